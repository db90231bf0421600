"""How a forked kernel serves its clients: ipykernel's parts, without what they do twice or by another thread.

Runs in the template and in the kernels forked from it, on ipykernel 7 alone. Whatever is replaced here keeps
its meaning: the messages, their order and their contents are ipykernel's.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import hmac
import itertools
import linecache
import os
import sys
import threading
import types
import zlib
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import zmq
from ipykernel.compiler import get_tmp_directory
from ipykernel.iostream import BackgroundSocket, IOPubThread
from ipykernel.ipkernel import IPythonKernel
from ipykernel.jsonutil import json_clean
from IPython.core.async_helpers import _pseudo_sync_runner
from jupyter_client._version import protocol_version
from jupyter_client.adapter import adapt
from jupyter_client.session import DELIM, Session, utcnow
from zmq.backend import Socket as BackendSocket
from zmq.eventloop.zmqstream import ZMQStream

SOURCES = 1000  # of cells, for tracebacks into functions that they defined; IPython keeps all
LISTENING_SECONDS = 2  # a cell may have stopped the thread
PARTS = 5  # of a message behind its delimiter: the signature, and four that are signed


def sender(socket: Any) -> Callable[[list[Any]], None]:
    """`socket.send_multipart`, whole or not at all: no signal handler of a cell's runs between two frames.

    The loop is `map`'s, and Python looks for signals between instructions of its own only.
    """
    send = functools.partial(BackendSocket.send, socket)

    def send_multipart(frames: list[Any]) -> None:
        more = itertools.repeat(int(zmq.SNDMORE), len(frames) - 1)
        deque(map(send, frames, itertools.chain(more, (0,))), 0)

    return send_multipart


class Publisher(IOPubThread):
    """ipykernel's IOPub thread without a thread: who publishes sends, one after another.

    The hand-over cost each message a wake-up and a fight for the GIL, and the end of a cell four waits.
    """

    sends_at_once = True

    def __init__(self) -> None:
        self.background_socket = BackgroundSocket(self)  # type: ignore[no-untyped-call]
        self.socket, self._master_pid = None, os.getpid()
        self._sending = threading.RLock()  # a signal handler of the cell's may print while its thread sends

    def open(self, socket: Any, session: Any, thread: Any) -> None:
        """Publish on `socket`; subscriptions, and children's messages, are read in the loop of `thread`."""
        self.socket, self.session, self.thread, self.io_loop = socket, session, thread, thread.io_loop
        self._stopped, self._pipe_flag, self._master_pid = False, False, os.getpid()
        self._send = sender(socket)
        self.io_loop.add_handler(socket.get(zmq.FD), lambda *_: self._take_subscriptions(), self.io_loop.READ)
        self.io_loop.add_callback(self._take_subscriptions)
        os.register_at_fork(before=self._listen_to_children, after_in_child=self._after_fork)

    def schedule(self, f: Any) -> None:
        """Have `f` called in the loop."""
        self.io_loop.add_callback(f)

    def send_multipart(self, msg: list[Any], *_: Any, **__: Any) -> None:
        """Send a message now; from a forked child, by way of its parent."""
        if os.getpid() != self._master_pid:
            self._really_send(msg)  # type: ignore[no-untyped-call]
            return
        with self._sending:
            if self.socket is None:
                return
            self._send(msg)
            # Sending can swallow the edge that tells of a subscription.
            if self.socket.get(zmq.EVENTS) & zmq.POLLIN:
                self.schedule(self._take_subscriptions)

    def _take_subscriptions(self) -> None:
        with self._sending:
            while self.socket is not None and self.socket.get(zmq.EVENTS) & zmq.POLLIN:
                self._handle_subscription(self.socket.recv_multipart(zmq.NOBLOCK))  # type: ignore[no-untyped-call]

    def _listen_to_children(self) -> None:
        """Open the port at which forked children publish, before the first: most kernels fork none."""
        if self._pipe_flag or not self._is_master_process():  # type: ignore[no-untyped-call]
            return
        self._pipe_flag, is_open = True, threading.Event()

        def listen() -> None:
            self._setup_pipe_in()  # type: ignore[no-untyped-call]
            is_open.set()

        self.schedule(listen)
        is_open.wait(LISTENING_SECONDS)

    def _after_fork(self) -> None:
        self._sending = threading.RLock()  # another thread of the parent may have held it

    def stop(self) -> None:
        """Close what is not `socket`; the thread is its owner's, who has ended it before."""
        if hasattr(self, "_pipe_in"):
            self._pipe_in.socket.close()


