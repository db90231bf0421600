"""Answers helper calls from the record of an episode: by what is asked, then by order.

On the standard library alone: the text of this file is also in the first cell of every exported notebook,
which runs again without kernel_env.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from typing import Any

ALIASES = {"llm_batch": "llm_query_batched"}


class RecordedCalls:
    """The helper calls of an episode as dicts, in their order, and what answers from them.

    `signatures` are those of the functions, by name: a call may leave out what has a default. What cannot be
    served raises `error`; failed items of a batch are `failure`s.
    """

    def __init__(self, calls: Any, signatures: Any, error: Any, failure: Any) -> None:
        self._defaults = {
            name: {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}
            for name, signature in signatures.items()
        }
        self._error, self._failure = error, failure
        self._by_content: Any = defaultdict(deque)
        self._by_order: Any = defaultdict(deque)
        self.unrecorded: list[str] = []
        """Calls that the record does not have, as text."""
        self.by_order: list[str] = []
        """Calls that were answered with the next reply there was, because nothing like them was recorded."""
        for number, call in enumerate(calls):
            self._by_content[self._key(call["name"], call["arguments"])].append((number, call))
            self._by_order[ALIASES.get(call["name"], call["name"])].append((number, call))
        self._used: set[int] = set()

    def answer(self, name: str, arguments: Any) -> Any:
        """What the function returned or raised when it was called like this."""
        call = self._take(name, arguments)
        if call is None:
            raise self._error(f"{name}: the record of this episode has no such call left")
        if call["error"] is not None:
            raise self._error(call["error"])
        result = call["result"]
        if call["failed"]:
            result = list(result)
            for index, text in call["failed"].items():
                result[int(index)] = self._failure(text)
        return result

    def _take(self, name: str, arguments: Any) -> Any:
        """The recorded call that answers this one; None if there is none left."""
        name = ALIASES.get(name, name)
        found = self._next(self._by_content[self._key(name, arguments)])
        if found is None:
            shown = f"{name}({json.dumps(arguments, ensure_ascii=False, default=repr)[:200]})"
            found = self._next(self._by_order[name])
            (self.unrecorded if found is None else self.by_order).append(shown)
        return found

    def _next(self, calls: Any) -> Any:
        while calls:
            number, call = calls.popleft()
            if number not in self._used:
                self._used.add(number)
                return call
        return None

    def _key(self, name: str, arguments: Any) -> str:
        name = ALIASES.get(name, name)
        defaults = self._defaults.get(name, {"model": None, "context": None, "contexts": None})
        given = {k: v for k, v in arguments.items() if k not in defaults or defaults[k] != v}
        return json.dumps([name, given], sort_keys=True, ensure_ascii=False, default=repr)
