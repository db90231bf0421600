"""Removing a folder that a cell may have done anything to."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import subprocess
from pathlib import Path

__all__ = ["remove"]

log = logging.getLogger("kernel_env.removal")

_LEVELS = 30
_SECONDS = 120
# By their names, from the folders they are in: a path may be longer than the system takes.
_UNLOCK = ("-type", "d", "!", "-perm", "-u=rwx", "-execdir", "chmod", "u+rwx", "{}", ";")


def remove(path: Path) -> None:
    """Remove a folder, or what stands in its place, whatever its permissions and depth.

    Nothing outside is changed: no link is followed, files keep their permissions, which hard links share,
    and what is mounted in the folder is unmounted first. What cannot be removed stays, and is logged.
    """
    try:
        mounted = _mounts(path)
        for point in reversed(mounted):
            _run("umount", "--lazy", "--", point)
        if mounted and (left := _mounts(path)):
            log.warning("%s is not removed, for %s is mounted in it", path, left[0])
            return
        with contextlib.suppress(OSError, RecursionError):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            elif _unlock(str(path), _LEVELS):
                shutil.rmtree(path)
        # These two go down any number of folders, of each of which `rmtree` holds a descriptor.
        remove_all = ("rm", "-rf", "--", str(path))
        for command in (remove_all, ("find", str(path), *_UNLOCK), remove_all):
            if not os.path.lexists(path):
                return
            _run(*command)
        if os.path.lexists(path):
            log.warning("%s could not be removed", path)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s could not be removed: %s", path, error)


def _unlock(folder: str, levels: int) -> bool:
    """Let this user empty the folders down to so many levels; whether there are no deeper ones."""
    if os.lstat(folder).st_mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(folder, stat.S_IRWXU)
    with os.scandir(folder) as entries:
        inner = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    return all(levels > 0 and _unlock(path, levels - 1) for path in inner)


def _mounts(folder: Path) -> list[str]:
    """What is mounted in a folder, in the order in which it was mounted."""
    inside = f"{os.path.realpath(folder.parent)}/{folder.name}/"
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    points = [line.split()[4].decode("unicode-escape").encode("latin-1") for line in lines]
    return [point for point in map(os.fsdecode, points) if point.startswith(inside)]


def _run(*command: str) -> None:
    # In a process group of its own, so that Ctrl-C in a terminal does not end it. `find -execdir` takes no
    # PATH with folders that depend on where it is.
    folders = os.pathsep.join(filter(os.path.isabs, os.get_exec_path()))
    subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=_SECONDS,
        process_group=0,
        env={"PATH": folders},
    )
