"""Episode → Jupyter notebook (nbformat 4.5), with all that the record has; `reading.py` is the way back.

A head, a first cell that lets the others run again without kernel_env, and for every turn a heading with what
the model said, its code, its outputs, its helper calls and its children.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernel_env import sidefiles
from kernel_env.episode import Episode, Turn
from kernel_env.errors import ConfigError, NotebookError, boundary
from kernel_env.markup import (
    call_html,
    call_preview,
    call_text,
    children_text,
    head,
    reasoning_of_turns,
    section,
)
from kernel_env.reading import CALL_MIME, SCHEMA, digest, exact, is_exact

__all__ = ["check_target", "notebook_text", "read_cells", "to_notebook", "write_notebook"]

_HERE = Path(__file__).parent
_SETUP = """\
# So that the cells below run again without kernel_env and without a model: the context, the seed, and helpers
# that answer from the record of the episode.
import json as _json
from pathlib import Path as _Path

_record = {}"""
_SIGNATURES = {
    "llm_query": "(prompt, model=None)",
    "llm_query_batched": "(prompts, model=None)",
    "llm_batch": "(prompts, model=None)",
    "rlm_query": "(prompt, model=None, context=None)",
    "rlm_query_batched": "(prompts, model=None, contexts=None)",
}
_NO_CODE = "# The policy submitted its final answer without code; see the metadata of this cell."


def to_notebook(episode: Episode) -> dict[str, Any]:
    """The notebook of an episode, valid, in plain JSON types, with everything in it.

    What the notebook format has a place for is there; the rest is under the one metadata key `kernel_env`, of
    the notebook for the episode and of each code cell for its turn. `notebook_schema.json` beside this module
    is its JSON schema.

    Raises:
        NotebookError: the record has what JSON does not, as an action's `metadata` may.
    """
    return _Writer(episode, None, []).notebook()


def notebook_text(episode: Episode) -> str:
    """The text of a notebook file with everything in it; equal episodes give equal text."""
    return _as_text(to_notebook(episode))


def _as_text(notebook: dict[str, Any]) -> str:
    text = json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True, allow_nan=False) + "\n"
    # The escapes of lone surrogates, which UTF-8 does not have, are what JSON calls them too.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_notebook(episode: Episode, path: str | Path) -> Path:
    """Write the notebook whole or not at all, replacing an older one; of each child one beside it, first.

    The files of the children of `episode.ipynb` are `episode-child-1.ipynb` and so on. Large contexts and
    helper calls (from 64 Ki characters on) have files of their own, named by their content, in the folder
    `kernel_env_data` beside it, which other notebooks there share.

    Raises:
        ConfigError: the path does not end in `.ipynb`, or cannot be written.
        NotebookError: as `to_notebook`.
    """
    target = check_target(path)
    files = [target.with_stem(f"{target.stem}-child-{n}") for n in range(1, len(episode.children) + 1)]
    for name, child in zip(files, episode.children, strict=True):
        write_notebook(child, name)
    try:
        text = _as_text(_Writer(episode, target, [name.name for name in files]).notebook())
        sidefiles.write_whole(target, text.encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot export to {str(target)!r}: {error.strerror or error}") from error
    return target


class _Writer:
    """One notebook; large texts go beside `path`, if there is one, and the children are in `files`."""

    def __init__(self, episode: Episode, path: Path | None, files: list[str]) -> None:
        self._episode = episode
        self._path = path
        self._files = files
        self._calls: list[Any] = []

    def notebook(self) -> dict[str, Any]:
        try:
            self._calls = [self._calls_of(turn) for turn in self._episode.turns]
            return self._notebook()
        except (TypeError, ValueError) as error:
            name = self._episode.episode_id
            raise NotebookError(f"the record of {name!r} is no JSON value: {error}") from error

    def _notebook(self) -> dict[str, Any]:
        # Beside JupyterLab this takes a second (formats of jsonschema), which most uses need not spend.
        import nbformat

        episode = self._episode
        record = episode.model_dump(mode="python", exclude={"turns", "children", "context"})
        record["children"] = self._files or [child.model_dump(mode="python") for child in episode.children]
        context = self._beside(episode.context)
        metadata = {"schema": SCHEMA, "turns": len(episode.turns)}
        record |= {"context": context, "reward": episode.reward}
        if episode.seed is not None and episode.seed >= 2**53:
            record["seed"] = str(episode.seed)  # JavaScript would round it
        cells = [
            _text_cell("task", "head", head(episode)),
            self._setup_cell(context),
            *self._turn_cells(),
        ]
        whole = [record, [cell["metadata"] for cell in cells]]
        text = json.dumps(whole, ensure_ascii=False, allow_nan=False)
        if not is_exact(text):
            metadata["joined"] = True
            record = exact(record)
            for cell in cells:
                cell["metadata"] = exact(cell["metadata"])
        notebook = {
            "nbformat": 4,
            "nbformat_minor": 5,
            "metadata": {
                "kernelspec": {"name": episode.kernel_name, "display_name": "Python 3", "language": "python"},
                "language_info": {"name": "python"},
                "kernel_env": {**metadata, "episode": record},
            },
            "cells": cells,
        }
        # Validates what a reader will load; text with lone surrogates only stands as an escape in the file.
        nbformat.validate(notebook)
        return notebook

    def _beside(self, text: str) -> Any:
        if self._path is None or len(text) < sidefiles.LARGE:
            return text
        return sidefiles.put(text, self._path)

    def _calls_of(self, turn: Turn) -> Any:
        calls = [call.model_dump(mode="python") for call in turn.helper_calls]
        if not calls or self._path is None:
            return calls
        text = self._beside(json.dumps(calls, ensure_ascii=False, sort_keys=True, allow_nan=False))
        return text if sidefiles.is_reference(text) else calls

    def _setup_cell(self, context: Any) -> dict[str, Any]:
        episode = self._episode
        given = _python_text(context)
        if episode.context_type == "json":
            given = f"_json.loads({given})" if episode.context else "''"
        calls = " + ".join(_python_json(calls) for calls in self._calls if calls) or "[]"
        there = set(episode.turns[0].observation.available_variables) if episode.turns else set()
        signatures = {name: text for name, text in _SIGNATURES.items() if name in there} | episode.tools
        functions = ", ".join(
            f"{name!r}: lambda {text[1:-1]}: None" for name, text in sorted(signatures.items())
        )
        texts = ((_HERE / name).read_text("utf-8") for name in ("recorded.py", "guest/rerun.py"))
        source = "\n".join(
            [
                _SETUP,
                # As texts on lines of their own: a page that cannot fold the cell away shows ten lines.
                *(f"exec({text!r}, _record)" for text in texts),
                '_record["run_again"](',
                '    globals(),\n    _record["RecordedCalls"],',
                f"    context={given},\n    seed={episode.seed!r},\n    calls={calls},",
                f"    signatures={{{functions}}},\n)",
            ]
        )
        return {
            "id": "setup",
            "cell_type": "code",
            "execution_count": None,
            "metadata": {
                "kernel_env": {"role": "setup", "source": digest(source)},
                "jupyter": {"source_hidden": True},
                "tags": ["kernel-env:setup"],
            },
            "source": source,
            "outputs": [],
        }

    def _turn_cells(self) -> Iterator[dict[str, Any]]:
        episode = self._episode
        started: dict[int, list[tuple[str | None, Episode]]] = defaultdict(list)
        files: list[Any] = list(self._files) or [None] * len(episode.children)
        for file, child in zip(files, episode.children, strict=True):
            started[_turn_that_started(child, episode)].append((file, child))
        said = reasoning_of_turns(episode)
        for number, turn in enumerate(episode.turns, start=1):
            yield _text_cell(f"turn-{number}-head", "turn", section(number, turn, said[number - 1]))
            yield _turn_cell(number, turn, self._calls[number - 1])
            if number in started:
                tags = ["kernel-env:child"]
                yield _text_cell(f"turn-{number}-children", "children", children_text(started[number]), tags)


def _text_cell(id: str, role: str, source: str, tags: list[str] | None = None) -> dict[str, Any]:
    metadata: dict[str, Any] = {"kernel_env": {"role": role}} | ({"tags": tags} if tags else {})
    return {"id": id, "cell_type": "markdown", "metadata": metadata, "source": source}


def _turn_cell(number: int, turn: Turn, calls: Any) -> dict[str, Any]:
    observation, code = turn.observation, turn.action.code
    source = _NO_CODE if turn.action.is_final and not code else code
    record = turn.model_dump(mode="python", exclude={"observation": {"outputs"}, "helper_calls": True})
    if source == code and is_exact(code) and "\r" not in code:
        record["action"]["code"] = None  # it is the cell's
    written = {
        "source": digest(source),
        "outputs": digest(observation.outputs),
        "calls": len(turn.helper_calls),
    }
    record |= {"helper_calls": calls, "written": written}
    if not is_exact(json.dumps(observation.outputs, ensure_ascii=False)):
        record["outputs"] = observation.outputs
    tags = ["kernel-env:turn"]
    tags += ["kernel-env:error"] if observation.status != "ok" else []
    tags += ["kernel-env:final"] if observation.done else []
    shown = [
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {
                CALL_MIME: call_preview(call),
                "text/html": call_html(call),
                "text/plain": call_text(call),
            },
        }
        for call in turn.helper_calls
    ]
    return {
        "id": f"turn-{number}",
        "cell_type": "code",
        "execution_count": turn.execution_count,
        "metadata": {
            "kernel_env": {"turn": number, "reward": observation.reward, "done": observation.done, **record},
            "tags": tags,
        },
        "source": source,
        "outputs": [*observation.outputs, *shown],
    }


def _turn_that_started(child: Episode, parent: Episode) -> int:
    """The number of the turn in whose helper calls the child began; the last, if its call is not recorded."""
    for number, turn in enumerate(parent.turns, start=1):
        if any(call.started <= child.started <= call.started + call.duration for call in turn.helper_calls):
            return number
    return len(parent.turns)


def _python_text(text: Any) -> str:
    """A text as code, wherever it stands."""
    if sidefiles.is_reference(text):
        return f'_Path({text["file"]!r}).read_bytes().decode("utf-8", "surrogatepass")'
    return repr(text)


def _python_json(value: Any) -> str:
    if sidefiles.is_reference(value):
        return f"_json.loads({_python_text(value)})"
    return f"_json.loads({json.dumps(value, sort_keys=True, allow_nan=False)!r})"


def check_target(path: str | Path) -> Path:
    """Make sure that a notebook can be written to `path`, before there is one.

    Raises:
        ConfigError: it cannot, with the reason.
    """
    target = Path(path)
    if target.suffix != ".ipynb":
        raise ConfigError(f"cannot export to {str(target)!r}: the name must end in .ipynb")
    if not target.parent.is_dir():
        raise ConfigError(f"cannot export to {str(target)!r}: there is no folder {str(target.parent)!r}")
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise ConfigError(f"cannot export to {str(target)!r}: it is a folder, or its folder is not writable")
    return target


def read_cells(path: str | Path) -> list[str]:
    """The code cells of a notebook, or of a Python file with `# %%` lines, in order.

    Text before the first `# %%` of a Python file is a cell if it is more than comments; cells marked
    `[markdown]` or `[raw]` are left out, as are empty ones.

    Raises:
        ConfigError: the file cannot be read as either, or has no code cell.
    """
    file = Path(path)
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the script {str(file)!r}: {error}") from error
    if file.suffix == ".ipynb":
        cells = _notebook_cells(file, text)
    elif file.suffix == ".py":
        cells = _percent_cells(text)
    else:
        raise ConfigError(f"the script {str(file)!r} must be a notebook (.ipynb) or a Python file (.py)")
    if not cells:
        raise ConfigError(f"the script {str(file)!r} has no code cell")
    return cells


def _notebook_cells(file: Path, text: str) -> list[str]:
    import nbformat  # as above

    with boundary(ConfigError, f"{str(file)!r} is no notebook"):
        notebook = nbformat.reads(text, as_version=4)  # type: ignore[no-untyped-call]
    codes = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    return [cell.source for cell in codes if cell.metadata.get("kernel_env", {}).get("role") != "setup"]


def _percent_cells(text: str) -> list[str]:
    head, *parts = re.split(r"^# ?%%", text, flags=re.MULTILINE)
    cells = [head] if any(line.strip() and not line.startswith("#") for line in head.splitlines()) else []
    for part in parts:
        title, _, body = part.partition("\n")
        if body.strip() and "[markdown]" not in title and "[md]" not in title and "[raw]" not in title:
            cells.append(f"#{title}\n{body}".strip() if title.strip() else body.strip())
    return [cell.strip("\n") for cell in cells]
