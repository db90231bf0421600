"""Episodes as notebooks, read back by the tools people open them with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from kernel_env import (
    ConfigError,
    Episode,
    HelperError,
    LocalRLMRunner,
    REPLAction,
    to_notebook,
    write_notebook,
)
from kernel_env.notebook import read_cells
from kernel_env.outputs import stdout_text

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
    task, setup, *rest = notebook.cells
    turns = [cell for cell in rest if cell.cell_type == "code"]
    assert "kernel-env:setup" in setup.metadata.tags
    assert task.cell_type == "markdown"
    assert "> Is 1 &lt; 2?" in task.source
    assert "> \\# &lt;b&gt;not a heading&lt;/b&gt;" in task.source
    assert [cell.source for cell in turns[:-1]] == CELLS
    assert [cell.execution_count for cell in turns] == [1, 2, 3, 4, None]
    kinds = [[output.output_type for output in cell.outputs] for cell in turns]
    assert kinds == [
        ["stream", "stream", "execute_result"],
        ["display_data"],
        ["stream", "execute_result", "display_data"],
        ["error"],
        [],
    ]
    assert "image/png" in turns[1].outputs[0].data
    tags = [cell.metadata.tags[1:] for cell in turns]
    assert tags == [[], [], [], ["kernel-env:error"], ["kernel-env:final"]]


def test_the_expected_answer_is_not_in_the_notebook(episode: Episode, tmp_path: Path) -> None:
    path = write_notebook(episode, tmp_path / "episode.ipynb")
    assert "hidden-expected-answer" not in path.read_text("utf-8")


def test_it_converts_to_html(episode: Episode, tmp_path: Path) -> None:
    exporter = HTMLExporter()  # type: ignore[no-untyped-call]
    html, _ = exporter.from_filename(str(write_notebook(episode, tmp_path / "episode.ipynb")))
    assert "ZeroDivisionError" in html
    assert "<b>not a heading</b>" not in html


def ran_again(path: Path, kernel_name: str = "python3") -> list[tuple[str, str]]:
    """The text and errors of the turns of a notebook, run in a kernel that knows nothing of kernel_env."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        notebook, timeout=60, kernel_name=kernel_name, allow_errors=True, resources=resources
    ).execute()
    turns = [cell for cell in notebook.cells if "turn" in cell.metadata.get("kernel_env", {})]
    for cell in turns:
        cell.outputs = [dict(output) for output in cell.outputs]
    return [(stdout_text(cell.outputs), _error_of(cell.outputs)) for cell in turns]


def _error_of(outputs: list[dict[str, Any]]) -> str:
    return "".join(f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error")


AGAIN = [
    "print(len(context), ascii(context[:3]))",
    "import random, numpy; print(random.random(), numpy.random.rand())",
    "replies = llm_query_batched(['a', 'b', 'fails']); print(replies, replies[2].error)",
    "print([llm_query(p) for p in 'xyx'])",
    "llm_query('fails')",
    "lookup('k', 3), lookup(name='k')",
    "total = len(replies); SHOW_VARS()",
    "FINAL_VAR('missing')",
    "answer['content'] = 'so far'; answer",
    "FINAL_VAR('total')",
]


@pytest.mark.parametrize("size", [10, 400_000])
def test_run_all_prints_the_same_again_without_kernel_env(
    make_env: MakeEnv, tmp_path: Path, size: int
) -> None:
    asked = []

    def model(prompt: str) -> str:
        asked.append(prompt)
        if prompt == "fails":
            raise HelperError("no such luck")
        return f"{prompt} is asked as number {len(asked)}" + "." * (size // 10)

    env = make_env(llm_query_fn=model, tools={"lookup": lambda name, limit=10: {name: limit}})
    env.reset(context="lo\ud800ng\r\n" * size, seed=7)
    for cell in AGAIN:
        env.execute(cell, timeout_s=60)
    env.close()
    path = env.export(tmp_path / "episode.ipynb")
    assert (tmp_path / "kernel_env_data").exists() == (size > 10)
    turns = [turn.observation.outputs for turn in env.episode.turns]
    assert ran_again(path, "stock") == [(stdout_text(outputs), _error_of(outputs)) for outputs in turns]


def test_papermill_runs_it(make_env: MakeEnv, tmp_path: Path) -> None:
    env = make_env(llm_query_fn=str.upper)
    env.reset(context=[1, 2])
    env.execute("print(llm_query('asked'), context)")
    path = env.export(tmp_path / "episode.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(path), str(tmp_path / "out.ipynb")]
    subprocess.run(command, check=True, timeout=100, capture_output=True, cwd=tmp_path)
    done = nbformat.read(tmp_path / "out.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    assert done.cells[-1].outputs[0].text == "ASKED [1, 2]\n"


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
    assert [cell["id"] for cell in to_notebook(env.episode)["cells"]] == ["task", "setup"]


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


EVIL = (
    "<img src=x onerror=alert(1)> ![a](http://evil.example/x.png) [b]: http://evil.example <script>x</script>"
)


def test_what_a_model_says_is_shown_and_not_rendered(tmp_path: Path) -> None:
    replies = [f"{EVIL}\n\n```repl\nllm_query({EVIL!r})\n```", f"```repl\nFINAL({EVIL!r})\n```"]

    def chat(messages: list[dict[str, str]]) -> str:
        return EVIL if len(messages) == 1 else replies[len(messages) // 2 - 1]

    episode = LocalRLMRunner(chat).run("", EVIL).episode
    episode.expected_answer = EVIL
    path = write_notebook(episode, tmp_path / "e.ipynb")
    html, _ = HTMLExporter().from_filename(str(path))  # type: ignore[no-untyped-call]
    assert "onerror" in html
    for active in ("<img src=x", "<script>x", 'src="http://evil'):
        assert active not in html
    assert Episode.from_notebook(path) == episode


def test_a_turn_is_headed_by_what_the_model_said_before_its_code() -> None:
    replies = [
        "I think first.",
        "First *this*.\n```repl\nx = 1\n```\nThen that.\n```repl\nx += 1\n```\nAnd:\n```json\n{}\n```",
        "As in:\n```json\n{}\n```\nDone.\n```repl\nFINAL(x)\n```",
    ]
    episode = LocalRLMRunner(lambda messages: replies[len(messages) // 2 - 1]).run("", "t").episode
    cells = {cell["id"]: cell["source"] for cell in to_notebook(episode)["cells"]}
    assert cells["turn-1-head"].startswith("## Turn 1\n\nok · ")
    assert cells["turn-1-head"].endswith("\n\nI think first.\n\nFirst *this*.")
    assert cells["turn-2-head"].endswith("\n\nThen that.")
    assert cells["turn-3-head"].endswith("\n\nAs in:\n```json\n{}\n```\nDone.")
