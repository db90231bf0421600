"""Puts back, after every cell, the parts of the kernel that a cell can break; carries interrupts to it.

Runs inside the kernel, on the standard library and IPython alone.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import fcntl
import os
import signal
import sys
from asyncio import events
from collections.abc import Iterator
from typing import Any

TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


class TookTooLong(BaseException):
    """Raised in code of the cell's that the report has no more time for."""


class Guard:
    """What a kernel needs to run the next cell, as it was before the first."""

    def __init__(self, shell: Any, streams: tuple[Any, Any]) -> None:
        self._shell = shell
        self._streams = streams
        self._namespace = shell.user_ns
        passing = shell.builtin_trap.auto_builtins  # there while a cell runs
        self._builtins = {name: value for name, value in vars(builtins).items() if name not in passing}
        self._recursion_limit = sys.getrecursionlimit()
        self._timers: dict[int, tuple[float, float]] = {}
        # IPython 9 keeps a copy of all that is written, for a magic that exports it; it grows without bound
        # and is half the cost of a print. The copying that is under way for this request is undone later.
        shell._tee = lambda channel: contextlib.nullcontext()

    def before_cell(self) -> None:
        """Let interrupts through, and let the timers of earlier cells go on."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for stream in self._streams:
            vars(stream).pop("write", None)
        for which, (seconds, interval) in self._timers.items():
            signal.setitimer(which, seconds, interval)
        self._timers.clear()

    def after_cell(self) -> list[str]:
        """Put back what the cell broke and name it; from here on no interrupt and no timer strikes."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ipykernel puts its own back before the next request
        broken: list[str] = []
        if sys.getrecursionlimit() < self._recursion_limit:
            sys.setrecursionlimit(self._recursion_limit)
            broken.append("the recursion limit")
        for which in TIMERS:
            if signal.getitimer(which)[0]:
                # A handler that raises in ipykernel's own code would cost a reply: timers stand between cells.
                self._timers[which] = signal.setitimer(which, 0)
        broken += self._restore_streams()
        if self._shell.user_ns is not self._namespace:
            self._shell.user_ns = self._namespace
            broken.append("the namespace")
        present = vars(builtins)
        for name, value in self._builtins.items():
            # One that can still be called may have been replaced on purpose.
            if present.get(name) is not value and callable(value) and not callable(present.get(name)):
                present[name] = value
                broken.append(f"builtins.{name}")
        return broken

    def end_cell(self) -> None:
        """Publish the last of what the cell wrote."""
        for stream in self._streams:
            if hasattr(stream, "end_cell"):
                stream.end_cell()

    def flush(self) -> None:
        """Publish what stands in the streams' buffers."""
        for stream in self._streams:
            stream.flush()

    def _restore_streams(self) -> list[str]:
        broken = []
        for name, stream in zip(("stdout", "stderr"), self._streams):  # noqa: B905 - Python 3.9
            if getattr(sys, name, None) is not stream:
                setattr(sys, name, stream)
                broken.append(f"sys.{name}")
            if vars(stream).pop("write", None) is not None:
                broken.append(f"sys.{name}.write")
            if hasattr(stream, "restore_fd") and stream.restore_fd():
                broken.append(f"file descriptor {stream.fileno()}")
        return broken

    @contextlib.contextmanager
    def cell_code(self) -> Iterator[None]:
        """Run code of the cell's after the cell: an interrupt reaches it."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    @contextlib.contextmanager
    def cell_code_for(self, seconds: float) -> Iterator[None]:
        """The same, silent, and raise TookTooLong in it after `seconds`."""

        def stop(*_: Any) -> None:
            raise TookTooLong

        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        self._mute(True)
        try:
            with self.cell_code():
                yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if previous is None else previous)
            self._mute(False)

    def _mute(self, muted: bool) -> None:
        for stream in self._streams:
            if hasattr(stream, "mute"):
                stream.mute(muted)

    @contextlib.contextmanager
    def cancel_on_sigint(self, cell: Any) -> Iterator[None]:
        """Interrupt a cell with top-level `await`, wherever it is; in place of ipykernel's method.

        ipykernel only schedules a cancellation from its handler, which wakes no loop that waits and
        reaches no code that spins (ipykernel issue 881).
        """
        loop = asyncio.get_running_loop()
        run_code = type(self._shell).run_code.__code__

        def on_sigint(_: int, frame: Any) -> None:
            codes = _codes_of_callback(frame)
            if asyncio.current_task(loop) is cell and run_code in codes:
                raise KeyboardInterrupt  # in the cell's own code, where IPython expects it
            loop.call_soon_threadsafe(cell.cancel)
            if codes:
                # Another task or a callback spins: a KeyboardInterrupt from there would end the loop.
                raise asyncio.CancelledError

        previous = signal.signal(signal.SIGINT, on_sigint)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _codes_of_callback(frame: Any) -> list[Any]:
    """The code objects that run in the loop's present callback, innermost first; none while it waits."""
    codes = []
    callback = events.Handle._run.__code__
    while frame is not None:
        if frame.f_code is callback:
            return codes
        codes.append(frame.f_code)
        frame = frame.f_back
    return []


def die_with(connection: Any) -> None:
    """Have the kernel killed when the peer of `connection` is gone, whatever code runs and holds the GIL.

    Linux sends the signal of F_SETSIG to the owner of a socket in O_ASYNC mode (fcntl(2)); the peer must
    never write.
    """
    fd = connection.fileno()
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, getattr(fcntl, "F_SETSIG", 10), int(signal.SIGKILL))
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
