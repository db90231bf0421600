"""Jupyter messages as they are sent and received: this host's end of one kernel's channels.

The wire protocol is https://jupyter-client.readthedocs.io/en/stable/messaging.html. jupyter_client's Session
does more than is read here: it made dates of text, and 0.3 ms of each start were its traits.
"""

from __future__ import annotations

import hmac
import itertools
import json
import os
import uuid
from datetime import UTC, datetime
from typing import Any

from jupyter_client._version import protocol_version
from jupyter_client.session import DELIM

__all__ = ["Wire"]


class Wire:
    """Makes requests, and reads what comes back; `limit` bytes of a message, at most, are read."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.key = os.urandom(32).hex().encode()
        """What both ends sign messages with."""
        self.session = uuid.uuid4().hex
        """Which of a kernel's clients this is."""
        self._numbers = itertools.count()
        self._parent: tuple[bytes, Any] = (b"", None)

    def request(
        self, kind: str, content: dict[str, Any], metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Make a request, whose id is then known before it is sent."""
        header = {
            "msg_id": f"{self.session}_{next(self._numbers)}",
            "msg_type": kind,
            "username": "kernel_env",
            "session": self.session,
            "date": datetime.now(UTC).isoformat(),
            "version": protocol_version,
        }
        return {"header": header, "metadata": metadata or {}, "content": content}

    def pack(self, request: dict[str, Any]) -> list[bytes]:
        """The frames of a request."""
        contents: tuple[Any, ...] = (request["header"], {}, request["metadata"], request["content"])
        parts = [json.dumps(part, allow_nan=False).encode() for part in contents]
        return [DELIM, self._sign(parts), *parts]

    def unpack(self, frames: list[bytes]) -> dict[str, Any]:
        """The type, the parent's header and the content of a message.

        Raises:
            ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError: it is none of this
                kernel's, or larger than `limit`.
        """
        signature, *parts = frames[frames.index(DELIM) + 1 :]
        if (size := sum(map(len, parts))) > self.limit:
            raise ValueError(f"it has {size} bytes")
        if not hmac.compare_digest(signature, self._sign(parts[:4])):
            raise ValueError("its signature is wrong")
        header, parent, _, content = parts[:4]
        if parent != self._parent[0]:  # all that one request brings has the same
            self._parent = parent, json.loads(parent)
        message = {
            "msg_type": json.loads(header)["msg_type"],
            "parent_header": self._parent[1],
            "content": json.loads(content),
        }
        if not isinstance(message["parent_header"], dict) or not isinstance(message["content"], dict):
            raise TypeError("its parts are no objects")
        return message

    def _sign(self, parts: list[bytes]) -> bytes:
        return hmac.digest(self.key, b"".join(parts), "sha256").hex().encode()
