"""What a kernel sent without the right to: counted, and the first of it logged."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

_LOGGED = 20  # a cell can send for ever, and the log's disk is the host's


class Refusals:
    """Those of one kernel, on its sockets or on its helper channel."""

    def __init__(self, who: str) -> None:
        self._who = who
        self.count = 0

    def add(self, what: str) -> None:
        """Count one more."""
        self.count += 1
        if self.count <= _LOGGED:
            ending = "" if self.count < _LOGGED else "; what follows is counted and not logged"
            log.warning("%s: not taken: %s%s", self._who, what, ending)
