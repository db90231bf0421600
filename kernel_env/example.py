"""The built-in example: a question about Python's own language reference, which ships with CPython."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

__all__ = ["TASK", "expected_answer", "language_reference", "stand_in_model"]

CELLS = Path(__file__).with_name("example_cells.py")
"""The policy: each cell of this script is one action."""

TASK = (
    'The context is the Python language reference; a line "=== topic: NAME" begins each topic. '
    "How many topics speak of exceptions, by the judgement of llm_query, "
    "and which of those is the longest? Answer as `count, name`."
)


def language_reference() -> str:
    """Every topic of the reference, about half a million characters; it differs from version to version."""
    topics = pydoc_data.topics.topics
    return "\n".join(f"=== topic: {name}\n{topics[name]}" for name in sorted(topics))


def stand_in_model(prompt: str) -> str:
    """Answers the one question of the example by looking for a word. It is no language model, and says so."""
    _, _, text = prompt.partition("\n")
    verdict = "yes" if "exception" in text.lower() else "no"
    return f"{verdict} (a stand-in for a model: it looks for the word)"


def expected_answer() -> str:
    """The answer for the Python that runs this, found without a kernel."""
    topics = pydoc_data.topics.topics
    matching = [name for name in topics if "exception" in topics[name].lower()]
    longest = max(sorted(matching), key=lambda name: len(topics[name]))
    return f"{len(matching)}, {longest}"
