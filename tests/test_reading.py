"""Notebooks read back: the same episode; what was changed by hand; files that are none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import kernel_env
from kernel_env import ConfigError, Episode, HelperCall, NotebookError, REPLAction, Turn, write_notebook
from kernel_env.budget import ModelUsage
from kernel_env.episode import SkippedBlocks
from kernel_env.notebook import notebook_text
from kernel_env.schema import notebook_schema
from kernel_env.types import CodeBlockResult, REPLObservation, Usage

from .conftest import MakeEnv

TEXT = st.text(st.characters() | st.sampled_from("\r\n\t\ud83d\ude00\x00\u2028`<]("), max_size=40)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOAT | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OBJECT = st.dictionaries(st.text(max_size=8), JSON, max_size=3)
OUTPUT = st.one_of(
    st.builds(
        lambda name, text: {"output_type": "stream", "name": name, "text": text},
        st.sampled_from(["stdout", "stderr"]),
        TEXT,
    ),
    st.builds(
        lambda text, data: {
            "output_type": "display_data",
            "metadata": {},
            "data": {"text/plain": text, "application/json": data},
        },
        TEXT,
        OBJECT,
    ),
    st.builds(
        lambda n, text: {
            "output_type": "execute_result",
            "metadata": {},
            "execution_count": n,
            "data": {"text/html": text},
        },
        st.integers(0, 99),
        TEXT,
    ),
    st.builds(
        lambda a, b, lines: {"output_type": "error", "ename": a, "evalue": b, "traceback": lines},
        TEXT,
        TEXT,
        st.lists(TEXT, max_size=3),
    ),
)
CALL = st.builds(
    HelperCall,
    name=TEXT,
    arguments=OBJECT,
    result=JSON,
    failed=st.dictionaries(st.integers(0, 9), TEXT, max_size=2),
    error=st.none() | TEXT,
    started=FLOAT,
    duration=FLOAT,
)
USAGE = st.builds(
    Usage,
    wall=FLOAT,
    active=FLOAT,
    helper_wait=FLOAT,
    cpu=FLOAT,
    peak_memory=st.integers(0),
    bytes_out=st.integers(0),
    processes=st.integers(0, 99),
)
OBSERVATION = st.builds(
    REPLObservation,
    result=st.builds(
        CodeBlockResult,
        stdout=TEXT,
        stderr=TEXT,
        exception=st.none() | TEXT,
        execution_time=FLOAT,
        locals_snapshot=st.dictionaries(st.text(max_size=5), TEXT, max_size=2),
    ),
    context_preview=st.none() | TEXT,
    reward=st.none() | FLOAT,
    done=st.booleans(),
    metadata=OBJECT,
    final_answer=st.none() | TEXT,
    status=st.sampled_from(["ok", "error", "timeout", "died"]),
    outputs=st.lists(OUTPUT, max_size=4),
    usage=st.none() | USAGE,
    lost_variables=st.lists(TEXT, max_size=2),
)
TURN = st.builds(
    Turn,
    action=st.builds(
        REPLAction, code=TEXT, is_final=st.booleans(), final_answer=st.none() | TEXT, metadata=OBJECT
    ),
    observation=OBSERVATION,
    execution_count=st.none() | st.integers(1, 99),
    started=FLOAT,
    active_time=FLOAT,
    helper_calls=st.lists(CALL, max_size=3).map(tuple),
)
USED = st.builds(ModelUsage, calls=st.integers(0, 9), prompt_tokens=st.integers(0, 9), cost=FLOAT)
MESSAGE = st.builds(
    lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), TEXT
)


def episodes(children: Any) -> Any:
    return st.builds(
        Episode,
        episode_id=TEXT,
        task_prompt=TEXT,
        context=TEXT,
        kernel_name=st.just("python3"),
        max_iterations=st.integers(1, 99),
        seed=st.none() | st.integers(0, 2**64 - 1),
        limits=st.dictionaries(st.text(max_size=5), st.none() | FLOAT, max_size=2),
        started=FLOAT,
        turns=st.lists(TURN, max_size=4),
        final_answer=st.none() | TEXT,
        messages=st.lists(MESSAGE, max_size=4),
        skipped=st.lists(
            st.builds(SkippedBlocks, after_turn=st.integers(1, 9), blocks=st.lists(TEXT, max_size=2)),
            max_size=2,
        ),
        children=children,
        model_usage=st.dictionaries(st.text(max_size=5), USED, max_size=2),
        expected_answer=JSON,
        edits=st.lists(TEXT, max_size=2),
    )


EPISODE = episodes(st.lists(episodes(st.just([])), max_size=2))


@given(episode=EPISODE)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_every_episode_comes_back_as_it_was(episode: Episode, tmp_path: Path) -> None:
    path = write_notebook(episode, tmp_path / "e.ipynb")
    again = Episode.from_notebook(path)
    assert again == episode
    assert write_notebook(again, tmp_path / "again.ipynb").read_bytes().replace(
        b"again-child", b"e-child"
    ) == (path.read_bytes())
    (tmp_path / "whole.ipynb").write_text(notebook_text(episode), "utf-8")
    assert Episode.from_notebook(tmp_path / "whole.ipynb") == episode


@pytest.fixture
def path(make_env: MakeEnv, tmp_path: Path) -> Path:
    env = make_env(llm_query_fn=str.upper)
    env.reset(context="c", task_prompt="t", seed=2**63 + 1, episode_id="the-id")
    for code in ("print('one')", "llm_query('two')", "3", "FINAL('four')"):
        env.execute(code)
    env.close()
    return env.export(tmp_path / "episode.ipynb")


def edited(path: Path, edit: Callable[[dict[str, Any]], None]) -> Episode:
    notebook = json.loads(path.read_text("utf-8"))
    edit(notebook)
    path.write_text(json.dumps(notebook), "utf-8")
    return Episode.from_notebook(path)


def cell(notebook: dict[str, Any], id: str) -> dict[str, Any]:
    return next(cell for cell in notebook["cells"] if cell["id"] == id)


def test_code_that_was_edited_is_what_it_is_now(path: Path) -> None:
    episode = edited(path, lambda notebook: cell(notebook, "turn-1").update(source=["print(\n", "'uno')"]))
    assert episode.turns[0].action.code == "print(\n'uno')"
    assert episode.edits == ["cell 4 (turn-1): the code of turn 1 was edited"]
    assert episode.seed == 2**63 + 1


def test_outputs_that_were_cleared_are_gone_and_the_calls_are_not(path: Path) -> None:
    def clear(notebook: dict[str, Any]) -> None:
        for one in notebook["cells"]:
            if one["cell_type"] == "code":
                one.update(outputs=[], execution_count=None)

    episode = edited(path, clear)
    assert all(turn.observation.outputs == [] for turn in episode.turns)
    assert episode.turns[0].observation.result.stdout == "one\n"
    assert [call.result for call in episode.turns[1].helper_calls] == ["TWO"]
    assert "cell 4 (turn-1): the outputs of turn 1 were cleared" in episode.edits
    assert "cell 4 (turn-1): turn 1 was run again, or its number cleared" in episode.edits


def test_cells_that_were_moved_deleted_copied_and_added_are_told(path: Path) -> None:
    def edit(notebook: dict[str, Any]) -> None:
        cells = {one["id"]: one for one in notebook["cells"]}
        added = {"cell_type": "code", "id": "mine", "metadata": {}, "source": "1 / 0", "execution_count": 9}
        added["outputs"] = [
            {"output_type": "stream", "name": "stdout", "text": ["be", "fore"]},
            {"output_type": "error", "ename": "ZeroDivisionError", "evalue": "division", "traceback": []},
        ]
        note = {"cell_type": "markdown", "id": "note", "metadata": {}, "source": "my note"}
        order = ["task", "setup", "turn-3", "turn-1", "turn-1", "turn-4"]
        notebook["cells"] = [*(cells[id] for id in order), added, note]

    episode = edited(path, edit)
    assert [turn.action.code for turn in episode.turns] == [
        *("3", "print('one')", "print('one')", "FINAL('four')", "1 / 0")
    ]
    assert (episode.turns[4].observation.status, episode.turns[4].observation.result.stdout) == (
        "error",
        "before",
    )
    assert episode.edits == [
        "cell 7 (mine) was added; it is turn 5 now",
        "1 cell of text added; not part of the record",
        "turn 2 was deleted",
        "turn 1 was copied",
        "turns were moved; their order is now 3, 1, 1, 4",
    ]


def test_a_notebook_saved_by_another_editor_is_the_same(path: Path) -> None:
    before = Episode.from_notebook(path)

    def save(notebook: dict[str, Any]) -> None:
        for one in notebook["cells"]:
            one["source"] = one["source"].splitlines(keepends=True)
            for output in one.get("outputs", []):
                if "text" in output:
                    output["text"] = output["text"].splitlines(keepends=True)

    assert edited(path, save) == before


def test_notebooks_of_the_first_schema_are_read(path: Path) -> None:
    before = Episode.from_notebook(path)

    def first(notebook: dict[str, Any]) -> None:
        notebook["metadata"]["kernel_env"]["schema"] = 1
        del notebook["metadata"]["kernel_env"]["turns"]
        notebook["cells"] = [
            one for one in notebook["cells"] if one["id"] in ("task", *(f"turn-{n}" for n in range(9)))
        ]
        for one in notebook["cells"][1:]:
            record = one["metadata"]["kernel_env"]
            del one["outputs"][len(one["outputs"]) - record.pop("written")["calls"] :]
            record["action"]["code"] = one["source"]
        notebook["cells"][0]["metadata"] = {}
        del notebook["metadata"]["kernel_env"]["episode"]["model_usage"]

    assert edited(path, first) == before


METADATA = ("metadata", "kernel_env")


def put(notebook: dict[str, Any], *place: Any) -> None:
    *way, key, value = place
    for step in way:
        notebook = notebook[step]
    notebook[key] = value


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (("nbformat", 3), "notebook format 3, not 4; open it in Jupyter"),
        (("metadata", {}), "is a notebook, but no episode: its metadata has no kernel_env"),
        (("metadata", "kernel_env", "schema", 3), "episode schema 3; this kernel_env reads 1 to 2. A newer"),
        (
            ("metadata", "kernel_env", "episode", "max_iterations", "many"),
            "episode.ipynb', max_iterations: Input",
        ),
        (
            ("metadata", "kernel_env", "episode", "context", {"file": "/etc/passwd"}),
            "'/etc/passwd', which is no file",
        ),
        (
            ("metadata", "kernel_env", "episode", "children", ["../x.ipynb"]),
            r"the child '../x.ipynb', which is no",
        ),
        (
            ("metadata", "kernel_env", "episode", "children", ["gone.ipynb"]),
            "cannot read .*gone.ipynb': No such",
        ),
        (
            ("cells", 3, "metadata", "kernel_env", "started", "soon"),
            r"cell 4 \(turn-1\), field started: Input should",
        ),
        (
            ("cells", 3, "metadata", "kernel_env", "observation", {}),
            r"cell 4 \(turn-1\), field observation.result",
        ),
        (
            ("cells", 3, "metadata", "kernel_env", "observation", 5),
            r"cell 4 \(turn-1\): kernel_env.observation is mis",
        ),
        (
            ("cells", 3, "metadata", "kernel_env", "action", None),
            r"cell 4 \(turn-1\): kernel_env.turn or .action",
        ),
        (("cells", 3, "metadata", None), "cell 4: it is no cell, or has no metadata"),
        (("cells", 3, "source", 5), "cell 4: its source is no text"),
        (("cells", None), "has no list of cells"),
        (
            ("metadata", "kernel_env", "episode", "children", ["episode.ipynb"]),
            "is named as a child of itself",
        ),
        (("metadata", "kernel_env", "episode", "children", 5), "is not as it was written: TypeError"),
        (("cells", 3, "outputs", 5), "is not as it was written: TypeError"),
        (("cells", 3, "metadata", "kernel_env", "written", 5), "is not as it was written: AttributeError"),
    ],
)
def test_metadata_that_was_broken_by_hand_is_named(path: Path, place: tuple[Any, ...], words: str) -> None:
    with pytest.raises(NotebookError, match=words):
        edited(path, lambda notebook: put(notebook, *place))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is no notebook, or only a part of one: it is not JSON"),
        (b'{"nbformat": 4, "cells": [', "only a part of one"),
        (b"\xff\xfe", "it is not UTF-8 text"),
        (b"[1]", "is JSON, but no notebook"),
        (b"[" * 10**5, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_notebook_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "x.ipynb").write_bytes(data)
    with pytest.raises(NotebookError, match=words):
        Episode.from_notebook(tmp_path / "x.ipynb")
    with pytest.raises(NotebookError, match="Is a directory"):
        Episode.from_notebook(tmp_path)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "x.ipynb", "wb") as file:
        os.truncate(file.fileno(), 500 * 2**20)
    begin = time.monotonic()
    with pytest.raises(NotebookError, match="has 524,288,000 bytes, and at most 268,435,456 are read"):
        Episode.from_notebook(tmp_path / "x.ipynb")
    assert time.monotonic() - begin < 1


def test_the_schema_that_is_shipped_describes_what_is_written(path: Path, tmp_path: Path) -> None:
    shipped = json.loads(Path(kernel_env.__file__).with_name("notebook_schema.json").read_text("utf-8"))
    assert shipped == notebook_schema(), "python -m kernel_env.schema > kernel_env/notebook_schema.json"
    validator = jsonschema.Draft202012Validator(shipped)
    notebook = json.loads(path.read_text("utf-8"))
    validator.validate(notebook)
    next(c for c in notebook["cells"] if c["id"] == "turn-1")["metadata"]["kernel_env"]["started"] = "soon"
    assert not validator.is_valid(notebook)
    notebook = json.loads(path.read_text("utf-8"))
    notebook["metadata"]["kernel_env"]["episode"]["limits"] = 5
    assert not validator.is_valid(notebook)


@given(episode=EPISODE)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_every_notebook_fits_the_schema(episode: Episode) -> None:
    notebook = json.loads(notebook_text(episode))
    assume("joined" not in notebook["metadata"]["kernel_env"])
    jsonschema.Draft202012Validator(notebook_schema()).validate(notebook)


@pytest.fixture
def large(make_env: MakeEnv, tmp_path: Path) -> tuple[Episode, Path]:
    env = make_env(llm_query_fn=lambda prompt: prompt * 2)
    env.reset(context=["large \ud800"] * 50_000)
    env.execute("x = llm_query('y' * 300_000)")
    env.close()
    return env.episode, env.export(tmp_path / "a.ipynb")


def test_large_texts_are_in_files_that_notebooks_share(large: tuple[Episode, Path], tmp_path: Path) -> None:
    episode, path = large
    files = sorted((tmp_path / "kernel_env_data").iterdir())
    assert len(files) == 2
    assert path.stat().st_size < 100_000
    assert Episode.from_notebook(path) == episode
    stamps = [file.stat().st_mtime_ns for file in files]
    write_notebook(episode, tmp_path / "b.ipynb")
    assert sorted((tmp_path / "kernel_env_data").iterdir()) == files
    assert [file.stat().st_mtime_ns for file in files] == stamps
    (tmp_path / "elsewhere").mkdir()
    assert Episode.from_notebook(write_notebook(episode, tmp_path / "elsewhere" / "a.ipynb")) == episode


def test_a_file_that_is_gone_or_altered_is_named(large: tuple[Episode, Path], tmp_path: Path) -> None:
    episode, path = large
    file = min((tmp_path / "kernel_env_data").iterdir(), key=lambda file: file.stat().st_size)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"!")
    with pytest.raises(
        NotebookError, match=f"{file.name}' was altered: its SHA-256 is .*, and its name says "
    ):
        Episode.from_notebook(path)
    file.unlink()
    with pytest.raises(NotebookError, match="No such file or directory; move kernel_env_data/ along"):
        Episode.from_notebook(path)
    assert Episode.from_notebook(write_notebook(episode, path)) == episode


def test_a_record_with_numbers_that_json_does_not_have_is_named(path: Path, tmp_path: Path) -> None:
    episode = Episode.from_notebook(path)
    episode.turns[1].helper_calls[0].arguments["prompt"] = float("nan")
    with pytest.raises(NotebookError, match="the record of 'the-id' is no JSON value: Out of range float"):
        write_notebook(episode, tmp_path / "e.ipynb")


def test_a_record_that_json_does_not_have_is_named(path: Path, tmp_path: Path) -> None:
    episode = Episode.from_notebook(path)
    episode.turns[0].action.metadata["logits"] = {1, 2}
    with pytest.raises(NotebookError, match=r"the record of 'the-id' is no JSON value: .*set is not JSON"):
        write_notebook(episode, tmp_path / "e.ipynb")


FULL = """
import sys
import kernel_env
from kernel_env import ConfigError, Episode
from kernel_env.notebook import write_notebook
episode = Episode(episode_id="e", kernel_name="python3", max_iterations=1, started=0, context="x" * 10**6)
episode.task_prompt = "new" * 10**6
try:
    write_notebook(episode, sys.argv[1])
except ConfigError as error:
    print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small file system")
def test_a_disk_that_fills_leaves_the_old_file(path: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"mount -t tmpfs -o size=2m none {disk} && cp {path} {disk}/e.ipynb && "
    script += f'{sys.executable} -c "$1" {disk}/e.ipynb; cmp {path} {disk}/e.ipynb && ls -A {disk}'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", FULL], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == [
        f"cannot export to '{disk}/e.ipynb': No space left on device",
        "e.ipynb",
        "kernel_env_data",
    ], done.stderr


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    episode = Episode(episode_id="e", kernel_name="k", max_iterations=1, started=0)
    (tmp_path / "kernel_env_data").write_text("in the way")
    write_notebook(episode, tmp_path / "small.ipynb")
    episode.context = "x" * 10**6
    with pytest.raises(ConfigError, match=r"cannot export to .*large.ipynb': (File exists|Not a directory)"):
        write_notebook(episode, tmp_path / "large.ipynb")
    assert sorted(os.listdir(tmp_path)) == ["kernel_env_data", "small.ipynb"]
