"""Messages of the kernel as bytes: what a cell patched does not reach them, and none is without bounds.

Runs inside the kernel, on the standard library and jupyter_client alone.
"""

from __future__ import annotations

import json
from typing import Any

try:
    from jupyter_client.jsonutil import json_default
except ImportError:  # jupyter_client 6
    from jupyter_client.jsonutil import date_default as json_default

MARKER_CHARS = 50


def packer(message_chars: int) -> Any:
    """Session.pack that a cell's patch of `json` does not reach, for text of any kind and size.

    Jupyter's own fails on lone surrogates and loses the message; and nothing else bounds a message.
    """
    strict = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=json_default).encode
    lax = json.JSONEncoder(default=json_default).encode
    without_nan = json.JSONDecoder(parse_constant=lambda _: None).decode

    def pack(message: Any) -> bytes:
        try:
            text = strict(message)
        except ValueError:  # NaN, which only Python reads
            message = without_nan(lax(message))
            text = strict(message)
        if len(text) > message_chars:
            text = strict(shortened(message, message_chars // 2))
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError:  # lone surrogates
            return lax(shortened(message, message_chars // 2)).encode("ascii")

    return pack


def unpacker() -> Any:
    """Session.unpack that a cell's patch of `json` does not reach."""
    decode = json.JSONDecoder().decode
    return lambda text: decode(bytes(text).decode("utf-8", "replace"))


def shortened(content: Any, limit: int) -> Any:
    """Message content without text of more than `limit` characters; what is missing is said in `dropped`."""
    if not isinstance(content, dict):
        return content
    dropped = 0

    def short(value: Any, mime: str) -> Any:
        nonlocal dropped
        if isinstance(value, list):
            return [short(item, mime) for item in value]
        if not isinstance(value, str) or len(value) <= limit:
            return value
        half = limit // 2 - MARKER_CHARS
        dropped += len(value) - 2 * half
        if "/" in mime and mime != "text/plain":  # half an image is none
            return None
        marker = f"\n... (truncated, total {len(value)} chars) ...\n"
        return value[:half] + marker + value[len(value) - half :]

    cut = {key: short(value, "") for key, value in content.items()}
    lines = content.get("traceback")
    if isinstance(lines, list) and sum(len(line) for line in lines if isinstance(line, str)) > limit:
        cut["traceback"] = [short("\n".join(map(str, lines)), "")]
    if isinstance(content.get("data"), dict):
        data = {mime: short(value, mime) for mime, value in content["data"].items()}
        cut["data"] = {mime: value for mime, value in data.items() if value is not None}
        notes = [
            f"<{mime} of {len(content['data'][mime])} chars, over Limits.cell_output, not kept>"
            for mime, value in data.items()
            if value is None
        ]
        if notes:
            cut["data"]["text/plain"] = "\n".join([*filter(None, [cut["data"].get("text/plain")]), *notes])
    return {**cut, "dropped": dropped} if dropped else cut
