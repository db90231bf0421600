"""The numbers of a run: intervals, pass@k, groups, and how two runs compare."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kernel_env import ConfigError
from kernel_env.rundir import Result, describe_differences
from kernel_env.summary import compare, interval, pass_at_k, summarise


def result(task: str, reward: float | None, sample: int = 0, **fields: Any) -> Result:
    given = {
        "tasks": "set",
        "split": "all",
        "seed": 0,
        "started": 0.0,
        "seconds": 2.0,
        "done_reason": "final",
    }
    return Result(task=task, sample=sample, reward=reward, **{**given, **fields})


def test_intervals_are_wilson_s_and_do_not_vanish() -> None:
    # The values for 8 of 10 and 10 of 10 are those of Wilson (1927) as any table has them.
    assert interval([1.0] * 8 + [0.0] * 2) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert interval([1.0] * 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert interval([0.5] * 10)[0] > 0.2
    assert all(map(math.isnan, interval([])))
    low, high = interval([-1.0, 3.0, 1.0, 1.0])
    assert (low + high) / 2 == pytest.approx(1.0)


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    assert pass_at_k(5, 0, 3) == 0.0
    assert pass_at_k(5, 1, 5) == 1.0
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)


def test_a_summary_counts_tasks_once_and_failures_as_nothing() -> None:
    results = [
        result("a", 1.0, 0, context_length=5_000),
        result("a", 0.0, 1, context_length=5_000),
        result("b", None, 0, error="ModelError", context_length=10**7, tasks="other"),
        result("b", 1.0, 1, context_length=10**7, tasks="other", kernel_seconds=0.5, model_seconds=1.0),
    ]
    summary = summarise(results, samples=2, expected=6)
    assert (summary["reward"], summary["tasks"], summary["episodes"]) == (0.5, 2, 4)
    assert (summary["failed"], summary["missing"]) == (1, 2)
    assert summary["pass@k"] == {"1": 0.5, "2": 1.0}
    assert summary["mean@k"] == {"2": 0.5}
    assert list(summary["by_context_size"]) == ["≤ 10 k", "> 4 M"]
    assert summary["by_tasks"]["other"]["episodes"] == 2
    assert summary["outcomes"] == {"right": 2, "wrong": 1, "ModelError": 1}
    assert summary["seconds"]["total"] == 8.0
    assert summary["seconds"]["overhead"] == 6.5
    assert summarise([], samples=1, expected=3)["reward"] is None


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"reward": 1.0}, "right"),
        ({"reward": 0.4}, "partly right"),
        ({"reward": 0.0}, "wrong"),
        ({"reward": 0.0, "done_reason": "max_iterations"}, "max_iterations"),
        ({"reward": 0.0, "done_reason": "closed", "stopped_by": "tokens"}, "budget"),
        ({"reward": None, "error": "RubricError"}, "RubricError"),
        ({"reward": 0.0, "done_reason": None}, "no end"),
    ],
)
def test_outcomes(fields: dict[str, Any], outcome: str) -> None:
    assert result("a", **fields).outcome == outcome


def test_runs_are_compared_by_the_tasks_that_both_have() -> None:
    a = [result("x", 1.0), result("y", 1.0, 0), result("y", 0.0, 1), result("z", 1.0), result("only a", 1.0)]
    b = [result("x", 0.0), result("y", 0.25), result("z", 1.0), result("only b", 0.0)]
    compared = compare(a, b)
    assert (compared.tasks, compared.wins, compared.losses, compared.ties) == (3, 2, 0, 1)
    assert (compared.only_a, compared.only_b) == (["only a"], ["only b"])
    assert compared.difference == pytest.approx(1.25 / 3)
    assert compared.changes == [("x", 1.0, 0.0), ("y", 0.5, 0.25)]
    assert compared.low < compared.difference < compared.high
    assert compared.p_value == 0.5
    with pytest.raises(ConfigError, match="no task in common"):
        compare(a, [result("w", 1.0)])


@pytest.mark.parametrize(("wins", "losses", "p"), [(0, 0, 1.0), (8, 1, 0.0391), (2_000, 1_900, 0.113)])
def test_the_sign_test(wins: int, losses: int, p: float) -> None:
    count = wins + losses or 1
    a = [result(f"{n}", 1.0 if n < wins else 0.0) for n in range(count)]
    b = [result(f"{n}", 0.0 if n < wins or not wins else 1.0) for n in range(count)]
    assert compare(a, b).p_value == pytest.approx(p, abs=2e-3)


def test_differences_are_named_by_their_path() -> None:
    there, here = {"a": 1, "b": {"c": [1], "d": 2}}, {"a": 1, "b": {"c": [2], "e": 3}}
    assert describe_differences(there, here) == [
        "b.c: [1] there, [2] here",
        "b.d: 2 there, None here",
        "b.e: None there, 3 here",
    ]
