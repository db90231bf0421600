"""Notebook → the record of its episode, and what was changed by hand since it was written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernel_env import sidefiles
from kernel_env.errors import NotebookError, boundary

__all__ = [
    "CALL_MIME",
    "SCHEMA",
    "Read",
    "digest",
    "exact",
    "exact_again",
    "is_exact",
    "load_notebook",
    "read",
]

SCHEMA = 2
"""Version of what stands under the metadata key `kernel_env`; older ones are read, too."""
CALL_MIME = "application/vnd.kernel-env.helper-call+json"
MAX_BYTES = 256 * 2**20
"""Of a notebook file; its side files come on top."""

_PAIR = re.compile("[\ud800-\udbff](?=[\udc00-\udfff])")
_JOINED = "$joined"


@dataclass
class Read:
    """The record, as plain data, and where each of its turns stands."""

    record: dict[str, Any]
    cells: list[str] = field(default_factory=list)
    """Of each turn the cell that it is in, for messages."""


def read(path: str | Path, *, max_bytes: int = MAX_BYTES, above: tuple[Path, ...] = ()) -> Read:
    """The record of the episode in a notebook, its children's and large texts' files included.

    What was changed by hand is in the record's `edits`; cells that were added are turns, of their outputs.
    `above` are the files of the episodes that it is a child of.

    Raises:
        NotebookError: the file cannot be read, or is no episode; says where.
    """
    file = Path(path)
    if file in above:
        raise NotebookError(f"{str(file)!r} is named as a child of itself")
    with boundary(NotebookError, f"{str(file)!r} is not as it was written"):
        notebook = load_notebook(file, max_bytes=max_bytes)
        return _Reader(file, notebook, max_bytes, (*above, file)).read()


def load_notebook(file: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """A notebook of format 4, of anybody's, with its texts whole.

    Raises:
        NotebookError: it is none.
    """
    name = repr(str(file))
    try:
        size = file.stat().st_size
        if size > max_bytes:
            raise NotebookError(f"{name} has {size:,} bytes, and at most {max_bytes:,} are read (max_bytes)")
        notebook = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise NotebookError(f"cannot read {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise NotebookError(f"{name} is no notebook: it is not UTF-8 text ({error})") from error
    except RecursionError:
        raise NotebookError(f"{name} is no notebook: its JSON is nested too deeply") from None
    except ValueError as error:
        raise NotebookError(
            f"{name} is no notebook, or only a part of one: it is not JSON ({error})"
        ) from error
    if not isinstance(notebook, dict) or "nbformat" not in notebook:
        raise NotebookError(f"{name} is JSON, but no notebook: it has no nbformat")
    if notebook["nbformat"] != 4:
        raise NotebookError(
            f"{name} has notebook format {notebook['nbformat']!r}, not 4; open it in Jupyter and save it"
        )
    cells = notebook.get("cells")
    if not isinstance(cells, list):
        raise NotebookError(f"{name} is no notebook: it has no list of cells")
    for number, cell in enumerate(cells, start=1):
        if not isinstance(cell, dict) or not isinstance(cell.get("metadata"), dict):
            raise NotebookError(f"{name}, cell {number}: it is no cell, or has no metadata")
        cell["source"] = _whole(cell.get("source"))
        if not isinstance(cell["source"], str):
            raise NotebookError(f"{name}, cell {number}: its source is no text")
        for output in cell.get("outputs") or ():
            _make_whole(output)
    return notebook


def _whole(value: Any) -> Any:
    return "".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _make_whole(output: Any) -> None:
    # Files may have long texts as lists of lines; but JSON data may be a list of texts.
    if isinstance(output, dict):
        if "text" in output:
            output["text"] = _whole(output["text"])
        data = output.get("data")
        if isinstance(data, dict):
            data.update({mime: _whole(v) for mime, v in data.items() if not mime.endswith("json")})


def exact(value: Any) -> Any:
    """`value`, with no text that JSON would give back changed: a high surrogate before a low one."""
    if isinstance(value, str):
        ends = [match.end() for match in _PAIR.finditer(value)]
        if not ends:
            return value
        return {_JOINED: [value[a:b] for a, b in zip([0, *ends], [*ends, len(value)], strict=True)]}
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    return [exact(item) for item in value] if isinstance(value, list | tuple) else value


def exact_again(value: Any) -> Any:
    """What `exact` was given."""
    if isinstance(value, dict):
        if value.keys() == {_JOINED}:
            return "".join(value[_JOINED])
        return {key: exact_again(item) for key, item in value.items()}
    return [exact_again(item) for item in value] if isinstance(value, list) else value


def is_exact(text: str) -> bool:
    """Whether a text comes back from JSON as it is."""
    return _PAIR.search(text) is None


def digest(value: Any) -> str:
    """Of a source or outputs, to see whether they are still as they were written."""
    if isinstance(value, str):
        text = value.replace("\r\n", "\n").replace("\r", "\n")  # as an editor has it
    else:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    if not is_exact(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class _Reader:
    def __init__(
        self, file: Path, notebook: dict[str, Any], max_bytes: int, lineage: tuple[Path, ...]
    ) -> None:
        self._file = file
        self._lineage = lineage
        self._notebook = notebook
        self._max_bytes = max_bytes
        self._edits: list[str] = []
        self._found: list[int] = []
        self._is_first = False

    def read(self) -> Read:
        metadata = self._notebook.get("metadata", {}).get("kernel_env")
        if not isinstance(metadata, dict) or not isinstance(metadata.get("episode"), dict):
            raise NotebookError(
                f"{str(self._file)!r} is a notebook, but no episode: its metadata has no kernel_env.episode"
            )
        schema = metadata.get("schema")
        if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
            raise NotebookError(
                f"{str(self._file)!r} has episode schema {schema!r}; this kernel_env reads 1 to {SCHEMA}. "
                "A newer kernel_env may read it"
            )
        self._is_first = schema == 1  # its cells of text have no mark
        record = exact_again(metadata["episode"]) if metadata.get("joined") else dict(metadata["episode"])
        record.pop("reward", None)
        if sidefiles.is_reference(record.get("context")):
            record["context"] = sidefiles.fetch(record["context"], self._file)
        record["children"] = [self._child(child) for child in record.get("children", [])]
        numbered = list(self._turns(bool(metadata.get("joined"))))
        self._tell_order(metadata.get("turns"))
        record["turns"] = [turn for _, turn in numbered]
        record["edits"] = [*record.get("edits", []), *self._edits]
        return Read(record, [name for name, _ in numbered])

    def _child(self, child: Any) -> Any:
        if not isinstance(child, str):
            return child
        if "/" in child or child.startswith("."):
            raise NotebookError(f"{str(self._file)!r} names the child {child!r}, which is no file beside it")
        file = self._file.with_name(child)
        return read(file, max_bytes=self._max_bytes, above=self._lineage).record

    def _turns(self, is_joined: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        texts = 0
        for number, cell in enumerate(self._notebook["cells"], start=1):
            metadata = cell["metadata"].get("kernel_env")
            name = f"cell {number} ({cell.get('id', 'without id')})"
            if cell.get("cell_type") != "code":
                texts += not isinstance(metadata, dict)
                continue
            if not isinstance(metadata, dict):
                if cell["source"].strip():
                    self._edits.append(f"{name} was added; it is turn {len(self._found) + 1} now")
                    self._found.append(0)
                    yield name, _added_turn(cell)
            elif "turn" in metadata:
                yield name, self._turn(name, cell, exact_again(metadata) if is_joined else metadata)
            elif metadata.get("source") not in (None, digest(cell["source"])):
                self._edits.append(f"{name}, which prepares the others, was edited")
        if texts and not self._is_first:
            self._edits.append(f"{texts} cell{'s' * (texts > 1)} of text added; not part of the record")

    def _turn(self, name: str, cell: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
        turn = dict(metadata)
        number = turn.pop("turn")
        if not isinstance(number, int) or not isinstance(turn.get("action"), dict):
            raise NotebookError(f"{str(self._file)!r}, {name}: kernel_env.turn or .action is not what it was")
        if not isinstance(turn.get("observation"), dict):
            raise NotebookError(f"{str(self._file)!r}, {name}: kernel_env.observation is missing")
        self._found.append(number)
        written = turn.pop("written", {})
        if sidefiles.is_reference(turn.get("helper_calls")):
            turn["helper_calls"] = json.loads(sidefiles.fetch(turn["helper_calls"], self._file))
        source, outputs = cell["source"], _own_outputs(cell, written.get("calls", 0))
        action = turn["action"] = dict(turn["action"])
        known = written.get("source")
        was_edited = action.get("code") not in (source, "") if known is None else known != digest(source)
        if was_edited:
            self._edits.append(f"{name}: the code of turn {number} was edited")
        if was_edited or action.get("code") is None:  # it stands in the cell alone
            action["code"] = source
        kept = turn.pop("outputs", None)
        if "outputs" in written and written["outputs"] != digest(outputs):
            how = "changed" if outputs else "cleared"
            self._edits.append(f"{name}: the outputs of turn {number} were {how}")
            kept = None
        turn["observation"] = {**turn["observation"], "outputs": outputs if kept is None else kept}
        if turn.get("execution_count") != cell.get("execution_count"):
            self._edits.append(f"{name}: turn {number} was run again, or its number cleared")
            turn["execution_count"] = cell.get("execution_count")
        for key in ("reward", "done"):  # beside the observation for those who read the metadata
            turn.pop(key, None)
        return turn

    def _tell_order(self, written: Any) -> None:
        known = [number for number in self._found if number]
        total = written if isinstance(written, int) else max(known, default=0)
        for number in sorted(set(range(1, total + 1)) - set(known)):
            self._edits.append(f"turn {number} was deleted")
        for number in sorted({number for number in known if known.count(number) > 1}):
            self._edits.append(f"turn {number} was copied")
        if known != sorted(known):
            self._edits.append(f"turns were moved; their order is now {', '.join(map(str, known))}")


def _own_outputs(cell: dict[str, Any], calls: int) -> list[Any]:
    """The outputs of a cell without those that show its helper calls, which stand last."""
    outputs = list(cell.get("outputs") or [])
    while calls and outputs and isinstance(outputs[-1], dict) and CALL_MIME in outputs[-1].get("data", {}):
        outputs.pop()
        calls -= 1
    return outputs


def _added_turn(cell: dict[str, Any]) -> dict[str, Any]:
    outputs = list(cell.get("outputs") or [])
    errors = [output for output in outputs if output.get("output_type") == "error"]
    printed = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    result: dict[str, Any] = {"stdout": printed, "success": not errors}
    if errors:
        result["exception"] = f"{errors[0].get('ename')}: {errors[0].get('evalue')}"
    observation = {"result": result, "outputs": outputs, "status": "error" if errors else "ok"}
    return {
        "action": {"code": cell["source"], "metadata": {"added_by_hand": True}},
        "observation": observation,
        "execution_count": cell.get("execution_count"),
        "started": 0.0,
    }
