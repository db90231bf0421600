"""What all suites share: splits by size, kinds of tasks in turn, and a generator seeded for each task."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kernel_env.config import check_count
from kernel_env.tasks import Reference, Task, TaskSet

__all__ = ["SIZES", "Made", "Suite", "code_of"]

SIZES = {
    "8k": 8_000,
    "32k": 32_000,
    "128k": 128_000,
    "512k": 512_000,
    "2m": 2_000_000,
    "16m": 16_000_000,
}
"""Split → characters of its contexts, about."""

_TASKS = 1000


@dataclass(frozen=True)
class Made:
    """What a suite makes of a size and a kind."""

    context: Any
    question: str
    expected: Any
    metric: str
    solution: str
    chunked: str


class Suite(TaskSet):
    """Tasks made by a generator.

    A subclass has `name`, `source` (where its kind of task comes from) and `kinds`, whose tasks follow each
    other in this order, and defines `make` and `read`.

    Args:
        seed: of all tasks.

    Raises:
        ConfigError: the seed is no whole number from 0 on.
    """

    source: str
    kinds: tuple[str, ...]

    def __init__(self, seed: int = 0) -> None:
        check_count("seed", seed, least=0)
        self.seed = seed

    def make(self, rng: random.Random, size: int, kind: str) -> Made:
        """Make a task of about `size` characters."""
        raise NotImplementedError

    def read(self, prompt: str, errs: Callable[[], bool]) -> str:
        """Reply to what this suite's `chunked` code asks, as a model would; see `Reference.reader`."""
        raise NotImplementedError

    def list_splits(self) -> list[str]:
        return list(SIZES)

    def num_tasks(self, split: str) -> int:
        self.check_split(split)
        return _TASKS

    def usual_splits(self) -> list[str]:
        return [split for split in self.list_splits() if SIZES[split] <= SIZES["128k"]]

    def usual_number(self, split: str) -> int:
        return 2 * len(self.kinds)

    def task_id(self, split: str, index: int) -> str:
        return f"{self.name}-{split}-{index:03}"

    def get_task(self, split: str, index: int) -> Task:
        self.check_index(split, index)
        kind = self.kinds[index % len(self.kinds)]
        rng = random.Random(f"{self.name}:{self.seed}:{split}:{index}")
        made = self.make(rng, SIZES[split], kind)
        return Task(
            id=self.task_id(split, index),
            task_prompt=made.question,
            context=made.context,
            expected_answer=made.expected,
            metric=made.metric,
            metadata={"suite": self.name, "split": split, "kind": kind},
            reference=Reference(made.solution, made.chunked, self.read),
        )

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.seed}


def code_of(code: str, /, **values: Any) -> str:
    """Code after lines that bind `values`."""
    return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + code
