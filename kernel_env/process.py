"""One kernel process: its folder, its sockets, its death. What runs in it is `kernel.py`'s business."""

from __future__ import annotations

import asyncio
import atexit
import hmac
import json
import logging
import os
import signal
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.session import DELIM, Session

from kernel_env.config import from_env
from kernel_env.errors import ConfigError, KernelStartError
from kernel_env.folder import KernelFolder
from kernel_env.portal import run_in_thread

__all__ = ["KernelProcess", "check_platform", "find_kernelspec"]

log = logging.getLogger("kernel_env.process")

OnMessage = Callable[[str, dict[str, Any]], None]

_STDERR_TAIL = 8192
_DRAIN_AT_ONCE = 500
_UNREAD = 32  # messages that wait in this process, of 1 MiB and more each

_live: weakref.WeakSet[KernelProcess] = weakref.WeakSet()


def check_platform() -> None:
    """Raise ConfigError where memfd and pidfd are missing, which carry the context and tell of deaths."""
    if sys.platform != "linux":
        raise ConfigError(f"kernel_env needs Linux, not {sys.platform}; on Windows use WSL2")


def find_kernelspec(name: str) -> KernelSpec:
    """Look up an installed kernelspec.

    Raises:
        ConfigError: there is none of that name, with the names there are; or it is not for Python, or
            its kernels are not processes of this machine.
    """
    manager = KernelSpecManager()
    try:
        spec: KernelSpec = manager.get_kernel_spec(name)
    except (NoSuchKernel, ValueError) as error:
        found = manager.find_kernel_specs()
        if name in found:
            raise ConfigError(
                f"kernel_name={name!r} needs a kernel provisioner that is not installed"
            ) from error
        installed = ", ".join(sorted(found)) or "none (pip install ipykernel)"
        raise ConfigError(f"kernel_name={name!r} is not installed; installed: {installed}") from error
    if spec.language.lower() != "python":
        raise ConfigError(f"kernel_name={name!r} runs {spec.language}; the helpers need an IPython kernel")
    provisioner = spec.metadata.get("kernel_provisioner", {}).get("provisioner_name", "local-provisioner")
    if provisioner != "local-provisioner":
        raise ConfigError(f"kernel_name={name!r} is started by {provisioner!r}; only local kernels work yet")
    return spec


