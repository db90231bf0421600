"""Questions about a whole table whose labels have to be read out of its texts, as in OOLONG."""

from __future__ import annotations

import datetime
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from kernel_env.suites.rows import ABOUT, CHUNKED, LABELS, READER, Row, make_rows, read_labels, shown
from kernel_env.suites.suite import Made, Suite, code_of

__all__ = ["Aggregation"]

_SOLUTION = "rows = rows_of(context)\n"
_ENDS = {
    "count": "FINAL(sum(row.label == label for row in rows))",
    "most_frequent": "FINAL(collections.Counter(row.label for row in rows).most_common()[0][0])",
    "least_frequent": "FINAL(collections.Counter(row.label for row in rows).most_common()[-1][0])",
    "relative_frequency": (
        "n, m = (sum(row.label == one for row in rows) for one in labels_asked)\n"
        "FINAL('more' if n > m else 'less' if n < m else 'same')"
    ),
    "of_user": "FINAL(sum(row.label == label and row.user == user for row in rows))",
    "top_user": (
        "users = collections.Counter(row.user for row in rows if row.label == label).most_common(1)\n"
        "FINAL(users[0][0] if users else 0)"
    ),
    "before_date": "FINAL(sum(row.label == label and row.date < datetime.date(*date) for row in rows))",
}


class Aggregation(Suite):
    """Counts, most and least frequent labels and comparisons, of all rows, of a user, before a date.

    Numbers score 0.75 to the power of the error, all else exactly.
    """

    name = "aggregation"
    source = "OOLONG, arXiv:2511.02817"
    kinds = tuple(_ENDS)

    def make(self, rng: random.Random, size: int, kind: str) -> Made:
        while True:  # a few tables in a hundred have two most frequent labels, or two first users
            rows = make_rows(rng, size, users=max(min(size // 2_000, 200), 8), busy=0.8)
            counts = Counter(dict.fromkeys(LABELS, 0))
            counts.update(row.label for row in rows)
            asked = self._ask(rng, kind, rows, counts)
            if asked is not None:
                break
        question, expected, values = asked
        metric = "distance" if isinstance(expected, int) else "exact"
        return Made(
            shown(rows),
            ABOUT + question,
            expected,
            metric,
            READER + _SOLUTION + code_of(_ENDS[kind], **values),
            READER + CHUNKED + code_of(_ENDS[kind], **values),
        )

    def _ask(
        self, rng: random.Random, kind: str, rows: list[Row], counts: Counter[str]
    ) -> tuple[str, Any, dict[str, Any]] | None:
        """Question, answer, and what the code of the kind needs; None if the answer is not the only one."""
        label, other = rng.sample(LABELS, 2)
        ranked = counts.most_common()
        if kind == "count":
            return f'How many instances have the label "{label}"?', counts[label], {"label": label}
        if kind in ("most_frequent", "least_frequent"):
            end, next_to = (ranked[0], ranked[1]) if kind == "most_frequent" else (ranked[-1], ranked[-2])
            if end[1] == next_to[1] or end[1] == 0:
                return None
            return f"Which label is the {kind.replace('_', ' ')}? Answer with the label.", end[0], {}
        if kind == "relative_frequency":
            n, m = counts[label], counts[other]
            expected = "more" if n > m else "less" if n < m else "same"
            question = (
                f'Is the label "{label}" more or less frequent than "{other}"? Answer more, less or same.'
            )
            return question, expected, {"labels_asked": [label, other]}
        users = Counter(row.user for row in rows if row.label == label)
        if kind == "top_user":
            first = users.most_common(2)
            if len(first) < 2 or first[0][1] == first[1][1]:
                return None
            question = f'Which user has the most instances with the label "{label}"? Answer with the number.'
            return question, str(first[0][0]), {"label": label}
        if kind == "of_user":
            user = rng.choice(rows).user
            question = f'How many instances of user {user} have the label "{label}"?'
            return question, users[user], {"label": label, "user": user}
        date = datetime.date(2023, rng.randrange(2, 12), rng.randrange(1, 29))
        before = sum(row.label == label and row.date < date for row in rows)
        question = f'How many instances with the label "{label}" have a date before {date:%b %d, %Y}?'
        return question, before, {"label": label, "date": (date.year, date.month, date.day)}

    def read(self, prompt: str, errs: Callable[[], bool]) -> str:
        return read_labels(prompt, errs)
