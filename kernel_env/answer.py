"""How a printed final answer is recognised.

What `FINAL` or `answer` submits comes over the helper channel instead (`bridge.py`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from dataclasses import dataclass

from kernel_env.syntax import parse

__all__ = ["Marker", "first_marker", "printed_marker"]

_PARENTHESIS = re.compile(r"[()]")
_OPENING = re.compile(r"^(FINAL|FINAL_VAR)\(", re.MULTILINE)


@dataclass(frozen=True)
class Marker:
    """A `FINAL(…)` or `FINAL_VAR(…)` that a cell printed."""

    text: str
    """What stands between the parentheses."""
    is_variable: bool
    """`text` names a variable (`FINAL_VAR`) instead of being the answer."""


def printed_marker(code: str, stdout: str) -> Marker | None:
    """Find the answer that `code` printed on purpose.

    It counts only if a string literal of `code` itself contains the marker, so that a cell which
    prints its context never ends an episode by what is in there. Of the markers at the start of a
    line of `stdout`, the first with balanced parentheses is the answer.
    """
    if "FINAL" not in stdout or not _has_marker_literal(code):
        return None
    return first_marker(stdout)


def first_marker(text: str) -> Marker | None:
    """The first marker with balanced parentheses at the start of a line."""
    openings = {match.end() - 1: match.group(1) for match in _OPENING.finditer(text)}
    ends = _closing_parentheses(text, openings)
    for start, kind in openings.items():
        if start in ends:
            return _marker(kind, text[start + 1 : ends[start]].strip())
    return None


def _marker(kind: str, text: str) -> Marker:
    if kind == "FINAL":
        return Marker(text, is_variable=False)
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return Marker(text, is_variable=True)


def _has_marker_literal(code: str) -> bool:
    try:
        tree = parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and ("FINAL(" in node.value or "FINAL_VAR(" in node.value)
        for node in ast.walk(tree)
    )


def _closing_parentheses(text: str, openings: Collection[int]) -> dict[int, int]:
    """Position of each opening parenthesis that is closed → of the one that closes it, in one pass."""
    ends: dict[int, int] = {}
    pending: list[int] = []
    for match in _PARENTHESIS.finditer(text, min(openings, default=len(text))):
        if match.group() == "(":
            pending.append(match.start())
        elif pending and (start := pending.pop()) in openings:
            ends[start] = match.start()
    return ends