class KernelProcess:
    """A kernel process from launch to death, with this host as its client.

    `on_message` gets every message of the channels "shell" and "iopub", on the loop, as soon as it is in;
    `on_exit` is called once, when the process has ended.
    """

    def __init__(
        self,
        manager: AsyncKernelManager,
        folder: KernelFolder,
        stderr: int,
        message_bytes: int,
        on_message: OnMessage,
        on_exit: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.session: Session = manager.session
        self.exited = asyncio.Event()
        self._manager = manager
        self._on_message = on_message
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._owner = os.getpid()
        self._popen = manager.provisioner.process  # type: ignore[union-attr]
        self.pid: int = self._popen.pid
        self._stderr = stderr
        self._stderr_tail = b""
        self.received = 0
        """Messages that came in, broken ones included."""
        self.broken = 0
        """Messages that were none, or too large to be read."""
        self._message_bytes = message_bytes
        self._ending: asyncio.Future[None] | None = None
        self._is_released = False
        self._pidfd = os.pidfd_open(self.pid)
        self._sockets = {
            "iopub": self._connect("iopub", zmq.SUB),
            "shell": self._connect("shell", zmq.DEALER),
        }
        self._loop.add_reader(self._pidfd, self._take_exit)
        self._loop.add_reader(self._stderr, self._read_stderr)
        for channel in self._sockets.values():
            self._loop.add_reader(_fileno(channel), self.drain)
        self.drain()
        _live.add(self)

    @classmethod
    async def launch(
        cls,
        kernel_name: str,
        folder: KernelFolder,
        message_bytes: int,
        on_message: OnMessage,
        on_exit: Callable[[], None],
    ) -> KernelProcess:
        """Start the process; it is not ready yet. A message of more than `message_bytes` is not read.

        Raises:
            ConfigError: no such kernelspec.
            KernelStartError: its command could not be run.
        """
        check_platform()
        find_kernelspec(kernel_name)
        manager = AsyncKernelManager(
            kernel_name=kernel_name,
            transport="ipc",
            ip=str(folder.path / "k"),
            connection_file=str(folder.path / "connection.json"),
            context=zmq.asyncio.Context(_shared_context()),
            # Not orjson even where it is installed: it refuses text with lone surrogates.
            session=Session(
                key=os.urandom(32).hex().encode(), packer="json", unpacker="json", check_pid=False
            ),
        )
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        try:
            await manager.start_kernel(
                env=_environment(folder.path),
                cwd=str(folder.path / "work"),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=write_end,
            )
            return cls(manager, folder, read_end, message_bytes, on_message, on_exit)
        except BaseException as error:
            # jupyter_client sleeps a little after the process is there: a cancellation can strike just then.
            if manager.has_kernel:
                await manager.shutdown_kernel(now=True)
            os.close(read_end)
            if not isinstance(error, OSError):
                raise
            if manager.ready.done():
                manager.ready.exception()  # read, or asyncio complains that nobody did
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
            socket.identity = self.session.bsession
        socket.connect(f"ipc://{self._manager.ip}-{getattr(self._manager, f'{channel}_port')}")
        return socket

    def message(
        self, kind: str, content: dict[str, Any], metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Make a request, whose id is then known before it is sent."""
        message: dict[str, Any] = self.session.msg(kind, content=content, metadata=metadata)
        return message

    def send(self, message: dict[str, Any]) -> None:
        self.session.send(self._sockets["shell"], message)
        # Sending can swallow the edge that tells of messages which are already in.
        self._loop.call_soon(self.drain)

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
        try:
            self._on_message(channel, self._decode(frames))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            # Passed on, it would leave the messages behind it unread until the next one comes.
            self.broken += 1
            log.warning("kernel %d sent a broken message on %s: %s", self.pid, channel, error)

    def _decode(self, frames: list[bytes]) -> dict[str, Any]:
        # `Session.deserialize` also makes datetimes of every date, which nobody here reads: half its time.
        signature, *parts = frames[frames.index(DELIM) + 1 :]
        if (size := sum(map(len, parts))) > self._message_bytes:
            raise ValueError(f"it has {size} bytes")
        if not hmac.compare_digest(signature, self.session.sign(parts[:4])):
            raise ValueError("its signature is wrong")
        header, parent, _, content = (json.loads(part) for part in parts[:4])
        if not isinstance(parent, dict) or not isinstance(content, dict):
            raise TypeError("its parts are no objects")
        return {"msg_type": header["msg_type"], "parent_header": parent, "content": content}

    def _take_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._signal_group()  # its children; once the process is reaped, the group's id may be another's
        self._popen.wait()
        self._read_stderr()
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
        if code >= 0:
            return f"exited with code {code}"
        named = -code in signal.Signals.__members__.values()
        return f"was killed by {signal.Signals(-code).name if named else f'signal {-code}'}"

    async def interrupt(self) -> None:
        """Interrupt what runs, the way the kernelspec asks for."""
        if not self.exited.is_set():
            await self._manager.interrupt_kernel()

    async def settle(self, seconds: float = 0.05) -> None:
        """Read what a dead process has left in its sockets, until nothing came for `seconds`."""
        for _ in range(20):  # a thread of its may publish for ever
            seen = self.received
            await asyncio.sleep(seconds)
            if seen == self.received:
                return

    async def terminate(self) -> None:
        """Kill the process and its group, and wait for the end."""
        self._signal_group()
        await self.exited.wait()

    async def kill(self) -> None:
        """Terminate, close what this host holds of the process and remove its folder.

        Once begun it comes to its end, also when the caller is cancelled; again, it waits for the same end.
        """
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._kill())
        await asyncio.shield(self._ending)

    async def _kill(self) -> None:
        await self.terminate()
        self._release()
        await self._manager.provisioner.wait()  # type: ignore[union-attr]
        await self._manager.cleanup_resources()
        await run_in_thread(self.folder.remove)
        _live.discard(self)

    def kill_now(self) -> None:
        """The same without a loop, when there is none left to wait in."""
        _live.discard(self)
        self._signal_group()
        self._popen.wait()
        self._release()
        self.folder.remove()

    async def kill_soon(self) -> None:
        """`kill_now` on the loop."""
        self.kill_now()

    def _signal_group(self) -> None:
        if self._popen.returncode is not None:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)  # jupyter_client starts every kernel in a session of its own
        except ProcessLookupError:
            return

    def _release(self) -> None:
        if self._is_released:
            return
        self._is_released = True
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
            asyncio.run_coroutine_threadsafe(process.kill_soon(), process._loop).result(5)
        else:
            process.kill_now()


_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}


def _shared_context() -> zmq.Context[zmq.Socket[bytes]]:
    # One for all kernels: a context of its own costs each client 2 threads and 14 file descriptors. It does
    # not survive a fork.
    context = _contexts.get(os.getpid())
    if context is None:
        context = _contexts.setdefault(os.getpid(), zmq.Context())
        context.set(zmq.MAX_SOCKETS, 65_535)
    return context


def _fileno(socket: zmq.Socket[bytes]) -> int:
    return int(socket.get(zmq.FD))


def _environment(folder: Path) -> dict[str, str]:
    return {
        **from_env().kernel_variables,
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "IPYTHONDIR": str(folder / "ipython"),
        # Sets of text have the same order in every kernel; else the same seed would not give the same output.
        "PYTHONHASHSEED": "0",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
