"""ForkProvisioner: kernels that are forks of a warm process, for any Jupyter client.

A kernelspec asks for it with the metadata
`{"kernel_provisioner": {"provisioner_name": "kernel-env-fork", "config": {"preload": []}}}`. One template
process (`guest/template.py`) serves all kernels of one host with the same interpreter, arguments, environment
and preloads; it holds neither keys nor contexts, and ends with its host. What each kernel is told, and what
it tells, is described there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from traitlets import List, Unicode

from kernel_env.errors import ConfigError, KernelStartError
from kernel_env.folder import TEMPLATE_PREFIX, KernelFolder
from kernel_env.install import GUEST_MODULES
from kernel_env.portal import run_in_thread

__all__ = ["NAME", "ForkProvisioner", "environment_of_folder", "forkable_command", "is_available"]

log = logging.getLogger("kernel_env.provisioners.fork")

NAME = "kernel-env-fork"
"""Its entry point in the group `jupyter_client.kernel_provisioners`."""

_TEMPLATE = Path(__file__).parents[1] / "guest" / "template.py"
_TELLS_WITHIN = 2.0  # seconds from the end of a kernel to its template's word on it
_DATAGRAM = 2**16
_MOST_TEMPLATES = 4
_UNKNOWN = 255
_STDERR_TAIL = 8192


def is_available() -> bool:
    """Whether this system can fork kernels: Linux, with pidfd."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


def forkable_command(command: list[str]) -> tuple[list[str], list[str], str] | None:
    """Interpreter, arguments and file of `python -m ipykernel_launcher -f FILE`; None if it is not that."""
    if "-m" not in command:
        return None
    at = command.index("-m")
    interpreter, module, arguments = command[:at], command[at + 1 : at + 2], command[at + 2 :]
    if module not in (["ipykernel_launcher"], ["ipykernel"]) or "-f" not in arguments[:-1]:
        return None
    file_at = arguments.index("-f")
    return interpreter, arguments[:file_at] + arguments[file_at + 2 :], arguments[file_at + 1]


def environment_of_folder(folder: Path) -> dict[str, str]:
    """The variables that are a kernel's own, whatever else its environment holds."""
    return {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "IPYTHONDIR": str(folder / "ipython"),
    }


_OWN_VARIABLES = frozenset(environment_of_folder(Path()))


