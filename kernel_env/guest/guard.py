"""Puts back, after every cell, the parts of the kernel that a cell can break; carries interrupts to it.

Runs inside the kernel, on the standard library, IPython and pyzmq alone.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import fcntl
import functools
import json
import operator
import os
import select
import signal
import sys
import threading
import time
from _signal import getitimer as get_timer  # type: ignore[import-not-found]
from _signal import pthread_sigmask  # past `signal`, which makes enumerations of what goes in and comes out
from _signal import setitimer as set_timer
from _signal import signal as set_signal
from _thread import start_new_thread  # `threading` waits for locks that the interrupted code may hold
from asyncio import events
from collections.abc import Iterator
from os import getpid, kill
from time import sleep
from typing import Any

import zmq

TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
# What ipykernel calls on the way to a reply; of the 200 functions of `os`, those it can come to.
MODULES = (builtins, threading, json, time, signal, os)
OF_OS = (
    *("_exit", "close", "dup2", "fsdecode", "fsencode", "fspath", "fstat", "getcwd", "getpid", "kill"),
    *("lstat", "open", "pipe", "read", "scandir", "stat", "urandom", "write"),
)
PROBE_SECONDS = 1.0
AGAIN_SECONDS = 0.005  # from an interrupt that was dropped to the next
TOO_LONG_SECONDS = 0.05  # from one TookTooLong to the next
SHOW_UNRAISABLE = sys.__unraisablehook__
OUR_FILES = ("_kernel_env_guard", "_kernel_env_streams")
OURS = frozenset({"input"})  # ipykernel's own while a cell runs
SOCKET_METHODS = ("send", "recv", "send_multipart", "recv_multipart")
SHELL = (
    *("user_ns", "user_module", "payload_manager", "displayhook", "display_pub", "display_formatter"),
    *("events", "history_manager", "input_transformer_manager", "compile", "kernel"),
)


class TookTooLong(BaseException):
    """Raised in code of the cell's that the report has no more time for."""


class Interrupt(KeyboardInterrupt):
    """What a signal handler raises: KeyboardInterrupt that tells when Python has dropped it.

    A garbage collection may be most of what a cell does, and what it calls has nobody to raise to: of an
    error in a `__del__` or in the callback of a weak reference it tells `sys.unraisablehook`; of one that
    strikes while it makes the text of a ResourceWarning (`unclosed file`), nobody. Then this is deleted
    before it has come to code of the cell's: `__traceback__` begins where it has come to (before Python 3.12,
    where it was caught).
    """

    def __init__(self, when_dropped: Any = None) -> None:
        super().__init__()
        self.when_dropped = when_dropped

    def __del__(self) -> None:
        trace = self.__traceback__
        if self.when_dropped is not None and (trace is None or _is_ours(trace)):
            self.when_dropped()

    def __reduce__(self) -> Any:
        return KeyboardInterrupt, ()


Interrupt.__name__ = Interrupt.__qualname__ = "KeyboardInterrupt"
Interrupt.__module__ = "builtins"


