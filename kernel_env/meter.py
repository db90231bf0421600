"""What a kernel's processes use, read from /proc by the host: the ledger of a turn, and limits on the whole.

A limit that Linux holds for one process is the guest's to set (`guest/limits.py`); what several processes
take together is seen here, while a cell runs and, at longer intervals, in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import stat
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_env.config import Limits
from kernel_env.folder import WRITABLE, KernelFolder
from kernel_env.portal import run_in_thread
from kernel_env.types import Status

__all__ = ["LOOK_EVERY", "Breach", "Meter"]

log = logging.getLogger("kernel_env.meter")

LOOK_EVERY = 0.1
"""Seconds between two looks at a cell that runs."""
_LOOK_SHARE = 10  # looking takes at most a tenth of the time
_AT_REST_EVERY = 2.0
_COUNT_SHARE = 10  # counting in a thread, too
_COUNT_AT_LEAST_EVERY = 5.0  # however long it takes: a cell can make it long
_COUNT_OF_SHORT_CELLS = 5.0  # seconds after which files are counted though no cell ran long enough for a look
_COUNT_TIMEOUT = 60
_CELL_STARTS_WITHIN = 0.02  # of the clock that processes' starts are told by, and its ticks
_SHORT = 0.005  # seconds
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_NUMBERS = re.compile(rb"^(RssAnon|RssShmem|VmPTE|Threads|Pss_Anon|Pss_Shmem):\s+(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Breach:
    """A limit on all of a kernel's processes that they have gone over."""

    limit: str
    value: float
    maximum: float
    words: str
    status: Status = "error"
    is_fatal: bool = False
    """The kernel goes at once: an interrupt would leave it time to take more."""

    def __str__(self) -> str:
        value, maximum = (f"{n:,}" if isinstance(n, int) else f"{n:,.1f}" for n in (self.value, self.maximum))
        return f"{self.words.format(value)}, more than Limits.{self.limit} = {maximum}"


class _Count:
    """Something that takes too long for the loop: counted in a thread, at most every so many seconds."""

    def __init__(self, function: Callable[..., Any], every: float) -> None:
        self._function = function
        self._every = every
        self._work: asyncio.Future[Any] | None = None
        self._again = 0.0
        self.began = time.monotonic()
        """When the last one began."""

    def begin(self, *args: Any) -> None:
        """Count, unless it is being done, or was a moment ago."""
        if self._work is None and time.monotonic() >= self._again:
            self.began = time.monotonic()
            self._work = asyncio.ensure_future(run_in_thread(self._function, *args))

    def take(self) -> Any:
        """What was counted, once; None if there is nothing new."""
        if self._work is None or not self._work.done():
            return None
        work, self._work = self._work, None
        took = time.monotonic() - self.began
        self._again = time.monotonic() + min(max(self._every, _COUNT_SHARE * took), _COUNT_AT_LEAST_EVERY)
        return None if work.cancelled() else work.result()

    def close(self) -> None:
        if self._work is not None:
            self._work.cancel()


