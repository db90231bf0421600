"""Helper calls: the functions that a kernel may call, and the calls of one cell."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from kernel_env.episode import HelperCall
from kernel_env.errors import HelperError

__all__ = ["Cell", "Helper", "HelperFailure", "note_to_cell", "signature_text"]

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class HelperFailure(str):
    """The failed item of a batch: a text that reads as the error, which is also in `.error`."""

    @property
    def error(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Helper:
    """A function of the host that the kernel may call by name."""

    function: Callable[..., Awaitable[Any]]
    signature: inspect.Signature
    doc: str
    is_typed: bool = False
    """The kernel holds callers to the annotations; those of a user's tool are documentation."""

    def bind(self, name: str, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments of a call by name.

        Raises:
            HelperError: the function does not take them.
        """
        signature = self.signature
        if unknown := sorted(arguments.keys() - signature.parameters.keys()):
            raise HelperError(f"{name}: unexpected arguments {unknown}")
        parameters = signature.parameters.values()
        if all(p.kind in _BY_NAME and (p.name in arguments or p.default is not p.empty) for p in parameters):
            return (), arguments  # as nearly always; `Signature.bind` costs a tenth of a call
        ordered = {key: arguments[key] for key in signature.parameters if key in arguments}
        bound = inspect.BoundArguments(signature, ordered)
        try:
            args, kwargs = bound.args, bound.kwargs
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise HelperError(f"{name}: {error}") from None
        return args, kwargs


def signature_text(signature: inspect.Signature) -> str:
    """A signature as code, without annotations; defaults that are no plain values are `...`."""
    parameters = []
    for parameter in signature.parameters.values():
        default = parameter.default
        if default is not parameter.empty and type(default) not in (str, int, float, bool, type(None)):
            default = ...
        if isinstance(default, float) and not math.isfinite(default):
            default = ...
        parameters.append(parameter.replace(annotation=parameter.empty, default=default))
    plain = inspect.Signature(parameters)
    return str(plain).replace("=Ellipsis", "=...")


_serving: ContextVar[Cell | None] = ContextVar("kernel_env_cell", default=None)


def note_to_cell(note: str) -> None:
    """In code that serves a helper call: have the cell that made it tell this to its policy."""
    cell = _serving.get()
    if cell is not None and note not in cell.notes:
        cell.notes.append(note)


@dataclass
class Cell:
    """The helper calls of one execution: what is in flight, what has ended, how long it waited."""

    id: str
    answer: str | None = None
    """The text submitted last."""
    calls: list[HelperCall] = field(default_factory=list)
    refusal: str | None = None
    """Why no further call is served; None while calls are."""
    on_broken: Callable[[str], None] | None = None
    """Called when the kernel says why it cannot reply to this request."""
    in_flight: set[asyncio.Task[None]] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    """What is to be told of its calls."""
    _waited: float = 0.0
    _waiting_since: float = 0.0

    @property
    def waited(self) -> float:
        """Seconds in which at least one call was in flight."""
        return self._waited + (time.monotonic() - self._waiting_since if self.in_flight else 0.0)

    def enter(self, task: asyncio.Task[None]) -> None:
        _serving.set(self)
        if not self.in_flight:
            self._waiting_since = time.monotonic()
        self.in_flight.add(task)

    def leave(self, task: asyncio.Task[None]) -> None:
        self.in_flight.discard(task)
        if not self.in_flight:
            self._waited += time.monotonic() - self._waiting_since

    def cancel(self, reason: str) -> None:
        """Cancel what is in flight and refuse what comes."""
        self.refusal = reason
        for task in list(self.in_flight):
            task.cancel(reason)
