"""Kernel end of the helper channel: a Unix socket to the host, and functions that call through it.

Runs inside the kernel and in processes it starts, on the standard library alone. A frame is eight bytes of
length (big endian), then JSON in UTF-8 with `surrogatepass`. Every thread of every process has a connection
of its own and one request on it at a time. What a cell may replace in `socket`, `json` or `os` is taken at
import: the channel must outlive a monkeypatch.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import json
import mmap
import os
import struct
import sys
import threading
import types
from _socket import AF_UNIX, CMSG_LEN, SOCK_STREAM
from _socket import socket as Socket  # the C type: the methods of the one in `socket` can be replaced
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from os import environ, getpid
from typing import Any

LENGTH = struct.Struct(">Q")
FD = struct.Struct("i")
FIRST_READ = 2**16
SHOWN_ANSWER_CHARS = 200

MODULE = "kernel_env_helpers"  # where a spawned process finds them: `child.py` under this name
CELL_VARIABLE = "KERNEL_ENV_CELL"

_to_json = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
_from_json = json.JSONDecoder().decode

# A process that a cell spawns has nothing of this but its environment variables.
_spawned_in = environ.get(CELL_VARIABLE)
_cell: contextvars.ContextVar[str | None] = contextvars.ContextVar("kernel_env_cell", default=_spawned_in)


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

    def __init__(self, path: str, token: str, frame_bytes: int, answer_bytes: int) -> None:
        self._path = path
        self._token = token
        self._frame_bytes = frame_bytes
        self._answer_bytes = answer_bytes
        self._local = threading.local()

    def encode(self, message: dict[str, Any]) -> bytes:
        """The frame of a request of the present cell.

        Raises TypeError or ValueError for what is no JSON value, HelperError for what is too large.
        """
        payload = _to_json({**message, "cell": current_cell()}).encode("utf-8", "surrogatepass")
        if len(payload) > self._frame_bytes and message["op"] != "submit":  # an answer has a limit of its own
            raise HelperError(
                f"the call has {len(payload):,} bytes; Limits.helper_frame_bytes is {self._frame_bytes:,}"
            )
        return LENGTH.pack(len(payload)) + payload

    def exchange(self, frame: bytes) -> Any:
        """Send one request and wait for its reply.

        Raises HelperError with the host's reason. Anything raised while waiting, KeyboardInterrupt
        above all, closes the connection: a late reply must not be read as the next one, and the host
        takes the end of the connection as a cancellation.
        """
        __tracebackhide__ = True
        connection = self._connection()
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # why it was closed stands in it
                connection.sendall(frame)
            reply = _from_json(_receive_frame(connection).decode("utf-8", "surrogatepass"))
        except BaseException as error:
            self._close()
            if isinstance(error, (OSError, EOFError)):
                raise HelperError(f"the host closed the helper channel ({error})") from None
            raise
        return _result(reply)

    def submit(self, text: str) -> None:
        """Send a text that leaves the kernel: a final answer, or the value the host asked for."""
        __tracebackhide__ = True
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > self._answer_bytes:
            raise HelperError(
                f"the answer has {size:,} bytes; Limits.answer_bytes is {self._answer_bytes:,}: shorten it"
            )
        self.exchange(self.encode({"op": "submit", "text": text}))

    def receive_context(self) -> Any:
        """The episode's context: its text, or the value of its JSON."""
        # `text += piece` grows in place while `text` has one owner: for 1 GB of ASCII, host and kernel stay
        # near 2 GB, where joining the pieces or decoding all at once takes 3. CPython 3.11 does so only in
        # a `for` loop; a `while` loop copies the text each time (31 s instead of 4).
        kind, text = "str", ""
        for kind, piece in self._context_pieces():  # noqa: B007 - read after the loop
            text += piece
        return text if kind == "str" else json.loads(text)

    def _context_pieces(self) -> Iterator[tuple[str, str]]:
        start: int | None = 0
        while start is not None:
            reply, fd = self._receive_piece(start)
            try:
                piece = ""
                if reply["bytes"]:
                    with mmap.mmap(fd, reply["bytes"], access=mmap.ACCESS_READ) as memory:
                        piece = str(memory, "utf-8", "surrogatepass")
            finally:
                os.close(fd)
            yield reply["type"], piece
            start = reply["next"]

    def _receive_piece(self, start: int) -> tuple[Any, int]:
        frame = self.encode({"op": "context", "start": start})
        connection = self._connection()
        try:
            connection.sendall(frame)
            head, ancillary, _, _ = connection.recvmsg(FIRST_READ, CMSG_LEN(FD.size))
            reply = _from_json(_receive_frame(connection, head).decode("utf-8", "surrogatepass"))
        except BaseException:  # as in `exchange`
            self._close()
            raise
        return _result(reply), FD.unpack(ancillary[0][2])[0]

    def _connection(self) -> Any:
        # A forked child inherits the parent's thread-locals, but must not share its connection.
        if getattr(self._local, "pid", None) != getpid():
            self._local.connection = None
            self._local.pid = getpid()
        if self._local.connection is None:
            self._local.connection = self.connect()
        return self._local.connection

    def connect(self) -> Any:
        """A new authenticated connection.

        Raises HelperError if the host no longer listens.
        """
        connection = Socket(AF_UNIX, SOCK_STREAM)
        hello = _to_json({"token": self._token}).encode("ascii")
        try:
            connection.connect(self._path)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(LENGTH.pack(len(hello)) + hello)
        except OSError as error:
            connection.close()
            raise HelperError(f"the host's helper channel is gone ({error})") from None
        return connection

    def _close(self) -> None:
        connection, self._local.connection = self._local.connection, None
        connection.close()