class ForkedSession(Session):
    """jupyter_client's Session, which makes dates of text and text of dates, and packs each parent again."""

    digest_history_size = 4096
    _packed: tuple[Any, bytes] = ({}, b"{}")

    def msg_header(self, msg_type: str) -> dict[str, Any]:
        return {
            "msg_id": self.msg_id,
            "msg_type": msg_type,
            "username": self.username,
            "session": self.session,
            "date": utcnow().isoformat().replace("+00:00", "Z"),
            "version": protocol_version,
        }

    def send(
        self,
        stream: Any,
        msg_or_type: Any,
        content: Any = None,
        parent: Any = None,
        ident: Any = None,
        buffers: Any = None,
        track: bool = False,
        header: Any = None,
        metadata: Any = None,
    ) -> Any:
        if os.getpid() != self.pid:  # a forked child's, unless its streams have told that it may
            return None
        if isinstance(msg_or_type, dict):
            message = msg_or_type
            buffers = buffers or message.get("buffers")
        else:
            message = self.msg(msg_or_type, content, parent, header, metadata)
        if stream is not None:
            frames = self.serialize(message, ident)
            if buffers:
                frames += map(memoryview, buffers)
            stream.send_multipart(frames)
        return message

    def serialize(self, msg: dict[str, Any], ident: Any = None) -> list[Any]:
        parent, packed = self._packed
        if msg["parent_header"] is not parent:
            parent = msg["parent_header"]
            packed = self.pack(parent)
            self._packed = parent, packed
        metadata, content = msg["metadata"], msg["content"]
        parts = [
            self.pack(msg["header"]),
            packed,
            self.pack(metadata) if metadata else b"{}",
            content if isinstance(content, bytes) else self.pack(content),
        ]
        route = ident if isinstance(ident, list) else [ident] if ident is not None else []
        return [*route, DELIM, self.sign(parts), *parts]

    def feed_identities(self, msg_list: Any, copy: bool = True) -> tuple[list[bytes], list[Any]]:
        return super().feed_identities([_bytes(frame) for frame in msg_list])

    def deserialize(self, msg_list: Any, content: bool = True, copy: bool = True) -> dict[str, Any]:
        signature, *parts = map(_bytes, msg_list[:PARTS])
        if len(parts) < PARTS - 1:
            raise TypeError(f"a message of {len(parts)} parts")
        if self.auth is not None:
            if signature in self.digest_history:
                raise ValueError("a signature for the second time")
            if not hmac.compare_digest(signature, self.sign(parts)):
                raise ValueError("the signature is wrong")
            if content:
                self._add_digest(signature)
        header, parent, metadata = map(self.unpack, parts[:3])
        if content:
            self._packed = header, parts[0]  # what answers it has this as its parent
        return adapt(
            {
                "header": header,
                "msg_id": header["msg_id"],
                "msg_type": header["msg_type"],
                "parent_header": parent,
                "metadata": metadata,
                "content": self.unpack(parts[3]) if content else parts[3],
                "buffers": [memoryview(_bytes(frame)) for frame in msg_list[PARTS:]],
            }
        )


def _bytes(frame: Any) -> bytes:
    return frame if isinstance(frame, bytes) else bytes(frame.bytes)


class ShellStream(ZMQStream):
    """The shell channel, whose replies go out at once: not by a queue, a poll and the loop."""

    def __init__(self, socket: Any) -> None:
        super().__init__(socket)
        self._send = sender(socket)

    def send_multipart(self, msg: list[Any], *_: Any, **__: Any) -> None:  # type: ignore[override]
        self._send(msg)
        # Sending can swallow the edge that tells of the next request.
        if int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self.io_loop.add_callback(self._handle_events, self.socket, 0)

    def flush(self, flag: int = zmq.POLLIN | zmq.POLLOUT, limit: int | None = None) -> int:
        return super().flush(flag, limit) if flag & zmq.POLLIN else 0


