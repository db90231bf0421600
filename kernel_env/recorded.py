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
    """The helper calls of an episode as (name, arguments, result, failed, error), in their order.

    `defaults` are, by function, what its arguments are where a call leaves them out.
    """

    def __init__(self, calls: Any, defaults: Any) -> None:
        self._defaults = defaults
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

    def take(self, name: str, arguments: Any) -> Any:
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
