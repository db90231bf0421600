"""The channels of a forked kernel: ipykernel's parts, without queues, waits and other threads in between.

Runs in the template and in the kernels forked from it, on ipykernel 7 alone. Whatever is replaced here keeps
its meaning: the messages, their order and their contents are ipykernel's.
"""

from __future__ import annotations

import functools
import hmac
import itertools
import os
import threading
from collections import deque
from typing import Any

import zmq
from ipykernel.iostream import BackgroundSocket, IOPubThread
from jupyter_client._version import protocol_version
from jupyter_client.adapter import adapt
from jupyter_client.session import DELIM, Session, utcnow
from zmq.backend import Socket as BackendSocket
from zmq.eventloop.zmqstream import ZMQStream

LISTENING_SECONDS = 2  # a cell may have stopped the thread
PARTS = 5  # of a message behind its delimiter: the signature, and four that are signed


class Sender:
    """`socket.send_multipart` that sends the rest, too, when a signal handler of a cell's raises in between.

    The loop is `map`'s, so that Python itself runs no handler between two frames; but pyzmq does.
    """

    def __init__(self, socket: Any) -> None:
        self._send = functools.partial(BackendSocket.send, socket)

    def __call__(self, frames: list[Any]) -> None:
        more = itertools.repeat(int(zmq.SNDMORE), len(frames) - 1)
        sending, raised = map(self._send, frames, itertools.chain(more, (0,))), None
        while True:
            try:
                deque(sending, 0)
                break
            except zmq.ZMQError:  # the socket is closed: nothing of it was sent
                raise
            except BaseException as error:  # noqa: BLE001 - of a handler
                raised = raised or error
        if raised is not None:
            raise raised


class Publisher(IOPubThread):
    """ipykernel's IOPub thread without a thread: who publishes sends, one after another.

    The hand-over cost each message a wake-up and a fight for the GIL, and the end of a cell four waits.
    """

    sends_at_once = True
    at_work: frozenset[Any]
    """The code in which an interrupt would cost a message."""

    def __init__(self) -> None:
        self.background_socket = BackgroundSocket(self)  # type: ignore[no-untyped-call]
        self.socket, self._master_pid = None, os.getpid()
        self.lock = threading.RLock()
        """Of the streams, too: with one each, a `__del__` that prints could wait for another for ever."""
        self.after_send: Any = None
        self._outgoing: deque[list[Any]] = deque()
        self._is_sending = False

    def open(self, socket: Any, session: Any, thread: Any) -> None:
        """Publish on `socket`; subscriptions, and children's messages, are read in the loop of `thread`."""
        self.socket, self.session, self.thread, self.io_loop = socket, session, thread, thread.io_loop
        self._stopped, self._pipe_flag, self._master_pid = False, False, os.getpid()
        self._send = Sender(socket)
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
        with self.lock:
            if self.socket is None:
                return
            self._outgoing.append(msg)
            if self._is_sending:  # in a signal handler of the cell's, in the middle of a message
                return
            self._is_sending = True
            try:
                while self._outgoing and self.socket is not None:
                    self._send(self._outgoing.popleft())
            finally:
                self._is_sending = False
            # Sending can swallow the edge that tells of a subscription.
            if self.socket is not None and self.socket.get(zmq.EVENTS) & zmq.POLLIN:
                self.schedule(self._take_subscriptions)
        if self.after_send is not None:
            self.after_send()

    def _take_subscriptions(self) -> None:
        with self.lock:
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
        self.lock = threading.RLock()  # another thread of the parent may have held it
        self._outgoing.clear()
        self._is_sending = False

    def stop(self) -> None:
        """Close what is not `socket`; the thread is its owner's, who has ended it before."""
        if hasattr(self, "_pipe_in"):
            self._pipe_in.socket.close()


Publisher.at_work = frozenset({Publisher.send_multipart.__code__, Sender.__call__.__code__})


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
        views = [memoryview(buffer) for buffer in buffers or ()]
        if not all(view.contiguous for view in views):  # found out later, it would be half a message
            raise ValueError("a buffer is not contiguous")
        if stream is not None:
            stream.send_multipart([*self.serialize(message, ident), *views])
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

    is_flushing = False

    def __init__(self, socket: Any) -> None:
        super().__init__(socket)
        self._send = Sender(socket)

    def send_multipart(self, msg: list[Any], *_: Any, **__: Any) -> None:  # type: ignore[override]
        self._send(msg)
        # Sending can swallow the edge that tells of the next request.
        if int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self.io_loop.add_callback(self._handle_events, self.socket, 0)

    def flush(self, flag: int = zmq.POLLIN | zmq.POLLOUT, limit: int | None = None) -> int:
        """Take in what is there; the callback sees to it by `is_flushing` that it is served later."""
        if not flag & zmq.POLLIN:
            return 0
        was_flushing, self.is_flushing = self.is_flushing, True
        try:
            return super().flush(flag, limit)
        finally:
            self.is_flushing = was_flushing