class NoSubshells:
    """What ipykernel calls its shell channel thread: false, and yet asked for the thread that runs cells."""

    parent_thread = threading.main_thread()

    def __bool__(self) -> bool:
        return False


class ForkedKernel(IPythonKernel):
    """ipykernel's kernel without subshells, which cost a thread and two hops of every message."""

    session: Any
    shell: Any
    shell_stream: Any
    _is_serving = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._sources: dict[str, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.shell.compile.get_code_name = self._name_of_cell
        _look_before_tokenizing(self.shell.input_transformer_manager)

    @property
    def _supports_kernel_subshells(self) -> bool:
        return False

    def _name_of_cell(self, raw_code: str, code: str, number: int) -> str:
        """A file name like ipykernel's, whose hash, for debuggers, takes 0.1 ms for 1,000 characters."""
        folder = get_tmp_directory()  # type: ignore[no-untyped-call]
        number = zlib.crc32(raw_code.encode("utf-8", "replace"))
        name = os.environ.get("IPYKERNEL_CELL_NAME") or f"{folder}{os.sep}{number}.py"
        self._sources.pop(name, None)
        self._sources[name] = None
        if len(self._sources) > SOURCES:
            oldest = next(iter(self._sources))
            del self._sources[oldest]
            linecache.cache.pop(oldest, None)
        return name

    def _publish_status(self, status: str, channel: str, parent: Any = None) -> None:
        parent = parent or self.get_parent(channel)  # type: ignore[no-untyped-call]
        message = self.session.msg("status", b'{"execution_state": "%s"}' % status.encode(), parent)
        self.iopub_thread.send_multipart(self.session.serialize(message, self._topic("status")))  # type: ignore[no-untyped-call]

    def start(self) -> None:
        super().start()  # type: ignore[no-untyped-call]
        self._context = contextvars.copy_context()
        self.shell_stream.on_recv(self._serve)

    def _serve(self, message: list[bytes]) -> None:
        """Serve a request, up to where it waits for something; only the rest becomes a task."""
        work = self.shell_main(None, message)
        if self._is_serving:  # an error of a cell aborts what has come in
            self._go_on(work)
            return
        self._is_serving = True
        try:
            waits_for = self._context.run(work.send, None)
        except StopIteration:
            return
        except BaseException:
            self.log.exception("a request could not be served")
            return
        finally:
            self._is_serving = False
        self._go_on(_rest(work, waits_for))

    def _go_on(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work, context=self._context)
        self._tasks.add(task)  # the loop itself holds none
        task.add_done_callback(self._tasks.discard)

    async def execute_request(self, stream: Any, ident: Any, parent: Any) -> None:
        """As ipykernel's, which also pauses, for clients that stop reading at the reply."""
        try:
            content, metadata = parent["content"], self.init_metadata(parent)  # type: ignore[no-untyped-call]
            code, silent = content["code"], content.get("silent", False)
            cell_id = parent["metadata"].get("cellId")
        except (AttributeError, KeyError, TypeError):
            self.log.exception("an execute request without code: %s", parent)
            return
        if not silent:
            self._publish_execute_input(code, parent, self.execution_count)  # type: ignore[no-untyped-call]
        reply = await self.do_execute(
            code,
            silent,
            content.get("store_history", not silent),
            content.get("user_expressions", {}),
            content.get("allow_stdin", False),
            cell_id=cell_id,
        )
        for stream_of_cell in (sys.stdout, sys.stderr):
            if stream_of_cell is not None:
                stream_of_cell.flush()
        reply = json_clean(reply)  # type: ignore[no-untyped-call]
        metadata = self.finish_metadata(parent, metadata, reply)  # type: ignore[no-untyped-call]
        self.session.send(stream, "execute_reply", reply, parent, ident, metadata=metadata)
        if not silent and reply["status"] == "error" and content.get("stop_on_error", True):
            self._abort_queues(None)

    async def do_execute(
        self,
        code: str,
        silent: bool,
        store_history: bool = True,
        user_expressions: Any = None,
        allow_stdin: bool = False,
        *,
        cell_meta: Any = None,
        cell_id: Any = None,
    ) -> Any:
        """As ipykernel's, which transforms a cell twice, compiles it three times and looks at signatures."""
        shell: Any = self.shell
        shell._last_traceback, shell._last_traceback_during_displayhook = None, False
        fault = None
        try:
            transformed = shell.transform_cell(code)
        except Exception:  # noqa: BLE001 - of the input transformers; IPython shows it
            transformed, fault = code, sys.exc_info()
        options = {"silent": silent, "store_history": store_history, "cell_id": cell_id}
        if "await" in transformed or "async" in transformed:
            return await super().do_execute(  # type: ignore[no-untyped-call]
                code, user_expressions=user_expressions, allow_stdin=allow_stdin, **options
            )
        self._forward_input(allow_stdin)  # type: ignore[no-untyped-call]
        result = None
        try:
            result = self.run_plain_cell(
                code, transformed_cell=transformed, preprocessing_exc_tuple=fault, **options
            )
            error = result.error_in_exec if result.error_before_exec is None else result.error_before_exec
        except BaseException as caught:  # noqa: BLE001 - an interrupt outside of the cell's own code
            error = caught
            shell.showtraceback(running_compiled_code=True)
        finally:
            shell.events.trigger("post_execute")
            if not silent:
                shell.events.trigger("post_run_cell", result)
            self._restore_input()  # type: ignore[no-untyped-call]
        return self._reply(error, user_expressions or {})

    def run_plain_cell(self, code: str, transformed_cell: str | None = None, **options: Any) -> Any:
        """Run a cell that awaits nothing."""
        transformed = self.shell.transform_cell(code) if transformed_cell is None else transformed_cell
        cell = self.shell.run_cell_async(code, transformed_cell=transformed, **options)
        return _pseudo_sync_runner(cell)  # type: ignore[no-untyped-call]

    def _reply(self, error: BaseException | None, user_expressions: dict[str, str]) -> dict[str, Any]:
        shell: Any = self.shell
        reply: dict[str, Any] = {"status": "ok", "execution_count": shell.execution_count - 1}
        if error is None and not getattr(shell, "_last_traceback_during_displayhook", False):
            reply["user_expressions"] = shell.user_expressions(user_expressions) if user_expressions else {}
        else:
            reply |= {
                "status": "error",
                "traceback": shell._last_traceback or [],
                "ename": type(error).__name__,
                "evalue": str(error),
                "user_expressions": {},
            }
        reply["payload"] = shell.payload_manager.read_payload()
        shell.payload_manager.clear_payload()
        return reply


def _look_before_tokenizing(manager: Any) -> None:
    """Spare cells in plain Python IPython's search for its own syntax: 0.35 ms of 1,000 characters.

    What its transformers look for begins with, or contains, one of a few characters.
    """
    known, search = list(manager.token_transformers), manager.do_one_token_transform

    def do_one_token_transform(lines: list[str]) -> tuple[bool, list[str]]:
        is_plain = manager.token_transformers == known and not any(map(_has_special_syntax, lines))
        return (False, lines) if is_plain else search(lines)

    manager.do_one_token_transform = do_one_token_transform


def _has_special_syntax(line: str) -> bool:
    return "%" in line or "!" in line or "?" in line or line.lstrip().startswith((",", ";", "/"))


@types.coroutine
def _rest(work: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """What is left of a coroutine that was begun outside a task and waits for a future."""
    while True:
        try:
            sent = yield waits_for
        except BaseException as error:  # noqa: BLE001 - a cancellation is the coroutine's
            step = functools.partial(work.throw, error)
        else:
            step = functools.partial(work.send, sent)
        try:
            waits_for = step()
        except StopIteration:
            return
