"""Rubrics: `(action, observation) -> float`, under OpenEnv's names.

Any callable of that shape works as a rubric, sync or async, and OpenEnv's own do; `reset()` and
`set_expected(value)` are called at each reset if they are there. The expected answer stays here, on the
host: it never enters the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from kernel_env.errors import RubricError, boundary
from kernel_env.portal import as_async
from kernel_env.types import REPLAction, REPLObservation

__all__ = [
    "CodeExecutionRubric",
    "CustomMetricRubric",
    "ExactMatchRubric",
    "FuzzyMatchRubric",
    "REPLRubric",
    "Rubric",
    "Scorer",
]


class Rubric:
    """Scores one step; subclass it and write `forward`."""

    def __call__(self, action: REPLAction, observation: REPLObservation) -> Any:
        return self.forward(action, observation)

    def forward(self, action: REPLAction, observation: REPLObservation) -> Any:
        """The score of the step; may be a coroutine function."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(action, observation)")

    def reset(self) -> None:
        """Forget the episode."""

    def set_expected(self, expected: Any) -> None:
        """Take the expected answer of the episode; None if it has none."""


class _AnswerRubric(Rubric):
    """Compares the final answer with the expected one; 0.0 as long as either is missing."""

    def __init__(self) -> None:
        self._expected: Any = None

    def reset(self) -> None:
        self._expected = None

    def set_expected(self, expected: Any) -> None:
        self._expected = expected

    def forward(self, action: REPLAction, observation: REPLObservation) -> Any:
        if self._expected is None or observation.final_answer is None:
            return 0.0
        return self.score(self._expected, observation.final_answer)

    def score(self, expected: Any, answer: str) -> Any:
        raise NotImplementedError


def _normal(value: Any) -> str:
    return str(value).strip().casefold()


class ExactMatchRubric(_AnswerRubric):
    """1.0 if the answers are equal after strip and case-fold, else 0.0."""

    def score(self, expected: Any, answer: str) -> float:
        return 1.0 if _normal(answer) == _normal(expected) else 0.0


class FuzzyMatchRubric(_AnswerRubric):
    """1.0 if the answers are equal after strip and case-fold, 0.5 if one contains the other, else 0.0.

    An empty answer is contained in everything and earns nothing.
    """

    def score(self, expected: Any, answer: str) -> float:
        given, wanted = _normal(answer), _normal(expected)
        if given == wanted:
            return 1.0
        return 0.5 if given and wanted and (given in wanted or wanted in given) else 0.0


class CustomMetricRubric(_AnswerRubric):
    """Scores the final answer with `metric_fn(expected, predicted)`, sync or async."""

    def __init__(self, metric_fn: Callable[[Any, str], Any]) -> None:
        super().__init__()
        self._metric = metric_fn

    def score(self, expected: Any, answer: str) -> Any:
        return self._metric(expected, answer)


class CodeExecutionRubric(Rubric):
    """`success_reward` for a cell that ran, `error_penalty` for one that raised, ran out of time or died."""

    def __init__(self, success_reward: float = 0.0, error_penalty: float = -0.05) -> None:
        self.success_reward = success_reward
        self.error_penalty = error_penalty

    def forward(self, action: REPLAction, observation: REPLObservation) -> float:
        return self.success_reward if observation.result.success else self.error_penalty


class REPLRubric(Rubric):
    """`process` on the way, `outcome` at the end, `failure_reward` at an end without an answer."""

    def __init__(self, outcome: Any = None, process: Any = None, failure_reward: float = -0.1) -> None:
        self.outcome = ExactMatchRubric() if outcome is None else outcome
        self.process = CodeExecutionRubric() if process is None else process
        self.failure_reward = failure_reward

    def reset(self) -> None:
        for rubric in (self.outcome, self.process):
            _call_if_there(rubric, "reset")

    def set_expected(self, expected: Any) -> None:
        for rubric in (self.outcome, self.process):
            _expect(rubric, expected)

    def forward(self, action: REPLAction, observation: REPLObservation) -> Any:
        if not observation.done:
            return self.process(action, observation)
        if observation.final_answer is None:
            return self.failure_reward
        return self.outcome(action, observation)


def _is_instant(rubric: Any, observation: REPLObservation) -> bool:
    """Whether this is a rubric of ours that has nothing to compare: a thread would cost more than it."""
    kind = type(rubric)
    if kind is REPLRubric:
        part = rubric.outcome if observation.done else rubric.process
        return (observation.done and observation.final_answer is None) or _is_instant(part, observation)
    if kind in (ExactMatchRubric, FuzzyMatchRubric, CustomMetricRubric):
        return observation.final_answer is None
    return kind is CodeExecutionRubric


def _call_if_there(rubric: Any, method: str, *args: Any) -> None:
    function = getattr(rubric, method, None)
    if function is not None:
        function(*args)


def _expect(rubric: Any, expected: Any) -> None:
    # None is told too, so that the answer of the last episode does not stay behind; but OpenEnv's rubrics
    # would make the text "None" of it, and their reset has cleared what they had.
    if expected is not None or isinstance(rubric, Rubric) or not hasattr(rubric, "reset"):
        _call_if_there(rubric, "set_expected", expected)


class Scorer:
    """A user's rubric, adapted once: awaitable, off the loop if sync, and its result checked."""

    def __init__(self, rubric: Any) -> None:
        self._rubric = rubric
        self._call = as_async(rubric)
        self._name = getattr(rubric, "__name__", type(rubric).__name__)

    def begin(self, expected: Any) -> None:
        """Make the rubric forget the last episode and tell it what this one expects.

        Raises:
            RubricError: the rubric raised.
        """
        with boundary(RubricError, f"rubric {self._name} could not begin an episode"):
            _call_if_there(self._rubric, "reset")
            _expect(self._rubric, expected)

    async def score(self, action: REPLAction, observation: REPLObservation) -> float:
        """The reward of a step.

        Raises:
            RubricError: the rubric raised, or gave something that is not a finite number.
        """
        with boundary(RubricError, f"rubric {self._name} raised"):
            if _is_instant(self._rubric, observation):
                reward = self._rubric(action, observation)
            else:
                reward = await self._call(action, observation)
        if not isinstance(reward, Real) or not math.isfinite(reward):
            raise RubricError(f"rubric {self._name} returned {reward!r}; a reward is a finite number")
        return float(reward)
