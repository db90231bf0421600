"""What a run and all its children may use together, and what they have used."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from pydantic import BaseModel, ConfigDict

from kernel_env.config import check_amount
from kernel_env.errors import BudgetExceeded

__all__ = ["Budget", "ModelUsage", "Spending", "cost_by"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bounds on a whole tree of runs; each is looked at before a model is asked.

    Raises:
        ConfigError: one is no number above zero.
    """

    tokens: float = math.inf
    """Prompt and completion tokens, as the models tell them."""
    cost: float = math.inf
    """In the unit of the runner's `cost` function."""
    seconds: float = math.inf
    """From the beginning of the run."""
    model_calls: float = math.inf
    consecutive_errors: float = 1
    """Failures of the model in a row that end the run; fewer are asked again."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            check_amount(f"Budget.{entry.name}", getattr(self, entry.name))


class ModelUsage(BaseModel):
    """What the calls of a model, or of a level of runs, have used."""

    model_config = ConfigDict(frozen=True)

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: ModelUsage) -> ModelUsage:
        return ModelUsage(
            calls=self.calls + other.calls,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cost=self.cost + other.cost,
        )


def cost_by(prices: tuple[float, float]) -> Callable[[ModelUsage], float]:
    """What a reply costs, by the prices of a million prompt and completion tokens."""
    prompt, completion = prices
    return lambda usage: (usage.prompt_tokens * prompt + usage.completion_tokens * completion) / 1e6


class Spending:
    """What a tree of runs has used of its budget."""

    def __init__(self, budget: Budget, cost: Callable[[ModelUsage], float] | None) -> None:
        self.budget = budget
        self.total = ModelUsage()
        self.by_model: dict[str, ModelUsage] = defaultdict(ModelUsage)
        self.by_depth: dict[int, ModelUsage] = defaultdict(ModelUsage)
        self._cost = cost
        self._began = time.monotonic()
        self._errors = 0

    def used(self) -> dict[str, float]:
        """Name of each budget → how much of it is used."""
        return {
            "tokens": self.total.prompt_tokens + self.total.completion_tokens,
            "cost": self.total.cost,
            "seconds": time.monotonic() - self._began,
            "model_calls": self.total.calls,
        }

    def check(self) -> None:
        """Raise BudgetExceeded if there is nothing left of one."""
        for name, used in self.used().items():
            maximum = getattr(self.budget, name)
            if used >= maximum:
                raise BudgetExceeded(name, used, maximum)

    def add(self, reply: Any, model: str | None, depth: int) -> tuple[str, ModelUsage]:
        """Count a reply: an object with `prompt_tokens` and `completion_tokens`, or one whose `usage` has.

        Returns the model's name and what the reply took.
        """
        self._errors = 0
        source = getattr(reply, "usage", None) or reply
        tokens = [getattr(source, name, 0) or 0 for name in ("prompt_tokens", "completion_tokens")]
        usage = ModelUsage(calls=1, prompt_tokens=int(tokens[0]), completion_tokens=int(tokens[1]))
        if self._cost is not None:
            usage = usage.model_copy(update={"cost": float(self._cost(usage))})
        self.total += usage
        name = getattr(reply, "model", None) or model or ""
        self.by_model[name] += usage
        self.by_depth[depth] += usage
        return name, usage

    def may_fail_again(self) -> bool:
        """Count a failure; False if it was the last that there may be in a row."""
        self._errors += 1
        return self._errors < self.budget.consecutive_errors

    def describe(self) -> list[str]:
        """What a model is told of the budget; nothing if there is none."""
        bounds = {name: left for name, left in self.left().items() if left is not None}
        if not bounds:
            return []
        told = ", ".join(f"{left:,.6g} {name.replace('_', ' ')}" for name, left in bounds.items())
        return [f"Left of the budget of the whole run: {told}. `budget()` tells what is left later."]

    def left(self) -> dict[str, float | None]:
        """Name of each budget → how much of it is left; None where there is no bound."""
        return {
            name: None if (maximum := getattr(self.budget, name)) == math.inf else max(maximum - used, 0)
            for name, used in self.used().items()
        }
