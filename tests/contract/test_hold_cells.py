"""Cells that break their own kernel: the next step works, or a fresh kernel takes over and says so."""

from __future__ import annotations

import time

import pytest

from kernel_env import Limits, LocalREPLEnv

from .conftest import Kind, LendEnv, StartEnv
from .hostile import KEPT, LOST, LOST_UNLESS_FORKED, RAISING_TIMER, cell

NEXT = "print('next', llm_query('q'), len(context))\n40 + 2"


def assert_whole(env: LocalREPLEnv) -> None:
    """A step in `env` does all that a step does."""
    observation = env.execute(NEXT).observation
    assert observation.result.stdout == "next Q 3\n42\n"
    assert (observation.status, observation.restarted) == ("ok", False)
    assert env.execute("1 / 0").observation.result.exception == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("name", KEPT)
def test_a_kernel_that_a_cell_broke_goes_on_with_its_variables(start: StartEnv, name: str) -> None:
    env = start({"context": "ctx"}, llm_query_fn=str.upper)
    env.execute("kept = 1")
    observation = env.execute(cell(KEPT[name])).observation
    assert observation.status in ("ok", "error")
    assert "IN REPR" not in observation.result.stdout
    assert_whole(env)
    assert env.execute("kept").observation.result.stdout == "1\n"


def test_a_timer_that_raises_in_ipykernel_itself_costs_at_most_the_kernel(start: StartEnv) -> None:
    """Where it strikes decides: hardly ever in a forked kernel, sometimes in a stock one under load."""
    env = start({"context": "ctx"}, llm_query_fn=str.upper)
    env.execute("kept = 1")
    observation = env.execute(cell(RAISING_TIMER)).observation
    if observation.restarted:
        assert observation.status == "died", observation.result.stderr
        assert "kept" in observation.lost_variables
    assert_whole(env)
    assert env.execute("'kept' in globals()").observation.result.stdout == f"{not observation.restarted}\n"


@pytest.mark.parametrize("name", LOST_UNLESS_FORKED)
def test_a_forked_kernel_needs_less_of_ipykernel(start: StartEnv, kind: Kind, name: str) -> None:
    env = start({"context": "ctx"}, llm_query_fn=str.upper)
    env.execute("kept = 1")
    env.execute(cell(LOST_UNLESS_FORKED[name]))
    is_kept = env.execute("kept").observation.result.stdout == "1\n"
    assert is_kept == (kind.kernel_name == "python3")
    assert_whole(env)
    assert env.execute("'kept' in globals()").observation.result.stdout == f"{is_kept}\n"


@pytest.mark.parametrize("name", LOST)
def test_a_kernel_that_a_cell_ended_is_replaced_and_the_observation_says_so(lend: LendEnv, name: str) -> None:
    env = lend({"context": "ctx"}, llm_query_fn=str.upper, limits=Limits(restarts=100))
    env.execute("lost = 1")
    begin = time.monotonic()
    observation = env.execute(cell(LOST[name])).observation
    if not observation.restarted:  # a cell that broke IPython may itself have run well: the next finds out
        observation = env.execute("1").observation
    assert time.monotonic() - begin < 15
    assert (observation.status, observation.restarted) == ("died", True)
    assert "lost" in observation.lost_variables
    assert "A fresh kernel took over; lost variables:" in observation.result.stderr
    assert_whole(env)


@pytest.mark.parametrize(
    ("code", "restored"),
    [
        ("import sys; sys.stdout = None", "sys.stdout"),
        ("import os; os.close(1)", "file descriptor 1"),
        ("import builtins; del builtins.print", "builtins.print"),
        ("import json; json.dumps = None", "json.dumps"),
        ("import signal; signal.alarm(60);", "a timer"),
        ("import sys; sys.modules.clear()", "sys.modules"),
        ("FINAL = llm_query = 1", "FINAL, llm_query"),
    ],
)
def test_what_was_put_back_is_named(lend: LendEnv, code: str, restored: str) -> None:
    env = lend(llm_query_fn=str.upper)
    observation = env.execute(code).observation
    assert f"[kernel_env] Restored: {restored}." in observation.result.stderr


def test_what_was_replaced_on_purpose_stays(start: StartEnv) -> None:
    env = start()
    env.execute("import builtins, time; builtins.abs = lambda x: 7; time.sleep = print")
    assert env.execute("abs(1), time.sleep is print").observation.result.stdout == "(7, True)\n"


def test_a_reset_namespace_keeps_helpers_and_context(start: StartEnv) -> None:
    env = start({"context": "ctx"}, llm_query_fn=str.upper)
    for code in ("%reset -f", "get_ipython().reset()"):
        env.execute("gone = 1")
        assert "Restored: FINAL," in env.execute(code).observation.result.stderr
        assert_whole(env)
        assert env.execute("gone").observation.status == "error"


