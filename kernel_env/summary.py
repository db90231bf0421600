"""What a run came to, in numbers, and how two runs compare."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kernel_env.budget import ModelUsage
from kernel_env.errors import ConfigError
from kernel_env.rundir import Result

__all__ = ["Comparison", "compare", "interval", "pass_at_k", "summarise"]

_Z = 1.959964  # of a normal distribution's middle 95 %
_SIZES = (
    (10_000, "≤ 10 k"),
    (50_000, "≤ 50 k"),
    (200_000, "≤ 200 k"),
    (10**6, "≤ 1 M"),
    (4 * 10**6, "≤ 4 M"),
)


def interval(rewards: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the mean, of values of different tasks.

    In [0, 1] it is Wilson's score interval, which does not vanish where all are equal, and is conservative
    for values in between: of all with this mean, those of 0 and 1 vary most. Else ± 1.96 standard errors.
    """
    n = len(rewards)
    if n == 0:
        return math.nan, math.nan
    mean = fmean(rewards)
    if min(rewards) < 0 or max(rewards) > 1:
        error = _Z * _standard_error(rewards)
        return mean - error, mean + error
    middle = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.inf
    mean = fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of `k` samples of a task is right, without bias (Chen et al., arXiv:2107.03374)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def _by_task(results: Iterable[Result]) -> dict[str, list[float]]:
    rewards: dict[str, list[float]] = defaultdict(list)
    for result in results:
        rewards[result.task].append(result.reward or 0.0)  # what failed earned nothing
    return rewards


def _scores(results: Sequence[Result]) -> dict[str, Any]:
    """The reward of some results, by tasks: samples of one task are no independent evidence."""
    means = [fmean(rewards) for rewards in _by_task(results).values()]
    low, high = interval(means)
    return {
        "reward": fmean(means) if means else None,
        "low": low if means and math.isfinite(low) else None,
        "high": high if means and math.isfinite(high) else None,
        "tasks": len(means),
        "episodes": len(results),
    }


def _grouped(results: Sequence[Result], name_of: Callable[[Result], str]) -> dict[str, Any]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[name_of(result)].append(result)
    return {name: _scores(group) for name, group in groups.items()}


def size_of(result: Result) -> str:
    """The bin of a result's context."""
    return next((name for most, name in _SIZES if result.context_length <= most), "> 4 M")


def summarise(results: Sequence[Result], *, samples: int, expected: int) -> dict[str, Any]:
    """The numbers of a run of `expected` episodes, in JSON types; a failed one counts as a reward of 0."""
    by_task = _by_task(results)
    whole = [rewards for rewards in by_task.values() if len(rewards) == samples]
    ks = sorted({1, samples} | {2**n for n in range(1, 10) if 2**n < samples})
    ordered = sorted(results, key=lambda result: result.context_length)
    usage = sum((result.usage for result in results), ModelUsage())
    seconds = {
        "total": sum(result.seconds for result in results),
        "kernel": sum(result.kernel_seconds for result in results),
        "model": sum(result.model_seconds for result in results),
        "bookkeeping": sum(result.bookkeeping_seconds for result in results),
    }
    parts = seconds["kernel"] + seconds["model"]
    return {
        **_scores(results),
        "expected_episodes": expected,
        "missing": expected - len(results),
        "failed": sum(result.error is not None for result in results),
        "pass@k": {
            str(k): fmean(pass_at_k(samples, sum(reward >= 1 for reward in rewards), k) for rewards in whole)
            for k in ks
            if whole
        },
        "mean@k": {str(samples): fmean(fmean(rewards) for rewards in whole)} if whole else {},
        "by_tasks": _grouped(results, lambda result: result.tasks),
        "by_context_size": _grouped(ordered, size_of),
        "outcomes": dict(Counter(result.outcome for result in results).most_common()),
        "steps": fmean(result.steps for result in results) if results else None,
        "seconds": {**seconds, "overhead": max(seconds["total"] - parts, 0.0)},
        "usage": usage.model_dump(),
    }


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same tasks: A against B, task by task."""

    tasks: int
    """That are in both."""
    only_a: list[str]
    only_b: list[str]
    wins: int
    """Tasks at which A did better."""
    losses: int
    ties: int
    mean_a: float
    mean_b: float
    difference: float
    """Of the means, A's less B's."""
    low: float
    """95 % interval of the difference: the paired one, by the standard error of the tasks' differences
    (Miller, arXiv:2411.00640)."""
    high: float
    p_value: float
    """Of a two-sided sign test of the wins against the losses."""
    changes: list[tuple[str, float, float]]
    """Task, A's and B's mean reward, of all that differ, the largest difference first."""


def compare(a: Sequence[Result], b: Sequence[Result]) -> Comparison:
    """Compare the results of two runs by the tasks that both have.

    Raises:
        ConfigError: there is no such task.
    """
    means_a = {task: fmean(rewards) for task, rewards in _by_task(a).items()}
    means_b = {task: fmean(rewards) for task, rewards in _by_task(b).items()}
    both = [task for task in means_a if task in means_b]
    if not both:
        raise ConfigError("the runs have no task in common")
    differences = [means_a[task] - means_b[task] for task in both]
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    mean, error = fmean(differences), _Z * _standard_error(differences)
    changes = [(task, means_a[task], means_b[task]) for task in both if means_a[task] != means_b[task]]
    return Comparison(
        tasks=len(both),
        only_a=sorted(means_a.keys() - means_b.keys()),
        only_b=sorted(means_b.keys() - means_a.keys()),
        wins=wins,
        losses=losses,
        ties=len(both) - wins - losses,
        mean_a=fmean(means_a[task] for task in both),
        mean_b=fmean(means_b[task] for task in both),
        difference=mean,
        low=mean - error,
        high=mean + error,
        p_value=_sign_test(wins, losses),
        changes=sorted(changes, key=lambda change: -abs(change[1] - change[2])),
    )


def _sign_test(wins: int, losses: int) -> float:
    n, least = wins + losses, min(wins, losses)
    if n > 1000:  # the sum's terms are too long for floats
        return math.erfc((abs(wins - losses) - 1) / math.sqrt(2 * n)) if wins != losses else 1.0
    return min(2 * float(sum(math.comb(n, k) for k in range(least + 1)) / 2**n), 1.0)
