"""Metrics: how well a final answer does against the expected one, from 0.0 to 1.0.

To add one, write a function `(expected, answer) -> float`, what it expects, and its line in `METRICS`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kernel_env.errors import ConfigError

__all__ = ["METRICS", "Metric", "answer_text", "check_metric", "is_source"]

_MARK = "def metric("
_AROUND = " \t\r[](){}'\""  # what a Python list has around its items


@dataclass(frozen=True)
class Metric:
    """A named metric, and what it can compare with."""

    score: Callable[[Any, str], float]
    accepts: Callable[[Any], bool]
    wants: str
    """What `accepts` takes, in words."""


def _normal(value: Any) -> str:
    return str(value).strip().casefold()


def _exact(expected: Any, answer: str) -> float:
    return float(_normal(expected) == _normal(answer))


def _fuzzy(expected: Any, answer: str) -> float:
    wanted, given = _normal(expected), _normal(answer)
    if wanted == given:
        return 1.0
    return 0.5 if given in wanted or wanted in given else 0.0


def _distance(expected: Any, answer: str) -> float:
    given = answer.strip().replace(",", "").replace("_", "")
    if not re.fullmatch(r"[+-]?\d{1,300}(\.\d{1,300})?", given):
        return 0.0  # a text that only holds the number somewhere is no answer
    return float(0.75 ** min(abs(float(expected) - float(given)), 1e4))


def _f1(wanted: Counter[Any], given: Counter[Any]) -> float:
    hits = (wanted & given).total()
    return 2 * hits / (wanted.total() + given.total()) if hits else 0.0


def _set_f1(expected: Any, answer: str) -> float:
    return _f1(Counter({_normal(str(item).strip(_AROUND)) for item in expected}), Counter(_items(answer)))


def _items(answer: str) -> Iterable[str]:
    items = (item.strip(_AROUND) for item in re.split(r"[,;\n]", answer))
    return [_normal(item) for item in items if item]


def _pair_f1(expected: Any, answer: str) -> float:
    wanted = Counter({(_normal(first), _normal(second)) for first, second in expected})
    text = answer.casefold().replace('"', "").replace("'", "")
    return _f1(wanted, Counter(re.findall(r"(\w+)[ \t]*[,;:–-][ \t]*(\w+)", text)))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) and str(value).strip() != "" and value == value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_list_of_scalars(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(_is_scalar(item) and not re.search(r"[,;\n]", str(item)) for item in value)
    )


def _is_list_of_pairs(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
        and all(re.fullmatch(r"\w+", str(item)) is not None for pair in value for item in pair)
    )


METRICS: dict[str, Metric] = {
    # Equal after strip and case-fold.
    "exact": Metric(_exact, _is_scalar, "text that is not empty, or a number"),
    # And half for one that contains the other.
    "fuzzy": Metric(_fuzzy, _is_scalar, "text that is not empty, or a number"),
    # 0.75 to the power of the error, as OOLONG scores numbers (arXiv:2511.02817).
    "distance": Metric(_distance, _is_number, "a number"),
    # F1 of the answer's items (between commas, semicolons or line ends, or a Python list); doubles are wrong.
    "set_f1": Metric(
        _set_f1, _is_list_of_scalars, "a list of texts or numbers, not empty, without commas in them"
    ),
    # F1 of pairs such as `12, 34` or `(12, 34)`, their order counting; twice is once wrong.
    "pair_f1": Metric(_pair_f1, _is_list_of_pairs, "a list of pairs of words or numbers that is not empty"),
}
"""Name → metric. An empty answer scores 0.0 in all of them."""


def is_source(metric: object) -> bool:
    """Whether this is the source text of a metric: `def metric(expected, answer): …`."""
    return isinstance(metric, str) and _MARK in metric


def check_metric(metric: object, expected: Any) -> None:
    """Make sure that there is such a metric, and that it can compare with `expected`.

    Raises:
        ConfigError: it is none, or it cannot.
    """
    if callable(metric):
        return
    if is_source(metric):
        try:
            compile(str(metric), "metric", "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"the source of the metric is no Python: {error}") from None
        return
    if not isinstance(metric, str) or metric not in METRICS:
        raise ConfigError(
            f"metric {metric!r:.200}; give one of {', '.join(METRICS)}, "
            f"or source with `{_MARK}expected, answer)`"
        )
    if not METRICS[metric].accepts(expected):
        raise ConfigError(
            f"expected_answer {expected!r:.200} is a {type(expected).__name__}; "
            f"the metric {metric!r} compares with {METRICS[metric].wants}"
        )


def answer_text(expected: Any) -> str:
    """An expected answer as a policy would submit it."""
    if isinstance(expected, list | tuple):
        return "\n".join(
            ", ".join(map(str, item)) if isinstance(item, list | tuple) else str(item) for item in expected
        )
    return str(expected)
