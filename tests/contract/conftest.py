"""The contract's fixture: the same checks run over every way to drive an environment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import pytest

from kernel_env import (
    Episode,
    EpisodeOver,
    Limits,
    LocalREPLEnv,
    REPLAction,
    REPLEnvironment,
    REPLObservation,
    REPLState,
)
from tests.conftest import NEEDS_SANDBOX
from tests.processes import pid_of


class Facade(Protocol):
    """What every facade offers, in the form the contract tests use."""

    def reset(self, **options: Any) -> REPLObservation: ...
    def step(self, action: REPLAction, timeout_s: float | None = None) -> REPLObservation: ...
    def execute(self, code: str, timeout_s: float | None = None) -> REPLObservation: ...
    def variable(self, name: str) -> REPLObservation: ...
    def state(self) -> REPLState: ...
    def close(self) -> None: ...
    @property
    def episode(self) -> Episode: ...


MakeFacade = Callable[..., Facade]
F = TypeVar("F", bound="Local | Async")
StartEnv = Callable[..., LocalREPLEnv]
LendEnv = Callable[..., LocalREPLEnv]


class Kind(NamedTuple):
    """What kernels an environment has."""

    kernel_name: str
    isolation: str

    @property
    def options(self) -> dict[str, Any]:
        """The environment's arguments for it."""
        return self._asdict()


SANDBOXED = pytest.param(Kind("python3", "sandbox"), marks=NEEDS_SANDBOX, id="sandbox")
FORKED = pytest.param(Kind("python3", "process"), id="forked")
STARTED = pytest.param(Kind("stock", "process"), id="started")
KERNELS = [SANDBOXED, FORKED, STARTED]
"""The kinds of kernels, which all must hold against everything in `test_hold_*.py`."""


class Local:
    """LocalREPLEnv, called without a loop."""

    def __init__(self, **options: Any) -> None:
        self._env = LocalREPLEnv(**options)

    def reset(self, **options: Any) -> REPLObservation:
        return self._env.reset(**options).observation

    def step(self, action: REPLAction, timeout_s: float | None = None) -> REPLObservation:
        return self._env.step(action, timeout_s=timeout_s).observation

    def execute(self, code: str, timeout_s: float | None = None) -> REPLObservation:
        return self._env.execute(code, timeout_s=timeout_s).observation

    def variable(self, name: str) -> REPLObservation:
        return self._env.get_variable(name).observation

    def state(self) -> REPLState:
        return self._env.state()

    def close(self) -> None:
        self._env.close()

    def end(self) -> None:
        self.close()

    @property
    def episode(self) -> Episode:
        return self._env.episode


class Async:
    """REPLEnvironment's coroutines, on a loop of the caller's."""

    def __init__(self, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._env = REPLEnvironment(**options)

    def reset(self, **options: Any) -> REPLObservation:
        return self._runner.run(self._env.reset_async(**options))

    def step(self, action: REPLAction, timeout_s: float | None = None) -> REPLObservation:
        return self._runner.run(self._env.step_async(action, timeout_s))

    def execute(self, code: str, timeout_s: float | None = None) -> REPLObservation:
        return self.step(REPLAction(code=code), timeout_s)

    def variable(self, name: str) -> REPLObservation:
        return self._runner.run(self._env.get_variable_async(name))

    def state(self) -> REPLState:
        return self._env.state

    def close(self) -> None:
        self._runner.run(self._env.close_async())

    def end(self) -> None:
        self.close()
        self._runner.close()

    @property
    def episode(self) -> Episode:
        return self._env.episode


@pytest.fixture(
    params=[
        pytest.param((Local, Kind("python3", "sandbox")), marks=NEEDS_SANDBOX, id="local-sandbox"),
        pytest.param((Async, Kind("python3", "process")), id="async-forked"),
        pytest.param((Local, Kind("stock", "process")), id="local-started"),
    ]
)
def new_facade(request: pytest.FixtureRequest) -> partial[Local | Async]:
    """The facade under test, over the kernels under test."""
    facade, kind = request.param
    return partial(facade, **kind.options)


@pytest.fixture
def make(new_facade: partial[Local | Async]) -> Iterator[MakeFacade]:
    """Make facades of the kind under test, over the kernels under test; they are closed at the end."""
    made: list[Local | Async] = []

    def make_one(**options: Any) -> Facade:
        made.append(new_facade(**options))
        return made[-1]

    yield make_one
    for facade in made:
        facade.end()


@pytest.fixture(params=KERNELS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """The kind of kernel under test."""
    assert isinstance(request.param, Kind)
    return request.param


@pytest.fixture
def start(kind: Kind) -> Iterator[StartEnv]:
    """Start an episode in the kind of kernel under test, `start(reset={…}, **options)`; closed at the end."""
    made: list[LocalREPLEnv] = []

    def start_one(reset: dict[str, Any] | None = None, **options: Any) -> LocalREPLEnv:
        made.append(LocalREPLEnv(**kind.options | options))
        made[-1].reset(**{"max_iterations": 10**6} | (reset or {}))
        return made[-1]

    yield start_one
    for env in made:
        env.close()


class Lender:
    """Episodes that tests of a module take turns with, for cells after which the kernel goes on.

    A test gets one that it made itself, or that worked after the test before in the kernel it began with, or
    in a fresh one if its limits allow for so many: so each finds what it broke itself. After `TURNS` tests a
    new one begins: what a kernel logs has an end.
    """

    TURNS = 15

    def __init__(self) -> None:
        self._held: dict[str, tuple[Any, list[int]]] = {}
        self._lent: dict[str, bool] = {}

    def lend(self, new: partial[F], reset: dict[str, Any] | None, options: dict[str, Any]) -> F:
        """The episode of such a facade with these options, until `take_back`."""
        key = f"{new.func} {sorted((new.keywords | options).items())} {reset}"
        if key not in self._held:
            facade = new(**options)
            self._held[key] = facade, []
            facade.reset(**{"max_iterations": 10**6} | (reset or {}))
        lent: F
        lent, pids = self._held[key]
        pids.append(pid_of(lent))
        self._lent[key] = options.get("limits", Limits()).restarts >= self.TURNS
        return lent

    def take_back(self) -> None:
        """Keep what was lent, or close it."""
        for key, may_lose_kernels in self._lent.items():
            facade, pids = self._held[key]
            is_good = may_lose_kernels or pid_of(facade) == pids[0]
            if not is_good or len(pids) == self.TURNS or not _works(facade):
                self._held.pop(key)[0].end()
        self._lent.clear()

    def close(self) -> None:
        for facade, _ in self._held.values():
            facade.end()


def _works(facade: Facade) -> bool:
    try:
        return facade.execute("1").result.stdout == "1\n"
    except EpisodeOver:
        return False


@pytest.fixture(scope="module")
def lender() -> Iterator[Lender]:
    lender = Lender()
    yield lender
    lender.close()


@pytest.fixture
def lend(kind: Kind, lender: Lender) -> Iterator[LendEnv]:
    """Lend an episode in the kind of kernel under test, as `start` starts one, for one test after another."""
    new = partial(Local, **kind.options)
    yield lambda reset=None, **options: lender.lend(new, reset, options)._env
    lender.take_back()


@pytest.fixture
def share(new_facade: partial[Local | Async], lender: Lender) -> Iterator[MakeFacade]:
    """The same in the facade under test, as `make` makes them, after a reset."""
    yield lambda **options: lender.lend(new_facade, None, options)
    lender.take_back()
