"""What all runs of one tree share: how they work, what each came to, and who may work when."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from kernel_env.budget import ModelUsage, Spending
from kernel_env.calls import Helper
from kernel_env.config import Limits, from_env
from kernel_env.episode import Episode
from kernel_env.errors import ConfigError
from kernel_env.helpers import Adapted
from kernel_env.types import REPLAction, REPLObservation

__all__ = [
    "ChildTrace",
    "Environment",
    "Progress",
    "RLMRunResult",
    "RunConfig",
    "Tree",
    "Work",
    "derived_seed",
]


class Environment(Protocol):
    """What a run does with its environment, which may ask for runs itself and so stands above them."""

    @property
    def episode(self) -> Episode: ...
    @property
    def helpers(self) -> dict[str, Helper]: ...
    async def reset_async(
        self, *, context: Any, task_prompt: str, expected_answer: Any, seed: int | None
    ) -> REPLObservation: ...
    async def step_async(self, action: REPLAction) -> REPLObservation: ...
    async def close_async(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the runs of a tree work; the arguments of `LocalRLMRunner`, checked."""

    chat_fn: Callable[..., Any]
    make_env: Callable[..., Environment]
    """`REPLEnvironment`."""
    system_prompt: str
    max_iterations: int
    max_depth: int
    depth: int = 0
    sub_model: str | None = None
    env_max_iterations_multiplier: int = 5
    backend_factory: Callable[..., Any] | None = None
    max_children_total: int | None = None
    max_children_per_batch: int | None = None
    result_truncation_limit: int | None = None
    per_child_timeout_s: float | None = None
    on_subcall_start: Callable[[int, str, str], Any] | None = None
    on_subcall_complete: Callable[[int, str, float, str | None], Any] | None = None
    log_level: int = logging.DEBUG
    tools: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of every environment."""
    of_root: Mapping[str, Any] = field(default_factory=dict)
    """Further ones of the root's."""

    @cached_property
    def chat(self) -> Adapted:
        """The chat function, called with what it takes."""
        return Adapted(self.chat_fn, ("model",))


@dataclass(frozen=True)
class ChildTrace:
    """One child run, as the run that started it saw it."""

    depth: int
    duration_s: float
    prompt_preview: str
    result_preview: str
    error: str | None


@dataclass(frozen=True)
class RLMRunResult:
    """How a run ended."""

    final_answer: str | None
    messages: list[dict[str, str]]
    """The conversation, with the last reply."""
    iterations: int
    """Replies of the model that were acted on."""
    depth: int
    child_traces: list[ChildTrace]
    """Of this run's own children, in the order in which they ended."""
    episode: Episode
    """The record, with those of the children."""
    usage: ModelUsage
    """Of this run and all its children; of a child's result, of the whole tree so far."""
    usage_by_model: dict[str, ModelUsage]
    usage_by_depth: dict[int, ModelUsage]
    stopped_by: str | None
    """The budget that ended the run, with what was used of it; None if none did."""


@dataclass
class Progress:
    """A run as it stands, and its children, for whoever watches."""

    prompt: str
    model: str
    turn: int = 0
    """Replies of the model, so far."""
    model_seconds: float = 0.0
    """How long it waited for them."""
    began: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    """How long it took; None while it goes on."""
    error: str | None = None
    children: list[Progress] = field(default_factory=list)

    def end(self, error: str | None) -> float:
        """The run is over; returns the seconds it took."""
        self.seconds, self.error = time.monotonic() - self.began, error
        return self.seconds


def derived_seed(*parts: object) -> int:
    """A seed made of others and of texts, of 48 bits: JavaScript keeps it."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big")


class Tree:
    """What all runs of one tree share.

    A child has one of its level's places for as long as it lives, so that there are never more kernels than
    these, and one of the workers' while it works. Who holds a place of a level waits for deeper ones alone,
    and the deepest level waits for none: so no tree can wait for itself.

    Raises:
        ConfigError: there may not be as many kernels as the tree may hold.
    """

    def __init__(self, workers: int, depth: int, spending: Spending) -> None:
        most, at_once = from_env().max_kernels, 1 + workers * (depth - 1)
        if at_once > most:
            raise ConfigError(
                f"KERNEL_ENV_MAX_KERNELS is {most}, and a tree with max_depth={depth} and "
                f"max_batch_workers={workers} may hold {at_once} kernels at once"
            )
        self.spending = spending
        self.workers = asyncio.Semaphore(workers)
        self.levels = [asyncio.Semaphore(workers) for _ in range(depth + 1)]
        self.children = 0
        """Children that were started."""

    async def spending_left(self) -> dict[str, float | None]:
        """What is left of the whole run's budget: tokens, cost, seconds, …; None where there is no bound."""
        return self.spending.left()


class Work:
    """A child's place among the workers, lent to its own children while it waits for them."""

    def __init__(self, workers: asyncio.Semaphore) -> None:
        self._workers = workers
        self._is_held = False
        self._waits = 0

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        await self._take()
        try:
            yield
        finally:
            self._give_back()

    @contextlib.asynccontextmanager
    async def lent(self) -> AsyncIterator[None]:
        self._waits += 1
        self._give_back()
        try:
            yield
        finally:
            self._waits -= 1  # several threads of a cell may wait at once
        if self._waits == 0:
            await self._take()

    async def _take(self) -> None:
        await self._workers.acquire()
        self._is_held = True

    def _give_back(self) -> None:
        if self._is_held:
            self._is_held = False
            self._workers.release()
