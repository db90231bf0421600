"""The processes that kernels are forked from, and the kernels, as the host sees them.

`guest/template.py` describes what goes over the sockets between them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import json
import logging
import math
import os
import resource
import select
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kernel_env import seccomp
from kernel_env.errors import ConfigError, KernelEnvError, KernelStartError, SandboxUnavailable
from kernel_env.folder import TEMPLATE_PREFIX, WRITABLE, KernelFolder
from kernel_env.install import GUEST_MODULES
from kernel_env.isolation import can_change_user
from kernel_env.portal import run_in_thread

__all__ = ["ForkedProcess", "Key", "close_templates", "environment_of_folder", "launch"]

log = logging.getLogger("kernel_env.provisioners.templates")

_TEMPLATE = Path(__file__).parents[1] / "guest" / "template.py"
_TELLS_WITHIN = 2.0  # seconds from the end of a kernel to its template's word on it
_WAKES_EVERY = 1.0  # seconds that nothing is heard of a kernel that is to be forked
_DATAGRAM = 2**16
_MOST_TEMPLATES = 4
_IDLE = 5.0  # seconds
_UNKNOWN = 255
_STDERR_TAIL = 8192


class Key(NamedTuple):
    """What the kernels of one template have in common."""

    interpreter: tuple[str, ...]
    arguments: tuple[str, ...]
    preload: tuple[str, ...]
    environment: frozenset[tuple[str, str]]
    sandboxed_in: str | None
    """The folder with the folders of kernels that are confined; None if they are not."""


def environment_of_folder(folder: Path) -> dict[str, str]:
    """The variables that are a kernel's own, whatever else its environment holds."""
    return {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "IPYTHONDIR": str(folder / "home" / ".ipython"),
    }


async def launch(key: Key, request: dict[str, Any], streams: list[int]) -> ForkedProcess:
    """Fork a kernel; clients can connect when this returns.

    Raises:
        ConfigError: a module cannot be preloaded.
        SandboxUnavailable: this system does not let it be confined.
        KernelStartError: no process could be forked, or it ended before it was ready.
    """
    for attempt in (1, 2):
        template = _templates.get(key)
        if template is None or not template.is_alive():
            template = await run_in_thread(_start_template, key)
        template.used = time.monotonic()
        try:
            return await template.fork(request, streams)
        except _TemplateGone:
            await run_in_thread(template.end)  # it may still look alive for a moment
            if attempt == 2:
                raise KernelStartError(
                    "the process that kernels are forked from ended; "
                    f"its stderr ends:\n{template.stderr_tail}"
                ) from None
        except _NoKernels as fault:
            if _templates.get(key) is template:  # the next one may find what this one lacked
                del _templates[key]
                await run_in_thread(template.close)
            raise fault.error from None
    raise AssertionError("unreachable")


class _TemplateGone(Exception):
    """It ended before it had forked what it was asked for."""


