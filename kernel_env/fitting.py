"""What does not fit is cut and says so: text around one marker, the data of displays, errors."""

from __future__ import annotations

import json
import re
from typing import Any

_DEEPEST = 100
_MOST_NOTES = 5
_LONGEST_NAME = 100
_MOST_LINES = 1000  # of a traceback
_MARKER = 64  # characters of one and more; what is no longer is not worth cutting
_ROOM_AROUND = 3 * _MARKER  # so that what is cut fits with its marker, and with what counts as its weight
_JSON = re.compile(r"application/(.*\+)?json")  # the types that nbformat 4.5 lets hold anything but text


def clip(text: str, limit: int, *, dropped: int = 0) -> str:
    """Keep the head and the tail of `text` around one marker that gives the true length.

    The parts kept make `limit` characters; the marker comes on top. `dropped` characters are missing
    from `text` already, at a marker of its own.
    """
    if len(text) <= limit:
        return text
    tail = limit // 2
    total = len(text) + dropped
    if dropped:
        total -= len(marker(total))
    return text[: limit - tail] + marker(total) + text[len(text) - tail :]


def marker(total: int) -> str:
    """What stands where something is missing of a text of `total` characters."""
    return f"\n... (truncated, total {total} chars) ...\n"


def size_of(value: Any) -> int:
    """Characters of text, or of anything else as Python writes it."""
    return len(value) if isinstance(value, str) else len(repr(value))


def valid_count(value: Any) -> int | None:
    """`value` if the notebook format takes it as an execution count."""
    return value if type(value) is int and 0 <= value < 2**31 else None


def valid_display(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Data and metadata of a display as the notebook format allows them.

    Raises:
        ValueError, TypeError: they are no objects, or nested too deeply.
    """
    metadata = dict(content.get("metadata") or {})
    data = {mime: _valid_data(mime, value) for mime, value in dict(content.get("data") or {}).items()}
    return data, _valid_json(metadata) if metadata else metadata


def fit_display(
    data: dict[str, Any], metadata: dict[str, Any], limit: int, *, dropped: int = 0
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What of a display fits into `limit` characters, and how many are missing from its text.

    Its text is cut; the rest is kept whole where it finds room beside it, for half an image or half a page is
    worth nothing, and else named in the text. `dropped` characters are missing from the text already.
    """
    text = data.get("text/plain", "")
    room = max(limit - len(text), 0)
    kept: dict[str, Any] = {}
    gone: dict[str, int] = {}
    for mime, value in data.items():
        if mime == "text/plain":
            continue
        size = size_of(value)
        if size + len(mime) <= room:
            kept[mime] = value
            room -= size + len(mime)
        else:
            gone[mime] = size
    if metadata and (size := size_of(metadata)) > room:
        metadata, gone["metadata"] = {}, size
    if "text/plain" not in data and not gone:
        return kept, metadata, dropped
    notes = _notes(gone)[: max(limit, 2 * _MARKER)]
    shown, missing = _cut(text, max(limit - len(notes), 0), dropped)
    kept["text/plain"] = "\n".join(filter(None, [shown, notes]))
    return kept, metadata, missing


def fit_error(content: dict[str, Any], limit: int, *, dropped: int = 0) -> tuple[dict[str, Any], int]:
    """The fields of an error within `limit` characters, and how many are missing from its traceback.

    Raises:
        ValueError: its traceback is no list.
    """
    ename, evalue = (
        clip(str(content.get(name, "")), max(limit // 4, _MARKER)) for name in ("ename", "evalue")
    )
    lines = content.get("traceback") or []
    if not isinstance(lines, list):
        raise ValueError(f"a traceback is a list of lines, not {type(lines).__name__}")
    lines = [str(line) for line in lines]
    text = "\n".join(lines)
    shown, missing = _cut(text, max(limit - len(ename) - len(evalue), 0), dropped)
    if shown is not text or len(lines) > _MOST_LINES:
        lines = [shown]
    return {"ename": ename, "evalue": evalue, "traceback": lines}, missing


def _cut(text: str, room: int, dropped: int) -> tuple[str, int]:
    if len(text) <= max(room, _MARKER):
        return text, dropped
    limit = max(room - _ROOM_AROUND, room // 2)
    return clip(text, limit, dropped=dropped), dropped + len(text) - limit


def _notes(gone: dict[str, int]) -> str:
    notes = [
        f"<{name[:_LONGEST_NAME]} of {size} chars, over Limits.cell_output, not kept>"
        for name, size in list(gone.items())[:_MOST_NOTES]
    ]
    if len(gone) > _MOST_NOTES:
        notes.append(f"<{len(gone) - _MOST_NOTES} more, not kept>")
    return "\n".join(notes)


def _valid_data(mime: str, value: Any) -> Any:
    """Text, but for JSON types, which have no NaN."""
    if isinstance(value, str):
        return value
    is_json = _JSON.fullmatch(mime) is not None
    if not is_json and isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "".join(value)
    value = _valid_json(value)
    return value if is_json else json.dumps(value)


def _valid_json(value: Any) -> Any:
    """`value` without NaN, which JSON does not have.

    Raises:
        ValueError: it is nested so deeply that who reads the record would run out of stack.
    """
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > _DEEPEST:
            raise ValueError(f"an output is nested over {_DEEPEST} deep")
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        pending.extend((child, depth + 1) for child in children)
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
