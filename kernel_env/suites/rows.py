"""Dated rows of users' texts whose labels are not written down: what aggregation and pairs are about.

The form of a row, its labels (those of TREC's question types) and the long tail of users follow OOLONG
(arXiv:2511.02817); the texts are made from templates, so that their labels are known.
"""

from __future__ import annotations

import datetime
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ABOUT", "CHUNKED", "LABELS", "READER", "Row", "label_of", "make_rows", "read_labels", "shown"]

LABELS = (
    "abbreviation",
    "description",
    "entity",
    "human being",
    "location",
    "numeric value",
)
ABOUT = (
    "Each row of the context has a date, a user and an instance, a question of somebody's. An instance has "
    f"one of the labels {', '.join(LABELS)}, by what its answer would be; the labels are not written down. "
)

_TEMPLATES = {
    "abbreviation": ("What does {} stand for?", "What is the short form of {}?", "How is {} abbreviated?"),
    "description": ("Why does {} happen?", "What is the meaning of {}?", "How does one describe {}?"),
    "entity": ("What kind of animal lives near {}?", "Which instrument suits {}?", "What food goes with {}?"),
    "human being": ("Who discovered {}?", "Which painter is known for {}?", "Who wrote about {}?"),
    "location": ("Where can one find {}?", "Which country borders {}?", "In what city is {}?"),
    "numeric value": ("How many people saw {}?", "What year was {}?", "How far away is {}?"),
}
_TOPICS = tuple(
    f"{kind} {name}"
    for kind in ("the old", "the upper", "the silent", "the second", "the crowned")
    for name in (
        "bridge",
        "comet",
        "garden",
        "harbour",
        "language",
        "meadow",
        "observatory",
        "quarry",
        "river",
    )
)
_RULES = {template.split("{}")[0]: label for label, templates in _TEMPLATES.items() for template in templates}

READER = f"""
import collections, datetime, re
rules = {_RULES!r}
def label_of(text):
    return next(label for start, label in rules.items() if text.startswith(start))
Row = collections.namedtuple("Row", "date user text label")
def rows_of(text, label=label_of):
    found = re.findall(r"^Date: (.*?) \\|\\| User: (\\d+) \\|\\| Instance: (.*)$", text, re.MULTILINE)
    read = lambda date: datetime.datetime.strptime(date, "%b %d, %Y").date()
    dates = {{date: read(date) for date in {{date for date, _, _ in found}}}}
    return [Row(dates[date], int(user), text, label(text)) for date, user, text in found]
"""
"""Code that knows the labels: `rows_of(context)`."""

CHUNKED = """
head = "Label each instance: one label a line, of " + ", ".join(sorted(set(rules.values()))) + ".\\n\\n"
plain = rows_of(context, label=lambda text: None)
chunks = [plain[begin:begin + 50] for begin in range(0, len(plain), 50)]
prompts = [head + "\\n".join(row.text for row in chunk) for chunk in chunks]
replies, todo = [None] * len(prompts), list(range(len(prompts)))
for _ in range(6):
    for n, reply in zip(todo, llm_query_batched([prompts[n] for n in todo]) if todo else []):
        replies[n] = reply
    todo = [n for n, reply in enumerate(replies) if isinstance(reply, HelperFailure)]
labels = []
for chunk, reply in zip(chunks, replies):
    given = reply.splitlines() if not isinstance(reply, HelperFailure) else []
    labels += (given + ["entity"] * len(chunk))[:len(chunk)]
rows = [row._replace(label=label) for row, label in zip(plain, labels)]
"""
"""Code that asks for the labels of 50 rows at a time; needs `READER` before it, and binds `rows`."""


@dataclass(frozen=True)
class Row:
    """One row, with the label that its text does not show."""

    date: datetime.date
    user: int
    label: str
    text: str


def label_of(text: str) -> str:
    """The label of a text of a row."""
    return next(label for start, label in _RULES.items() if text.startswith(start))


def make_rows(rng: random.Random, size: int, *, users: int, busy: float) -> list[Row]:
    """Rows of about `size` characters by date; a share `busy` of them is of a fifth of the users."""
    count = max(size // 85, 40)
    ids = rng.sample(range(10_000, 100_000), users)
    busy_ids = ids[: max(users // 5, 1)]
    weights = [rng.uniform(0.5, 2.0) for _ in LABELS]
    labels = rng.choices(LABELS, weights, k=count)
    begin = datetime.date(2023, 1, 1)
    days = sorted(rng.randrange(365) for _ in range(count))
    rows = []
    for day, label in zip(days, labels, strict=True):
        text = rng.choice(_TEMPLATES[label]).format(rng.choice(_TOPICS))
        user = rng.choice(busy_ids if rng.random() < busy else ids)
        rows.append(Row(begin + datetime.timedelta(days=day), user, label, text))
    return rows


def shown(rows: list[Row]) -> str:
    """The context: the rows without their labels, a line each."""
    dates = {date: f"{date:%b %d, %Y}" for date in {row.date for row in rows}}
    return "".join(f"Date: {dates[row.date]} || User: {row.user} || Instance: {row.text}\n" for row in rows)


def read_labels(prompt: str, errs: Callable[[], bool]) -> str:
    """Reply to `CHUNKED`'s question."""
    texts = prompt.partition("\n\n")[2].splitlines()
    labels = [label_of(text) for text in texts if re.search(r"\w", text)]
    return "\n".join(LABELS[(LABELS.index(label) + 1) % len(LABELS)] if errs() else label for label in labels)
