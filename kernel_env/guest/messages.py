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
    # Shorter than what the host keeps of them, so that it finds one marker with the true length.
    cut = {k: _short(v, limit // 8 if k in ("ename", "evalue") else limit) for k, v in content.items()}
    shown = content.get("text")  # what the host counts as output
    if isinstance(content.get("traceback"), list):
        shown = "\n".join(map(str, content["traceback"]))
        if len(shown) > limit:
            cut["traceback"] = [_short(shown, limit)]
    if isinstance(content.get("data"), dict):
        data = {mime: _joined(value, mime) for mime, value in content["data"].items()}
        shown = data.get("text/plain")
        cut["data"] = _shortened_data(data, limit)
    if isinstance(shown, str) and len(shown) > limit:
        cut["dropped"] = len(shown) - limit
    return cut


def _short(value: Any, limit: int) -> Any:
    if isinstance(value, list):
        return [_short(item, limit) for item in value]
    if not isinstance(value, str) or len(value) <= limit:
        return value
    tail = limit // 2
    marker = f"\n... (truncated, total {len(value)} chars) ...\n"
    return value[: limit - tail] + marker + value[len(value) - tail :]


def _joined(value: Any, mime: str) -> Any:
    is_lines = isinstance(value, list) and all(isinstance(line, str) for line in value)
    return "".join(value) if is_lines and not mime.endswith("json") else value


def _shortened_data(data: dict[str, Any], limit: int) -> dict[str, Any]:
    """Half an image is none: what is too large is left out, and named in the text."""
    gone = {
        mime: len(value)
        for mime, value in data.items()
        if mime != "text/plain" and isinstance(value, str) and len(value) > limit
    }
    kept = {mime: value for mime, value in data.items() if mime not in gone}
    notes = [f"<{mime} of {size} chars, over Limits.cell_output, not kept>" for mime, size in gone.items()]
    if "text/plain" in kept or notes:
        text = _short(str(kept.get("text/plain", "")), limit)
        kept["text/plain"] = "\n".join([*filter(None, [text]), *notes[:5]])
    return kept
