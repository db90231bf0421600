"""Messages of a cell → outputs in a notebook's shape → text for the policy. The one place that truncates."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kernel_env.fitting import (
    clip,
    fit_display,
    fit_error,
    marker,
    size_of,
    valid_count,
    valid_display,
)

__all__ = [
    "Output",
    "Outputs",
    "half",
    "plain_traceback",
    "stderr_text",
    "stdout_text",
    "stream_text",
    "without_colours",
]

Output = dict[str, Any]
"""One entry of a code cell's `outputs` (nbformat 4.5)."""

_LARGEST_PIECE = 2**16
_OVERHEAD = 64
_SMALL_PIECE = 256  # of a stream: what comes after it is added to it
_LONGEST_ID = 1000
_MOST_OF_ONE_ID = 100  # displays that an update changes; each costs a copy
_MOST_CLEARED = 10_000
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_LIBRARY_PATH = re.compile(
    r"(?<=File )(\"?)[/~][^\n\":]*?/(?:site-packages|dist-packages|python3\.\d+)/(?=[^\n\":]+)"
)
_OTHER_PATH = re.compile(r"(?<=File )(\"?)[/~][^\n\":]*/(?=[^\n\":/]+)")


@dataclass(slots=True, eq=False)
class _Piece:
    output: Output
    size: int
    overhead: int
    missing: int = 0
    display_id: str | None = None
    in_tail: bool = False

    @property
    def weight(self) -> int:
        """What it takes of the limit: any number of empty displays would be "within" one of text alone."""
        return self.size + self.overhead


