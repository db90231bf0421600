"""One kernel process: its folder, its sockets, its death. What runs in it is `kernel.py`'s business."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import resource
import signal
import subprocess
import sys
import uuid
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.connect import write_connection_file
from jupyter_client.provisioning.factory import KernelProvisionerFactory

from kernel_env.config import FILES_OF_KERNEL, from_env
from kernel_env.errors import ConfigError, KernelStartError
from kernel_env.folder import KernelFolder, give_to_owner
from kernel_env.kernelspecs import command_of, find_kernelspec, with_provisioner
from kernel_env.provisioners import templates
from kernel_env.provisioners.forked import ForkedProcess
from kernel_env.refusals import Refusals
from kernel_env.types import Isolation
from kernel_env.wire import Wire

__all__ = ["KernelProcess", "check_platform"]

log = logging.getLogger("kernel_env.process")

OnMessage = Callable[[str, dict[str, Any]], None]

_PORTS = {f"{name}_port": n for n, name in enumerate(("shell", "iopub", "stdin", "hb", "control"), start=1)}
_STDERR_TAIL = 8192
_DRAIN_AT_ONCE = 500
_UNREAD = 32  # messages that wait in this process, of 1 MiB and more each

_live: weakref.WeakSet[KernelProcess] = weakref.WeakSet()


def check_platform() -> None:
    """Raise ConfigError where memfd and pidfd are missing, which carry the context and tell of deaths."""
    if sys.platform != "linux":
        raise ConfigError(f"kernel_env needs Linux, not {sys.platform}; on Windows use WSL2")


class KernelProcess:
    """A kernel process from launch to death, with this host as its client.

    `on_message` gets every message of the channels "shell" and "iopub", on the loop, as soon as it is in;
    `on_exit` is called once, when the process has ended.
    """

    def __init__(
        self,
        provisioner: Any,
        wire: Wire,
        folder: KernelFolder,
        stderr: int,
        on_message: OnMessage,
        on_exit: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.wire = wire
        self.exited = asyncio.Event()
        self._provisioner = provisioner
        self._on_message = on_message
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._owner = os.getpid()
        self._popen: subprocess.Popen[bytes] | ForkedProcess = provisioner.process
        self.pid: int = self._popen.pid
        self._stderr = stderr
        self._stderr_tail = b""
        self.received = 0
        """Messages that came in, broken ones included."""
        self.bytes_out = 0
        """Bytes of the messages that it published."""
        self.refusals = Refusals(f"kernel {self.pid}")
        """Messages that were none, or too large to be read."""
        self._ending: asyncio.Future[None] | None = None
        self._has_ended = self._is_released = False
        self._pidfd = (
            os.dup(self._popen.pidfd) if isinstance(self._popen, ForkedProcess) else os.pidfd_open(self.pid)
        )
        self._sockets = {
            "iopub": self._connect("iopub", zmq.SUB),
            "shell": self._connect("shell", zmq.DEALER),
        }
        self._loop.add_reader(self._pidfd, self._take_exit)
        self._loop.add_reader(self._stderr, self._read_stderr)
        for channel in self._sockets.values():
            self._loop.add_reader(_fileno(channel), self.drain)
        # Not at once: whoever takes the messages is about to be told of this process.
        self._loop.call_soon(self.drain)
        _live.add(self)

    @classmethod
    async def launch(
        cls,
        kernel_name: str,
        folder: KernelFolder,
        on_message: OnMessage,
        on_exit: Callable[[], None],
        *,
        message_bytes: int,
        preload: Sequence[str] = (),
        isolation: Isolation = "process",
    ) -> KernelProcess:
        """Start the process; it is not ready yet. A message of more than `message_bytes` is not read.

        Raises:
            ConfigError: no such kernelspec.
            KernelStartError: its command could not be run.
        """
        check_platform()
        _allow_files()
        spec, _ = with_provisioner(find_kernelspec(kernel_name), preload, isolation)
        wire = Wire(message_bytes)
        connection_file = str(folder.path / "connection.json")
        ports: dict[str, Any] = _PORTS
        write_connection_file(
            connection_file,
            transport="ipc",
            ip=_ip(folder),
            key=wire.key,
            kernel_name=kernel_name,
            **ports,
        )
        give_to_owner(folder.path, Path(connection_file))
        factory = KernelProvisionerFactory.instance()
        provisioner = factory.create_provisioner_instance(uuid.uuid4().hex, spec, None)
        # Without jupyter_client's KernelManager: it took 7 ms of each start, and a socket.
        options = await provisioner.pre_launch(env=_environment(folder.path))
        command = command_of(options.pop("cmd"), connection_file, spec.resource_dir)
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        try:
            await provisioner.launch_kernel(
                command,
                cwd=str(folder.path / "work"),
                stdout=subprocess.DEVNULL,
                stderr=write_end,
                **options,
            )
            return cls(provisioner, wire, folder, read_end, on_message, on_exit)
        except BaseException as error:
            if provisioner.has_process:
                await provisioner.kill()
                await provisioner.wait()
            os.close(read_end)
            if not isinstance(error, OSError):
                raise
            raise KernelStartError(f"kernel {kernel_name!r} could not be launched: {error}") from error
        finally:
            os.close(write_end)

    def _connect(self, channel: str, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = _shared_context().socket(kind)
        socket.linger = 0
        # A kernel that publishes more than this host reads keeps the rest itself: the guest takes the limit
        # off its end, where zmq would drop messages, `idle` included.
        socket.rcvhwm = _UNREAD
        socket.sndhwm = 0
        # zmq tries again only every 100 ms by itself, and the kernel binds some time after its start.
        socket.reconnect_ivl = 5
        if kind == zmq.SUB:
            socket.subscribe(b"")
        else:
            socket.identity = self.wire.session.encode()
        socket.connect(f"ipc://{_ip(self.folder)}-{_PORTS[f'{channel}_port']}")
        return socket

    def send(self, request: dict[str, Any]) -> None:
        self._sockets["shell"].send_multipart(self.wire.pack(request))
        self.drain()  # sending can swallow the edge that tells of messages which are already in

    def drain(self) -> None:
        """Take the messages that are there."""
        for channel, socket in self._sockets.items():
            for _ in range(_DRAIN_AT_ONCE):
                if socket.closed or not int(socket.get(zmq.EVENTS)) & zmq.POLLIN:
                    break
                self._receive(channel, socket.recv_multipart(zmq.NOBLOCK))
            else:
                self._loop.call_soon(self.drain)  # let other tasks run before the rest of a flood

    def _receive(self, channel: str, frames: list[bytes]) -> None:
        self.received += 1
        if channel == "iopub":
            self.bytes_out += sum(map(len, frames))
        try:
            self._on_message(channel, self.wire.unpack(frames))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            # Passed on, it would leave the messages behind it unread until the next one comes.
            self.refusals.add(f"sent a broken message on {channel}: {error}")

    def _take_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self.kill_group()  # its children; once the process is reaped, the group's id may be another's
        self._has_ended = True
        if isinstance(self._popen, ForkedProcess):
            # Its template tells how, once it has killed orphans.
            self._popen.watch(self._loop, self._note_exit)
        else:
            self._popen.wait()
            self._note_exit()

    def _note_exit(self) -> None:
        try:
            if not self._is_released:
                self._read_stderr()
        finally:
            self.exited.set()
            self._on_exit()

    def _read_stderr(self) -> None:
        try:
            data = os.read(self._stderr, 65536)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._stderr)
        self._stderr_tail = (self._stderr_tail + data)[-_STDERR_TAIL:]

    @property
    def stderr_tail(self) -> str:
        """The last lines the process itself wrote to its stderr."""
        return self._stderr_tail.decode("utf-8", "replace").strip()

    @property
    def end(self) -> str:
        """How the process ended, in words."""
        code = self._popen.returncode
        if code is None:
            return "is running"
        if self.is_forked and not self._is_deserted:
            return "ended; how is not known, for its template was killed"
        if code >= 0:
            return f"exited with code {code}"
        named = -code in signal.Signals.__members__.values()
        return f"was killed by {signal.Signals(-code).name if named else f'signal {-code}'}"

    async def interrupt(self) -> None:
        """Interrupt what runs, the way the kernelspec asks for."""
        if self._has_ended:
            return
        if self._provisioner.kernel_spec.interrupt_mode == "signal":
            await self._provisioner.send_signal(signal.SIGINT)
            return
        if "control" not in self._sockets:
            self._sockets["control"] = self._connect("control", zmq.DEALER)
        self._sockets["control"].send_multipart(self.wire.pack(self.wire.request("interrupt_request", {})))

    async def settle(self, seconds: float = 0.05) -> None:
        """Read what a dead process has left in its sockets, until nothing came for `seconds`."""
        for _ in range(20):  # a thread of its may publish for ever
            seen = self.received
            await asyncio.sleep(seconds)
            if seen == self.received:
                return

    @property
    def roots(self) -> tuple[int, ...]:
        """The process, and the one that adopts its orphans if that is another."""
        return self._popen.roots if isinstance(self._popen, ForkedProcess) else (self.pid,)

    async def terminate(self) -> None:
        """Kill the process and its group, and wait for the end."""
        self.kill_group()
        await self.exited.wait()

    async def kill(self, *, keeps_work: bool = False) -> None:
        """Terminate, close what this host holds of the process and remove its folder, or make it fresh.

        Once begun it comes to its end, also when the caller is cancelled; again, it waits for the same end.
        """
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._kill(keeps_work=keeps_work))
        await asyncio.shield(self._ending)

    async def _kill(self, *, keeps_work: bool) -> None:
        await self.terminate()
        self._release()
        await self._provisioner.wait()
        await self.folder.clear(keeps_work=keeps_work, is_deserted=self._is_deserted)
        _live.discard(self)

    def kill_now(self) -> None:
        """The same without a loop, when there is none left to wait in."""
        _live.discard(self)
        self.kill_group()
        self._release()
        self._popen.wait()
        self.folder.remove(is_deserted=self._is_deserted)

    @property
    def is_forked(self) -> bool:
        """Whether it comes from a template, with the guest's modules."""
        return isinstance(self._popen, ForkedProcess)

    @property
    def _is_deserted(self) -> bool:
        """Whether nothing is left of the processes that the kernel started."""
        return isinstance(self._popen, ForkedProcess) and self._popen.is_alone

    async def kill_soon(self) -> None:
        """`kill_now` on the loop."""
        self.kill_now()

    def kill_group(self) -> None:
        """Kill the process and its group."""
        if self._has_ended or self._popen.returncode is not None:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)  # jupyter_client starts every kernel in a session of its own
        except OSError:  # it has ended, and its group with it
            return

    def _release(self) -> None:
        if self._is_released:
            return
        self._is_released = True
        if isinstance(self._popen, ForkedProcess):
            self._popen.unwatch()
        for fd in (self._pidfd, self._stderr, *(_fileno(channel) for channel in self._sockets.values())):
            self._loop.remove_reader(fd)
        for channel in self._sockets.values():
            channel.close(linger=0)
        os.close(self._pidfd)
        os.close(self._stderr)


