"""A kernel's private folder: made, held, and removed with what still runs in it."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kernel_env.errors import KernelStartError, SandboxUnavailable
from kernel_env.isolation import is_own_user

__all__ = ["TEMPLATE_PREFIX", "WRITABLE", "KernelFolder", "give_to_owner", "sweep"]

log = logging.getLogger("kernel_env.folder")

_PREFIX = "ke-"
TEMPLATE_PREFIX = "kt-"
"""Of the folder of a process that kernels are forked from."""
# The longest socket name under a folder is "/run/k-5"; a Unix socket's path has at most 107 bytes.
_LONGEST = 107 - len("/run/k-5")
_UNFINISHED = (f"new-{_PREFIX}", f"new-{TEMPLATE_PREFIX}")
_SWEPT = (_PREFIX, TEMPLATE_PREFIX, *_UNFINISHED)
WRITABLE = ("work", "home", "tmp", "run")
"""Folders in it that a kernel writes to; the rest of it is the host's."""
_MAKING_SECONDS = 60
_ROUNDS = 20
_LEVELS = 30

_IPYTHON_CONFIG = {
    # History goes to a database file: 2.6 ms of a step, and locks on network file systems.
    "HistoryManager": {"enabled": False},
    "InteractiveShellApp": {"exec_PYTHONSTARTUP": False},
    "IPKernelApp": {"quiet": True},
}


_held_here: dict[KernelFolder, int] = {}
"""Folders → the process that holds them."""


@dataclass(frozen=True)
class KernelFolder:
    """The folder of one kernel (0700), held by this process until it is removed or this process is gone."""

    path: Path
    _lock: int

    @property
    def work(self) -> Path:
        """The kernel's working directory, which the kernel can do anything to."""
        return self.path / "work"

    @classmethod
    def make(
        cls, prefix: str = _PREFIX, *, owner: int | None = None, parent: str | None = None
    ) -> KernelFolder:
        """Make a folder with a path short enough for the kernel's sockets, for the user with the id `owner`.

        Raises:
            KernelStartError: there is no room, or no right, to make one.
        """
        parent = parent or _parent()
        try:
            return cls._make(parent, prefix, owner)
        except OSError as error:
            raise KernelStartError(
                f"no folder for a kernel could be made in {parent}: {error.strerror or error}; "
                "make room there, or set TMPDIR to another folder"
            ) from error

    @classmethod
    def _make(cls, parent: str, prefix: str, owner: int | None) -> KernelFolder:
        made = Path(tempfile.mkdtemp(prefix="new-" + prefix, dir=parent))
        lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Held before it has the name that others sweep. A lock on the folder itself ends with its
            # holder, however that ends, and holds between containers, where a process id says nothing.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if owner is not None:
                _give(made, owner)
            _furnish(made)
            folder = cls(made.rename(made.with_name(made.name.removeprefix("new-"))), lock)
            _held_here[folder] = os.getpid()
            return folder
        except BaseException:
            os.close(lock)
            _remove(made)
            raise

    @contextlib.contextmanager
    def opened_work(self) -> Iterator[int]:
        """A descriptor of the working directory, wherever a cell may have moved what is above it.

        Raises:
            OSError: it is gone, or something else is in its place.
        """
        fd = os.open("work", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._lock)
        try:
            yield fd
        finally:
            os.close(fd)

    @property
    def is_held(self) -> bool:
        """Whether it is still there."""
        return self in _held_here

    def remove(self, *, is_deserted: bool = False) -> None:
        """Kill what was started in the folder and still runs, then remove it, whatever its permissions.

        `is_deserted`: nothing does, so that there is no need to look through all processes: 20 ms. Done
        again it does nothing.
        """
        if _held_here.pop(self, None) is None:
            return
        if not is_deserted:
            _evict(self.path)
        if self.path.is_symlink():
            _remove(self.path)
        if (place := self._place) is not None:
            _remove(place)
        os.close(self._lock)

    @property
    def _place(self) -> Path | None:
        """Where it is, for a cell of a kernel that is not confined may have moved it; None if nowhere."""
        for place in (self.path, Path(os.readlink(f"/proc/self/fd/{self._lock}"))):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(place), os.fstat(self._lock)):
                    return place
        return None

    def empty(self, *, is_deserted: bool = False) -> None:
        """The same, but keep the folder and the working directory in it."""
        if not is_deserted:
            _evict(self.path)
        if self._place != self.path:
            return  # what is there instead is not the kernel's
        with contextlib.suppress(OSError):
            os.fchmod(self._lock, stat.S_IRWXU)
        for entry in list(os.scandir(self.path)):
            if entry.name != "work" or not entry.is_dir(follow_symlinks=False):
                _remove(Path(entry.path))

    def furnish(self) -> None:
        """Make what the next kernel needs in the emptied folder.

        Raises:
            KernelStartError: something is left of what the kernel before made there; it could lead elsewhere.
        """
        if self._place != self.path:
            raise KernelStartError(f"{self.path} could not be made fresh: a cell moved it")
        try:
            _furnish(self.path)
        except OSError as error:
            raise KernelStartError(f"{self.path} could not be made fresh: {error}") from error
        self.work.chmod(stat.S_IRWXU)