class _NoKernels(Exception):
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
                        raise _TemplateGone from None
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
            raise _NoKernels(ConfigError(message["preload"]))
        if "sandbox" in message:
            raise _NoKernels(SandboxUnavailable(message["sandbox"]))
        if "fault" in message:
            text = f"the process that kernels are forked from could not start: {message['fault']}"
            raise _NoKernels(KernelStartError(text))
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
        if self.returncode is None and _is_readable(self.pidfd, 0):
            self._collect()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it did not come within `timeout` seconds.
        """
        if self.returncode is None and not _is_readable(self.pidfd, timeout):
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

    def send_signal(self, signum: int) -> None:
        """Signal the process alone, if it has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class _Template:
    """A warm process, held by its two sockets."""

    def __init__(self, key: Key) -> None:
        sandbox: dict[str, Any] | None = None
        if key.sandboxed_in is not None:
            try:
                program = base64.b64encode(seccomp.program()).decode()
            except OSError as error:
                raise SandboxUnavailable(str(error)) from error
            sandbox = {"program": program, "writable": WRITABLE, "as_root": can_change_user()}
        self._folder = KernelFolder.make(TEMPLATE_PREFIX, parent=key.sandboxed_in)
        if sandbox is not None:
            sandbox["folder"] = str(self._folder.path)
        self._stderr = self._folder.path / "stderr"
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lifeline, lifeline = socket.socketpair()
        self._control.setblocking(False)
        self.used = time.monotonic()
        self.processes: weakref.WeakSet[ForkedProcess] = weakref.WeakSet()
        options = {
            "control": control.fileno(),
            "lifeline": lifeline.fileno(),
            "modules": [*GUEST_MODULES, "channels", "serving", "app"],
            "arguments": key.arguments,
            "preload": key.preload,
            "sandbox": sandbox,
        }
        with control, lifeline, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*key.interpreter, str(_TEMPLATE)],
                env=dict(key.environment) | environment_of_folder(self._folder.path),
                cwd=self._folder.path / "work",
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(control.fileno(), lifeline.fileno()),
                start_new_session=True,
            )
            assert self._process.stdin is not None
            with self._process.stdin as stdin:  # no argument: those can be seen from outside, and in kernels
                stdin.write(json.dumps(options).encode())

    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def is_idle(self) -> bool:
        """Whether it has no kernels, and has had none for a while: it may just have been chosen for one."""
        return not self.processes and time.monotonic() - self.used > _IDLE

    @property
    def stderr_tail(self) -> str:
        """The last that the process wrote to its stderr."""
        with contextlib.suppress(OSError):
            return self._stderr.read_bytes()[-_STDERR_TAIL:].decode("utf-8", "replace").strip()
        return ""

    async def fork(self, request: dict[str, Any], streams: list[int]) -> ForkedProcess:
        """Ask for a process, which waits its turn behind those asked for before, until clients can connect.

        Raises:
            ConfigError, KernelStartError, _TemplateGone: as `ForkedProcess.until_bound`.
        """
        self._wake()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lifeline, kernel_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        lifeline.setblocking(False)
        process = ForkedProcess(ours, lifeline, self._wake)
        self.processes.add(process)  # from now on, or the template would seem to have nothing to do
        try:
            with theirs, kernel_end:
                await self._ask(
                    json.dumps(request).encode("utf-8", "surrogateescape"),
                    [*streams, kernel_end.fileno(), theirs.fileno()],
                )
            await process.until_bound()
        except BaseException:
            self.processes.discard(process)
            process.release()
            raise
        return process

    async def _ask(self, request: bytes, descriptors: list[int]) -> None:
        while True:
            try:
                socket.send_fds(self._control, [request], descriptors)
            except OSError as error:
                # It has more to do than its queue holds, or other sockets of this user's hold as many
                # descriptors as the limit on open files allows, which is then raised.
                if error.errno not in (errno.EAGAIN, errno.ETOOMANYREFS):
                    raise _TemplateGone from None  # it is gone, or was closed for another one
                if error.errno == errno.ETOOMANYREFS:
                    _raise_limit_on_files()
                await asyncio.sleep(0.005)
            else:
                return

    def _wake(self) -> None:
        self._process.send_signal(signal.SIGCONT)  # a cell of a kernel that is not confined can stop it

    def end(self) -> None:
        """End the process; of its kernels, those that are confined end with it."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process and remove what is left of it."""
        self.end()
        self.let_go()
        self._folder.remove(is_deserted=True)  # its kernels began with its environment, and are not to go

    def let_go(self) -> None:
        """Close this process's ends of the sockets."""
        self._control.close()
        self._lifeline.close()


_templates: dict[Key, _Template] = {}
_starting = threading.Lock()
_live: weakref.WeakSet[ForkedProcess] = weakref.WeakSet()


def _start_template(key: Key) -> _Template:
    with _starting:
        known = _templates.get(key)
        if known is not None and known.is_alive():
            return known
        if known is not None:
            log.warning("a template process was killed; another one takes its place")
            known.close()
        idle = [k for k, template in _templates.items() if template.is_idle]
        for old in idle[: max(len(_templates) - _MOST_TEMPLATES + 1, 0)]:
            _templates.pop(old).close()
        _templates[key] = _Template(key)
        return _templates[key]


def close_templates() -> None:
    """End every template of this process; called at exit, when no kernel is left."""
    while _templates:
        _templates.popitem()[1].close()


def _after_fork() -> None:
    # A forked child of the host must not keep the kernels alive when the host is gone.
    global _starting
    _starting = threading.Lock()
    for template in _templates.values():
        template.let_go()
    _templates.clear()
    for process in list(_live):
        process._watch = None  # the loop's epoll object is shared: what is removed here is removed there
        process.release()


os.register_at_fork(after_in_child=_after_fork)


def _raise_limit_on_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


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
