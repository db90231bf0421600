"""Metrics: what scores how much, and what they can compare with."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kernel_env import ConfigError
from kernel_env.metrics import METRICS, answer_text, check_metric


@pytest.mark.parametrize(
    ("metric", "expected", "answer", "score"),
    [
        ("exact", "Paris", " paris\n", 1.0),
        ("exact", "Paris", "Paris, France", 0.0),
        ("exact", 7, "7", 1.0),
        ("exact", "FINAL(x)", "FINAL(x)", 1.0),
        ("fuzzy", "Paris", "Paris, France", 0.5),
        ("fuzzy", "Paris", "paris", 1.0),
        ("fuzzy", "Paris", "Rome", 0.0),
        ("distance", 10, "10", 1.0),
        ("distance", 10, "11", 0.75),
        ("distance", 10, "8", 0.75**2),
        ("distance", 1000, "1,000", 1.0),
        ("distance", 10, "about 10", 0.0),
        ("distance", 10, "10 11 12", 0.0),
        ("distance", 10, "9" * 300, 0.0),
        ("distance", 10, "9" * 10**6, 0.0),
        ("distance", 10, "nan", 0.0),
        ("set_f1", ["a", "b"], "b, a", 1.0),
        ("set_f1", ["a", "b"], "['A', 'b']", 1.0),
        ("set_f1", ["a", "b"], "a\nb\nc\nd", 2 * 2 / 6),
        ("set_f1", ["a", "b"], "a, a", 2 * 1 / 4),
        ("set_f1", ["a"], "none", 0.0),
        ("set_f1", ["f(x)", "it's"], "it's, f(x)", 1.0),
        ("pair_f1", [["Ann", "Bob"]], "[('ann', 'bob')]", 1.0),
        ("pair_f1", [[1, 2], [1, 3]], "1, 2\n1, 3", 1.0),
        ("pair_f1", [[1, 2], [1, 3]], "[(1, 2), (1, 3)]", 1.0),
        ("pair_f1", [[1, 2], [1, 3]], "2, 1\n1, 3", 0.5),
        ("pair_f1", [[1, 2]], "1, 2\n1, 2", 2 / 3),
        ("pair_f1", [[1, 2]], "nothing to see", 0.0),
    ],
)
def test_scores(metric: str, expected: Any, answer: str, score: float) -> None:
    assert METRICS[metric].score(expected, answer) == pytest.approx(score)


@pytest.mark.parametrize("metric", METRICS)
def test_what_an_oracle_submits_is_right(metric: str) -> None:
    expected = {"distance": 3, "set_f1": ["a", "b"], "pair_f1": [[1, 2], [3, 4]]}.get(metric, "text")
    assert METRICS[metric].score(expected, answer_text(expected)) == 1.0


@pytest.mark.parametrize(
    ("metric", "expected", "says"),
    [
        ("exact", None, "None is a NoneType"),
        ("exact", "", "text that is not empty"),
        ("exact", ["a"], "is a list"),
        ("distance", "seven", "'seven' is a str; the metric 'distance' compares with a number"),
        ("distance", math.nan, "a number"),
        ("distance", True, "a number"),
        ("set_f1", [], "a list of texts or numbers, not empty"),
        ("set_f1", ["a, b"], "without commas"),
        ("distance", 10**400, "a number"),
        ("pair_f1", [[1, 2, 3]], "a list of pairs"),
        ("rouge", "a", "give one of exact, fuzzy"),
        (7, "a", "metric 7"),
        ("def metric(expected, answer) return 1", "a", "is no Python"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_what_can(metric: Any, expected: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_metric(metric, expected)
    assert says in str(caught.value)