@atexit.register
def _kill_what_is_left() -> None:
    for process in list(_live):
        if process._owner != os.getpid():
            continue
        if process._loop.is_running():  # in another thread: what that reads from must not be closed under it
            try:
                asyncio.run_coroutine_threadsafe(process.kill_soon(), process._loop).result(5)
            except TimeoutError:
                log.warning("kernel %d was not ended in time; it ends with this process", process.pid)
        else:
            process.kill_now()
    templates.close_templates()


_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}


def _shared_context() -> zmq.Context[zmq.Socket[bytes]]:
    # One for all kernels: a context of its own costs each client 2 threads and 14 file descriptors. It does
    # not survive a fork.
    context = _contexts.get(os.getpid())
    if context is None:
        context = _contexts.setdefault(os.getpid(), zmq.Context())
        context.set(zmq.MAX_SOCKETS, 65_535)
    return context


def _allow_files() -> None:
    """Raise this process's soft limit on open files to the hard one, before many kernels reach it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard and (len(_live) + 1) * FILES_OF_KERNEL > soft // 2:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _ip(folder: KernelFolder) -> str:
    return str(folder.path / "run" / "k")


def _fileno(socket: zmq.Socket[bytes]) -> int:
    return int(socket.get(zmq.FD))


def _environment(folder: Path) -> dict[str, str]:
    return {
        **from_env().kernel_variables,
        **templates.environment_of_folder(folder),
        # Sets of text have the same order in every kernel; else the same seed would not give the same output.
        "PYTHONHASHSEED": "0",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