class Outputs:
    """The outputs of one cell, in order of arrival, in bounded memory.

    Past `limit` characters the first half of them and the latest are kept, with a marker between.
    """

    def __init__(self, limit: int) -> None:
        self._half = half(limit)
        self._largest = max(self._half - _OVERHEAD, 1)
        self._piece = max(min(limit // 16, _LARGEST_PIECE), 1)
        self._on_output: Callable[[Output], None] | None = None
        self._clear_before_next = False
        self._displays: dict[str, dict[int, _Piece]] = {}  # display id → its pieces, by identity
        self._cleared: set[str] = set()  # display ids that this cell has shown and cleared
        self._clear()

    def _clear(self) -> None:
        self._head: list[_Piece] = []
        self._tail: deque[_Piece] = deque()
        self._sizes = [0, 0]  # of head and tail
        self._is_head_full = False
        self._cleared.update(islice(self._displays, max(_MOST_CLEARED - len(self._cleared), 0)))
        self._displays = {}
        self._totals: Counter[str] = Counter()
        self._streamed: Counter[str] = Counter()  # of the totals, what came on the stream itself
        self._gaps: set[str] = set()
        self.dropped: Counter[str] = Counter()
        """Stream → characters that are no longer here; a result counts as stdout."""

    def listen(self, on_output: Callable[[Output], None] | None) -> None:
        """Have `on_output` called with each output from here on, and now with those that are there."""
        self._on_output = on_output
        if on_output is not None:
            for output in self.finish():
                on_output(output)

    def add(self, message_type: str, content: dict[str, Any]) -> None:
        """Take one iopub message; types that are not output are ignored."""
        if message_type == "clear_output":
            self._clear_before_next = True
            if not content.get("wait"):
                self._apply_clear()
            return
        missing = content.get("dropped")  # the guest has left it out already
        dropped = missing if isinstance(missing, int) and 0 < missing < 2**53 else 0
        display_id = _display_id(content)
        if message_type == "update_display_data":
            if display_id is None or display_id in self._cleared:
                return
            if shown := self._displays.get(display_id):
                self._update(shown.values(), content, dropped)
                return
        made = _output_of(message_type, content, self._largest, dropped)
        if made is not None:
            self._apply_clear()
            self._take(*made, display_id)

    def _take(self, output: Output, missing: int, display_id: str | None) -> None:
        self._miss(_stream_of(output), missing)
        if output["output_type"] == "stream":
            if missing:
                self._gaps.add(output["name"])
                self._is_head_full = True
                return
            name, text = output["name"], output["text"]
            self._totals[name] += len(text)
            self._streamed[name] += len(text)
            for piece in _pieces(text, self._piece):
                self._keep_text(name, piece)
        else:  # the marker stands in the text itself
            size, is_display = _size(output), output["output_type"] != "error"
            self._totals[_stream_of(output)] += size
            self._keep(_Piece(output, size, _OVERHEAD, missing, display_id if is_display else None))
        if self._on_output is not None:
            self._on_output(output)

    def _miss(self, name: str, count: int) -> None:
        self._totals[name] += count
        self.dropped[name] += count
        if not self.dropped[name]:
            del self.dropped[name]

    def _keep_text(self, name: str, text: str) -> None:
        pieces = self._tail if self._is_head_full else self._head
        last = pieces[-1] if pieces else None
        continues = last is None or last.output.get("name") == name
        is_full = not self._is_head_full and self._sizes[0] + len(text) > self._half
        if last is None or not continues or is_full or last.size > _SMALL_PIECE:
            self._keep(_Piece(_stream(name, text), len(text), 0 if continues else _OVERHEAD))
            return
        last.output = _stream(name, last.output["text"] + text)
        last.size += len(text)
        self._sizes[last.in_tail] += len(text)
        self._trim()

    def exception_of(self, reply: dict[str, Any]) -> str:
        """What the reply of a cell that failed says of it, in one line if the exception has one."""
        ename, evalue = reply.get("ename", reply.get("status")), reply.get("evalue", "")
        texts = [clip(text, self._half) if isinstance(text, str) else "?" for text in (ename, evalue)]
        return ": ".join(texts)

    def finish(self, *, kernel_died: bool = False) -> list[Output]:
        """The outputs so far, neighbouring pieces of one stream joined."""
        middle = [_stream(name, marker(self._totals[name])) for name in sorted(self._gaps)]
        lost = []
        if kernel_died:
            # The guest sends the first half at once and the rest at the end of the cell.
            held = [name for name, size in self._streamed.items() if size >= self._half]
            self.dropped.update(dict.fromkeys(held, 1))
            lost = [_stream(name, "\n... (truncated, the rest went with the kernel) ...\n") for name in held]
        return _joined([*_outputs(self._head), *middle, *_outputs(self._tail), *lost])

    def _apply_clear(self) -> None:
        if self._clear_before_next:
            self._clear_before_next = False
            self._clear()

    def _update(self, shown: Iterable[_Piece], content: dict[str, Any], dropped: int) -> None:
        data, metadata = valid_display(content)
        for piece in shown:
            before = piece.weight
            room = max(self._half - self._sizes[piece.in_tail] + piece.size, 0)
            fitted = fit_display(data, metadata, min(room, self._largest), dropped=dropped)
            piece.output["data"], piece.output["metadata"], missing = fitted
            self._miss(_stream_of(piece.output), missing - piece.missing)
            piece.missing, piece.size = missing, _size(piece.output)
            self._sizes[piece.in_tail] += piece.weight - before

    def _keep(self, piece: _Piece) -> None:
        if piece.display_id is not None:
            self._cleared.discard(piece.display_id)
            shown = self._displays.setdefault(piece.display_id, {})
            if len(shown) < _MOST_OF_ONE_ID:
                shown[id(piece)] = piece
            else:
                piece.display_id = None
        if not self._is_head_full and self._sizes[0] + piece.weight <= self._half:
            self._head.append(piece)
            self._sizes[0] += piece.weight
            return
        self._is_head_full = piece.in_tail = True
        self._tail.append(piece)
        self._sizes[1] += piece.weight
        self._trim()

    def _trim(self) -> None:
        while self._sizes[1] > self._half and len(self._tail) > 1:
            self._drop(self._tail.popleft())

    def _drop(self, piece: _Piece) -> None:
        self._sizes[1] -= piece.weight
        self.dropped[_stream_of(piece.output)] += piece.size
        self._gaps.add(_stream_of(piece.output))
        if piece.display_id is not None:
            shown = self._displays[piece.display_id]
            del shown[id(piece)]
            if not shown:
                del self._displays[piece.display_id]


def half(limit: int) -> int:
    """Characters at the start, and as many at the end, that are kept of a cell's output."""
    return max(limit // 2, 1)


def _outputs(pieces: Iterable[_Piece]) -> Iterator[Output]:
    return (piece.output for piece in pieces)


def _stream(name: str, text: str) -> Output:
    return {"output_type": "stream", "name": name, "text": text}


def _display_id(content: dict[str, Any]) -> str | None:
    identifier = (content.get("transient") or {}).get("display_id")
    if isinstance(identifier, str) and len(identifier) > _LONGEST_ID:
        raise ValueError(f"a display id of {len(identifier)} characters")
    return identifier if isinstance(identifier, str) else None


def _output_of(
    message_type: str, content: dict[str, Any], limit: int, dropped: int
) -> tuple[Output, int] | None:
    """The output that a message is, within `limit` characters, and how many are missing from its text."""
    match message_type:
        case "stream" if (text := str(content.get("text", ""))) or dropped:
            return _stream("stderr" if content.get("name") == "stderr" else "stdout", text), dropped
        case "display_data" | "execute_result" | "update_display_data":
            # An update of what is not here, as of an earlier cell's display, shows where it is made.
            data, metadata, missing = fit_display(*valid_display(content), limit, dropped=dropped)
            kind = message_type.removeprefix("update_")
            output: Output = {"output_type": kind, "data": data, "metadata": metadata}
            if message_type == "execute_result":
                output["execution_count"] = valid_count(content.get("execution_count"))
            return output, missing
        case "error":
            fields, missing = fit_error(content, limit, dropped=dropped)
            return {"output_type": "error", **fields}, missing
    return None


def _pieces(text: str, size: int) -> Iterator[str]:
    """A stream's text in pieces, so that what is dropped can be dropped finely."""
    return (text[at : at + size] for at in range(0, len(text), size))


def _stream_of(output: Output) -> str:
    return "stderr" if output.get("name") == "stderr" or output["output_type"] == "error" else "stdout"


def _size(output: Output) -> int:
    match output["output_type"]:
        case "stream":
            return len(output["text"])
        case "error":
            lines = sum(len(line) + 1 for line in output["traceback"])
            return len(output["ename"]) + len(output["evalue"]) + lines
        case _:
            data, metadata = output["data"], output["metadata"]
            sizes = (len(key) + size_of(value) for key, value in data.items())
            return sum(sizes) + (size_of(metadata) if metadata else 0)


def _joined(outputs: Iterable[Output]) -> list[Output]:
    joined: list[Output] = []
    texts: list[str] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output["output_type"] == "stream" and last.get("name") == output["name"]:
            texts.append(output["text"])
            continue
        if texts:
            last["text"] = "".join(texts)
        joined.append(dict(output))
        texts = [output["text"]] if output["output_type"] == "stream" else []
    if texts:
        joined[-1]["text"] = "".join(texts)
    return joined


def stream_text(outputs: Iterable[Output], name: str) -> str:
    """Everything written to one stream."""
    return "".join(o["text"] for o in outputs if o["output_type"] == "stream" and o["name"] == name)


def stdout_text(outputs: Iterable[Output]) -> str:
    """The stdout stream and the `text/plain` of results and displays, each result on lines of its own."""
    parts: list[str] = []
    for output in outputs:
        if output["output_type"] == "stream" and output["name"] == "stdout":
            parts.append(output["text"])
        elif "text/plain" in output.get("data", {}):
            if parts and not parts[-1].endswith("\n"):
                parts.append("\n")
            parts.append(f"{output['data']['text/plain']}\n")
    return "".join(parts)


def stderr_text(outputs: Iterable[Output]) -> str:
    """The stderr stream, then the traceback in plain text."""
    outputs = list(outputs)
    parts = [stream_text(outputs, "stderr")]
    parts += [plain_traceback(o["traceback"]) for o in outputs if o["output_type"] == "error"]
    return "\n".join(part.rstrip("\n") for part in parts if part)


def plain_traceback(lines: Iterable[str]) -> str:
    """A traceback without colours, its file names without the host's folders."""
    text = without_colours("\n".join(lines))
    return _OTHER_PATH.sub(r"\1", _LIBRARY_PATH.sub(r"\1", text))


def without_colours(text: str) -> str:
    """`text` without its ANSI escape sequences."""
    return _ANSI.sub("", text)
