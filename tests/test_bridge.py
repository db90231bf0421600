"""The host's end of the helper channel, spoken to over a raw socket."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kernel_env import Limits
from kernel_env.bridge import Bridge
from kernel_env.calls import Helper
from kernel_env.episode import Context
from kernel_env.install import describe


async def echo(text: str, times: int = 1) -> str:
    """Say it again."""
    return text * times


class Hanging:
    """A helper that hangs, and says when it began and ended."""

    def __init__(self) -> None:
        self.began, self.ended = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> None:
        self.began.set()
        try:
            await asyncio.sleep(3600)
        finally:
            self.ended.set()


def helper(function: Any) -> Helper:
    return Helper(function, inspect.signature(function), "")


class Peer:
    """A client that may say anything."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(struct.pack(">Q", len(data)) + data)

    async def ask(self, **message: Any) -> Any:
        self.send(json.dumps(message).encode())
        (size,) = struct.unpack(">Q", await self.reader.readexactly(8))
        return json.loads(await self.reader.readexactly(size))

    async def is_dropped(self) -> bool:
        try:
            return await self.reader.read() == b""
        except ConnectionResetError:
            return True


@asynccontextmanager
async def bridge_and_peer(
    folder: Path, *, token: str | None = None, hanging: Hanging | None = None
) -> AsyncIterator[tuple[Bridge, Peer]]:
    limits = Limits(helper_frame_bytes=10_000)
    helpers = {"echo": helper(echo), "hang": helper(hanging or Hanging())}
    bridge = Bridge(folder / "h", helpers, Context.of("context"), limits)
    await bridge.open()
    peer = Peer(*await asyncio.open_unix_connection(folder / "h"))
    peer.send(json.dumps({"token": bridge.token if token is None else token}).encode())
    try:
        async with asyncio.timeout(20):
            yield bridge, peer
    finally:
        peer.writer.close()
        bridge.close()


def call(name: str, cell: str = "cell", **arguments: Any) -> dict[str, Any]:
    return {"op": "call", "cell": cell, "name": name, "arguments": arguments}


def test_a_call_is_served_and_recorded(temporary_folder: Path) -> None:
    async def body() -> None:
        async with bridge_and_peer(temporary_folder) as (bridge, peer):
            cell = bridge.begin("cell")
            assert await peer.ask(**call("echo", text="a", times=2)) == {"ok": "aa", "failed": []}
            assert [(c.name, c.result) for c in cell.calls] == [("echo", "aa")]
            assert cell.waited > 0

    asyncio.run(body())


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (call("echo", "other", text="a"), "refused: its cell has ended"),
        ({"op": "call", "name": "echo", "arguments": {}}, "refused: its cell has ended"),
        (call("missing"), "refused: there is no such helper"),
        (call("__init__"), "refused: there is no such helper"),
        (
            {"op": "call", "cell": "cell", "name": "echo", "arguments": [1]},
            "refused: there is no such helper",
        ),
        (
            {"op": "call", "cell": "cell", "name": ["echo"], "arguments": {}},
            "refused: there is no such helper",
        ),
        (call("echo"), "echo: missing a required argument: 'text'"),
        (call("echo", text="a", extra=1), "echo: unexpected arguments ['extra']"),
        ({"op": "submit", "cell": "cell", "text": 5}, "refused: an answer is text"),
        ({"op": "submit", "cell": "other", "text": "a"}, "refused: its cell has ended"),
        ({"op": "context", "start": -1}, "refused: the context has no such place"),
        ({"op": "eval"}, "refused: unknown request"),
        ({}, "refused: unknown request"),
    ],
)
def test_what_is_not_in_the_protocol_is_refused(
    temporary_folder: Path, request_: dict[str, Any], error: str
) -> None:
    async def body() -> None:
        async with bridge_and_peer(temporary_folder) as (bridge, peer):
            cell = bridge.begin("cell")
            reply = await peer.ask(**request_)
            assert reply["error"].startswith(error)
            assert (cell.answer, cell.calls) == (None, [])

    asyncio.run(body())


@pytest.mark.parametrize("token", ["", "wrong", "\ud800"])
def test_a_wrong_token_drops_the_connection(temporary_folder: Path, token: str) -> None:
    async def body() -> None:
        async with bridge_and_peer(temporary_folder, token=token) as (_, peer):
            assert await peer.is_dropped()

    asyncio.run(body())


@pytest.mark.parametrize(
    "data", [b"not json", b"[]", b"\xff\xff", b"[" * 9000, b'{"op": ', b"x" * 20_000], ids=range(6)
)
def test_a_malformed_frame_drops_the_connection_and_no_other(temporary_folder: Path, data: bytes) -> None:
    async def body() -> None:
        async with bridge_and_peer(temporary_folder) as (bridge, peer):
            bridge.begin("cell")
            assert "ok" in await peer.ask(**call("echo", text="a"))
            other = Peer(*await asyncio.open_unix_connection(bridge.path))
            other.send(json.dumps({"token": bridge.token}).encode())
            other.send(data)
            assert await other.is_dropped()
            other.writer.close()
            assert "ok" in await peer.ask(**call("echo", text="a"))

    asyncio.run(body())


def test_a_stopped_cell_has_its_calls_cancelled_and_refused(temporary_folder: Path) -> None:
    async def body() -> None:
        hanging = Hanging()
        async with bridge_and_peer(temporary_folder, hanging=hanging) as (bridge, peer):
            cell = bridge.begin("cell")
            waiting = asyncio.create_task(peer.ask(**call("hang")))
            await hanging.began.wait()
            cell.cancel("it took too long")
            assert "cancelled" in (await waiting)["error"]
            assert (await peer.ask(**call("echo", text="a")))["error"] == "refused: it took too long"
            assert [c.error for c in cell.calls] == ["hang was cancelled: it took too long"]

    asyncio.run(body())


def test_a_caller_that_goes_away_cancels_its_call(temporary_folder: Path) -> None:
    async def body() -> None:
        hanging = Hanging()
        async with bridge_and_peer(temporary_folder, hanging=hanging) as (bridge, peer):
            cell = bridge.begin("cell")
            peer.send(json.dumps(call("hang")).encode())
            await hanging.began.wait()
            peer.writer.close()
            await hanging.ended.wait()
            await asyncio.sleep(0)  # the call is recorded as soon as the helper has ended
            assert cell.calls[0].error == "hang was cancelled: the caller went away"

    asyncio.run(body())


def test_a_large_context_comes_in_pieces(temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernel_env.bridge._CONTEXT_PIECE", 3)

    async def body() -> None:
        bridge = Bridge(temporary_folder / "h", {}, Context.of("abé\ud800efg"), Limits())
        pieces: list[str] = []
        start: int | None = 0
        while start is not None:
            fd, description = bridge.context_piece({"start": start})
            pieces.append(os.pread(fd, description["bytes"], 0).decode("utf-8", "surrogatepass"))
            os.close(fd)
            start = description["next"]
        assert pieces == ["abé", "\ud800ef", "g"]
        bridge.close()

    asyncio.run(body())


def test_a_description_has_what_a_signature_shows() -> None:
    description = describe("echo", Helper(echo, inspect.signature(echo), "Say it again."))
    assert description["parameters"] == [
        {"name": "text", "kind": "POSITIONAL_OR_KEYWORD", "annotation": "str"},
        {"name": "times", "kind": "POSITIONAL_OR_KEYWORD", "annotation": "int", "default": "1"},
    ]
    assert description["returns"] == "str"
