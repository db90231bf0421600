"""Host end of the helper channel: authenticate, decode, validate, dispatch, reply, record.

A Unix socket in the kernel's private folder. A frame is eight bytes of length (big endian), then JSON in
UTF-8 with `surrogatepass`: as escapes, two lone surrogates would come back as one character. The first frame
of a connection holds the kernel's token. Then, one at a time for each connection:

    {"op": "call", "cell": id, "name": …, "arguments": {…}}  →  {"ok": value, "failed": [index…]}
    {"op": "submit", "cell": id, "text": …}                  →  {"ok": null}
    {"op": "context", "start": n}                            →  {"ok": {…}} with a memfd
    {"op": "broken", "cell": id, "text": …}                  →  {"ok": null}: no reply can come any more

or `{"error": text}`. `cell` is the id of the execute request that the call belongs to; a call of any
other cell than the one that runs is refused. Nothing that comes in is trusted.
"""

from __future__ import annotations

import asyncio
import fcntl
import hmac
import json
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from kernel_env.calls import Cell, Helper, HelperFailure
from kernel_env.config import Limits
from kernel_env.episode import Context, HelperCall
from kernel_env.errors import HelperError
from kernel_env.refusals import Refusals

__all__ = ["Bridge"]

log = logging.getLogger("kernel_env.bridge")

_LENGTH = struct.Struct(">Q")
_HELLO_BYTES = 4096
_BACKLOG = 128  # asyncio accepts as many of the host's descriptors before it can refuse one
_CONTEXT_PIECE = 2**24
_CONTEXTS = 100
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_ENCODED_AT_ONCE = 2**18  # small enough for memory that is there already: 0.24 s for 1 GB instead of 1.4
_to_json = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_from_json = json.JSONDecoder(parse_constant=_refuse_constant).decode


