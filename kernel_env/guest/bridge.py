"""Kernel end of the helper channel: a Unix socket to the host, and functions that call through it.

Runs inside the kernel, on the standard library alone. A frame is eight bytes of length (big endian),
then JSON. Every thread of every process has a connection of its own and one request on it at a time.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import json
import mmap
import os
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LENGTH = struct.Struct(">Q")
DECODE_PIECE = 2**24

_cell: contextvars.ContextVar[str | None] = contextvars.ContextVar("kernel_env_cell", default=None)


class HelperError(Exception):
    """Raised when the host could not serve a helper call."""


class HelperFailure(str):
    """The failed item of a batch; reads as the error, which is also in `.error`."""

    @property
    def error(self) -> str:
        return str(self)


class Verbatim(str):
    """Text that prints without quotes, also as a result or a default."""

    def __repr__(self) -> str:
        return str(self)


class Channel:
    """The way to the host: one authenticated connection per process and thread, opened on first use."""

    def __init__(self, path: str, token: str, frame_bytes: int) -> None:
        self._path = path
        self._token = token
        self._frame_bytes = frame_bytes
        self._local = threading.local()

    def request(self, message: dict[str, Any]) -> Any:
        """Send one request and wait for its reply.

        Raises HelperError with the host's reason. Anything raised while waiting, KeyboardInterrupt
        above all, closes the connection: a late reply must not be read as the next one, and the host
        takes the end of the connection as a cancellation.
        """
        __tracebackhide__ = True
        payload = self._encode(message)
        connection = self._connection()
        try:
            connection.sendall(LENGTH.pack(len(payload)) + payload)
            reply = json.loads(
                _receive_exactly(connection, *LENGTH.unpack(_receive_exactly(connection, LENGTH.size)))
            )
        except BaseException as error:
            self._close()
            if isinstance(error, (OSError, EOFError)):
                raise HelperError(f"the host closed the helper channel ({error})") from None
            raise
        return _result(reply)

    def receive_context(self) -> Any:
        """The episode's context: text decoded piece by piece, or the value of its JSON."""
        payload = self._encode({"op": "context"})
        connection = self._connection()
        try:
            connection.sendall(LENGTH.pack(len(payload)) + payload)
            head, fds, _, _ = socket.recv_fds(connection, LENGTH.size, 1)
            head += _receive_exactly(connection, LENGTH.size - len(head))
            reply = json.loads(_receive_exactly(connection, *LENGTH.unpack(head)))
        except BaseException:
            self._close()
            raise
        description = _result(reply)
        try:
            text = _decode(fds[0], description["bytes"])
        finally:
            os.close(fds[0])
        return text if description["type"] == "str" else json.loads(text)

    def _encode(self, message: dict[str, Any]) -> bytes:
        payload = json.dumps({**message, "cell": current_cell()}, allow_nan=False).encode("ascii")
        if len(payload) > self._frame_bytes:
            raise HelperError(
                f"the call has {len(payload):,} bytes; Limits.helper_frame_bytes is {self._frame_bytes:,}"
            )
        return payload

    def _connection(self) -> socket.socket:
        # A forked child inherits the parent's thread-locals, but must not share its connection.
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.connection = None
            self._local.pid = os.getpid()
        if self._local.connection is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(self._path)
                hello = json.dumps({"token": self._token}).encode("ascii")
                connection.sendall(LENGTH.pack(len(hello)) + hello)
            except OSError as error:
                connection.close()
                raise HelperError(f"the host's helper channel is gone ({error})") from None
            self._local.connection = connection
        return self._local.connection  # type: ignore[no-any-return]

    def _close(self) -> None:
        connection, self._local.connection = self._local.connection, None
        connection.close()


def _receive_exactly(connection: socket.socket, size: int) -> bytearray:
    received = bytearray(size)
    view = memoryview(received)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError("connection closed")
        view = view[count:]
    return received


def _result(reply: dict[str, Any]) -> Any:
    __tracebackhide__ = True
    if "error" in reply:
        raise HelperError(reply["error"])
    value = reply["ok"]
    for index in reply.get("failed", ()):
        value[index] = HelperFailure(value[index])
    return value


