"""How an answer to a task is scored: here, or, where its metric is source text, in a kernel of its own."""

from __future__ import annotations

import logging
import math
from numbers import Real
from typing import Any

from kernel_env.config import Limits
from kernel_env.environment import REPLEnvironment
from kernel_env.errors import RubricError
from kernel_env.metrics import METRICS, is_source
from kernel_env.portal import as_async
from kernel_env.rubrics import CodeExecutionRubric, Rubric
from kernel_env.tasks import Task
from kernel_env.types import REPLAction, REPLObservation

__all__ = ["Grader"]

log = logging.getLogger("kernel_env.evaluate")

_LIMITS = Limits(cell_active=60.0, restarts=0)
_CALL = "FINAL(repr(float(metric(context['expected'], context['answer']))))"


class Grader(Rubric):
    """The rubric of an episode of a task: its metric at the end, 0.0 without an answer, as ever on the way.

    Args:
        task: whose expected answer stays here.
        isolation, kernel_name: of the kernel that a metric given as source runs in.
    """

    def __init__(self, task: Task, *, isolation: str, kernel_name: str) -> None:
        self._task = task
        self._options: dict[str, Any] = {"isolation": isolation, "kernel_name": kernel_name}
        self._on_the_way = CodeExecutionRubric()
        self._graded: tuple[str, float] | None = None

    async def __call__(self, action: REPLAction, observation: REPLObservation) -> float:
        if not observation.done:
            return float(self._on_the_way(action, observation))
        return await self.grade(observation.final_answer)

    async def grade(self, answer: str | None) -> float:
        """The score of a final answer; the metric is asked once about each.

        Raises:
            RubricError: the metric raised, or gave something that is not a finite number.
        """
        if answer is None or not answer.strip():
            return 0.0
        if self._graded is None or self._graded[0] != answer:
            self._graded = answer, await self._score(answer)
        return self._graded[1]

    async def _score(self, answer: str) -> float:
        metric, expected = self._task.metric, self._task.expected_answer
        if is_source(metric):
            return await self._in_a_kernel(metric, expected, answer)
        function = metric if callable(metric) else METRICS[metric].score
        try:
            score = await as_async(function)(expected, answer)
        except Exception as error:  # the user's, whatever it is; its words are kept out of the run
            raise self._raised(type(error).__name__, error) from error
        if not isinstance(score, Real) or not math.isfinite(score):
            raise RubricError(
                f"the metric of task {self._task.id!r} returned {score!r}; a reward is a finite number"
            )
        return float(score)

    def _raised(self, kind: str, details: object) -> RubricError:
        # What it says may hold the expected answer: that goes to the log, and not into the run.
        log.warning("the metric of task %r raised: %s", self._task.id, details)
        return RubricError(f"the metric of task {self._task.id!r} raised {kind}; the log has the details")

    async def _in_a_kernel(self, source: str, expected: Any, answer: str) -> float:
        env = REPLEnvironment(**self._options, limits=_LIMITS)
        try:
            await env.reset_async(context={"expected": expected, "answer": answer}, seed=0)
            for code in (source, _CALL):
                observation = await env.step_async(REPLAction(code=code))
                if observation.status != "ok":
                    raised = observation.result.exception or observation.status
                    raise self._raised(raised.partition(":")[0], observation.result.stderr)
        finally:
            await env.close_async()
        try:
            score = float(observation.final_answer or "nan")
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise RubricError(
                f"the metric of task {self._task.id!r} returned something else; a reward is a finite number"
            )
        return score
