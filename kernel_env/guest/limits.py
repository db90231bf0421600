"""The limits that a kernel sets on itself before model code runs; without rights it can only lower them.

Runs inside the kernel, on the standard library alone.
"""

from __future__ import annotations

import contextlib
from resource import (
    RLIM_INFINITY,
    RLIMIT_CORE,
    RLIMIT_DATA,
    RLIMIT_FSIZE,
    RLIMIT_MSGQUEUE,
    RLIMIT_NOFILE,
    RLIMIT_NPROC,
    RLIMIT_SIGPENDING,
)
from resource import getrlimit as get_limit
from resource import setrlimit as set_limit
from typing import Any

HEADROOM = 64 * 2**20
"""Bytes above the limit on memory for what tells of a MemoryError."""
# No core files; and little of what Linux counts for all processes of a user.
FIXED = {RLIMIT_CORE: 0, RLIMIT_SIGPENDING: 1024, RLIMIT_MSGQUEUE: 0}
SIMPLE = {"open_files": RLIMIT_NOFILE, "file_bytes": RLIMIT_FSIZE, "processes": RLIMIT_NPROC}

TO_RUN = 8 * 2**20
"""Bytes that a cell needs to run at all."""

_is_released = False
_data: tuple[int, int] | None = None
_memory_bytes = 0


def install(limits: dict[str, Any]) -> None:
    """Set the limits; a second time it does nothing, for what the cells have taken is in use by then."""
    global _data, _memory_bytes
    if _data is not None:
        return
    for which, value in FIXED.items():
        _lower(which, value, value)
    for name, which in SIMPLE.items():
        if name in limits:
            _lower(which, limits[name], limits[name])
    _memory_bytes = limits["memory_bytes"]
    allowed = data_bytes() + _memory_bytes
    _data = _lower(RLIMIT_DATA, allowed, allowed + HEADROOM)


def _lower(which: int, soft: int, hard: int) -> tuple[int, int]:
    ceiling = get_limit(which)[1]
    if ceiling != RLIM_INFINITY:  # the host's own limits hold as well
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    set_limit(which, (soft, hard))
    return soft, hard


def data_bytes() -> int:
    """What RLIMIT_DATA counts: private memory that can be written to, whether it is in use or not."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))


def before_cell() -> None:
    """Hold back the memory that tells of its end."""
    global _is_released
    if _data is not None and _is_released:
        with contextlib.suppress(OSError):  # no descriptor is left: then this cell has the rest, too
            # What is there stays in use; the cell that gives it back needs a little to run.
            _set_soft(max(_data[0], data_bytes() + TO_RUN))
            _is_released = False


def release() -> None:
    """Give it away: a cell has failed, and that is to be told."""
    global _is_released
    if _data is not None:
        _set_soft(_data[1])
        _is_released = True


def _set_soft(wanted: int) -> None:
    hard = get_limit(RLIMIT_DATA)[1]  # a cell may have lowered it
    with contextlib.suppress(OSError, ValueError):
        set_limit(RLIMIT_DATA, (wanted if hard == RLIM_INFINITY else min(wanted, hard), hard))


def note() -> str:
    """What to say of a MemoryError."""
    return f"Limits.memory_bytes = {_memory_bytes:,} bounds the memory that the cells of a kernel add."
