"""Suites of tasks that are made, not stored: the same for the same suite, seed, split and index.

A suite is sound if its own solution, code that sees the context alone, scores 1.0 on every task, and an empty
answer 0.0. To add one, subclass `Suite` in a file here and write its line in `SUITES`.
"""

from __future__ import annotations

from kernel_env.suites.aggregation import Aggregation
from kernel_env.suites.code import CodeQuestions
from kernel_env.suites.needle import Needle
from kernel_env.suites.pairs import Pairs
from kernel_env.suites.suite import SIZES, Suite

__all__ = ["SIZES", "SUITES", "Aggregation", "CodeQuestions", "Needle", "Pairs", "Suite"]

SUITES: dict[str, type[Suite]] = {
    "needle": Needle,
    "aggregation": Aggregation,
    "pairs": Pairs,
    "code": CodeQuestions,
}
"""Name → class; `SUITES["needle"](seed=0)` is a `TaskSet`."""