def _decode(fd: int, size: int) -> str:
    """Decode UTF-8 (with lone surrogates) from a memfd, giving its memory back as the text grows.

    `text += piece` grows in place as long as `text` has one owner: for 1 GB of ASCII host and kernel
    together stay near 2 GB, where decoding it whole takes 3.
    """
    if not size:
        return ""
    text = ""
    with mmap.mmap(fd, size) as memory:
        start = 0
        while start < size:
            end = min(start + DECODE_PIECE, size)
            while end < size and memory[end] & 0xC0 == 0x80:
                end += 1
            text += str(memory[start:end], "utf-8", "surrogatepass")
            if hasattr(mmap, "MADV_REMOVE") and end - start >= DECODE_PIECE:
                first = start // mmap.PAGESIZE * mmap.PAGESIZE
                memory.madvise(mmap.MADV_REMOVE, first, end // mmap.PAGESIZE * mmap.PAGESIZE - first)
            start = end
    return text


def proxy(channel: Channel, description: dict[str, Any]) -> Any:
    """A function that calls the host's helper of that name, with its signature and docstring.

    Wrong arguments are a TypeError here, without a round trip.
    """
    name = description["name"]
    signature = inspect.Signature(
        [_parameter(p) for p in description["parameters"]],
        return_annotation=_annotation(description["returns"]),
    )

    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        try:
            arguments = signature.bind(*args, **kwargs).arguments
            for key, value in arguments.items():
                _check_type(key, value, signature.parameters[key].annotation)
            json.dumps(arguments, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}(): {error}") from None
        return channel.request({"op": "call", "name": name, "arguments": dict(arguments)})

    call.__name__ = call.__qualname__ = name
    call.__doc__ = description["doc"]
    call.__module__ = "kernel_env"
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _parameter(description: dict[str, Any]) -> inspect.Parameter:
    default = Verbatim(description["default"]) if "default" in description else inspect.Parameter.empty
    return inspect.Parameter(
        description["name"],
        getattr(inspect.Parameter, description["kind"]),
        default=default,
        annotation=_annotation(description["annotation"]),
    )


def _annotation(text: str | None) -> Any:
    return inspect.Signature.empty if text is None else Verbatim(text)


def _check_type(name: str, value: Any, annotation: Any) -> None:
    allowed = str(annotation).split(" | ")
    if value is None and "None" in allowed:
        return
    if "str" in allowed and not isinstance(value, str):
        raise TypeError(f"{name} must be str, not {type(value).__name__}")
    if "list[str]" in allowed:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list of str, not {type(value).__name__}")
        for index, item in enumerate(value):
            if not isinstance(item, str):
                raise TypeError(f"{name}[{index}] must be str, not {type(item).__name__}")


def current_cell() -> str | None:
    """The id of the cell that started this thread or task, which may be one that has ended."""
    return _cell.get() or getattr(threading.current_thread(), "_kernel_env_cell", None)


def enter_cell(cell: str) -> None:
    """Let everything that starts from here on belong to `cell`."""
    _cell.set(cell)


def _run_in_cell(cell: str | None, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    token = _cell.set(cell)
    try:
        return function(*args, **kwargs)
    finally:
        _cell.reset(token)


def tag_threads() -> None:
    """Make threads carry the cell that started them, and pooled work the cell that submitted it.

    A new thread has an empty context, so the context variable alone loses its origin; a pool's
    threads outlive the cell that made the pool.
    """
    start = threading.Thread.start
    submit: Any = ThreadPoolExecutor.submit
    if hasattr(start, "_kernel_env"):
        return

    @functools.wraps(start)
    def tagged_start(self: threading.Thread) -> None:
        self._kernel_env_cell = current_cell()  # type: ignore[attr-defined]
        start(self)

    @functools.wraps(submit)
    def tagged_submit(self: ThreadPoolExecutor, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return submit(self, _run_in_cell, current_cell(), fn, *args, **kwargs)

    tagged_start._kernel_env = True  # type: ignore[attr-defined]
    threading.Thread.start = tagged_start  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = tagged_submit  # type: ignore[method-assign,assignment]