TEXTS_OF_THEIR_OWN = {
    "spins": "while True: pass",
    "sleeps": "import time; time.sleep(600)",
    "exits": "raise SystemExit",
    "fails": "raise ZeroDivisionError",
    "is no text": "return 5",
    "prints": "print('IN TEXT'); return 'p'",
    "is of 1 GB": "return 'x' * 10**9",
}
USES = {
    "a result": "bad",
    "a display": "display(bad)",
    "a print": "print(bad)",
    "an exception": "raise Failure(bad)",
    "an answer": "FINAL(bad)",
    "a ready answer": "answer = {'content': bad, 'ready': True}",
}
BAD = """
class Bad:
    def __repr__(self):
        {}
    __str__ = __repr__
class Failure(Exception):
    def __str__(self): return str(self.args[0])
bad, kept = Bad(), 1
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", TEXTS_OF_THEIR_OWN)
def test_a_value_s_text_may_do_what_it_likes_wherever_it_is_shown(start: StartEnv, name: str) -> None:
    env = start(
        {"context": "ctx"},
        llm_query_fn=str.upper,
        limits=Limits(interrupt_grace=0.5, restarts=100),
    )
    timeout = 0.5 if name in ("spins", "sleeps") else 15
    is_large = name == "is of 1 GB"  # which takes seconds each time
    for use, code in USES.items():
        if is_large and use not in ("a result", "an answer"):
            continue
        env.execute(BAD.format(TEXTS_OF_THEIR_OWN[name]))
        observation = env.execute(code, timeout_s=timeout).observation
        ends = {"ok", "error", "timeout"} | ({"died", "out_of_memory"} if is_large else set())
        assert observation.status in ends, use
        assert observation.result.execution_time < 30, use
        assert sum(len(str(output)) for output in observation.outputs) < 5 * 2**20, use
        if observation.done:
            assert (name, observation.final_answer) == ("prints", "p"), use
            env.reset(context="ctx", max_iterations=10**6)
        elif observation.restarted:
            assert name in ("spins", "sleeps", "is of 1 GB"), use
            assert {"bad", "kept"} <= set(observation.lost_variables), use
        else:
            assert env.execute("print(kept)").observation.result.stdout == "1\n", use
        assert_whole(env)


def test_a_variable_whose_text_hangs_is_bounded_as_a_cell_is(start: StartEnv) -> None:
    env = start(limits=Limits(cell_active=1, interrupt_grace=10))
    env.execute(BAD.format(TEXTS_OF_THEIR_OWN["spins"]))
    observation = env.get_variable("bad").observation
    assert (observation.status, observation.restarted) == ("timeout", False)
    assert env.get_variable("kept").observation.result.stdout == "1\n"


def test_recursion_without_a_limit_ends_the_cell_or_the_kernel_and_says_so(start: StartEnv) -> None:
    env = start({"context": "ctx"}, llm_query_fn=str.upper)
    env.execute("kept = 1")
    endless = "class C:\n    def __repr__(self): return repr([self])\nrepr(C())"
    observation = env.execute(f"import sys; sys.setrecursionlimit(10**9)\n{endless}").observation
    if observation.restarted:
        assert observation.result.exception == "KernelDied: the kernel was killed by SIGSEGV"
        assert observation.lost_variables == ["kept"]
    else:
        assert observation.status == "error"
    assert_whole(env)


def test_a_repr_that_hangs_costs_its_snapshot_a_second(start: StartEnv) -> None:
    env = start()
    observation = env.execute(cell(KEPT["repr spins"])).observation
    assert observation.result.locals_snapshot["spins"] == "<repr raised TookTooLong>"
    assert observation.result.execution_time < 5


def test_a_repr_that_hangs_in_a_finalizer_costs_its_snapshot_little_more(start: StartEnv) -> None:
    code = """
class Value:
    def __del__(self):
        while True: pass
class Hangs:
    def __repr__(self):
        Value()
        while True: pass
hangs = Hangs()
"""
    observation = start().execute(code).observation
    assert observation.result.locals_snapshot["hangs"] == "<repr raised TookTooLong>"
    assert observation.result.execution_time < 5


def test_an_answer_that_cannot_be_text_is_said_once(start: StartEnv) -> None:
    env = start(limits=Limits(interrupt_grace=5))
    code = """
class Hangs:
    def __str__(self):
        while True: pass
answer = {'content': Hangs(), 'ready': True}
"""
    observation = env.execute(code, timeout_s=0.5).observation
    assert (observation.status, observation.restarted) == ("timeout", False)
    assert "answer not submitted: KeyboardInterrupt" in observation.result.stderr
    assert env.execute("answer['ready']").observation.result.stdout == "False\n"


def test_a_kernel_that_dies_costs_no_other_episode_anything(start: StartEnv) -> None:
    other = start()
    other.execute("x = 5")
    for name in ("SIGKILL", "descriptors are closed"):
        start().execute(cell(LOST[name]))
    observation = other.execute("x").observation
    assert (observation.result.stdout, observation.restarted) == ("5\n", False)
