"""How a printed final answer is recognised.

What `FINAL` or `answer` submits comes over the helper channel instead (`bridge.py`).
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

__all__ = ["Marker", "printed_marker"]

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
    for opening in _OPENING.finditer(stdout):
        end = _closing_parenthesis(stdout, opening.end())
        if end is not None:
            return _marker(opening.group(1), stdout[opening.end() : end].strip())
    return None


def _marker(kind: str, text: str) -> Marker:
    if kind == "FINAL":
        return Marker(text, is_variable=False)
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return Marker(text, is_variable=True)


def _has_marker_literal(code: str) -> bool:
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and ("FINAL(" in node.value or "FINAL_VAR(" in node.value)
        for node in ast.walk(tree)
    )


def _closing_parenthesis(text: str, start: int) -> int | None:
    depth = 1
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    return None
