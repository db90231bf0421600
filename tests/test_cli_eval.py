"""`kernel-env eval` and `compare`, as programs of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from kernel_env.rundir import read_results

from .chat_server import Server, completion
from .test_cli import KERNEL_ENV, kernel_env

EVAL = ("eval", "--no-report", "--out", "run")
ROWS = [{"id": f"t{n}", "context": f"{n} words", "expected_answer": f"{n}"} for n in range(4)]


def write_tasks(path: Path, *rows: Any) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (path / "tasks.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_suites_are_run_and_the_table_says_how_it_went(tmp_path: Path) -> None:
    arguments = ("needle", "pairs", "--policy", "oracle", "--split", "8k", "--num-tasks", 2)
    done = kernel_env(*EVAL, *arguments, cwd=tmp_path)
    for words in ("needle", "pairs", "≤ 10 k", "1.000", "outcomes: 4 right", "run: run"):
        assert words in done.stdout
    assert "4 of 4 done" in done.stderr
    again = kernel_env(*EVAL, *arguments, "--resume", "--quiet", cwd=tmp_path)
    assert (again.stdout, again.stderr) == ("", "")
    refused = kernel_env(*EVAL, *arguments, "--resume", "--samples", 2, cwd=tmp_path, fails=2)
    assert "samples: 1 there, 2 here" in refused.stderr


def test_json_is_a_line_for_each_episode_and_one_for_the_run(tmp_path: Path) -> None:
    write_tasks(tmp_path, *ROWS)
    done = kernel_env(*EVAL, "tasks.jsonl", "--policy", "oracle", "--json", "--samples", 2, cwd=tmp_path)
    *lines, last = map(json.loads, done.stdout.splitlines())
    assert {(line["task"], line["sample"]) for line in lines} == {
        (f"t{n}", s) for n in range(4) for s in (0, 1)
    }
    assert (last["reward"], last["mean@k"]) == (1.0, {"2": 1.0})
    assert done.stderr == ""


def test_bad_lines_are_named_and_the_rest_can_run(tmp_path: Path) -> None:
    write_tasks(tmp_path, ROWS[0], "{", ROWS[1], ROWS[0])
    arguments = (*EVAL, "tasks.jsonl", "--policy", "oracle")
    refused = kernel_env(*arguments, cwd=tmp_path, fails=2)
    assert "tasks.jsonl', line 2 is no JSON" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = kernel_env(*arguments, "--skip-bad", cwd=tmp_path)
    assert "left out: the tasks 'tasks.jsonl', line 2" in done.stderr
    assert "left out: the tasks 'tasks.jsonl', line 4: the id 't0' is also that of" in done.stderr
    assert len(read_results(tmp_path / "run")) == 2


def test_fields_are_mapped_and_failures_end_with_one(tmp_path: Path) -> None:
    metric = "def metric(expected, answer):\n    return len(answer) / expected if expected > 1 else 1 / 0"
    write_tasks(tmp_path, {"q": "?", "gold": 4, "year": 1}, {"q": "!", "gold": 1, "year": 2})
    arguments = ["--field", "task_prompt=q", "--field", "expected_answer=gold", "--metric", metric]
    done = kernel_env(*EVAL, "tasks.jsonl", "--policy", "oracle", *arguments, cwd=tmp_path, fails=1)
    assert "1 RubricError" in done.stdout
    good, bad = sorted(read_results(tmp_path / "run"), key=lambda result: result.task)
    assert (good.reward, good.metadata) == (0.25, {"year": 1})
    assert "ZeroDivisionError" in str(bad.message)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["needle"], "give --model, or --policy with one of oracle"),
        (["needle", "--policy", "genius"], "policy 'genius'"),
        (["haystack", "--policy", "oracle"], "no suite and no file 'haystack'"),
        (["needle", "--policy", "oracle", "--model", "m"], "give one of them"),
        (["needle", "--policy", "oracle", "--max-depth", "3"], "go with --model"),
        (["needle", "--policy", "oracle", "--field", "x"], "give NAME=NAME"),
        (["needle", "--policy", "oracle", "--prices", "x"], "give two numbers"),
        (["needle", "--policy", "oracle", "--run-cost", "1"], "needs prices"),
        (["needle", "--policy", "oracle", "--isolation", "none"], "isolation='none'"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, arguments: list[str], says: str) -> None:
    assert says in kernel_env(*EVAL, *arguments, cwd=tmp_path, fails=2).stderr


def test_a_model_on_a_server_works_on_tasks_at_a_price(tmp_path: Path, server: Server) -> None:
    for _ in ROWS:
        server.say(completion("```repl\nFINAL(context.split()[0])\n```"))
    write_tasks(tmp_path, *ROWS)
    arguments = ["--model", "tiny", "--base-url", server.url, "--prices", "1,1", "--max-depth", 1]
    kernel_env(*EVAL, "tasks.jsonl", *arguments, cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["reward"], summary["usage"]["calls"]) == (1.0, 4)
    assert summary["usage"]["cost"] > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["policy"]["base_url"] == server.url


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_cleanly(tmp_path: Path, number: signal.Signals, code: int) -> None:
    arguments = ["eval", "needle", "--policy", "oracle", "--no-report", "--json", "--out", "run"]
    arguments += ["--split", "8k", "--num-tasks", "900", "--at-once", "4"]
    with subprocess.Popen(
        [*KERNEL_ENV, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        running.send_signal(number)
        reader = threading.Timer(60, running.kill)
        reader.start()
        _, told = running.communicate()
        reader.cancel()
    assert running.returncode == code, told
    assert told.strip() == "stopped; go on with --resume: run"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    done = len(read_results(tmp_path / "run"))
    assert summary["episodes"] == done >= 1
    assert summary["missing"] == 900 - done


def test_two_runs_are_compared_task_by_task(tmp_path: Path) -> None:
    for policy, out in (("oracle", "a"), ("empty", "b")):
        arguments = ("--policy", policy, "--out", out, "--split", "8k", "--num-tasks", 3, "--no-report")
        kernel_env("eval", "needle", *arguments, cwd=tmp_path)
    shown = kernel_env("compare", "a", "b", cwd=tmp_path).stdout
    for words in (
        "policy.name: 'oracle' in A, 'empty' in B",
        "3, 0, 0",
        "+1.000",
        "episodes/needle-8k-000.0.ipynb",
    ):
        assert words in shown
    compared = json.loads(kernel_env("compare", "b", "a", "--json", cwd=tmp_path).stdout)
    assert (compared["wins"], compared["losses"], compared["difference"]) == (0, 3, -1.0)
    kernel_env("eval", "needle", *arguments[:2], "--out", "s", *arguments[4:], "--seed", 1, cwd=tmp_path)
    assert "seed: 0 there, 1 here" in kernel_env("compare", "a", "s", cwd=tmp_path, fails=2).stderr
    assert "is no run" in kernel_env("compare", "a", "c", cwd=tmp_path, fails=2).stderr