def _receive_frame(connection: Any, head: bytes = b"") -> bytes | bytearray:
    """One frame; nothing can follow it before the next request, so most come with a single read."""
    while len(head) < LENGTH.size:
        head += _received(connection.recv(FIRST_READ))
    size = LENGTH.unpack_from(head)[0]
    body = head[LENGTH.size :]
    if len(body) == size:
        return body
    frame = bytearray(size)
    frame[: len(body)] = body
    rest = memoryview(frame)[len(body) :]
    while rest:
        rest = rest[_received(connection.recv_into(rest)) :]
    return frame


def _received(data: Any) -> Any:
    if not data:
        raise EOFError("connection closed")
    return data


def _result(reply: dict[str, Any]) -> Any:
    __tracebackhide__ = True
    if "error" in reply:
        raise HelperError(reply["error"])
    value = reply["ok"]
    for index in reply.get("failed", ()):
        value[index] = HelperFailure(value[index])
    return value


def functions(options: dict[str, Any]) -> tuple[Channel, dict[str, Any]]:
    """The channel, and the functions over it that need nothing but it, by name."""
    channel = Channel(options["socket"], options["token"], options["frame_bytes"], options["answer_bytes"])

    def FINAL(value: Any) -> Any:
        """Submit `str(value)` as the final answer; the episode ends with this cell."""
        __tracebackhide__ = True
        text = str(value)
        channel.submit(text)
        shown = text if len(text) <= SHOWN_ANSWER_CHARS else text[:SHOWN_ANSWER_CHARS] + "…"
        return Verbatim(f"FINAL({shown})")

    FINAL.__qualname__, FINAL.__module__ = "FINAL", MODULE
    made = {description["name"]: proxy(channel, description) for description in options["helpers"]}
    return channel, {"HelperError": HelperError, "HelperFailure": HelperFailure, "FINAL": FINAL, **made}


def proxy(channel: Channel, description: dict[str, Any]) -> Any:
    """A function that calls the host's helper of that name, with its signature and docstring.

    Wrong arguments are a TypeError here, without a round trip.
    """
    name = description["name"]
    signature = inspect.Signature(
        [_parameter(p) for p in description["parameters"]],
        return_annotation=_annotation(description["returns"]),
    )

    ordinary = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_position = [p.name for p in ordinary] if len(ordinary) == len(signature.parameters) else []
    required = sum(p.default is p.empty for p in ordinary)
    kinds = {key: str(p.annotation).split(" | ") for key, p in signature.parameters.items()}
    checks = kinds if description["is_typed"] else {}

    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        try:
            if not kwargs and required <= len(args) <= len(by_position):
                arguments = dict(zip(by_position, args))  # noqa: B905 - Python 3.9; what `bind` does, in a tenth of its time
            else:
                arguments = signature.bind(*args, **kwargs).arguments
            for key, allowed in checks.items():
                if key in arguments:
                    _check_type(key, arguments[key], allowed)
            frame = channel.encode({"op": "call", "name": name, "arguments": arguments})
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}(): {error}") from None
        return channel.exchange(frame)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = description["doc"]
    call.__module__ = MODULE
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


def _check_type(name: str, value: Any, allowed: list[str]) -> None:
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


def publish(helpers: dict[str, Any], folder: str) -> None:
    """Let processes that a cell spawns import the helpers that it hands to them."""
    module = types.ModuleType(MODULE, "The functions that the host gives to this kernel.")
    module.__dict__.update(helpers)
    sys.modules[MODULE] = module
    if folder not in sys.path:
        sys.path.append(folder)


def current_cell() -> str | None:
    """The id of the cell that started this thread or task, which may be one that has ended."""
    return _cell.get() or getattr(threading.current_thread(), "_kernel_env_cell", None)


def enter_cell(cell: str) -> None:
    """Let everything that this thread or task starts from here on belong to `cell`."""
    _cell.set(cell)
    if threading.current_thread() is threading.main_thread():  # not a subshell beside a cell of ours
        environ[CELL_VARIABLE] = cell


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