class Bridge:
    """The helper channel of one kernel process."""

    def __init__(
        self, path: Path, helpers: Mapping[str, Helper], context: Context, limits: Limits, *, served: int = 0
    ) -> None:
        self.path = path
        self.token = secrets.token_hex(32)
        self._helpers = helpers
        self._context = context
        self._limits = limits
        self._handed_out = 0  # characters of the context
        self.served = served
        """Helper calls of this episode, those that were served to earlier kernels of it among them."""
        self._cell: Cell | None = None
        self.connections: set[_Connection] = set()
        self.buffered = 0
        """Bytes of frames that have not come in whole."""
        self.refusals = Refusals(f"kernel in {path.parent.name}")
        """Connections, frames and requests that were turned away, calls of ended cells among them."""
        self._server: asyncio.Server | None = None
        self.is_closed = False
        self._memfd: int | None = None

    def begin_episode(self, helpers: Mapping[str, Helper], context: Context, limits: Limits) -> None:
        """Serve these from here on."""
        self._helpers, self._context, self._limits = helpers, context, limits

    async def open(self) -> None:
        """Listen; the folder of `path` keeps other users out, the token everybody else."""
        loop = asyncio.get_running_loop()
        # In two steps: cancelled while it waits to serve, the first alone would leave its socket open.
        self._server = await loop.create_unix_server(
            lambda: _Connection(self), self.path, backlog=_BACKLOG, start_serving=False
        )
        await self._server.start_serving()

    def close(self) -> None:
        """Stop listening, drop every connection, cancel every call."""
        self.is_closed = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.abort()
        self._close_memfd()

    def begin(self, cell_id: str) -> Cell:
        """Serve the calls of this cell from here on, and of no other."""
        self._cell = Cell(cell_id)
        return self._cell

    def end(self, cell: Cell) -> None:
        """Refuse the calls of `cell` from here on."""
        cell.cancel("its cell has ended")
        if self._cell is cell:
            self._cell = None

    def cell_of(self, request: dict[str, Any]) -> Cell:
        """The running cell, if `request` is its own.

        Raises:
            HelperError: it belongs to another cell.
        """
        cell = self._cell
        if cell is None or request.get("cell") != cell.id:
            raise self.refuse("its cell has ended, or it was started by no cell of this episode")
        return cell

    @property
    def is_stopping(self) -> bool:
        """Whether the kernel's calls are being ended: those of a cell, or all."""
        return self.is_closed or (self._cell is not None and self._cell.refusal is not None)

    def refuse(self, why: str) -> HelperError:
        """Count what the kernel has no right to; returns the error to reply with."""
        self.refusals.add(f"a request on the helper channel: {why}")
        return HelperError(f"refused: {why}")

    async def call(self, request: dict[str, Any]) -> bytes:
        """Serve a helper call and record it; returns the encoded reply."""
        cell = self.cell_of(request)
        if cell.refusal is not None:
            raise HelperError(f"refused: {cell.refusal}")
        name, arguments = request.get("name"), request.get("arguments")
        helper = self._helpers.get(name) if isinstance(name, str) else None
        if helper is None or not isinstance(name, str) or not isinstance(arguments, dict):
            raise HelperError("refused: there is no such helper")
        args, kwargs = helper.bind(name, arguments)
        prompts = arguments.get("prompts") if helper.is_typed else None
        wanted = self.served + (max(len(prompts), 1) if isinstance(prompts, list) else 1)
        if wanted > self._limits.helper_calls:
            raise HelperError(
                f"refused: this would be helper call {wanted:,} of the episode, "
                f"and Limits.helper_calls = {self._limits.helper_calls:,}"
            )
        self.served = wanted
        task = asyncio.current_task()
        assert task is not None
        started, clock = time.time(), time.monotonic()
        result, error = None, None
        cell.enter(task)
        try:
            result = await helper.function(*args, **kwargs)
            reply = _encode_result(name, result)
        except asyncio.CancelledError:
            error = f"{name} was cancelled: {cell.refusal or 'the caller went away'}"
            raise
        except HelperError as failure:
            error = str(failure)
            raise
        finally:
            cell.leave(task)
            cell.calls.append(
                HelperCall(
                    name=name,
                    arguments=arguments,
                    result=None if error else _as_sent(result),
                    failed=_failures(result),
                    error=error,
                    started=started,
                    duration=time.monotonic() - clock,
                )
            )
        return reply

    def submit(self, request: dict[str, Any]) -> None:
        """Keep the text as the answer of its cell; the last one counts."""
        cell, text = self.cell_of(request), request.get("text")
        if not isinstance(text, str):
            raise HelperError("refused: an answer is text")
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > self._limits.answer_bytes:
            raise HelperError(
                f"the answer has {size:,} bytes; Limits.answer_bytes is {self._limits.answer_bytes:,}"
            )
        cell.answer = text

    def take_broken(self, request: dict[str, Any]) -> None:
        """Pass on that the kernel cannot reply."""
        cell, text = self.cell_of(request), request.get("text")
        if cell.on_broken is not None:
            cell.on_broken(text[:500] if isinstance(text, str) else "it does not say why")

    async def serve(self, request: dict[str, Any], connection: _Connection) -> None:
        """Serve one request of an authenticated connection."""
        fd = None
        try:
            match request.get("op"):
                case "call":
                    reply = await self.call(request)
                case "submit":
                    self.submit(request)
                    reply = _encode({"ok": None})
                case "broken":
                    self.take_broken(request)
                    reply = _encode({"ok": None})
                case "context":
                    fd, description = self.context_piece(request)
                    reply = _encode({"ok": description})
                case _:
                    raise self.refuse("unknown request")
        except HelperError as error:
            reply = _encode({"error": str(error)})
        except asyncio.CancelledError:
            reply = _encode({"error": "the call was cancelled: its cell was stopped"})
        except Exception:  # a fault of ours: without a reply the cell would wait for ever
            log.exception("a helper request could not be served")
            reply = _encode({"error": "the host could not serve the call"})
        connection.reply(reply, fd)

    def context_piece(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """A memfd with the context from character `start` on, and what it holds.

        Piece by piece, all in the same few pages: a memfd of the whole would be a third copy beside those
        of host and kernel, and most of the time would go into the faults of its fresh pages.
        """
        start, text = request.get("start"), self._context.text
        if not isinstance(start, int) or not 0 <= start <= len(text):
            raise self.refuse("the context has no such place")
        end, size = min(start + _CONTEXT_PIECE, len(text)), 0
        self._handed_out += end - start
        if self._handed_out > _CONTEXTS * len(text) + _CONTEXT_PIECE:
            raise self.refuse("the kernel has had the context too often")
        if self._memfd is None:
            self._memfd = os.memfd_create("context", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self._memfd, 4 * min(_CONTEXT_PIECE, len(text)))
            # Else it would be memory that a kernel could take without a limit.
            fcntl.fcntl(self._memfd, fcntl.F_ADD_SEALS, _SEALS)
        for at in range(start, end, _ENCODED_AT_ONCE):
            data = text[at : min(at + _ENCODED_AT_ONCE, end)].encode("utf-8", "surrogatepass")
            size += os.pwrite(self._memfd, data, size)
        fd, following = os.dup(self._memfd), end if end < len(text) else None
        if following is None:
            self._close_memfd()
        return fd, {"bytes": size, "next": following, "type": self._context.type}

    def _close_memfd(self) -> None:
        if self._memfd is not None:
            os.close(self._memfd)
        self._memfd = None

    @property
    def most_connections(self) -> int:
        # Every thread keeps one, and one is the kernel's own; the host's file descriptors are not ours alone.
        return 4 * self._limits.helper_concurrency + 1

    @property
    def frame_bytes(self) -> int:
        return self._limits.helper_frame_bytes

    @property
    def largest_frame(self) -> int:
        # An answer of control characters takes six bytes of JSON for each of its own.
        return max(self._limits.helper_frame_bytes, 6 * self._limits.answer_bytes + _HELLO_BYTES)


class _Connection(asyncio.Protocol):
    """One connection of one thread in the kernel: one request at a time."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._buffer = bytearray()
        self._authenticated = False
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # not one by inheritance in every loop: uvloop
        if self._bridge.is_closed:  # it was accepted just before
            self._transport.abort()
            return
        if len(self._bridge.connections) >= self._bridge.most_connections:
            error = self._bridge.refuse(
                f"more than {self._bridge.most_connections} threads hold a connection"
            )
            self.reply(_encode({"error": str(error)}), None)
            self._transport.close()
            return
        self._bridge.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._bridge.connections.discard(self)
        if self._buffer and not self._bridge.is_stopping:  # else what was sent is broken off by our own doing
            self._bridge.refusals.add(f"a frame that broke off after {len(self._buffer)} bytes")
        self._drop_buffer()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        """The kernel does not read its replies: it has to before it asks for more."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        before = len(self._buffer)
        self._buffer += data
        fault = self._take_frames()
        self._bridge.buffered += len(self._buffer) - before
        if fault is None and self._bridge.buffered > 2 * self._bridge.largest_frame:
            fault = f"{self._bridge.buffered} bytes of unfinished frames"
        if fault is not None:
            self._bridge.refusals.add(f"{fault} on the helper channel; the connection is dropped")
            self._drop_buffer()
            self.abort()

    def _drop_buffer(self) -> None:
        self._bridge.buffered -= len(self._buffer)
        self._buffer.clear()

    def _take_frames(self) -> str | None:
        """Serve the frames that are there; returns what is wrong with one."""
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > (self._bridge.largest_frame if self._authenticated else _HELLO_BYTES):
                return f"a frame of {size} bytes"
            if len(self._buffer) < _LENGTH.size + size:
                return None
            frame = self._buffer[_LENGTH.size : _LENGTH.size + size]
            del self._buffer[: _LENGTH.size + size]
            if not self._take(frame):
                return "a malformed or unauthenticated frame"
        return None

    def _take(self, frame: bytearray) -> bool:
        try:
            message = _from_json(frame.decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):
            return False
        if not isinstance(message, dict):
            return False
        if not self._authenticated:
            token = message.get("token")
            self._authenticated = isinstance(token, str) and hmac.compare_digest(
                token.encode("utf-8", "replace"), self._bridge.token.encode("ascii")
            )
            return self._authenticated
        if len(frame) > self._bridge.frame_bytes and message.get("op") != "submit":
            return False
        if self._task is not None and not self._task.done():
            return False
        self._task = asyncio.get_running_loop().create_task(self._bridge.serve(message, self))
        return True

    def reply(self, payload: bytes, fd: int | None) -> None:
        """Send a reply, with a file descriptor that is closed here in any case."""
        frame = _LENGTH.pack(len(payload)) + payload
        try:
            if self._transport.is_closing():
                return
            if fd is None:
                self._transport.write(frame)
            else:
                _send_with_fd(self._transport, frame, fd)
        except OSError as error:
            log.debug("the kernel went away before the reply: %s", error)
        finally:
            if fd is not None:
                os.close(fd)

    def abort(self) -> None:
        self._transport.abort()


def _send_with_fd(transport: asyncio.Transport, frame: bytes, fd: int) -> None:
    # asyncio's own socket object has no sendmsg; nothing is queued on a connection that waits for this reply.
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as connection:
        socket.send_fds(connection, [frame], [fd])


def _failures(result: Any) -> dict[int, str]:
    if not isinstance(result, list):
        return {}
    return {index: str(item) for index, item in enumerate(result) if isinstance(item, HelperFailure)}


def _as_sent(result: Any) -> Any:
    """What the kernel got, apart from what the user's function may still change."""
    if isinstance(result, str):
        return result
    if isinstance(result, list) and all(isinstance(item, str) for item in result):
        return list(result)
    return json.loads(_to_json(result))


def _encode_result(name: str, result: Any) -> bytes:
    try:
        return _encode({"ok": result, "failed": list(_failures(result))})
    except (TypeError, ValueError, RecursionError):
        raise HelperError(
            f"{name} failed: it returned a {type(result).__name__} that is no JSON value"
        ) from None


def _encode(reply: dict[str, Any]) -> bytes:
    return _to_json(reply).encode("utf-8", "surrogatepass")
