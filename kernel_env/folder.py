"""A kernel's private folder: made, held, and removed with what still runs in it."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import re
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kernel_env.errors import KernelStartError, SandboxUnavailable
from kernel_env.isolation import is_own_user
from kernel_env.portal import run_in_thread
from kernel_env.removal import remove

__all__ = ["TEMPLATE_PREFIX", "WRITABLE", "KernelFolder", "give_to_owner", "sweep"]

log = logging.getLogger("kernel_env.folder")

_PREFIX = "ke-"
TEMPLATE_PREFIX = "kt-"
"""Of the folder of a process that kernels are forked from."""
# The longest socket name under a folder is "/run/k-5"; a Unix socket's path has at most 107 bytes.
_LONGEST = 107 - len("/run/k-5")
_SWEPT = re.compile(f"(new-)?({_PREFIX}|{TEMPLATE_PREFIX})[a-z0-9_]{{8}}")
"""Names that `mkdtemp` gives."""
WRITABLE = ("work", "home", "tmp", "run")
"""Folders in it that a kernel writes to; the rest of it is the host's."""
_CONTENTS = (*WRITABLE, "guest", "connection.json", "h", "stderr")
_MAKING_SECONDS = 60
_ROUNDS = 20

_PROFILE = Path(__file__).parent / "guest" / "profile.py"

_held_here: dict[KernelFolder, int] = {}
"""Folders → the process that holds them."""
_stuck: dict[Path, float] = {}
"""What was swept and is still there → when it is to be tried again, and not at every start."""
_AGAIN_AFTER = 600


@dataclass(frozen=True)
class KernelFolder:
    """The folder of one kernel (0700), held by this process until it is removed or this process is gone."""

    path: Path
    _lock: int
    _removing: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

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
            remove(made)
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
        """Kill what was started in the folder and still runs, then remove it as `removal.remove` does.

        `is_deserted`: nothing does, so that there is no need to look through all processes: 20 ms. Done
        again it does nothing.
        """
        with self._removing:  # an exit, which ends other threads, waits for the one that is at it
            if self not in _held_here:
                return
            try:
                if not is_deserted:
                    _evict(self.path)
                if os.path.islink(self.path):
                    remove(self.path)
                if (place := self._place) is not None:
                    remove(place)
            finally:
                del _held_here[self]
                os.close(self._lock)

    @property
    def _place(self) -> Path | None:
        """Where it is, for a cell of a kernel that is not confined may have moved it; None if nowhere."""
        for place in (self.path, Path(os.readlink(f"/proc/self/fd/{self._lock}"))):
            if _is_same(place, self._lock):
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
                remove(Path(entry.path))

    async def clear(self, *, keeps_work: bool, is_deserted: bool = False) -> None:
        """Remove it or, with `keeps_work`, empty it, off the loop; what fails is logged."""
        try:
            await run_in_thread(self.empty if keeps_work else self.remove, is_deserted=is_deserted)
        except (OSError, RuntimeError) as error:  # nothing can be read there, or no thread be started
            log.warning("%s could not be cleared: %s", self.path, error)

    def furnish(self) -> None:
        """Make what the next kernel needs in the emptied folder.

        Raises:
            KernelStartError: something is left of what the kernel before made there; it could lead elsewhere.
        """
        if self._place != self.path:
            raise KernelStartError(f"{self.path} could not be made fresh: a cell moved it")
        try:
            _furnish(self.path)
            with self.opened_work() as work:
                os.fchmod(work, stat.S_IRWXU)
        except OSError as error:
            raise KernelStartError(f"{self.path} could not be made fresh: {error}") from error


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
    config = profile / "ipython_kernel_config.py"
    with open(config, "x", encoding="utf-8") as file:
        file.write(_PROFILE.read_text("utf-8"))
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
            found = [Path(entry.path) for entry in entries if _SWEPT.fullmatch(entry.name)]
        for path in found:
            if _stuck.get(path, 0) <= time.monotonic():
                with contextlib.suppress(OSError):
                    _sweep(path)


def _sweep(path: Path) -> None:
    with _held(path) as lock:
        if not _is_abandoned(path, lock):
            return
        log.warning("removing %s, left by a process that was killed", path)
        _evict(path)
        remove(path)
        if os.path.lexists(path):
            _stuck[path] = time.monotonic() + _AGAIN_AFTER


def _is_abandoned(path: Path, folder: int) -> bool:
    """Whether a folder that nobody holds is one that `make` made: another's may have such a name."""
    status = os.fstat(folder)
    if not is_own_user(status.st_uid) or status.st_mode & 0o077 or not _is_same(path, folder):
        return False
    with os.scandir(folder) as entries:
        found = list(entries)
    if path.name.startswith("new-") or not found:  # it is held a moment after it is there
        return time.time() - status.st_mtime > _MAKING_SECONDS
    # Its holder may have been killed while it removed it: one of them is enough.
    return any(entry.name in _CONTENTS and not entry.is_symlink() for entry in found)


def _is_same(path: Path, folder: int) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.lstat(path), os.fstat(folder))
    return False


@contextlib.contextmanager
def _held(path: Path) -> Iterator[int]:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    finally:
        os.close(lock)


def _evict(folder: Path) -> None:
    for _ in range(_ROUNDS):  # again, for what one of them forked meanwhile
        inhabitants = list(_inhabitants(folder))
        for pid in inhabitants:
            with contextlib.suppress(OSError):
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
