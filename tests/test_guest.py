"""Guest code that needs no kernel, loaded from its file as a kernel loads it."""

from __future__ import annotations

import ast
import importlib.util
import random
import sys
from collections import Counter, deque
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kernel_env

GUEST = Path(kernel_env.__file__).parent / "guest"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"guest_{name}", GUEST / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def helpers() -> ModuleType:
    return load("helpers")


class Raises:
    def __repr__(self) -> str:
        raise SystemExit


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (5, "5"),
        ("a" * 2000, repr("a" * 500)[:500]),
        (b"a" * 2000, repr(b"a" * 500)[:500]),
        (bytearray(b"a" * 2**28), repr(bytearray(b"a" * 500))[:500]),
        (deque(range(10**6)), "<deque of 1,000,000 items>"),
        (Counter(range(20_000)), "<Counter of 20,000 items>"),
        (deque([1]), "deque([1])"),
        ([], "[]"),
        ((1,), "(1,)"),
        (frozenset({1}), "frozenset({1})"),
        ({"a": [1, {2}]}, "{'a': [1, {2}]}"),
        ([[[[1]]]], "[[[...]]]"),
        ([[1] * 13], "[[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ...]]"),
        (sys, "<module 'sys'>"),
        (Raises(), "<repr raised SystemExit>"),
        ([Raises()], "<repr raised SystemExit>"),
    ],
)
def test_bounded_repr(helpers: ModuleType, value: Any, shown: str) -> None:
    assert helpers.bounded_repr(value) == shown


def test_bounded_repr_touches_little_of_a_large_value(helpers: ModuleType) -> None:
    class Counted:
        seen = 0

        def __repr__(self) -> str:
            Counted.seen += 1
            return "c"

    for value in ([Counted()] * 10**6, {n: Counted() for n in range(10**5)}, ([Counted()] * 10**6,) * 10**6):
        Counted.seen = 0
        assert len(helpers.bounded_repr(value)) <= 500
        assert Counted.seen <= 120 * 12


def test_numpy_is_seeded_when_it_comes_later() -> None:
    import numpy

    seeds = load("seeds")

    state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        seeds.seed_generators(2**32 + 5)
        first = (random.random(), numpy.random.rand())
        seeds.seed_generators(2**32 + 5)
        assert (random.random(), numpy.random.rand()) == first
    finally:
        random.setstate(state)
        numpy.random.set_state(numpy_state)


@pytest.mark.parametrize("path", sorted(GUEST.glob("*.py")), ids=lambda path: path.name)
def test_guest_code_runs_on_old_pythons_and_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            allowed = {*sys.stdlib_module_names, "ipykernel", "jupyter_client", "zmq", "_kernel_env_bridge"}
            if path.name in ("app.py", "channels.py", "serving.py"):  # what an IPython kernel is made of
                allowed |= {"IPython", "pexpect", "tornado", "traitlets"}
            assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
