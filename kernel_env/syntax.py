"""Syntax trees, in a process that makes them in several threads."""

from __future__ import annotations

import ast
import threading
from typing import Literal

__all__ = ["parse"]

_lock = threading.Lock()


def parse(source: str, mode: Literal["exec", "eval"] = "exec") -> ast.AST:
    """`ast.parse`, whatever other threads do.

    CPython 3.11 counts the depth of all trees in the making together: of two threads that make one, either
    gets a SystemError ("AST constructor recursion depth mismatch") although nothing is wrong. Threads that
    are not ours do not take the lock, hence the further tries.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: as `ast.parse`.
    """
    with _lock:
        for _ in range(100):
            try:
                return ast.parse(source, mode=mode)
            except SystemError:
                continue
        return ast.parse(source, mode=mode)
