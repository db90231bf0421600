"""All pairs of users for which something holds: answers of 10³ to 10⁵ characters, as in OOLONG-Pairs."""

from __future__ import annotations

import datetime
import itertools
import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

from kernel_env.suites.rows import ABOUT, CHUNKED, LABELS, READER, Row, make_rows, read_labels, shown
from kernel_env.suites.suite import Made, Suite, code_of

__all__ = ["Pairs"]

_ABOUT = ABOUT + (
    "List all pairs of users, the lower number first, one pair a line as 12345, 67890, such that "
)
_END = """
of_user = collections.defaultdict(list)
for row in rows:
    of_user[row.user].append(row)
def matches(own, wanted, least, most, after):
    found = [row.date for row in own if row.label in wanted]
    late = after is None or all(date > datetime.date(*after) for date in found)
    return least <= len(found) and late and (most is None or len(found) <= most)
first, second = ({user for user in of_user if matches(of_user[user], *side)} for side in (one, other))
users = sorted(of_user)
lines = [f"{a}, {b}" for n, a in enumerate(users) for b in users[n + 1:]
         if (a in first and b in second) or (b in first and a in second)]
answer["content"], answer["ready"] = "\\n".join(lines), True
"""
_Day = tuple[int, int, int]


class _Side(NamedTuple):
    """What holds for one user of a pair."""

    wanted: list[str]
    least: int
    most: int | None = None
    after: _Day | None = None


class Pairs(Suite):
    """Pairs of users by their labels: both alike, both within dates, or one like this and one like that.

    Scored by the F1 of the pairs; the order of a pair counts, and a pair given twice is once wrong.
    """

    name = "pairs"
    source = "OOLONG-Pairs in arXiv:2512.24601"
    kinds = ("both", "both_after", "one_and_other")

    def make(self, rng: random.Random, size: int, kind: str) -> Made:
        while True:
            rows = make_rows(rng, size, users=max(min(size // 300, 115), 30), busy=0.4)
            of_user: dict[int, list[Row]] = {}
            for row in rows:
                of_user.setdefault(row.user, []).append(row)
            one, other, condition = self._condition(rng, kind, of_user)
            pairs = _pairs(of_user, one, other)
            if len(pairs) >= 75:
                break
        values = {"one": tuple(one), "other": tuple(other)}
        return Made(
            shown(rows),
            f"{_ABOUT}{condition}.",
            pairs,
            "pair_f1",
            READER + "rows = rows_of(context)\n" + code_of(_END, **values),
            READER + CHUNKED + code_of(_END, **values),
        )

    def _condition(
        self, rng: random.Random, kind: str, of_user: dict[int, list[Row]]
    ) -> tuple[_Side, _Side, str]:
        """What divides the users of these rows somewhere near the middle."""
        first, second, third = rng.sample(LABELS, 3)
        dates = [[row.date for row in own if row.label in (first, second)] for own in of_user.values()]
        least = max(int(statistics.median(map(len, dates))) // 2, 1)
        either = f'at least {least} instances with the label "{first}" or "{second}"'
        side = _Side([first, second], least)
        if kind == "both":
            return side, side, f"both have {either}"
        if kind == "both_after":
            first_days = sorted(min(days) for days in dates if days)
            date = first_days[len(first_days) // 8]
            side = side._replace(after=(date.year, date.month, date.day))
            return side, side, f"both have {either}, and all of these after {date:%b %d, %Y}"
        most = max(
            int(statistics.median(sum(row.label == third for row in own) for own in of_user.values())), 1
        )
        condition = (
            f"one has {either}, and the other has at least one and at most {most} instances with the label "
            f'"{third}"'
        )
        return side, _Side([third], 1, most), condition

    def read(self, prompt: str, errs: Callable[[], bool]) -> str:
        return read_labels(prompt, errs)


def _pairs(of_user: dict[int, list[Row]], one: _Side, other: _Side) -> list[list[int]]:
    first, second = ({user for user, own in of_user.items() if _matches(own, side)} for side in (one, other))
    return [
        [a, b]
        for a, b in itertools.combinations(sorted(of_user), 2)
        if (a in first and b in second) or (b in first and a in second)
    ]


def _matches(rows: list[Row], side: _Side) -> bool:
    found = [row.date for row in rows if row.label in side.wanted]
    is_late = side.after is None or all(date > datetime.date(*side.after) for date in found)
    return side.least <= len(found) and is_late and (side.most is None or len(found) <= side.most)
