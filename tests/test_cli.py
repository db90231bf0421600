"""The command line, as a program of its own."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from kernel_env import Episode, example

from .chat_server import Server, completion
from .conftest import HAS_SANDBOX

KERNEL_ENV = [sys.executable, "-m", "kernel_env"]


def kernel_env(
    *arguments: object, cwd: Path, stdin: bytes = b"", fails: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*KERNEL_ENV, *map(str, arguments)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        timeout=110,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
    )
    result = subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )
    assert result.returncode == fails, result.stdout + result.stderr
    return result


def test_run_without_arguments_shows_the_built_in_example(tmp_path: Path) -> None:
    shown = kernel_env("run", cwd=tmp_path).stdout
    answer = example.expected_answer()
    for words in (
        "Turn 4",
        "not by a language model",
        f"Answer: {answer}",
        "Reward: 1",
        "Notebook: episode.ipynb",
    ):
        assert words in shown
    notebook = nbformat.read(tmp_path / "episode.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    assert notebook.metadata.kernel_env.episode.final_answer == answer
    (call,) = Episode.from_notebook(tmp_path / "episode.ipynb").turns[2].helper_calls
    assert call.name == "llm_query_batched"
    assert len(call.arguments["prompts"]) > 50


def test_json_is_one_line_for_each_turn(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "# %%\nprint(len(context))\n# %%\nprint('\\ud800')\n1/0\n# %%\nFINAL(context['a'])\n# %%\nnever"
    )
    (tmp_path / "context.json").write_text('{"a": "\\u00e9\\r\\n"}')
    arguments = ["--script", script, "--context", "context.json", "--expected", "é", "--seed", 1, "--json"]
    lines = kernel_env("run", *arguments, "--out", "out.ipynb", cwd=tmp_path).stdout.splitlines()
    turns = [json.loads(line) for line in lines]
    assert [turn["turn"] for turn in turns] == [1, 2, 3]
    assert [turn["observation"]["status"] for turn in turns] == ["ok", "error", "ok"]
    assert turns[2]["observation"]["final_answer"] == "é\r\n"
    assert turns[2]["observation"]["reward"] == 1.0
    assert (tmp_path / "out.ipynb").exists()


def test_the_context_can_come_from_stdin_byte_by_byte(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("context")
    arguments = ["--script", "s.py", "--context", "-", "--task", "See.", "--timeout", 30]
    shown = kernel_env("run", *arguments, cwd=tmp_path, stdin=b"a\r\nb\xc3\xa9").stdout
    assert "'a\\r\\nbé'" in shown
    assert "Task: See." in shown
    assert "No answer was submitted (closed)." in shown


def test_ctrl_c_keeps_the_turns_there_were(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("# %%\nx = 1\n# %%\nprint('running', flush=True)\nwhile True: pass")
    command = [*KERNEL_ENV, "run", "--script", "s.py"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        shown = b""
        for line in process.stdout:
            shown += line
            if line.startswith(b"running"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert b"the caller interrupted it" in shown
    assert b"Notebook: episode.ipynb" in shown
    assert b"most recent call last):\n  File" not in shown
    notebook = nbformat.read(tmp_path / "episode.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    turns = [cell for cell in notebook.cells if "turn" in cell.metadata.kernel_env]
    assert [cell.execution_count for cell in turns] == [1, 2]


def test_the_iteration_limit_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("# %%\n1\n# %%\n2\n# %%\n3")
    shown = kernel_env("run", "--script", "s.py", "--max-iterations", 2, cwd=tmp_path).stdout
    assert "Cells not run: 1 of 3" in shown
    assert "(max_iterations)" in shown


def test_escape_sequences_of_the_kernel_do_not_reach_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("print('\\x1b]0;title\\x07\\x1b[2Jshown')")
    shown = kernel_env("run", "--script", "s.py", cwd=tmp_path).stdout
    assert "shown" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kernel", "nosuch"], "kernel_name='nosuch' is not installed; installed:"),
        (["--out", "missing/e.ipynb"], "cannot export to 'missing/e.ipynb': there is no folder 'missing'"),
        (["--out", "e.html"], "must end in .ipynb"),
        (["--max-iterations", "0"], "max_iterations = 0"),
        (["--script", "missing.py"], "cannot read the script 'missing.py'"),
        (["--script", "empty.py"], "the script 'empty.py' has no code cell"),
        (["--task", "t"], "--task without --script"),
        (["--script", "s.py", "--context", "missing"], "cannot read the context 'missing'"),
        (["--script", "s.py", "--context", "bad.json"], "the context 'bad.json' is not JSON: Expecting"),
        (["--script", "s.py", "--context", "latin1.txt"], "as UTF-8 text"),
        (["--script", "s.py", "--timeout", "0"], "timeout_s = 0.0"),
    ],
)
def test_bad_input_is_named_in_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "s.py").write_text("1")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "latin1.txt").write_bytes(b"\xe9")
    done = kernel_env("run", *arguments, cwd=tmp_path, fails=2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_tries_a_real_episode(tmp_path: Path) -> None:
    shown = kernel_env("doctor", cwd=tmp_path).stdout
    for words in (
        "trial episode",
        "kernel ready in",
        "python3",
        "sandbox" if HAS_SANDBOX else "process: ",
        "ipykernel",
    ):
        assert words in shown


def test_version_and_help(tmp_path: Path) -> None:
    assert kernel_env("--version", cwd=tmp_path).stdout == "kernel_env 0.1.0\n"
    assert "--max-iterations" in kernel_env("run", "--help", cwd=tmp_path).stdout


CHILD = "```repl\nFINAL(context.upper())\n```"
ROOT = "I ask a child.\n```repl\nprint(len(context))\nFINAL(rlm_query('shout', context=context))\n```"


def test_a_model_works_on_a_task(server: Server, tmp_path: Path) -> None:
    (tmp_path / "context.txt").write_text("some words")
    server.say(completion(ROOT))
    server.say(completion(CHILD))
    arguments = ["--model", "m", "--base-url", server.url, "--context", "context.txt", "--task", "Shout it."]
    shown = kernel_env(
        "run", *arguments, "--expected", "SOME WORDS", "--budget-calls", 9, cwd=tmp_path
    ).stdout
    for words in ("Task: Shout it.", "Context: 10 characters", "child begins: shout", "child ended after"):
        assert words in shown
    for words in ("2 model calls · 36 tokens", "Answer: SOME WORDS", "Reward: 1", "Notebook: episode.ipynb"):
        assert words in shown
    notebook = nbformat.read(tmp_path / "episode.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    record = notebook.metadata.kernel_env.episode
    assert [message.role for message in record.messages] == ["system", "user", "user", "assistant"]
    assert record.children == ["episode-child-1.ipynb"]
    child = nbformat.read(tmp_path / record.children[0], as_version=4)  # type: ignore[no-untyped-call]
    assert child.metadata.kernel_env.episode.final_answer == "SOME WORDS"
    assert "9 model calls" in record.messages[1].content


def test_a_budget_that_ends_a_run_is_told(server: Server, tmp_path: Path) -> None:
    for _ in range(3):
        server.say(completion("```repl\nanswer['content'] = 'so far'\n```"))
    arguments = ["--base-url", server.url, "--budget-calls", 2]
    shown = kernel_env("run", *arguments, cwd=tmp_path).stdout
    assert "Stopped: the budget of the run is used up: model_calls 2 of 2" in shown
    assert "Answer: so far" in shown


def test_a_model_that_is_not_there_is_an_error_and_the_notebook_is_written(
    server: Server, tmp_path: Path
) -> None:
    server.say(b'{"error": {"message": "no such model: x"}}', 404)
    done = kernel_env("run", "--model", "x", "--base-url", server.url, cwd=tmp_path, fails=1)
    assert "the server replied 404" in done.stderr
    assert "no such model: x" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "episode.ipynb").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", 1], "do not go with --model"),
        (["--budget-cost", 1], "--budget-cost needs --prices"),
        (["--prices", "1"], "--prices '1': give two numbers >= 0"),
        (["--prices", "1,nan"], "--prices '1,nan'"),
        (["--budget-tokens", -1], "Budget.tokens = -1.0; give a number > 0"),
        (["--max-depth", 0], "max_depth = 0"),
    ],
)
def test_what_does_not_go_with_a_model_is_refused(
    tmp_path: Path, arguments: list[object], words: str
) -> None:
    done = kernel_env("run", "--model", "m", *arguments, cwd=tmp_path, fails=2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_sub_models_are_asked_below_the_root_and_all_has_its_price(server: Server, tmp_path: Path) -> None:
    for reply in (ROOT, "```repl\nFINAL(llm_query(context))\n```", "LEAF"):
        server.say(completion(reply))
    arguments = ["--model", "big", "--sub-model", "small", "--base-url", server.url]
    costs = ["--prices", "1000,10000", "--budget-cost", 5]
    shown = kernel_env("run", *arguments, *costs, cwd=tmp_path).stdout
    assert [request["model"] for request in server.requests] == ["big", "small", "small"]
    assert "3 model calls · 54 tokens · cost 0.243" in shown
    assert "1 child" in shown
    assert "Answer: LEAF" in shown


def test_a_terminal_shows_the_tree_as_it_stands(server: Server, tmp_path: Path) -> None:
    server.say(completion(ROOT))
    server.say(completion(CHILD), wait=1.5)
    command = [*KERNEL_ENV, "run", "--model", "m", "--base-url", server.url, "--task", "Shout it."]
    terminal, inner = pty.openpty()
    env = {**os.environ, "COLUMNS": "100", "LINES": "30", "TERM": "xterm-256color"}
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=inner, stderr=inner, stdin=subprocess.DEVNULL, env=env
    ) as process:
        os.close(inner)
        shown = b""
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed
            while data := os.read(terminal, 65536):
                shown += data
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert process.returncode == 0, text
    assert re.search(r"turn 1 · \d\.\d s · 1 model call · 18 tokens", text)
    assert re.search(r"── shout · turn 0 · 1\.\d s", text)
    assert "child begins" not in text
    assert "Notebook: episode.ipynb" in text
