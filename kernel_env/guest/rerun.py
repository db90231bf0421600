"""Gives the cells of an exported notebook what they had, without kernel_env and without a model.

Runs in any IPython kernel: its text is in the first cell of the notebook, beside that of `recorded.py`.
"""

from __future__ import annotations

import inspect
import random
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any


class HelperError(Exception):
    """A helper call that failed in the episode, or that its record does not have."""


class HelperFailure(str):
    """The failed item of a batch; reads as the error."""

    error = property(str)


class _Verbatim(str):
    def __repr__(self) -> str:
        return str(self)


def run_again(
    namespace: Any, recorded_calls: Any, context: Any, seed: Any, calls: Any, signatures: Any
) -> None:
    """Put the context, the helpers and `answer` into the namespace, and seed `random` and numpy."""
    known = {name: inspect.signature(function) for name, function in signatures.items()}
    record = recorded_calls(calls, known, HelperError, HelperFailure)

    def helper(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return record.answer(name, dict(known[name].bind(*args, **kwargs).arguments))

        call.__name__ = call.__qualname__ = name
        vars(call)["__signature__"] = known[name]
        return call

    def FINAL(value: Any) -> Any:
        text = str(value)
        shown = text if len(text) <= 200 else text[:200] + "…"
        return _Verbatim(f"FINAL({shown})")

    def FINAL_VAR(x: Any) -> Any:
        name = x.strip().strip("'\"") if isinstance(x, str) else None
        if name is not None and name not in namespace and name.isidentifier():
            names = ", ".join(SHOW_VARS()) or "none yet"
            raise NameError(
                f"FINAL_VAR: there is no variable {name!r}; your variables: {names}. "
                f"If {name!r} is the answer itself, call FINAL({name!r})."
            )
        return FINAL(namespace.get(name, x))

    def SHOW_VARS() -> Any:
        return sorted(n for n in namespace if n not in hidden and not n.startswith("_"))

    namespace.update({name: helper(name) for name in signatures})
    namespace.update(HelperError=HelperError, HelperFailure=HelperFailure)
    namespace.update(FINAL=FINAL, FINAL_VAR=FINAL_VAR, SHOW_VARS=SHOW_VARS)
    namespace.update(context=context, answer={"content": "", "ready": False})
    if seed is not None:
        random.seed(seed)
        if "numpy" in sys.modules or find_spec("numpy") is not None:
            import_module("numpy.random").seed(seed % 2**32)
    hidden = {*namespace, "exit", "quit", "open"}
