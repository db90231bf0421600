"""Contexts of every type: deleted, they free their memory; restored, they are equal to the byte."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from typing import Any

import pytest

from .conftest import StartEnv

MB = 2**20

CONTEXTS: dict[str, Any] = {
    "empty": "",
    "text": "kernel_env " * 4 * MB,
    "two bytes a character": "é" * 20 * MB,
    "four bytes a character": "\U0001f600" * 10 * MB,
    "awkward text": "a\r\nb\rc\x00\ud800\udfff\u2028\x1b[31m" * 10_000,
    "one character": "x",
    "a list": [{"id": n, "text": "é\r\n" * 100, "none": None, "on": True} for n in range(20_000)],
    "a dict": {f"k{n}": [n, n / 3, -n] for n in range(50_000)},
    "numbers": [0, -1, 2**70, 1e308, 5e-324, 0.1, 1.0],
    "nested": [[[[[[{"a": [{}, [], ""]}]]]]]],
    "a number": 7,
    "a fraction": 1.5,
    "true": True,
    "false": False,
    "null in a list": [None],
}

SIZE = "int(open('/proc/self/statm').read().split()[1]) * 4096"
DIGEST = """
import hashlib, json
print(type(context).__name__, hashlib.sha256(json.dumps(context).encode()).hexdigest())
"""


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_deleted_context_comes_back_equal_to_the_byte(start: StartEnv, name: str) -> None:
    context = CONTEXTS[name]
    env = start({"context": context})
    expected = f"{type(context).__name__} {hashlib.sha256(json.dumps(context).encode()).hexdigest()}\n"
    assert env.execute(DIGEST).observation.result.stdout == expected
    observation = env.execute("del context").observation
    assert observation.result.stderr == "[kernel_env] Restored: context."
    assert env.execute(DIGEST).observation.result.stdout == expected
    if isinstance(context, list | dict):
        env.execute("context.clear()")
        env.execute("del context")
        assert env.execute(DIGEST).observation.result.stdout == expected
    assert env.execute("import os; os._exit(1)").observation.restarted
    assert env.execute(DIGEST).observation.result.stdout == expected


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [
        ("text", 40),
        ("two bytes a character", 18),
        ("four bytes a character", 35),
        ("a list", 8),
        ("a dict", 8),
    ],
)
def test_a_deleted_context_frees_its_memory(start: StartEnv, name: str, megabytes: int) -> None:
    env = start({"context": CONTEXTS[name]})
    code = f"import gc; before = {SIZE}; del context; gc.collect(); print((before - {SIZE}) // {MB})"
    freed = int(env.execute(code).observation.result.stdout)
    assert freed >= megabytes


def test_deleting_it_again_and_again_does_not_grow_the_kernel(start: StartEnv) -> None:
    env = start({"context": CONTEXTS["text"]})
    sizes = []
    for _ in range(6):
        env.execute("del context")
        sizes.append(int(env.execute(f"print({SIZE} // {MB})").observation.result.stdout))
    assert max(sizes[2:]) - sizes[1] < 30


def test_a_rebound_context_stays_and_a_fresh_kernel_has_the_first(start: StartEnv) -> None:
    env = start({"context": "first"})
    env.execute("context = 'second'")
    assert env.execute("context").observation.result.stdout == "'second'\n"
    env.execute("import os; os._exit(1)")
    assert env.execute("context").observation.result.stdout == "'first'\n"


def test_a_hundred_megabytes_arrive_in_the_time_of_a_few_copies(start: StartEnv) -> None:
    """Beside what it takes to encode, write, read and decode as much in this very process."""
    text = "kernel_env " * (100 * MB // 11)
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)
        assert len(file.read().decode()) == len(text)
    copied = time.perf_counter() - begin
    env = start()
    begin = time.perf_counter()
    env.reset(context="x")
    small = time.perf_counter() - begin
    begin = time.perf_counter()
    env.reset(context=text)
    took = time.perf_counter() - begin
    assert took - small < 8 * copied + 0.5
    assert env.execute("len(context)").observation.result.stdout == f"{len(text)}\n"