class Meter:
    """Reads what the processes of one kernel use; `roots` are those that all others descend from.

    Made on the loop that the kernel lives on; when it is closed it reads nothing any more.
    """

    def __init__(self, roots: tuple[int, ...], limits: Limits, folder: KernelFolder) -> None:
        self._pid, self._roots = roots[0], roots
        self._limits = limits
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._clock = (~self._pid << 3) | 2  # clock_getcpuclockid(3): of all threads of a process
        self._is_closed = self._is_at_rest = False
        self._at_rest: asyncio.TimerHandle | None = None
        self._clock_at_rest: float | None = None
        self._look_again = 0.0
        self._files_count, self._memory_count = _Count(_files_of, 1.0), _Count(_shared_memory, 0.2)
        self._files_before: tuple[int, int] | None = None  # when they were last counted
        self._files_since = math.inf
        self.note = ""
        """What is to be told of earlier cells."""
        self._entries: dict[str, int] = {}
        try:
            for name in ("status", "stat", "statm", "clear_refs"):
                flags = os.O_WRONLY if name == "clear_refs" else os.O_RDONLY
                self._entries[name] = os.open(f"/proc/{self._pid}/{name}", flags | os.O_CLOEXEC)
        except OSError as error:
            log.warning("what kernel %d uses cannot be read in full: %s", self._pid, error)
        self._cpu_of_waited_for = self._read_cpu_of_waited_for()
        self._has_others = False
        self.rebase(limits)

    def rebase(self, limits: Limits) -> None:
        """What the kernel has now is what it begins with; `limits` bound what is added."""
        self._limits = limits
        self._memory_at_start = _resident(self._status())
        self.begin()

    def close(self) -> None:
        self._is_closed = True
        if self._at_rest is not None:
            self._at_rest.cancel()
        self._files_count.close()
        self._memory_count.close()
        while self._entries:
            os.close(self._entries.popitem()[1])

    # A cell.

    def begin(self) -> None:
        """Count from here on."""
        self._started = self._cpu = self._cpu_of_kernel()
        if self._has_others:  # a short cell may have waited for one, and read nothing
            self._cpu_of_waited_for = self._read_cpu_of_waited_for()
        self._waited_for_before = self._cpu_of_waited_for
        self._since = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._clocks: dict[int, tuple[float, float]] = {}  # of other processes: at first and at last
        self._most_memory = 0
        self._most_processes = 1
        self._look_at_files()  # of before
        self._files_since = time.monotonic()
        with contextlib.suppress(OSError, KeyError):
            os.write(self._entries["clear_refs"], b"5")  # the peak is that of now

    def measure_cpu(self, *, wall: float = math.inf) -> float:
        """Processor seconds since the beginning, `wall` seconds ago.

        Of processes that ended between two looks, those are counted that were waited for.
        """
        self._cpu = max(self._cpu, self._cpu_of_kernel())  # one that has ended tells none
        own = self._cpu - self._started
        if wall < _SHORT and not self._clocks:  # less than a tick, in which those are told
            return own
        self._cpu_of_waited_for = self._read_cpu_of_waited_for()
        seen = sum(last - first for first, last in self._clocks.values())
        return own + max(seen, self._cpu_of_waited_for - self._waited_for_before)

    def peak_memory(self, *, wall: float = math.inf) -> int:
        """Bytes, the most at once since the beginning; of several processes as far as it was seen.

        Of a cell of a few milliseconds, which cannot take much, what there is at its end: the peak takes
        30 µs to read, a thirtieth of a step.
        """
        if wall < _SHORT:
            fields = self._read("statm").split(maxsplit=2)
            return int(fields[1]) * _PAGE if fields else 0
        _, _, found = self._read("status").partition(b"VmHWM:")
        return max(self._most_memory, int(found[:20].split()[0]) * 1024 if found else 0)

    @property
    def processes(self) -> int:
        """The most at once since the beginning, as far as they were seen."""
        return self._most_processes

    def look(self) -> Breach | None:
        """See what the kernel's processes use now, and whether that is too much."""
        begin = time.monotonic()
        if begin < self._look_again or self._is_closed:
            return None
        try:
            return self._look_at_processes() or self._look_at_files()
        finally:
            self._look_again = begin + _LOOK_SHARE * (time.monotonic() - begin)

    def _look_at_processes(self) -> Breach | None:
        others = self._others()
        self._has_others = bool(others)
        self._files_count.begin(self._folder.path, (self._pid, *others))
        self._most_processes = max(self._most_processes, 1 + len(others))
        status = self._status()
        memory, threads = _resident(status), status.get("Threads", 0)
        for pid in others:
            found = _numbers(f"/proc/{pid}/status")
            memory += _resident(found)
            threads += found.get("Threads", 0)
            self._see_clock(pid)
        limits = self._limits
        if threads > limits.processes:
            words = "it had {} processes and threads"
            return Breach("processes", threads, limits.processes, words, is_fatal=True)
        if (cpu := self.measure_cpu()) > limits.cell_cpu:
            return Breach("cell_cpu", cpu, limits.cell_cpu, "it took {} processor seconds", "timeout")
        return self._look_at_memory(memory, others)

    def _look_at_memory(self, memory: int, others: list[int]) -> Breach | None:
        if others:  # forked ones share most of it, and count it several times
            if memory > self._limits.memory_bytes + self._memory_at_start or len(others) < _LOOK_SHARE:
                self._memory_count.begin((self._pid, *others))
            memory = self._memory_count.take() or _resident(self._status())
        self._most_memory = max(self._most_memory, memory)
        added, allowed = memory - self._memory_at_start, self._limits.memory_bytes
        if added <= allowed:
            return None
        words = "it added {} bytes of memory"
        return Breach("memory_bytes", added, allowed, words, "out_of_memory", is_fatal=True)

    def _see_clock(self, pid: int) -> None:
        try:
            now = time.clock_gettime((~pid << 3) | 2)
            first = self._clocks[pid][0] if pid in self._clocks else now * self._is_older(pid)
        except (OSError, ValueError, IndexError):  # it has ended
            return
        self._clocks[pid] = first, now

    def _is_older(self, pid: int) -> bool:
        """Whether a process was there when the cell began: what it used before is not the cell's."""
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return int(fields[19]) / _TICK < self._since - _CELL_STARTS_WITHIN

    def _look_at_files(self) -> Breach | None:
        """See whether files were added, since they were last counted, to more than there may be."""
        if (used := self._files_count.take()) is None:
            return None
        # What is there at first was given, or is from an earlier process: a cell may go on to remove it.
        before, self._files_before = self._files_before or used, used
        limits, breach = self._limits, None
        if used[0] > max(limits.workdir_bytes, before[0]):
            breach = Breach("workdir_bytes", used[0], limits.workdir_bytes, "its files take {} bytes")
        elif used[1] > max(limits.workdir_files, before[1]):
            breach = Breach("workdir_files", used[1], limits.workdir_files, "it has {} files and folders")
        if breach is not None and self._files_count.began < self._files_since:
            self.note, breach = f"An earlier cell went over a limit: {breach}.", None
        return breach

    # Between cells.

    def rest(self, on_breach: Callable[[Breach], None]) -> None:
        """Go on looking, now and then, at what is left running; `on_breach` is called on the loop."""
        if self._is_closed or self._loop.is_closed():
            return
        self._is_at_rest = True
        self._clock_at_rest = None  # the first look is taken in any case
        self._files_since = math.inf  # and the first count is of what the cells have left
        if time.monotonic() - self._files_count.began > _COUNT_OF_SHORT_CELLS:
            self._files_count.begin(self._folder.path, (self._pid,))
        if self._at_rest is None:  # one timer for all cells: a new one for each is in every step
            self._at_rest = self._loop.call_later(_AT_REST_EVERY, self._look_at_rest, on_breach)

    def wake(self) -> None:
        """A cell begins."""
        self._is_at_rest = False

    def _look_at_rest(self, on_breach: Callable[[Breach], None]) -> None:
        self._at_rest = self._loop.call_later(_AT_REST_EVERY, self._look_at_rest, on_breach)
        if not self._is_at_rest:
            return
        clock, counted = self._cpu_of_kernel(), self._files_before
        if clock == 0.0:  # it has ended
            self._at_rest.cancel()
            return
        # One clock for most kernels: it stands still, and nothing descends from them.
        if clock != self._clock_at_rest or self._others():
            breach = self.look()
            if breach is not None:
                self._at_rest.cancel()
                on_breach(breach)
                return
        if self._files_before is not counted and self._files_since == math.inf:
            self._files_since = time.monotonic()
        self._clock_at_rest = clock

    # The readings.

    def _cpu_of_kernel(self) -> float:
        try:
            return time.clock_gettime(self._clock)
        except OSError:  # it has ended
            return 0.0

    def _read_cpu_of_waited_for(self) -> float:
        fields = self._read("stat").rpartition(b")")[2].split()
        return sum(map(int, fields[13:15])) / _TICK if fields else 0.0

    def _read(self, name: str) -> bytes:
        try:
            return os.pread(self._entries[name], 4096, 0)
        except (OSError, KeyError):
            return b""

    def _status(self) -> dict[str, int]:
        return _in(self._read("status"))

    def _others(self) -> list[int]:
        """What descends from the kernel, or has lost its parent there."""
        found: list[int] = []
        pending = list(self._roots)
        while pending:
            children = _children(pending.pop())
            found += children
            pending += children
        return [pid for pid in found if pid not in self._roots]


