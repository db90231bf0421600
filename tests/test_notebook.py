"""Episodes as notebooks, read back by the tools people open them with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from kernel_env import ConfigError, Episode, REPLAction, to_notebook, write_notebook
from kernel_env.notebook import read_cells

from .conftest import MakeEnv

CELLS = [
    "print('out')\nimport sys; print('err', file=sys.stderr)\n{'a': 1}",
    "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()",
    "print('lone \\ud800'); llm_query_batched(['a', 'b'])",
    "1 / 0",
]


@pytest.fixture
def episode(make_env: MakeEnv) -> Episode:
    env = make_env(llm_query_fn=str.upper)
    env.reset(
        context="c\ud800\r\n",
        task_prompt="Is 1 < 2?\n# <b>not a heading</b>",
        episode_id="the-id",
        seed=1,
        expected_answer="hidden-expected-answer",
    )
    for cell in CELLS:
        env.execute(cell, timeout_s=60)
    env.submit_final_answer("y\ud800es | *no*")
    env.close()
    return env.episode


def test_a_notebook_has_the_task_and_every_turn(episode: Episode, tmp_path: Path) -> None:
    path = write_notebook(episode, tmp_path / "episode.ipynb")
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    task, *turns = notebook.cells
    assert task.cell_type == "markdown"
    assert "> Is 1 &lt; 2?" in task.source
    assert "> \\# &lt;b&gt;not a heading&lt;/b&gt;" in task.source
    assert [cell.source for cell in turns[:-1]] == CELLS
    assert [cell.execution_count for cell in turns] == [1, 2, 3, 4, None]
    kinds = [[output.output_type for output in cell.outputs] for cell in turns]
    assert kinds == [
        ["stream", "stream", "execute_result"],
        ["display_data"],
        ["stream", "execute_result"],
        ["error"],
        [],
    ]
    assert "image/png" in turns[1].outputs[0].data


def test_nothing_of_the_record_is_left_out(episode: Episode, tmp_path: Path) -> None:
    path = write_notebook(episode, tmp_path / "episode.ipynb")
    notebook = json.loads(path.read_text("utf-8"))
    record = notebook["metadata"]["kernel_env"]
    assert record["schema"] == 1
    turns = []
    for cell in notebook["cells"][1:]:
        turn = cell["metadata"]["kernel_env"]
        turns.append({**turn, "observation": {**turn["observation"], "outputs": cell["outputs"]}})
    # JSON has only text as keys, and tuples are lists there; otherwise it is the record, to the character.
    assert Episode.model_validate({**record["episode"], "turns": turns}) == episode
    assert [turn["reward"] for turn in turns] == [0.0, 0.0, 0.0, -0.05, 0.0]
    assert turns[2]["helper_calls"][0]["arguments"] == {"prompts": ["a", "b"]}


def test_the_expected_answer_is_not_in_the_notebook(episode: Episode, tmp_path: Path) -> None:
    path = write_notebook(episode, tmp_path / "episode.ipynb")
    assert "hidden-expected-answer" not in path.read_text("utf-8")


def test_it_converts_and_runs_again(make_env: MakeEnv, episode: Episode, tmp_path: Path) -> None:
    exporter = HTMLExporter()  # type: ignore[no-untyped-call]
    html, _ = exporter.from_filename(str(write_notebook(episode, tmp_path / "episode.ipynb")))
    assert "ZeroDivisionError" in html
    assert "<b>not a heading</b>" not in html
    env = make_env()
    env.reset()
    env.execute("x = 20")
    env.execute("print(x + 1)")
    notebook = nbformat.from_dict(to_notebook(env.episode))  # type: ignore[no-untyped-call]
    before = [cell.outputs for cell in notebook.cells[1:]]
    NotebookClient(notebook, timeout=60).execute()
    assert [cell.outputs for cell in notebook.cells[1:]] == before


def test_a_write_that_fails_leaves_the_old_file(
    episode: Episode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_notebook(episode, tmp_path / "episode.ipynb")
    before = path.read_bytes()

    def fails(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(ConfigError, match="disk full"):
        write_notebook(episode, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["episode.ipynb"]


def test_equal_episodes_give_equal_bytes(episode: Episode, tmp_path: Path) -> None:
    first = write_notebook(episode, tmp_path / "a.ipynb").read_bytes()
    assert write_notebook(episode.model_copy(deep=True), tmp_path / "b.ipynb").read_bytes() == first


def test_an_episode_without_turns_is_a_notebook_too(make_env: MakeEnv, tmp_path: Path) -> None:
    env = make_env()
    env.reset()
    assert len(to_notebook(env.episode)["cells"]) == 1


PERCENT = """# a comment before everything

# %% [markdown]
# text

# %%
x = 1

# %% A title
print(x)
# %%
"""


def test_percent_scripts_and_notebooks_are_read_as_cells(tmp_path: Path, episode: Episode) -> None:
    script = tmp_path / "script.py"
    script.write_text(PERCENT)
    assert read_cells(script) == ["x = 1", "# A title\nprint(x)"]
    script.write_text("import os\n# %%\n1\n")
    assert read_cells(script) == ["import os", "1"]
    script.write_text("print(1)\nprint(2)\n")
    assert read_cells(script) == ["print(1)\nprint(2)"]
    assert read_cells(write_notebook(episode, tmp_path / "e.ipynb"))[:4] == CELLS


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("empty.py", "# only a comment\n# %% [markdown]\n# text", "has no code cell"),
        (
            "empty.ipynb",
            '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}',
            "has no code cell",
        ),
        ("broken.ipynb", "{", "is no notebook"),
        ("script.txt", "1", r"must be a notebook \(.ipynb\) or a Python file"),
    ],
)
def test_a_script_that_cannot_be_used_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_cells(path)
    with pytest.raises(ConfigError, match="cannot read the script"):
        read_cells(tmp_path / "missing.py")


def test_an_explicit_answer_is_in_the_record(make_env: MakeEnv) -> None:
    env = make_env()
    env.reset()
    env.step(REPLAction(is_final=True, final_answer="a", metadata={"logprob": -1.5}))
    (turn,) = env.episode.turns
    assert turn.action == REPLAction(is_final=True, final_answer="a", metadata={"logprob": -1.5})
