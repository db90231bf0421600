"""Contract §3: the rules of an episode."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kernel_env import (
    ConfigError,
    EpisodeOver,
    Limits,
    REPLAction,
    ResetRequired,
    RubricError,
    Turn,
    UsageError,
)
from tests.conftest import MakeEnv

from .conftest import MakeFacade

CYCLIC: list[Any] = []
CYCLIC.append([CYCLIC])


def test_nothing_works_before_reset_or_after_close(make: MakeFacade) -> None:
    env = make()
    for _ in range(2):
        with pytest.raises(ResetRequired, match="call reset"):
            env.execute("1")
        with pytest.raises(RuntimeError, match="call reset"):
            env.state()
        env.reset()
        env.close()
        env.close()


def test_a_step_after_the_end_is_an_error_and_changes_nothing(make: MakeFacade) -> None:
    env = make()
    env.reset()
    env.execute("FINAL(1)")
    with pytest.raises(EpisodeOver, match="reset"):
        env.execute("x = 1")
    assert env.state().iteration == 1
    assert len(env.episode.turns) == 1
    assert env.variable("answer").result.stdout.startswith("{'content'")


@pytest.mark.parametrize(("given", "answer"), [("42", "42"), (None, "")])
def test_an_explicit_action_submits(make: MakeFacade, given: str | None, answer: str) -> None:
    env = make()
    env.reset(expected_answer="42")
    observation = env.step(REPLAction(is_final=True, final_answer=given))
    assert (observation.done, observation.final_answer, observation.done_reason) == (True, answer, "final")
    assert observation.reward == (1.0 if given else 0.0)


def test_the_last_iteration_runs_and_then_ends_the_episode(make: MakeFacade) -> None:
    env = make()
    env.reset(max_iterations=2, expected_answer="4")
    assert not env.execute("answer['content'] = 2").done
    observation = env.execute("print('ran', end='')\nanswer['content'] *= 2")
    assert observation.result.stdout == "ran\nMaximum iterations (2) reached."
    assert (observation.done, observation.done_reason) == (True, "max_iterations")
    assert (observation.final_answer, observation.reward) == ("4", 1.0)


def test_an_answer_in_the_last_iteration_is_the_end(make: MakeFacade) -> None:
    env = make()
    env.reset(max_iterations=1)
    observation = env.execute("FINAL('x')")
    assert (observation.done_reason, observation.final_answer) == ("final", "x")
    assert "Maximum" not in observation.result.stdout


@pytest.mark.parametrize("code", ["1", "answer['content'] = None", "answer['content'] = []", "answer = 'x'"])
def test_no_answer_at_the_end_is_a_failure(make: MakeFacade, code: str) -> None:
    env = make()
    env.reset(max_iterations=1, expected_answer="x")
    observation = env.execute(code)
    assert (observation.final_answer, observation.reward) == (None, -0.1)


def test_printing_a_context_never_ends_an_episode(make: MakeFacade) -> None:
    env = make()
    env.reset(context="FINAL(bait)\nFINAL_VAR(context)\n", task_prompt="FINAL(bait)")
    for code in ("print(context)", "context", "%%bash\necho 'FINAL(bait)'"):
        assert not env.execute(code).done


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("print('FINAL(42)')", "42"),
        ("x = 6\nprint(f'FINAL({x * 7})')", "42"),
        ("print('FINAL(f(x) + (1, 2))')", "f(x) + (1, 2)"),
        ("print('FINAL(1)\\nFINAL(2)')", "1"),
        ("print('FINAL(two\\nlines)')", "two\nlines"),
        ("print('FINAL(open\\nFINAL(closed)')", "closed"),
        ("value = [1]\nprint('FINAL_VAR(\"value\")')", "[1]"),
        ("print('say FINAL(42)')", None),
        ("print('FINAL_VAR(missing)')", None),
        ("print('FINAL(' + '4' * 20_000 + ')')", "4" * 20_000),
    ],
)
def test_printed_markers(make: MakeFacade, code: str, answer: str | None) -> None:
    env = make()
    env.reset()
    observation = env.execute(code)
    assert observation.final_answer == answer
    assert observation.done == (answer is not None)


@pytest.mark.parametrize("ending", ["1/0", "while True: pass", "import os; os._exit(1)"])
def test_an_answer_survives_what_the_cell_does_next(make: MakeFacade, ending: str) -> None:
    env = make()
    env.reset(expected_answer="yes")
    observation = env.execute(f"FINAL('yes')\n{ending}", timeout_s=0.5)
    assert observation.status != "ok"
    assert (observation.final_answer, observation.reward, observation.done_reason) == ("yes", 1.0, "final")


def test_rewards_on_the_way(make: MakeFacade) -> None:
    env = make()
    assert env.reset(expected_answer="A").reward is None
    assert env.execute("1").reward == 0.0
    assert env.execute("1/0").reward == -0.05
    assert env.execute("FINAL(' a ')").reward == 1.0


def test_the_reset_message(make: MakeFacade) -> None:
    env = make()
    last = "Use answer['content'] to store your answer, and set answer['ready'] = True when done."
    assert env.reset().result.stdout == f"REPL environment initialized.\n{last}"
    assert env.reset(context="12345", task_prompt="Count.").result.stdout == (
        "REPL environment initialized.\n"
        "Context loaded (5 chars). Use 'context' variable to access it.\n"
        f"Task: Count.\n{last}"
    )


def test_metadata_at_every_point(make: MakeFacade) -> None:
    env = make()
    assert env.reset(task_prompt="t").metadata == {
        "task_prompt": "t",
        "message": "Environment ready.",
        "isolation": env.episode.isolation,
    }
    step = env.execute("1").metadata
    assert (step["task_prompt"], step["final_answer"]) == ("t", None)
    assert step["execution_time"] > 0
    end = env.execute("FINAL(2)").metadata
    assert (end["final_answer"], end["total_iterations"]) == ("2", 2)
    assert end["total_execution_time"] == pytest.approx(step["execution_time"] + end["execution_time"])


def test_stdout_and_stderr_in_order(share: MakeFacade) -> None:
    env = share()
    code = """