class Guard:
    """What a kernel needs to run the next cell, as it was before the first."""

    def __init__(self, shell: Any, streams: tuple[Any, Any]) -> None:
        self.is_interruptible = False
        """Whether code of the cell's runs: elsewhere an interrupt would cost the reply."""
        self._missed: Any = None
        self._stretch = 0
        """Counts how often cells have begun and ended."""
        self._own_hook = self._on_unraisable
        self._hook = SHOW_UNRAISABLE
        """The one that stands there, except from an interrupt to the end of its cell."""
        self._has_deadline = False
        self.own_code: frozenset[Any] = frozenset()
        """The code that sets this, and the handler's: it comes to its end when a second interrupt comes."""
        self._shell = shell
        self.streams = streams
        self._shell_parts = {name: getattr(shell, name) for name in SHELL}
        self._transformers = list(shell.input_transformers_post)
        # The way that the kernel runs its cells: not every kernel needs `run_cell`.
        self._probe = getattr(
            shell.kernel, "run_plain_cell", lambda code: shell.run_cell(code, store_history=False)
        )
        self._modules = dict(sys.modules)
        self._environ = os.environ
        self._recursion_limit = sys.getrecursionlimit()
        passing = shell.builtin_trap.auto_builtins  # there while a cell runs
        self._functions = []
        for module in MODULES:
            wanted = OF_OS if module is os else vars(module)
            found = {n: getattr(module, n) for n in wanted if callable(getattr(module, n, None))}
            names = tuple(name for name in found if name not in passing)
            values = tuple(found[name] for name in names)
            self._functions.append(
                (module.__name__, vars(module), names, values, operator.itemgetter(*names))
            )
        self._socket_methods = {name: vars(zmq.Socket).get(name) for name in SOCKET_METHODS}
        # IPython 9 keeps a copy of all that is written, for a magic that exports it; it grows without bound
        # and is half the cost of a print. The copying that is under way for this request is undone later.
        shell._tee = lambda channel: contextlib.nullcontext()

    def before_cell(self) -> None:
        """Let interrupts through, when the cell's code runs."""
        self._begin_stretch()
        set_signal(signal.SIGINT, self._on_sigint)
        pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
        for stream in self.streams:
            vars(stream).pop("write", None)

    def _begin_stretch(self) -> None:
        self._stretch += 1
        if vars(sys).get("unraisablehook") is self._own_hook:
            sys.unraisablehook = self._hook

    def _on_sigint(self, _: int, frame: Any) -> None:
        if not self.is_interruptible:
            self._missed = self._request()
        elif frame.f_code in DROPPING:
            self._repeat_interrupt(self._stretch)
        elif frame.f_code not in self.own_code and not self._is_in_stream(frame):
            self._hear_of_drops()
            raise self._interrupt()

    def _interrupt(self) -> Interrupt:
        return Interrupt(functools.partial(self._repeat_interrupt, self._stretch))

    def _hear_of_drops(self) -> None:
        # Not before an interrupt: Python's own hook is C code, in which no signal handler strikes.
        hook = vars(sys).get("unraisablehook", SHOW_UNRAISABLE)
        if hook is not self._own_hook:
            self._hook, sys.unraisablehook = hook, self._own_hook

    def _on_unraisable(self, told: Any) -> None:
        if told.exc_type not in RAISED or not _is_ours(_origin(told.exc_traceback)):
            self._hook(told)
            return
        if told.exc_type is Interrupt:
            told.exc_value.when_dropped = None
        self._repeat_interrupt(self._stretch)

    def _repeat_interrupt(self, stretch: int) -> None:
        if stretch == self._stretch:
            with contextlib.suppress(RuntimeError, MemoryError):
                start_new_thread(self._send_interrupt, (stretch,))

    def _send_interrupt(self, stretch: int) -> None:
        sleep(AGAIN_SECONDS)
        if stretch == self._stretch and self.is_interruptible:
            kill(getpid(), signal.SIGINT)

    def _request(self) -> Any:
        with contextlib.suppress(Exception):
            return self._shell.kernel.get_parent()["header"]["msg_id"]

    def take_missed(self) -> None:
        """Raise the interrupt that came between the beginning of this request and that of its code."""
        missed, self._missed = self._missed, None
        if missed is not None and missed == self._request():
            raise KeyboardInterrupt

    def _is_in_stream(self, frame: Any) -> bool:
        return any(hasattr(s, "postpones_interrupt") and s.postpones_interrupt(frame) for s in self.streams)

    def after_cell(self, *, has_failed: bool) -> list[str]:
        """Put back what the cell broke and name it; from here on no timer strikes.

        A function that was replaced by another stays, unless the kernel `has_failed` to run the cell.
        """
        self._begin_stretch()
        broken = self.restore_functions(even_callable=has_failed)
        set_signal(signal.SIGINT, self._on_sigint)  # the cell's own must not run in what follows
        if sys.getrecursionlimit() < self._recursion_limit:
            sys.setrecursionlimit(self._recursion_limit)
            broken.append("the recursion limit")
        for which in TIMERS:
            if get_timer(which)[0]:
                set_timer(which, 0)  # its handler would run in ipykernel's own code, and in every later cell
                broken.append("a timer")
        broken += self._restore_streams()
        broken += self._restore_shell()
        broken += self._restore_sockets()
        loop = asyncio.get_running_loop()
        if getattr(loop, "_stopping", False):  # the process would end with its loop
            loop._stopping = False  # type: ignore[attr-defined]
            broken.append("the event loop")
        return broken

    def restore_functions(self, *, even_callable: bool) -> list[str]:
        """Put back builtins and functions of the standard library that a cell has made unusable."""
        broken = []
        for module, present, names, values, present_values in self._functions:
            with contextlib.suppress(KeyError):
                if all(map(operator.is_, present_values(present), values)):
                    continue
            for name, value in zip(names, values):  # noqa: B905 - Python 3.9
                now = present.get(name)
                # One that can still be called may have been replaced on purpose.
                if now is not value and (even_callable or not callable(now)) and name not in OURS:
                    present[name] = value
                    broken.append(f"{module}.{name}")
        if os.environ is not self._environ:
            os.environ = self._environ  # noqa: B003 - the very object that was there
            broken.append("os.environ")
        if "builtins" not in sys.modules:
            sys.modules.update({n: m for n, m in self._modules.items() if n not in sys.modules})
            broken.append("sys.modules")
        return broken

    def _restore_sockets(self) -> list[str]:
        broken = []
        for name, method in self._socket_methods.items():
            if vars(zmq.Socket).get(name) is not method:
                if method is None:  # its base class has it
                    delattr(zmq.Socket, name)
                else:
                    setattr(zmq.Socket, name, method)
                broken.append(f"zmq.Socket.{name}")
        return broken

    def _restore_shell(self) -> list[str]:
        broken = []
        for name, value in self._shell_parts.items():
            if getattr(self._shell, name, None) is not value:
                setattr(self._shell, name, value)
                broken.append(f"get_ipython().{name}")
        if self._shell.input_transformers_post != self._transformers:
            try:
                with self.within(PROBE_SECONDS):
                    self._shell.transform_cell("1")
            except BaseException:  # noqa: BLE001 - one of the cell's, and no cell could take it out any more
                self._shell.input_transformers_post[:] = self._transformers
                broken.append("input transformers")
        return broken

    def can_run_a_cell(self) -> bool:
        """Whether IPython still runs cells: try one that does nothing."""
        try:
            with self.within(PROBE_SECONDS):
                return bool(self._probe("pass").success)
        except BaseException:  # noqa: BLE001 - whatever the cell has put in IPython's way
            return False

    def before_display(self) -> None:
        """Publish what was written before a display or a result."""
        for stream in self.streams:
            getattr(stream, "before_display", stream.flush)()

    def end_cell(self) -> None:
        """Publish the last of what the cell wrote."""
        for stream in self.streams:
            if hasattr(stream, "end_cell"):
                stream.end_cell()

    def flush(self) -> None:
        """Publish what stands in the streams' buffers."""
        for stream in self.streams:
            stream.flush()

    def _restore_streams(self) -> list[str]:
        broken = []
        for name, stream in zip(("stdout", "stderr"), self.streams):  # noqa: B905 - Python 3.9
            if getattr(sys, name, None) is not stream:
                setattr(sys, name, stream)
                broken.append(f"sys.{name}")
            if vars(stream).pop("write", None) is not None:
                broken.append(f"sys.{name}.write")
            if hasattr(stream, "restore_fd") and stream.restore_fd():
                broken.append(f"file descriptor {stream.fileno()}")
        return broken

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Run what may call code of the cell's, silently, and raise TookTooLong in it after `seconds`."""

        def stop(*_: Any) -> None:
            if self._has_deadline:
                raise TookTooLong

        previous = set_signal(signal.SIGALRM, stop)
        try:
            self._mute(True)
            try:
                self._has_deadline = True
                # Again and again, for an error may be dropped.
                set_timer(signal.ITIMER_REAL, seconds, TOO_LONG_SECONDS)
                yield
            finally:
                self._has_deadline = False
        finally:
            set_timer(signal.ITIMER_REAL, 0)
            set_signal(signal.SIGALRM, signal.SIG_DFL if previous is None else previous)
            self._mute(False)

    def _mute(self, muted: bool) -> None:
        for stream in self.streams:
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

        def cancel() -> None:
            self._stretch += 1  # it has come to the cell
            cell.cancel()

        def on_sigint(_: int, frame: Any) -> None:
            if self._is_in_stream(frame):
                return
            self._hear_of_drops()
            codes = _codes_of_callback(frame)
            if asyncio.current_task(loop) is cell and run_code in codes:
                raise self._interrupt()  # in the cell's own code, where IPython expects it
            loop.call_soon_threadsafe(cancel)
            if codes:
                # Another task or a callback spins: a KeyboardInterrupt from there would end the loop.
                raise asyncio.CancelledError

        previous = set_signal(signal.SIGINT, on_sigint)
        try:
            yield
        finally:
            set_signal(signal.SIGINT, previous)


def _origin(trace: Any) -> Any:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _is_ours(trace: Any) -> bool:
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(OUR_FILES)


RAISED = (Interrupt, asyncio.CancelledError)
DROPPING = frozenset(
    function.__code__ for function in (Interrupt.__del__, Guard._on_unraisable, _origin, _is_ours)
)
"""Where one would be dropped."""
HANDLER = (
    *(Guard._on_sigint, Guard._is_in_stream, Guard._hear_of_drops),
    *(Guard._interrupt, Interrupt.__init__, Guard._repeat_interrupt),
)
"""A second interrupt that strikes in here has nothing to add: the first is on its way, or comes again."""


def _codes_of_callback(frame: Any) -> list[Any]:
    """The code objects that run in the loop's present callback, innermost first; none while it waits."""
    codes: list[Any] = []
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
    if select.select([fd], [], [], 0)[0]:  # it was gone already
        os.kill(os.getpid(), signal.SIGKILL)
