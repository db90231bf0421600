"""Episodes again: the same from the record, and what is told where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kernel_env import (
    EXPORTERS,
    CodeExecutionRubric,
    CustomMetricRubric,
    Episode,
    HelperError,
    Limits,
    LocalRLMRunner,
    NotebookError,
    replay,
    write_notebook,
)
from kernel_env.replay import rescore

from .conftest import MakeEnv
from .test_cli import kernel_env

CELLS = [
    "import random; print(random.random(), len(context))",
    "llm_query_batched(['a', 'fails'])",
    "llm_query('fails')",
    "print(lookup('k', 3), lookup('k'))",
    "import time; time.sleep(60)",
    "import uuid; print(hex(uuid.uuid4().int >> 64)); {'one', 'two', 'three', 'four'}",
    "import uuid; print(uuid.uuid4(), 'in', 0.25 + hash('x') % 7, 'ms')",
    "FINAL(rlm_query('child', context=[1]))",
]


def model(prompt: str) -> str:
    if prompt == "fails":
        raise HelperError("no such luck")
    return prompt.upper()


@pytest.fixture
def path(make_env: MakeEnv, tmp_path: Path) -> Path:
    env = make_env(
        llm_query_fn=model,
        subcall_fn=lambda prompt, model, context: f"{prompt} {context}",
        tools={"lookup": lambda name, limit=10: {name: limit}},
        limits=Limits(memory_bytes=2**30, episode=1000),
    )
    env.reset(context=["a", "b"], task_prompt="t", seed=5)
    for cell in CELLS:
        env.execute(cell, timeout_s=0.5 if "sleep" in cell else None)
    env.close()
    return env.export(tmp_path / "episode.ipynb")


def test_an_episode_is_reproduced_from_its_record(path: Path) -> None:
    episode = Episode.from_notebook(path)
    report = replay(episode)
    assert [cell.differences for cell in report.cells] == [[]] * len(CELLS)
    assert report.cells[6].volatile == ["a duration", "an identifier"]
    assert "an address" in report.cells[5].volatile
    assert (report.score, report.is_reproduced, report.final_answers) == (
        1.0,
        True,
        ("child [1]", "child [1]"),
    )
    assert (report.unrecorded, report.by_order) == ([], [])
    assert report.episode.limits == episode.limits
    assert report.episode.turns[4].observation.status == "timeout"


def test_what_is_not_the_same_is_told_and_costs_the_score(path: Path) -> None:
    episode = Episode.from_notebook(path)
    episode.turns[0].action.code = "print('other'); llm_query('b'); llm_query('c')"
    episode.turns[3].observation.outputs[0]["text"] = "then\n"
    report = replay(episode)
    assert (report.score, report.is_reproduced) == (5 / 8, False)
    assert report.cells[3].differences[0] == "output 1 (stdout):"
    assert "-then" in report.cells[3].differences
    assert report.by_order == ['llm_query({"prompt": "b", "model": null})']
    assert report.unrecorded == ['llm_query({"prompt": "fails", "model": null})']
    assert report.cells[2].differences  # its reply was taken by another


def test_turns_behind_an_earlier_end_differ(path: Path) -> None:
    episode = Episode.from_notebook(path)
    episode.turns[1].action.code = "FINAL(1)"
    report = replay(episode)
    assert report.cells[7].differences == ["the episode had ended before"]
    assert report.final_answers == ("child [1]", "1")


@pytest.mark.parametrize("text", ["(a=__import__('os').abort())", "(a", "(a=print)", "(a, a)"])
def test_a_tool_in_a_record_is_no_code(path: Path, text: str) -> None:
    episode = Episode.from_notebook(path)
    episode.tools["lookup"] = text
    with pytest.raises(NotebookError, match=r"tools\['lookup'\]"):
        replay(episode)


def test_every_kind_of_parameter_of_a_tool_is_replayed(make_env: MakeEnv) -> None:
    def tool(a: int, /, b: int = -1, *c: int, d: str = "x", **e: Any) -> list[Any]:
        return [a, b, c, d, e]

    env = make_env(tools={"tool": tool})
    env.reset()
    env.execute("print(tool(1), tool(1, 2, 3, 4), tool(1, d='y', z=2), tool(5, b=6))")
    env.execute("FINAL('no turn after it')")
    report = replay(env.episode)
    assert report.is_reproduced, report.cells
    assert (report.by_order, report.unrecorded) == ([], [])


def test_another_rubric_scores_stored_turns_without_a_kernel(path: Path) -> None:
    episode = Episode.from_notebook(path)
    assert rescore(episode, CodeExecutionRubric(error_penalty=-1)) == [0, 0, -1, 0, -1, 0, 0, 0]
    rubric = CustomMetricRubric(lambda expected, predicted: float(expected == predicted) / 2)
    assert rescore(episode, rubric, expected_answer="child [1]")[-1] == 0.5
    episode.expected_answer = "child [1]"
    assert rescore(episode, rubric)[-1] == 0.5
    assert episode.turns[0].observation.reward == 0.0


def test_commands_replay_and_rescore(path: Path, tmp_path: Path) -> None:
    shown = kernel_env("replay", path, cwd=tmp_path).stdout
    assert "turn 7: same  (but for a duration, an identifier)" in shown
    assert "reproduced: 100% of 8 turns" in shown
    notebook = json.loads(path.read_text("utf-8"))
    next(cell for cell in notebook["cells"] if cell["id"] == "turn-1")["source"] = "print('other')"
    path.write_text(json.dumps(notebook))
    shown = kernel_env("replay", path, cwd=tmp_path, fails=1).stdout
    assert "changed by hand: cell 4 (turn-1): the code of turn 1 was edited" in shown
    assert "turn 1: differs" in shown
    assert "    +other" in shown
    assert "reproduced: 88% of 8 turns" in shown
    (tmp_path / "mine.py").write_text("def rubric(action, observation): return 7.5")
    shown = kernel_env("replay", path, "--rescore", "mine:rubric", cwd=tmp_path).stdout
    assert shown.count("7.5") == 8
    for arguments, words in (
        (["--rescore", "mine"], "give MODULE:RUBRIC"),
        (["--rescore", "nosuch:x"], "it cannot be imported: ModuleNotFoundError"),
        (["--expected", "x"], "--expected goes with --rescore"),
    ):
        assert words in kernel_env("replay", path, *arguments, cwd=tmp_path, fails=2).stderr
    assert "cannot read" in kernel_env("replay", "missing.ipynb", cwd=tmp_path, fails=2).stderr


def test_show_shows_every_turn(path: Path, tmp_path: Path) -> None:
    shown = kernel_env("show", path, cwd=tmp_path).stdout
    for words in ("Task: t", "Turn 8", "HelperError: no such luck", "Answer: child [1]", "timeout · "):
        assert words in shown
    assert "is no notebook" in kernel_env("show", __file__, cwd=tmp_path, fails=2).stderr


@pytest.fixture
def recursive() -> Episode:
    def chat(messages: list[dict[str, str]]) -> str:
        is_root = "the root" in messages[2]["content"]
        code = "print(len(context))" if len(messages) < 5 and is_root else "FINAL(rlm_query('part'))"
        return f"Because.\n```repl\n{code if is_root else 'FINAL(5)'}\n```"

    return LocalRLMRunner(chat).run("c\ud800", "the root", expected_answer="5").episode


def test_messages_are_conversations_with_the_turns_that_a_loss_is_for(recursive: Episode) -> None:
    root, child = map(json.loads, EXPORTERS["messages"](recursive).splitlines())
    plain = [{key: message[key] for key in ("role", "content")} for message in root["messages"]]
    assert plain == recursive.messages
    assert [m.get("weight") for m in root["messages"]] == [None, None, None, 1, None, 1]
    assert (root["reward"], root["depth"], child["depth"]) == (1.0, 0, 1)
    assert (child["parent_id"], child["episode_id"]) == (
        recursive.episode_id,
        recursive.children[0].episode_id,
    )


def test_messages_of_a_script_are_what_a_runner_would_have_had(path: Path) -> None:
    (conversation,) = map(json.loads, EXPORTERS["messages"](Episode.from_notebook(path)).splitlines())
    messages = conversation["messages"]
    assert [message["role"] for message in messages[2:]] == ["user", "assistant"] * 8
    assert f"```repl\n{CELLS[0]}\n```" == messages[3]["content"]
    assert "HelperError: no such luck" in messages[8]["content"]


def test_jsonl_has_a_turn_a_line(path: Path) -> None:
    episode = Episode.from_notebook(path)
    rows = [json.loads(line) for line in EXPORTERS["jsonl"](episode).splitlines()]
    assert [(row["turn"], row["action"]["code"]) for row in rows] == list(enumerate(CELLS, start=1))
    assert {row["episode_id"] for row in rows} == {episode.episode_id}


def test_export_writes_many_with_all_cores_and_names_what_it_cannot_read(
    path: Path, recursive: Episode, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    for number in range(10):
        write_notebook(recursive, tmp_path / "runs" / f"{number}.ipynb")
    done = kernel_env("export", "runs/?.ipynb", "--to", "messages", "--out", "m.jsonl", cwd=tmp_path)
    assert "10 of 10 episodes: m.jsonl" in done.stderr
    assert (tmp_path / "m.jsonl").read_text() == EXPORTERS["messages"](recursive) * 10
    (tmp_path / "runs" / "bad.ipynb").write_text("{")
    done = kernel_env("export", "runs/*d.ipynb", "--to", "jsonl", "--out", "t.jsonl", cwd=tmp_path, fails=1)
    assert "bad.ipynb' is no notebook" in done.stderr
    assert "0 of 1 episodes" in done.stderr
    kernel_env("export", "runs/1.ipynb", "--to", "ipynb", "--out", "whole", cwd=tmp_path)
    assert Episode.from_notebook(tmp_path / "whole" / "1.ipynb") == recursive
    for arguments, words in (
        (["none*", "--to", "jsonl", "--out", "x"], "no notebook matches 'none*'"),
        (["runs/1.ipynb", "--to", "csv", "--out", "x"], "--to 'csv'; give one of ipynb, jsonl, messages"),
        (["**/1.ipynb", "--to", "ipynb", "--out", "x"], "'1.ipynb' is in several folders"),
        (["runs/1.ipynb", "--to", "jsonl", "--out", "x", "--jobs", "-1"], "--jobs = -1"),
        (["runs/1.ipynb", "--to", "jsonl", "--out", "gone/x"], "No such file or directory"),
    ):
        assert words in kernel_env("export", *arguments, cwd=tmp_path, fails=2).stderr
