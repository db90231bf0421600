"""Episode → Jupyter notebook (nbformat 4.5): a markdown cell for the task, a code cell for every turn."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat

from kernel_env.episode import Episode, Turn
from kernel_env.errors import ConfigError, boundary

__all__ = ["SCHEMA", "check_target", "read_cells", "to_notebook", "write_notebook"]

SCHEMA = 1
"""Version of what stands under `metadata.kernel_env`."""


def to_notebook(episode: Episode, *, children: Sequence[str] | None = None) -> dict[str, Any]:
    """The notebook of an episode, valid and in plain JSON types.

    Everything the record has is in it: what the notebook format has a place for is there, and the whole
    of it under the one metadata key `kernel_env`, of the notebook for the episode and of each code cell
    for its turn. If the `children` have files of their own, whose names are given in order, the cells that
    started them link to these, and the names stand in the place of their records.
    """
    record = episode.model_dump(mode="python", exclude={"turns"})
    if children is not None:
        record["children"] = list(children)
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {
            "kernelspec": {"name": episode.kernel_name, "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
            "kernel_env": {"schema": SCHEMA, "episode": record | {"reward": episode.reward}},
        },
        "cells": [
            {"id": "task", "cell_type": "markdown", "metadata": {}, "source": _header(episode)},
            *_cells(episode, children or ()),
        ],
    }
    # Validates what a reader will load; text with lone surrogates only stands as an escape in the file.
    nbformat.validate(notebook)
    return notebook


def _cells(episode: Episode, files: Sequence[str]) -> Iterator[dict[str, Any]]:
    started: dict[int, list[tuple[str, Episode]]] = defaultdict(list)
    for file, child in zip(files, episode.children, strict=bool(files)):
        started[_turn_that_started(child, episode)].append((file, child))
    for number, turn in enumerate(episode.turns, start=1):
        yield _cell(number, turn)
        if number in started:
            lines = (
                f"- [{_shown(child.task_prompt)}]({file}): {_shown(child.final_answer)}"
                for file, child in started[number]
            )
            source = "\n".join(["Children of this cell:", "", *lines])
            yield {"id": f"turn-{number}-children", "cell_type": "markdown", "metadata": {}, "source": source}


def _turn_that_started(child: Episode, parent: Episode) -> int:
    """The number of the turn in whose helper calls the child began; the last, if its call is not recorded."""
    for number, turn in enumerate(parent.turns, start=1):
        if any(call.started <= child.started <= call.started + call.duration for call in turn.helper_calls):
            return number
    return len(parent.turns)


def _header(episode: Episode) -> str:
    facts = [
        ("Answer", _shown(episode.final_answer)),
        ("Reward", "–" if episode.reward is None else f"{episode.reward:g}"),
        ("Ended by", episode.done_reason or "not ended"),
        ("Turns", f"{len(episode.turns)} of {episode.max_iterations}"),
        ("Context", f"{len(episode.context):,} characters"),
        ("Kernel", episode.kernel_name + ("" if episode.seed is None else f", seed {episode.seed}")),
        ("Isolation", episode.isolation),
        ("Time in cells", f"{episode.total_execution_time:.2f} s"),
        *_used(episode),
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    task = (
        "\n".join(f"> {_escaped(line)}" for line in episode.task_prompt.splitlines()) or "> *no task prompt*"
    )
    return f"# Episode {_escaped(episode.episode_id)}\n\n{task}\n\n| | |\n|---|---|\n{rows}\n"


def _used(episode: Episode) -> list[tuple[str, str]]:
    usages = [turn.observation.usage for turn in episode.turns if turn.observation.usage is not None]
    if not usages:
        return []
    seconds = f"{sum(usage.cpu for usage in usages):.2f} s"
    peak = f"{max(usage.peak_memory for usage in usages) / 2**20:,.0f} MB"
    return [("Processor time", seconds), ("Most memory", peak)]


def _shown(answer: str | None) -> str:
    if answer is None:
        return "*none*"
    line = " ".join(answer.split())
    return _escaped(line if len(line) <= 300 else line[:300] + "…") or "*empty*"


def _escaped(text: str) -> str:
    # Task and answer may come from a model: they are shown, not rendered.
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+!|$~" else c for c in text)


def _cell(number: int, turn: Turn) -> dict[str, Any]:
    observation = turn.observation
    source = turn.action.code
    if turn.action.is_final and not source:
        source = "# The policy submitted its final answer without code; see the metadata of this cell."
    return {
        "id": f"turn-{number}",
        "cell_type": "code",
        "execution_count": turn.execution_count,
        "metadata": {
            "kernel_env": {
                "turn": number,
                "reward": observation.reward,
                "done": observation.done,
                **turn.model_dump(mode="python", exclude={"observation": {"outputs"}}),
            }
        },
        "source": source,
        "outputs": observation.outputs,
    }


def write_notebook(episode: Episode, path: str | Path) -> Path:
    """Write the notebook whole or not at all, replacing an older one; of each child one beside it, first.

    The files of the children of `episode.ipynb` are `episode-child-1.ipynb` and so on.

    Raises:
        ConfigError: the path does not end in `.ipynb`, or cannot be written.
    """
    target = check_target(path)
    files = [target.with_stem(f"{target.stem}-child-{n}") for n in range(1, len(episode.children) + 1)]
    for name, child in zip(files, episode.children, strict=True):
        write_notebook(child, name)
    notebook = to_notebook(episode, children=[name.name for name in files])
    # The escapes of lone surrogates, which UTF-8 does not have, are what JSON calls them too.
    text = json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True, allow_nan=False)
    data = (text + "\n").encode("utf-8", "backslashreplace")
    written = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(written, "xb") as file:
            file.write(data)
        os.replace(written, target)
    except OSError as error:
        raise ConfigError(f"cannot export to {str(target)!r}: {error.strerror or error}") from error
    finally:
        written.unlink(missing_ok=True)
    return target


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
    with boundary(ConfigError, f"{str(file)!r} is no notebook"):
        notebook = nbformat.reads(text, as_version=4)  # type: ignore[no-untyped-call]
    return [c.source for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def _percent_cells(text: str) -> list[str]:
    head, *parts = re.split(r"^# ?%%", text, flags=re.MULTILINE)
    cells = [head] if any(line.strip() and not line.startswith("#") for line in head.splitlines()) else []
    for part in parts:
        title, _, body = part.partition("\n")
        if body.strip() and "[markdown]" not in title and "[md]" not in title and "[raw]" not in title:
            cells.append(f"#{title}\n{body}".strip() if title.strip() else body.strip())
    return [cell.strip("\n") for cell in cells]