class ForkProvisioner(LocalProvisioner):
    """A local kernel, forked instead of spawned: ready in a fraction of the time and the memory.

    It is an ordinary IPython kernel but for the debugger, subshells and the history database, which are
    absent. Its IPython configuration is the kernelspec's command line; of a profile it reads the startup
    files alone.
    """

    process: Any = None

    preload = List(
        Unicode(),
        help="Modules that are imported once, in the template; one that starts threads is refused.",
    ).tag(config=True)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Fork a kernel; when this returns clients can connect.

        Raises:
            ConfigError: the kernelspec's command is not ipykernel's, or a module cannot be preloaded.
            KernelStartError: no process could be forked, or it ended before it was ready.
        """
        parts = forkable_command(cmd)
        if parts is None:
            raise ConfigError(f"{NAME} forks `python -m ipykernel_launcher -f FILE`, not {cmd!r}")
        interpreter, arguments, connection_file = parts
        environment = dict(kwargs.get("env") or os.environ)
        key = (tuple(interpreter), tuple(arguments), tuple(self.preload), _shared(environment))
        folder = str(kwargs.get("cwd") or Path.cwd())
        request = {
            "connection_file": connection_file,
            "environ": environment,
            "folder": folder,
            "argv": ["ipykernel_launcher", "-f", connection_file, *arguments],
        }
        nothing = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            stdout = _descriptor(kwargs.get("stdout"), 1, nothing)
            stderr = _descriptor(kwargs.get("stderr"), 2, nothing, stdout)
            self.process = await _launch(key, request, [stdout, stderr])
        finally:
            os.close(nothing)
        self.pid = self.pgid = self.process.pid
        self.cwd = folder
        return self.connection_info


def _shared(environment: dict[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(
        item
        for item in environment.items()
        if item[0] not in _OWN_VARIABLES and not item[0].startswith("JPY_")
    )


def _descriptor(given: Any, default: int, nothing: int, stdout: int | None = None) -> int:
    """The descriptor that `subprocess.Popen` would take this argument for."""
    if given is None:
        return default
    if given == subprocess.STDOUT and stdout is not None:
        return stdout
    if given == subprocess.PIPE:
        raise ConfigError(
            "a forked kernel writes to a file descriptor of yours; make the pipe with os.pipe()"
        )
    if given == subprocess.DEVNULL:
        return nothing
    return given if isinstance(given, int) else int(given.fileno())


async def _launch(key: Any, request: dict[str, Any], streams: list[int]) -> ForkedProcess:
    for attempt in (1, 2):
        template = _templates.get(key)
        if template is None or not template.is_alive():
            template = await run_in_thread(_start_template, key)
        try:
            return await template.fork(request, streams)
        except _TemplateGone:
            await run_in_thread(template.end)  # it may still look alive for a moment
            if attempt == 2:
                raise KernelStartError(
                    "the process that kernels are forked from ended; "
                    f"its stderr ends:\n{template.stderr_tail}"
                ) from None
        except ConfigError:  # of its preloads, one of which may be there at the next attempt
            if _templates.get(key) is template:
                del _templates[key]
                await run_in_thread(template.close)
            raise
    raise AssertionError("unreachable")


class _TemplateGone(Exception):
    """It ended before it had forked what it was asked for."""


class ForkedProcess:
    """A forked kernel, with the part of `subprocess.Popen`'s interface that provisioners use.

    When the host is gone, or this object, Linux kills the kernel.
    """

    stdin = stdout = stderr = None

    def __init__(self, channel: socket.socket) -> None:
        self.pid = 0
        self.pidfd = -1
        """A descriptor of the process; the caller may duplicate it."""
        self.returncode: int | None = None
        self._channel = channel
        self._is_bound = False
        self._status: int | None = None
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
            loop.add_reader(self._channel, _set, ready)
            try:
                await ready
            finally:
                loop.remove_reader(self._channel)
            try:
                self._take()
            except (EOFError, ConnectionResetError):
                if not self.pid:
                    raise _TemplateGone from None
                raise KernelStartError("the forked kernel ended before it was ready") from None
            if self._status is not None:
                raise KernelStartError(
                    f"the forked kernel ended before it was ready, with exit status {self._status}"
                )

    def _take(self) -> None:
        data, descriptors, _, _ = socket.recv_fds(self._channel, _DATAGRAM, 1)
        if not data:
            raise EOFError
        message = json.loads(data)
        if "preload" in message:
            raise ConfigError(message["preload"])
        if "error" in message:
            raise KernelStartError(f"the forked kernel could not start: {message['error']}")
        if "pid" in message:
            self.pid, self.pidfd = message["pid"], descriptors[0]
            self._close_pidfd = weakref.finalize(self, os.close, self.pidfd)
        self._is_bound = self._is_bound or "bound" in message
        self._status = message.get("status", self._status)

    def poll(self) -> int | None:
        """The exit status, as Popen gives it; None while the process runs.

        Once there is one, nothing is left of the processes it started either. 255 if nobody knows, because
        the template was killed.
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
        status = self.poll()
        assert status is not None
        return status

    @property
    def is_alone(self) -> bool:
        """Whether it has ended, and every process it started with it: its template has seen to that."""
        return self._status is not None

    def _collect(self) -> None:
        deadline = time.monotonic() + _TELLS_WITHIN
        with contextlib.suppress(EOFError, OSError):
            while self._status is None:
                self._channel.settimeout(max(deadline - time.monotonic(), 0.001))
                self._take()
        self.returncode = _UNKNOWN if self._status is None else self._status
        self.release()

    def release(self) -> None:
        """Let go of the process: Linux kills it if it still runs."""
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

    def __init__(self, key: Any) -> None:
        interpreter, arguments, preload, shared = key
        self._folder = KernelFolder.make(TEMPLATE_PREFIX)
        self._stderr = self._folder.path / "stderr"
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lifeline, lifeline = socket.socketpair()
        self._control.setblocking(False)
        self.processes: weakref.WeakSet[ForkedProcess] = weakref.WeakSet()
        options = {
            "control": control.fileno(),
            "lifeline": lifeline.fileno(),
            "modules": [*GUEST_MODULES, "channels", "serving", "app"],
            "arguments": arguments,
            "preload": preload,
        }
        with control, lifeline, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*interpreter, str(_TEMPLATE), json.dumps(options)],
                env=dict(shared) | environment_of_folder(self._folder.path),
                cwd=self._folder.path / "work",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(control.fileno(), lifeline.fileno()),
                start_new_session=True,
            )

    def is_alive(self) -> bool:
        return self._process.poll() is None

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
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        process = ForkedProcess(ours)
        try:
            with theirs:
                await self._ask(
                    json.dumps(request).encode("utf-8", "surrogateescape"), [*streams, theirs.fileno()]
                )
            await process.until_bound()
        except BaseException:
            process.release()
            raise
        self.processes.add(process)
        return process

    async def _ask(self, request: bytes, descriptors: list[int]) -> None:
        while True:
            try:
                socket.send_fds(self._control, [request], descriptors)
            except BlockingIOError:  # it has more to do than its queue holds
                await asyncio.sleep(0.005)
            except (BrokenPipeError, ConnectionResetError):
                raise _TemplateGone from None
            else:
                return

    def end(self) -> None:
        """End the process; its kernels go on."""
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


_templates: dict[Any, _Template] = {}
_starting = threading.Lock()
_live: weakref.WeakSet[ForkedProcess] = weakref.WeakSet()


def _start_template(key: Any) -> _Template:
    with _starting:
        known = _templates.get(key)
        if known is not None and known.is_alive():
            return known
        if known is not None:
            log.warning("a template process was killed; another one takes its place")
            known.close()
        idle = [k for k, template in _templates.items() if not template.processes]
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
        process.release()


os.register_at_fork(after_in_child=_after_fork)


def _is_readable(fd: int, timeout: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
