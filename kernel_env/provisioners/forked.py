"""A forked kernel as its host sees it: what the template and the kernel tell, and how it ended.

`guest/template.py` describes what goes over its two sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kernel_env.errors import ConfigError, KernelEnvError, KernelStartError, SandboxUnavailable

__all__ = ["ForkedProcess", "NoKernels", "TemplateGone"]

_TELLS_WITHIN = 2.0  # seconds from the end of a kernel to its template's word on it
_WAKES_EVERY = 1.0  # seconds that nothing is heard of a kernel that is to be forked
_DATAGRAM = 2**16
_UNKNOWN = 255

_live: weakref.WeakSet[ForkedProcess] = weakref.WeakSet()


class TemplateGone(Exception):
    """It ended before it had forked what it was asked for."""


class NoKernels(Exception):
    """No kernel can come of a template; says why."""

    def __init__(self, error: KernelEnvError) -> None:
        super().__init__(error)
        self.error = error


class _Watch(NamedTuple):
    loop: asyncio.AbstractEventLoop
    told: Callable[[], object]
    timer: asyncio.TimerHandle


class ForkedProcess:
    """A forked kernel, with the part of `subprocess.Popen`'s interface that provisioners use.

    When the host is gone, or this object, Linux kills the kernel.
    """

    stdin = stdout = stderr = None

    def __init__(self, channel: socket.socket, lifeline: socket.socket, wake: Callable[[], object]) -> None:
        self.pid = 0
        self.pidfd = -1
        """A descriptor of the process; the caller may duplicate it."""
        self.roots: tuple[int, ...] = ()
        """The process, and the one that adopts its orphans if that is another."""
        self.returncode: int | None = None
        self._channel = channel
        self._lifeline = lifeline
        self._wake = wake
        self._is_bound = self._is_silent = False
        self._status: int | None = None
        self._told_by = math.inf
        self._watch: _Watch | None = None
        self._close_pidfd: Callable[[], object] = lambda: None
        _live.add(self)

    async def until_bound(self) -> None:
        """Wait until clients can connect.

        Raises:
            ConfigError, KernelStartError: it ended before, or there was never a process.
        """
        loop = asyncio.get_running_loop()
        while not (self.pid and self._is_bound):
            ready = loop.create_future()
            ends = [self._channel] if self._is_silent else [self._channel, self._lifeline]
            for end in ends:
                loop.add_reader(end, _set, ready)
            try:
                await asyncio.wait({ready}, timeout=_WAKES_EVERY)
            finally:
                for end in ends:
                    loop.remove_reader(end)
            if not ready.done():
                self._wake()
            if not self._is_silent and _is_readable(self._lifeline.fileno(), 0):
                self._take_word_of_kernel()
            if _is_readable(self._channel.fileno(), 0):
                try:
                    self._take_word_of_template()
                except (EOFError, ConnectionResetError):
                    if not self.pid:
                        raise TemplateGone from None
                    raise KernelStartError("the forked kernel ended before it was ready") from None
            if self._status is not None:
                raise KernelStartError(
                    f"the forked kernel ended before it was ready, with exit status {self._status}"
                )

    def _take_word_of_kernel(self) -> None:
        # Its one message, sent before it runs code of anybody's; later ones would be that code's.
        self._is_silent = True
        try:
            data = self._lifeline.recv(_DATAGRAM)
        except ConnectionResetError:
            return
        message = json.loads(data) if data else {}
        if "sandbox" in message:
            raise SandboxUnavailable(message["sandbox"])
        if "error" in message:
            raise KernelStartError(f"the forked kernel could not start: {message['error']}")
        self._is_bound = "bound" in message

    def _take_word_of_template(self) -> None:
        data, descriptors, _, _ = socket.recv_fds(self._channel, _DATAGRAM, 2)
        if not data:
            raise EOFError
        message = json.loads(data)
        if "preload" in message:
            raise NoKernels(ConfigError(message["preload"]))
        if "sandbox" in message:
            raise NoKernels(SandboxUnavailable(message["sandbox"]))
        if "fault" in message:
            text = f"the process that kernels are forked from could not start: {message['fault']}"
            raise NoKernels(KernelStartError(text))
        if "error" in message:
            raise KernelStartError(f"the forked kernel could not start: {message['error']}")
        if "forked" in message:
            self.roots = tuple(map(_pid_of, descriptors))
            self.pid, self.pidfd = self.roots[0], descriptors[0]
            self._close_pidfd = weakref.finalize(self, os.close, self.pidfd)
            for other in descriptors[1:]:
                os.close(other)
        self._status = message.get("status", self._status)

    def poll(self) -> int | None:
        """The exit status, as Popen gives it; None while the process runs, and until the template tells.

        Once there is one, nothing is left of the processes it started either. 255 if nobody knows, because
        the template was killed, or says nothing for two seconds.
        """
        if self.returncode is None and self._has_ended(0):
            self._collect()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it did not come within `timeout` seconds.
        """
        if self.returncode is None and not self._has_ended(timeout):
            raise subprocess.TimeoutExpired("kernel", timeout or 0.0)
        while (status := self.poll()) is None:
            _is_readable(self._channel.fileno(), max(self._told_by - time.monotonic(), 0))
        return status

    def watch(self, loop: asyncio.AbstractEventLoop, told: Callable[[], object]) -> None:
        """Call `told` on `loop` once there is an exit status; the process has ended."""
        if self.poll() is not None:
            loop.call_soon(told)
            return
        loop.add_reader(self._channel, self.poll)
        self._watch = _Watch(loop, told, loop.call_at(loop.time() + _TELLS_WITHIN + 0.1, self.poll))

    def unwatch(self) -> None:
        """Call nobody."""
        if self._watch is not None:
            self._watch.loop.remove_reader(self._channel)
            self._watch.timer.cancel()
            self._watch = None

    @property
    def is_alone(self) -> bool:
        """Whether it has ended, and every process it started with it: its template has seen to that."""
        return self._status is not None

    def _has_ended(self, timeout: float | None) -> bool:
        return self.pidfd < 0 or _is_readable(self.pidfd, timeout)  # or it was released

    def _collect(self) -> None:
        if self._told_by == math.inf:
            self._told_by = time.monotonic() + _TELLS_WITHIN
            self._wake()
        try:
            while self._status is None and _is_readable(self._channel.fileno(), 0):
                self._take_word_of_template()
        except (EOFError, OSError, ValueError):  # the template is gone, or this object was released
            self._told_by = 0.0
        if self._status is None and time.monotonic() < self._told_by:
            return
        self.returncode = _UNKNOWN if self._status is None else self._status
        watch = self._watch
        self.release()
        if watch is not None:
            watch.loop.call_soon(watch.told)

    def release(self) -> None:
        """Let go of the process: Linux kills it if it still runs."""
        self.unwatch()
        self._lifeline.close()
        self._channel.close()
        self._close_pidfd()
        self.pidfd = -1

    def send_signal(self, signum: int) -> None:
        """Signal the process alone, if it has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _after_fork() -> None:
    # A forked child of the host must not keep the kernels alive when the host is gone.
    for process in list(_live):
        process._watch = None  # the loop's epoll object is shared: what is removed here is removed there
        process.release()


os.register_at_fork(after_in_child=_after_fork)


def _pid_of(pidfd: int) -> int:
    """The process id as seen from here: a template may be in another namespace."""
    entries = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    return next(int(entry.split()[1]) for entry in entries if entry.startswith("Pid:"))


def _is_readable(fd: int, timeout: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