import sys
from IPython.display import display
print('a', end='')
display('b')
print('c')
print('warning', file=sys.stderr)
1 / 0
"""
    result = env.execute(code).result
    assert result.stdout == "a\n'b'\nc\n"
    assert result.stderr.startswith("warning\n---")
    assert result.stderr.endswith("ZeroDivisionError: division by zero")
    assert (result.success, result.exception) == (False, "ZeroDivisionError: division by zero")


def test_tracebacks_have_no_colours_and_no_host_paths(share: MakeFacade) -> None:
    env = share(llm_query_fn=str)
    for code in ("import json\njson.loads('{')", "llm_query(1)", "%run missing.py", "def f(:"):
        stderr = env.execute(code).result.stderr
        assert "\x1b" not in stderr
        assert "File /" not in stderr
        assert "_kernel_env" not in stderr


def test_an_exception_group_is_an_error_like_any_other(make: MakeFacade) -> None:
    env = make()
    env.reset()
    observation = env.execute(
        "import asyncio\nasync def fail(): 1/0\nasync with asyncio.TaskGroup() as g: g.create_task(fail())"
    )
    assert [output["output_type"] for output in observation.outputs] == ["error"]
    stderr = observation.result.stderr
    assert "Cell In[1], line 2, in fail" in stderr
    assert "ZeroDivisionError: division by zero" in stderr
    assert 'File "asyncio/taskgroups.py"' in stderr
    assert observation.result.exception is not None
    assert observation.result.exception.startswith("ExceptionGroup: unhandled errors in a TaskGroup")
    assert env.execute("%tb").result.stderr == stderr


def test_locals_snapshot_has_what_changed(make: MakeFacade) -> None:
    env = make()
    env.reset()
    assert env.execute("x = 1\ny = [1]\nz = 'a' * 2000").result.locals_snapshot == {
        "x": "1",
        "y": "[1]",
        "z": repr("a" * 500)[:500],
    }
    assert env.execute("x").result.locals_snapshot == {}
    assert env.execute("x = 2\ny.append(2)\nd = {}").result.locals_snapshot == {
        "x": "2",
        "y": "[1, 2]",
        "d": "{}",
    }
    code = "class Bad:\n    def __repr__(self): raise SystemExit\nbad = Bad()\nbig = list(range(10**6))"
    snapshot = env.execute(code).result.locals_snapshot
    assert snapshot["bad"] == "<repr raised SystemExit>"
    assert snapshot["big"].startswith("[0, 1, 2")
    assert len(snapshot["big"]) <= 500


def test_options_of_one_reset_do_not_reach_the_next(make: MakeFacade) -> None:
    env = make()
    env.reset(context="c", task_prompt="t", max_iterations=1, expected_answer="x", seed=1, episode_id="first")
    assert env.execute("FINAL('x')").reward == 1.0
    observation = env.reset()
    assert (observation.context_length, observation.metadata["task_prompt"]) == (0, "")
    assert observation.max_iterations == 30
    assert env.state().episode_id != "first"
    assert env.execute("FINAL('x')").reward == 0.0


RANDOM = """
import random, uuid, tempfile, secrets
print(random.random(), {'a', 'b', 'c'})
import numpy
print(numpy.random.rand())
"""
DISTINCT = (
    "import uuid, secrets, tempfile; print(uuid.uuid4(), secrets.token_hex(), tempfile.mktemp(dir='.'))"
)


def test_a_seed_makes_the_same_outputs_and_only_those(make: MakeFacade) -> None:
    env = make()
    seen: list[tuple[str, str]] = []
    for _ in range(2):
        env.reset(seed=7)
        seen.append((env.execute(RANDOM).result.stdout, env.execute(DISTINCT).result.stdout))
    env.execute("import os; os._exit(1)")
    seen.append((env.execute(RANDOM).result.stdout, env.execute(DISTINCT).result.stdout))
    assert len({outputs for outputs, _ in seen}) == 1
    assert len({distinct for _, distinct in seen}) == 3
    env.reset()
    assert env.execute(RANDOM).result.stdout != seen[0][0]


def test_long_output_is_clipped_around_one_marker(make: MakeFacade) -> None:
    env = make(max_output_length=100)
    env.reset()
    observation = env.execute("print('a' * 500 + 'z' * 500, end='')")
    stdout = observation.result.stdout
    assert stdout.startswith("a" * 50 + "\n... (truncated, total 1000 chars)")
    assert stdout.endswith("z" * 50)
    assert observation.outputs[0]["text"] == "a" * 500 + "z" * 500


def test_the_record_has_a_larger_limit_with_the_same_marker(make: MakeFacade) -> None:
    env = make(limits=Limits(cell_output=10_000))
    env.reset()
    (output,) = env.execute("for n in range(100): print(str(n % 10) * 999)").outputs
    assert output["text"].startswith("0" * 999)
    assert output["text"].endswith("9" * 999 + "\n")
    assert "(truncated, total 100000 chars)" in output["text"]
    assert len(output["text"]) < 10_200


def test_the_true_length_is_told_of_each_stream(make: MakeFacade) -> None:
    env = make(limits=Limits(cell_output=50_000), max_output_length=1000)
    env.reset()
    result = env.execute("import sys\nprint('x' * 99_999)\nprint('y' * 199_999, file=sys.stderr)").result
    assert "(truncated, total 100000 chars)" in result.stdout
    assert "(truncated, total 200000 chars)" in result.stderr
    assert "y" not in result.stdout


def test_a_printed_answer_is_whole_or_none(make: MakeFacade) -> None:
    env = make(limits=Limits(cell_output=50_000))
    env.reset()
    assert not env.execute("print('FINAL(' + 'x' * 100_000 + ')')").done


def test_a_namespace_of_many_names_keeps_the_helpers(make: MakeFacade) -> None:
    env = make(llm_query_fn=str.upper)
    env.reset()
    names = env.execute("for n in range(11_000): globals()[f'a{n}'] = n").available_variables
    assert len(names) == 10_000
    assert {"context", "answer", "llm_query"} <= set(names)


def test_help_is_shown(share: MakeFacade) -> None:
    env = share(llm_query_fn=str.upper)
    stdout = env.execute("llm_query?").result.stdout
    assert "Ask a language model" in stdout
    assert "\x1b" not in stdout


def test_get_variable_is_no_step(make: MakeFacade) -> None:
    env = make()
    env.reset(max_iterations=2)
    env.execute("x = 'text'")
    for _ in range(3):
        observation = env.variable("x.upper()")
    assert (observation.result.stdout, observation.iteration, observation.done) == ("'TEXT'\n", 1, False)
    assert observation.reward is None
    missing = env.variable("missing")
    assert missing.result.exception == "NameError: name 'missing' is not defined"
    assert len(env.episode.turns) == 1
    assert env.execute("2").result.stdout.startswith("2\nMaximum")


def test_a_slow_reader_loses_nothing(make: MakeFacade) -> None:
    def block_the_loop(output: Any) -> None:
        while not sent.exists():  # until the kernel is through, far beyond what zmq queues by default
            time.sleep(0.01)

    env = make(on_output=block_the_loop)
    env.reset()
    sent = Path(env.variable("__import__('os').getcwd()").result.stdout.strip("'\n"), "sent")
    code = "from IPython.display import display\nfor n in range(5000): display(n)\n"
    observation = env.execute(f"{code}open('sent', 'w').close()")
    assert [output["data"]["text/plain"] for output in observation.outputs] == [str(n) for n in range(5000)]


def test_turns_and_outputs_are_called_back(make: MakeFacade) -> None:
    turns: list[Turn] = []
    outputs: list[dict[str, Any]] = []

    async def on_turn(turn: Turn) -> None:
        turns.append(turn)
        raise ValueError("a callback that raises is logged")

    env = make(on_output=outputs.append, on_turn=on_turn)
    env.reset()
    env.execute("print('a')\n2")
    assert [turn.action.code for turn in turns] == ["print('a')\n2"]
    assert [output["output_type"] for output in outputs] == ["stream", "execute_result"]
    assert env.episode.turns == turns


def test_a_rubric_may_read_variables(make_env: MakeEnv) -> None:
    def rubric(action: REPLAction, observation: Any) -> float:
        return float(env.get_variable("score").observation.result.stdout)

    env = make_env(rubric=rubric)
    env.reset()
    assert env.execute("score = 0.25").reward == 0.25


def test_a_tool_that_steps_its_own_episode_is_told_so(make_env: MakeEnv) -> None:
    seen: list[str] = []

    def peek() -> None:
        for use in (env.get_variable, env.execute):
            try:
                use("1")
            except UsageError as error:
                seen.append(str(error))

    env = make_env(tools={"peek": peek})
    env.reset()
    assert env.execute("peek()").observation.status == "ok"
    assert seen == ["a helper of this episode cannot step or read it: its own cell is still running"] * 2


def test_a_rubric_that_raises_costs_the_reward_not_the_turn(make: MakeFacade) -> None:
    def rubric(action: REPLAction, observation: Any) -> float:
        raise KeyError("score")

    env = make(rubric=rubric)
    env.reset()
    with pytest.raises(RubricError, match="rubric raised: KeyError: 'score'"):
        env.execute("x = 1")
    assert env.episode.turns[0].observation.reward is None
    assert env.episode.turns[0].observation.result.success
    assert env.variable("x").result.stdout == "1\n"


@pytest.mark.parametrize("reward", ["good", None, float("nan")])
def test_a_rubric_must_return_a_finite_number(make: MakeFacade, reward: Any) -> None:
    env = make(rubric=lambda action, observation: reward)
    env.reset()
    with pytest.raises(RubricError, match="a reward is a finite number"):
        env.execute("1")


def test_the_record_of_an_episode(make: MakeFacade) -> None:
    env = make(llm_query_fn=str.upper)
    env.reset(context=["c"], task_prompt="t", episode_id="e", seed=3)
    env.execute("llm_query('q')")
    env.close()
    episode = env.episode
    assert (episode.episode_id, episode.context, episode.context_type, episode.seed) == (
        "e",
        '["c"]',
        "json",
        3,
    )
    assert episode.done_reason == "closed"
    (turn,) = episode.turns
    (call,) = turn.helper_calls
    assert (call.name, call.arguments, call.result, call.error) == ("llm_query", {"prompt": "q"}, "Q", None)
    assert turn.execution_count == 1
    # Zero where the call came before the host had read that the cell is busy.
    assert 0 <= turn.active_time < turn.observation.result.execution_time


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": {1: "a"}}, "key 1"),
        ({"context": {"a": {1, 2}}}, r"context\['a'\] is a set"),
        ({"context": [float("nan")]}, r"context\[0\] is nan"),
        ({"context": ("a",)}, "context is a tuple"),
        ({"context": b"bytes"}, "context is a bytes"),
        ({"max_iterations": 0}, "max_iterations = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**64}, "64 bits"),
        ({"task_prompt": 5}, "task_prompt = 5"),
        ({"episode_id": 5}, "episode_id = 5"),
        ({"context": CYCLIC}, "contains itself"),
        ({"hf_token": "t"}, "without llm_model: name the model"),
        ({"hf_token": 5, "llm_model": "m"}, "hf_token=…"),
        ({"llm_model": ""}, "llm_model=''"),
        ({"rlm_max_depth": 2}, "rlm_max_depth=2: children need a chat model"),
        ({"rlm_max_depth": 0}, "rlm_max_depth = 0"),
        ({"rlm_max_iterations": 2}, "rlm_max_iterations=2"),
        ({"llm_model": "m", "rlm_max_depth": 10**6}, "KERNEL_ENV_MAX_KERNELS"),
    ],
)
def test_a_bad_reset_says_what_is_wrong_and_keeps_the_episode(
    share: MakeFacade, options: dict[str, Any], words: str
) -> None:
    env = share()
    env.execute("x = 1")
    with pytest.raises(ConfigError, match=words):
        env.reset(**options)
    assert env.variable("x").result.stdout == "1\n"


def test_bad_steps_are_refused_before_they_count(make: MakeFacade) -> None:
    env = make()
    env.reset()
    with pytest.raises(UsageError, match="REPLAction, not str"):
        env.step("print(1)")  # type: ignore[arg-type]
    for timeout in (0, -1.0, float("nan"), "1"):
        with pytest.raises(ConfigError, match="timeout_s"):
            env.execute("1", timeout_s=timeout)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="metadata is no JSON value"):
        env.step(REPLAction(code="1", metadata={"a": {1}}))
    with pytest.raises(ConfigError, match="get_variable"):
        env.variable(" ")
    exception = env.variable("'\ud800'").result.exception
    assert exception is not None
    assert exception.startswith("SyntaxError: the code has '\\ud800' at character 1")
    assert env.state().iteration == 0


@pytest.mark.parametrize("code", ["x = '\ud800'", "x = 1\x00"])
def test_code_that_is_no_text_is_a_failed_cell(share: MakeFacade, code: str) -> None:
    env = share()
    observation = env.execute(code)
    assert observation.status == "error"
    assert observation.result.exception is not None
    assert observation.result.exception.startswith("SyntaxError")
    assert env.execute("print('\\ud800 ok')").result.stdout == "\ud800 ok\n"