@atexit.register
def _remove_what_is_left() -> None:
    for folder, owner in list(_held_here.items()):
        if owner == os.getpid():
            folder.remove()


def _furnish(folder: Path) -> None:
    profile = folder / "home" / ".ipython" / "profile_default"
    made = [folder / name for name in (*WRITABLE, "guest") if name != "work"]
    for path in (*made, profile.parent, profile):
        path.mkdir()  # what is there already may be a link of a kernel's, to somewhere else
    if not (folder / "work").is_dir():
        (folder / "work").mkdir()
        made.append(folder / "work")
    config = profile / "ipython_kernel_config.json"
    with open(config, "x", encoding="utf-8") as file:
        json.dump(_IPYTHON_CONFIG, file)
    give_to_owner(folder, *made, profile.parent, profile, config)


def _give(folder: Path, owner: int) -> None:
    try:
        os.chown(folder, owner, owner)
    except OSError as error:
        raise SandboxUnavailable(
            f"user: {folder.parent} does not let folders be given to kernels' users: {error.strerror}"
        ) from error


def give_to_owner(folder: Path, *paths: Path) -> None:
    """Make what this process made in `folder` the property of the folder's owner, if that is another."""
    owner = os.stat(folder)
    if owner.st_uid != os.geteuid():
        for path in paths:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _parent() -> str:
    parent = tempfile.gettempdir()
    return parent if len(os.fsencode(parent)) + len("/ke-xxxxxxxx") <= _LONGEST else "/tmp"


def sweep() -> None:
    """Remove the folders of this user whose holder is gone: killed, it could not do so itself."""
    for parent in {tempfile.gettempdir(), _parent()}:
        found = []
        with contextlib.suppress(OSError), os.scandir(parent) as entries:
            found = [entry.path for entry in entries if entry.name.startswith(_SWEPT)]
        for path in found:
            with contextlib.suppress(OSError), _held(path):
                if is_own_user(os.stat(path).st_uid) and _is_abandoned(path):
                    log.warning("removing %s, left by a process that was killed", path)
                    _evict(Path(path))
                    _remove(Path(path))


def _is_abandoned(path: str) -> bool:
    if os.path.basename(path).startswith(_UNFINISHED):  # it is held a moment after it is there
        return time.time() - os.stat(path).st_mtime > _MAKING_SECONDS
    # Only what `make` made: somebody else's folder may begin with the same letters.
    return os.path.isdir(f"{path}/guest")


@contextlib.contextmanager
def _held(path: str) -> Iterator[None]:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _evict(folder: Path) -> None:
    for _ in range(_ROUNDS):  # again, for what one of them forked meanwhile
        inhabitants = list(_inhabitants(folder))
        for pid in inhabitants:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not inhabitants:
            return


def _inhabitants(folder: Path) -> Iterator[int]:
    """Processes that a kernel in `folder` started, known by the home they inherited.

    One that was given another environment is not found; that takes a sandbox.
    """
    home = f"HOME={folder}/home".encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as file:
            if home in file.read().split(b"\0"):
                yield int(entry)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a cell may have taken its own folders' permissions away
        if folder.is_symlink() or not folder.is_dir():
            folder.unlink()
        elif not _is_deep(str(folder), _LEVELS):  # of each, `rmtree` holds a descriptor and a stack frame
            shutil.rmtree(folder)
    if not os.path.lexists(folder):
        return
    if not folder.is_symlink():  # `chmod` would follow it
        subprocess.run(["chmod", "-R", "u+rwx", "--", folder], check=False, stderr=subprocess.DEVNULL)
    done = subprocess.run(["rm", "-rf", "--", folder], check=False, stderr=subprocess.PIPE)
    if os.path.lexists(folder):
        told = done.stderr[:500].decode(errors="replace")
        log.warning("the kernel's folder %s could not be removed: %s", folder, told)


def _is_deep(folder: str, levels: int) -> bool:
    """Whether there are folders in folders over more than so many levels."""
    with os.scandir(folder) as entries:
        inner = (entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
        return any(levels == 0 or _is_deep(path, levels - 1) for path in inner)
