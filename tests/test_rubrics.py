"""The table of rubrics; how an environment calls them is in contract/test_rules.py."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from kernel_env import (
    CodeBlockResult,
    CodeExecutionRubric,
    CustomMetricRubric,
    ExactMatchRubric,
    FuzzyMatchRubric,
    REPLAction,
    REPLObservation,
    REPLRubric,
    Rubric,
    RubricError,
)
from kernel_env.rubrics import Scorer


def observation(answer: str | None = None, *, done: bool = True, success: bool = True) -> REPLObservation:
    return REPLObservation(result=CodeBlockResult(success=success), done=done, final_answer=answer)


@pytest.mark.parametrize(
    ("rubric", "expected", "answer", "reward"),
    [
        (ExactMatchRubric(), "42", " 42\n", 1.0),
        (ExactMatchRubric(), "Straße", "STRASSE", 1.0),
        (ExactMatchRubric(), 42, "42", 1.0),
        (ExactMatchRubric(), "42", "43", 0.0),
        (ExactMatchRubric(), None, "None", 0.0),
        (ExactMatchRubric(), "", "", 1.0),
        (FuzzyMatchRubric(), "Paris", "paris", 1.0),
        (FuzzyMatchRubric(), "Paris", "It is Paris.", 0.5),
        (FuzzyMatchRubric(), "It is Paris", "Paris", 0.5),
        (FuzzyMatchRubric(), "Paris", "", 0.0),
        (FuzzyMatchRubric(), "Paris", "Rome", 0.0),
        (CustomMetricRubric(lambda expected, predicted: len(predicted) / len(expected)), "abcd", "ab", 0.5),
        (REPLRubric(), "42", "42", 1.0),
        (REPLRubric(), "42", None, -0.1),
        (REPLRubric(failure_reward=-1.0), "42", None, -1.0),
        (REPLRubric(outcome=FuzzyMatchRubric()), "Paris", "in Paris", 0.5),
    ],
)
def test_outcome(rubric: Rubric, expected: Any, answer: str | None, reward: float) -> None:
    rubric.reset()
    rubric.set_expected(expected)
    assert rubric(REPLAction(), observation(answer)) == reward
    rubric.reset()
    assert rubric(REPLAction(), observation("42")) == 0.0


def test_process() -> None:
    rubric = REPLRubric(process=CodeExecutionRubric(success_reward=0.1, error_penalty=-0.2))
    assert rubric(REPLAction(), observation(done=False)) == 0.1
    assert rubric(REPLAction(), observation(done=False, success=False)) == -0.2


async def score(rubric: Any, expected: Any = None) -> float:
    scorer = Scorer(rubric)
    scorer.begin(expected)
    return await scorer.score(REPLAction(), observation("x"))


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def test_a_sync_rubric_runs_off_the_loop_and_an_async_one_on_it() -> None:
    threads: list[threading.Thread] = []

    def sync(action: Any, observation: Any) -> float:
        threads.append(threading.current_thread())
        return 0.5

    async def asynchronous(action: Any, observation: Any) -> float:
        threads.append(threading.current_thread())
        return 0.25

    class AsyncForward(Rubric):
        async def forward(self, action: Any, observation: Any) -> float:
            return 0.125

    assert [run(score(r)) for r in (sync, asynchronous, AsyncForward())] == [0.5, 0.25, 0.125]
    assert [thread is threading.main_thread() for thread in threads] == [False, True]


def test_the_expected_answer_never_leaks_into_the_next_episode() -> None:
    class WithoutReset:
        expected: Any = "unset"

        def set_expected(self, expected: Any) -> None:
            self.expected = expected

        def __call__(self, action: Any, observation: Any) -> float:
            return 1.0

    class OpenEnvLike(WithoutReset):
        def set_expected(self, expected: Any) -> None:
            self.expected = str(expected)

        def reset(self) -> None:
            self.expected = None

    class WithOurNoReset(Rubric, WithoutReset):
        forward = WithoutReset.__call__
        set_expected = WithoutReset.set_expected

    for rubric in (WithoutReset(), OpenEnvLike(), WithOurNoReset()):
        for whole in (rubric, REPLRubric(outcome=rubric)):
            run(score(whole, "first"))
            assert rubric.expected == "first"
            run(score(whole))
            assert rubric.expected is None


def test_what_begins_an_episode_may_raise_too() -> None:
    class Broken(Rubric):
        def reset(self) -> None:
            raise OSError("no judge")

    with pytest.raises(RubricError, match="could not begin an episode: OSError: no judge"):
        Scorer(Broken()).begin("x")
    with pytest.raises(RubricError, match="must define forward"):
        run(score(Rubric()))