def _in(text: bytes) -> dict[str, int]:
    return {name.decode(): int(number) for name, number in _NUMBERS.findall(text)}


def _numbers(path: str) -> dict[str, int]:
    try:
        return _in(Path(path).read_bytes())
    except OSError:
        return {}


def _resident(status: dict[str, int]) -> int:
    return sum(status.get(name, 0) for name in ("RssAnon", "RssShmem", "VmPTE")) * 1024


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_bytes().split())
    return found


def _shared_memory(pids: Iterable[int]) -> int:
    """Bytes that processes have in memory, what several of them share counted once."""
    total = 0
    for pid in pids:
        numbers, status = _numbers(f"/proc/{pid}/smaps_rollup"), _numbers(f"/proc/{pid}/status")
        if numbers:
            total += (sum(numbers.values()) + status.get("VmPTE", 0)) * 1024
        else:  # a process may close its /proc entries to its user
            total += _resident(status)
    return total


def _files_of(folder: Path, pids: Iterable[int]) -> tuple[int, int] | None:
    """Bytes and number of the files that a kernel wrote, the deleted ones that it holds open among them.

    By du(1), which goes down any number of folders.
    """
    found = []
    for options in (["--block-size=1"], ["--inodes", "--count-links"]):
        command = ["du", "--summarize", "--total", "--one-file-system", *options, "--", *WRITABLE]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=False,
                timeout=_COUNT_TIMEOUT,
            )
            found.append(int(done.stdout.split()[-2]))
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            if folder.exists():  # else it was removed meanwhile
                log.warning("the files in %s could not be counted: %s", folder, error)
            return None
    deleted = {(file.st_dev, file.st_ino): file.st_blocks * 512 for pid in pids for file in _deleted(pid)}
    return found[0] + sum(deleted.values()), found[1]


def _deleted(pid: int) -> list[os.stat_result]:
    """Files without a name that a process holds open."""
    found = []
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/{pid}/fd/{fd}")
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                    found.append(status)
    return found
