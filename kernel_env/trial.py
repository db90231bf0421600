"""One episode of an evaluation: what it is about, and what became of it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from kernel_env.budget import Budget, ModelUsage, Spending
from kernel_env.config import Limits
from kernel_env.environment import REPLEnvironment
from kernel_env.episode import Episode
from kernel_env.errors import ConfigError
from kernel_env.grading import Grader
from kernel_env.tasks import Task

__all__ = ["Trial", "slug"]

_ANSWER = 4096  # characters of an answer in the results


@dataclass
class Trial:
    """One episode of an evaluation: what it is about, and what became of it."""

    task: Task
    context: Any
    sample: int
    """Which of the task's episodes this is, from 0 on."""
    seed: int
    max_iterations: int
    limits: Limits
    grader: Grader
    budget: Budget
    cost: Callable[[ModelUsage], float] | None
    options: dict[str, Any]
    """Further arguments of the environment."""
    episode: Episode | None = None
    """The record, from the start of its kernel on."""
    model_seconds: float = 0.0
    """How long a runner waited for its model's replies."""
    stopped_by: str | None = None
    """The budget that ended it."""
    spending: Spending = field(init=False)

    def __post_init__(self) -> None:
        self.spending = Spending(self.budget, self.cost)

    @asynccontextmanager
    async def environment(self, **options: Any) -> AsyncIterator[REPLEnvironment]:
        """The environment of the episode, after its reset."""
        env = REPLEnvironment(rubric=self.grader, limits=self.limits, **self.options, **options)
        try:
            await env.reset_async(
                seed=self.seed,
                context=self.context,
                task_prompt=self.task.task_prompt,
                max_iterations=self.max_iterations,
            )
            self.episode = env.episode
            yield env
        finally:
            await env.close_async()

    async def score(self) -> float:
        """The reward of the final answer, also of one that came after the last step.

        Raises:
            ConfigError: there was no episode.
            RubricError: as `Grader.grade`.
        """
        if self.episode is None:
            raise ConfigError("the policy began no episode")
        return await self.grader.grade(self.episode.final_answer)

    def figures(self) -> dict[str, Any]:
        """What the record says of the episode, under the names of `Result`."""
        episode = self.episode
        assert episode is not None  # it began
        active = sum(turn.active_time for turn in episode.turns)
        answer = episode.final_answer
        return {
            "episode_id": episode.episode_id,
            "final_answer": None if answer is None else answer[:_ANSWER],
            "answer_length": len(answer or ""),
            "done_reason": episode.done_reason,
            "stopped_by": self.stopped_by,
            "steps": len(episode.turns),
            "statuses": dict(Counter(turn.observation.status for turn in episode.turns)),
            "restarts": sum(turn.observation.restarted for turn in episode.turns),
            "children": len(episode.children),
            "context_length": len(episode.context),
            "kernel_seconds": episode.start_time + active,
            "model_seconds": max(episode.total_execution_time - active, 0.0) + self.model_seconds,
            "usage": episode.total_usage,
        }


def slug(id: str) -> str:
    """A task's id as the name of a file."""
    name = re.sub(r"[^\w-]", "_", id, flags=re.ASCII)[:100]
    if name == id:
        return name
    return f"{name}-{hashlib.sha256(id.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
