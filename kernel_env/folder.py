"""A kernel's private folder: made, held, and removed with what still runs in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_env.errors import KernelStartError

__all__ = ["TEMPLATE_PREFIX", "KernelFolder", "sweep"]

log = logging.getLogger("kernel_env.folder")

_PREFIX = "ke-"
TEMPLATE_PREFIX = "kt-"
"""Of the folder of a process that kernels are forked from."""
# The longest socket name under a folder is "/k-5"; a Unix socket's path has at most 107 bytes.
_LONGEST = 107 - len("/k-5")
_ROUNDS = 20

_IPYTHON_CONFIG = {
    # History goes to a database file: 2.6 ms of a step, and locks on network file systems.
    "HistoryManager": {"enabled": False},
    "InteractiveShellApp": {"exec_PYTHONSTARTUP": False},
    "IPKernelApp": {"quiet": True},
}


@dataclass(frozen=True)
class KernelFolder:
    """The folder of one kernel (0700), held by this process until it is removed or this process is gone."""

    path: Path
    _lock: int

    @classmethod
    def make(cls, prefix: str = _PREFIX) -> KernelFolder:
        """Make a folder with a path short enough for the kernel's sockets.

        Raises:
            KernelStartError: there is no room, or no right, to make one.
        """
        parent = _parent()
        try:
            return cls._make(parent, prefix)
        except OSError as error:
            raise KernelStartError(
                f"no folder for a kernel could be made in {parent}: {error.strerror or error}; "
                "make room there, or set TMPDIR to another folder"
            ) from error

    @classmethod
    def _make(cls, parent: str, prefix: str) -> KernelFolder:
        made = Path(tempfile.mkdtemp(prefix="new-" + prefix, dir=parent))
        lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Held before it has the name that others sweep. A lock on the folder itself ends with its
            # holder, however that ends, and holds between containers, where a process id says nothing.
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in ("work", "home", "tmp", "guest"):
                (made / name).mkdir()
            profile = made / "ipython" / "profile_default"
            profile.mkdir(parents=True)
            (profile / "ipython_kernel_config.json").write_text(json.dumps(_IPYTHON_CONFIG))
            return cls(made.rename(made.with_name(made.name.removeprefix("new-"))), lock)
        except BaseException:
            os.close(lock)
            _remove(made)
            raise

    def remove(self, *, is_deserted: bool = False) -> None:
        """Kill what was started in the folder and still runs, then remove it, whatever its permissions.

        `is_deserted`: nothing does, so that there is no need to look through all processes: 20 ms.
        """
        if is_deserted:
            _remove(self.path)
        else:
            _clear(self.path)
        os.close(self._lock)


def _parent() -> str:
    parent = tempfile.gettempdir()
    return parent if len(os.fsencode(parent)) + len("/ke-xxxxxxxx") <= _LONGEST else "/tmp"


def sweep() -> None:
    """Remove the folders of this user whose holder is gone: killed, it could not do so itself."""
    for parent in {tempfile.gettempdir(), _parent()}:
        found = []
        with contextlib.suppress(OSError), os.scandir(parent) as entries:
            found = [entry.path for entry in entries if entry.name.startswith((_PREFIX, TEMPLATE_PREFIX))]
        for path in found:
            with contextlib.suppress(OSError), _held(path):
                # Only what `make` made: somebody else's folder may begin with the same letters.
                if os.stat(path).st_uid == os.getuid() and os.path.isdir(f"{path}/guest"):
                    log.warning("removing %s, left by a process that was killed", path)
                    _clear(Path(path))


@contextlib.contextmanager
def _held(path: str) -> Iterator[None]:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    for _ in range(_ROUNDS):  # again, for what one of them forked meanwhile
        inhabitants = list(_inhabitants(folder))
        for pid in inhabitants:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not inhabitants:
            break
    _remove(folder)


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
    def make_removable(function: Any, path: str, _: Any) -> None:
        # A cell may have taken its own folders' permissions away.
        os.chmod(os.path.dirname(path), stat.S_IRWXU)
        if os.path.isdir(path) and not os.path.islink(path):
            os.chmod(path, stat.S_IRWXU)
            shutil.rmtree(path, ignore_errors=True)
        elif os.path.lexists(path):
            os.unlink(path)

    try:
        shutil.rmtree(folder, onerror=make_removable)
    except FileNotFoundError:
        return  # somebody removed it with what is around it
    except OSError as error:
        log.warning("the kernel's folder %s could not be removed: %s", folder, error)
