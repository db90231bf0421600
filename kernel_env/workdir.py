"""What goes into an episode's working directory, and what comes out; a cell may have done anything to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from kernel_env.errors import ArtifactError, ConfigError, KernelStartError, LimitExceeded
from kernel_env.folder import KernelFolder, give_to_owner

__all__ = ["ARTIFACT_BYTES", "Artifact", "check_files", "copy_in", "list_artifacts", "read_artifact"]

ARTIFACT_BYTES = 64 * 2**20
"""What `read_artifact` reads unless it is told otherwise."""
_MOST = 10_000
_MOST_SEEN = 100_000
_DEEPEST = 32
_CHUNK = 2**20
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A FIFO that nobody writes to must not block, nor a terminal become this process's.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


@dataclass(frozen=True)
class Artifact:
    """A regular file in the working directory."""

    name: str
    """Relative to the working directory, with `/` between its parts."""
    size: int
    """Bytes."""
    modified: float
    """Seconds since the epoch."""


def check_files(files: Any, limit: int) -> None:
    """Raise ConfigError for what cannot be copied: `files` maps names to bytes or paths of regular files."""
    if not isinstance(files, Mapping):
        raise ConfigError(f"files = {files!r}; give a mapping of names to bytes or paths")
    total = 0
    for name, source in files.items():
        if not isinstance(name, str) or _parts(name) is None:
            raise ConfigError(
                f"files[{name!r}]: a name is relative to the working directory, like 'data/a.csv'"
            )
        if isinstance(source, bytes):
            total += len(source)
            continue
        if not isinstance(source, str | os.PathLike):
            raise ConfigError(f"files[{name!r}] = {source!r}; give bytes or a path")
        try:
            found = os.stat(source)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"files[{name!r}]: {os.fspath(source)!r} cannot be read: {reason}") from error
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"files[{name!r}]: {os.fspath(source)!r} is no regular file")
        total += found.st_size
    if total > limit:
        raise ConfigError(f"files hold {total} bytes, more than Limits.files_bytes = {limit}")


def copy_in(files: Mapping[str, Any], folder: KernelFolder) -> None:
    """Write `files` into the working directory, before a cell has run there.

    Raises:
        KernelStartError: one could not be read or written.
    """
    for name, source in files.items():
        place = folder.work / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                place.write_bytes(source)
            else:
                shutil.copyfile(source, place)
            inner = PurePosixPath(name)
            give_to_owner(folder.work, *(folder.work / path for path in (inner, *list(inner.parents)[:-1])))
        except OSError as error:
            raise KernelStartError(
                f"files[{name!r}] could not be copied to {place}: {error.strerror or error}"
            ) from error


def list_artifacts(folder: KernelFolder) -> list[Artifact]:
    """The regular files in the working directory and in folders of it, sorted by name.

    At most 10,000, of the first 100,000 entries or so, not from folders more than 32 deep; nothing that is a
    link, or behind one.
    """
    found: list[Artifact] = []
    folders: list[tuple[str, ...]] = [()]
    seen = 0
    while folders and len(found) < _MOST and seen < _MOST_SEEN:
        parts = folders.pop()
        with contextlib.suppress(OSError), _opened(folder, parts) as inner, os.scandir(inner) as entries:
            for entry in entries:
                seen += 1
                try:
                    status = os.stat(entry.name, dir_fd=inner, follow_symlinks=False)
                except FileNotFoundError:
                    continue  # it was there a moment ago
                if stat.S_ISDIR(status.st_mode) and len(parts) < _DEEPEST:
                    folders.append((*parts, entry.name))
                elif stat.S_ISREG(status.st_mode) and len(found) < _MOST:
                    found.append(Artifact("/".join((*parts, entry.name)), status.st_size, status.st_mtime))
    return sorted(found, key=lambda artifact: artifact.name)


def read_artifact(folder: KernelFolder, name: str, max_bytes: int) -> bytes:
    """The content of a regular file in the working directory; no link is followed on the way.

    Raises:
        ArtifactError: there is no such file.
        LimitExceeded: it has more than `max_bytes`; nothing of it is given.
    """
    parts = _parts(name) if isinstance(name, str) else None
    if parts is None:
        raise ArtifactError(f"read_artifact({name!r}): give a name as in `artifacts()`")
    try:
        with _opened(folder, parts[:-1]) as inner:
            _check_regular(os.stat(parts[-1], dir_fd=inner, follow_symlinks=False))
            file = os.open(parts[-1], _OPEN_FILE, dir_fd=inner)
        try:
            _check_regular(os.fstat(file))  # it may have been replaced
            content = _read(file, max_bytes)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"there is no file {name!r} in the working directory: {reason}") from None
    return content


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")


def _read(file: int, max_bytes: int) -> bytes:
    content = bytearray()
    while chunk := os.read(file, min(_CHUNK, max_bytes + 1 - len(content))):
        content += chunk
    if len(content) > max_bytes:
        raise LimitExceeded("max_bytes", max(os.fstat(file).st_size, len(content)), max_bytes)
    return bytes(content)


def _parts(name: str) -> tuple[str, ...] | None:
    """The parts of a relative name that stays where it begins."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
        return None
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return None
    return path.parts


@contextlib.contextmanager
def _opened(folder: KernelFolder, parts: tuple[str, ...]) -> Iterator[int]:
    """A descriptor of a folder in the working directory, reached without following a link."""
    with contextlib.ExitStack() as stack:
        inner = stack.enter_context(folder.opened_work())
        for part in parts:
            inner = os.open(part, _OPEN_FOLDER, dir_fd=inner)
            stack.callback(os.close, inner)
        yield inner
