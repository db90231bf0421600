"""Contract §3.9 and §3.14: time, interrupts, dead kernels."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from kernel_env import Limits
from tests.processes import pid_of

from .conftest import MakeFacade


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import asyncio; await asyncio.sleep(60)",
        "import time; time.sleep(60)",
        "import subprocess; subprocess.run(['sleep', '60'])",
    ],
)
def test_a_cell_past_its_time_is_interrupted_and_keeps_its_variables(share: MakeFacade, code: str) -> None:
    env = share()
    start = time.monotonic()
    observation = env.execute(f"x = {code!r}\nprint('before', flush=True)\n{code}", timeout_s=0.5)
    assert time.monotonic() - start < 2.5
    assert (observation.status, observation.restarted, observation.done) == ("timeout", False, False)
    assert observation.result.stdout == "before\n"
    assert observation.result.exception == (
        "TimeoutError: the cell was stopped because it was active for more than 0.5 s"
    )
    assert "variables are kept" in observation.result.stderr
    assert env.execute("print(x)").result.stdout == f"{code}\n"


IGNORES_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nx = 1\nwhile True: pass"


def test_a_cell_that_ignores_the_interrupt_costs_the_kernel_not_the_episode(make: MakeFacade) -> None:
    env = make(limits=Limits(interrupt_grace=0.5), llm_query_fn=str.upper)
    env.reset(context="kept")
    env.execute("y = 1")
    observation = env.execute(IGNORES_SIGINT, timeout_s=0.5)
    assert (observation.status, observation.restarted, observation.done) == ("timeout", True, False)
    assert observation.lost_variables == ["y"]
    assert "ignored the interrupt" in observation.result.stderr
    assert "lost variables: y" in observation.result.stderr
    assert env.execute("context, llm_query('x')").result.stdout == "('kept', 'X')\n"


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("import os; os._exit(3)", "exited with code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "was killed by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 40)", "was killed by signal 40"),
    ],
)
def test_a_cell_that_ends_its_kernel_is_an_observation(make: MakeFacade, code: str, end: str) -> None:
    printed = threading.Event()
    # Output is on its way in a thread of the kernel when print returns: the cell dies once it has arrived.
    env = make(on_output=lambda output: printed.set(), tools={"arrived": lambda: printed.wait(20)})
    env.reset(context="kept")
    env.execute("x = 1")
    start = time.monotonic()
    observation = env.execute(f"print('before', flush=True)\narrived()\n{code}")
    assert time.monotonic() - start < 5
    assert (observation.status, observation.restarted, observation.done) == ("died", True, False)
    assert observation.result.exception == f"KernelDied: the kernel {end}"
    assert observation.result.stdout == "before\n"
    assert observation.lost_variables == ["x"]
    assert env.execute("context").result.stdout == "'kept'\n"


def test_a_kernel_that_dies_between_steps_is_told_by_the_next(make: MakeFacade) -> None:
    env = make()
    env.reset()
    os.kill(pid_of(env), signal.SIGKILL)
    observation = env.execute("x = 1")
    assert (observation.status, observation.restarted) == ("died", True)
    assert env.execute("x = 1").status == "ok"


def test_the_episode_ends_when_the_restarts_are_used_up(make: MakeFacade) -> None:
    env = make(limits=Limits(restarts=1))
    env.reset(expected_answer="x")
    assert not env.execute("import os; os._exit(1)").done
    observation = env.execute("import os; os._exit(1)")
    assert (observation.done, observation.done_reason, observation.reward) == (True, "kernel_died", -0.1)
    assert (observation.status, observation.restarted) == ("died", False)
    assert "Limits.restarts = 1" in observation.result.stderr


def test_a_ready_answer_counts_though_the_cell_is_stopped(make: MakeFacade) -> None:
    env = make()
    env.reset()
    observation = env.execute("answer.update(content='42', ready=True)\nwhile True: pass", timeout_s=0.5)
    assert (observation.status, observation.final_answer) == ("timeout", "42")


def test_waiting_for_helpers_is_not_active_time(make: MakeFacade) -> None:
    async def slow(prompt: str) -> str:
        await asyncio.sleep(1.5)
        return prompt

    env = make(llm_query_fn=slow)
    env.reset()
    observation = env.execute("llm_query('x')", timeout_s=1.0)
    assert observation.status == "ok"
    assert env.episode.turns[0].active_time < 1.0
    assert observation.result.execution_time >= 1.5


def test_total_time_bounds_the_waiting_too_and_cancels_the_call(make: MakeFacade) -> None:
    cancelled = []

    async def hangs(prompt: str) -> str:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(prompt)
            raise
        return prompt

    env = make(llm_query_fn=hangs, limits=Limits(cell_total=1.0))
    env.reset()
    start = time.monotonic()
    observation = env.execute("llm_query('x')")
    assert time.monotonic() - start < 2.5
    assert observation.status == "timeout"
    assert observation.result.exception is not None
    assert "more than 1 s in all" in observation.result.exception
    assert cancelled == ["x"]
    (call,) = env.episode.turns[0].helper_calls
    assert call.error is not None
    assert "cancelled" in call.error


def test_a_thread_pool_that_waits_for_helpers_is_stopped_at_once(make: MakeFacade) -> None:
    async def hangs(prompt: str) -> str:
        await asyncio.sleep(3600)
        return prompt

    env = make(llm_query_fn=hangs, limits=Limits(cell_total=1.0))
    env.reset()
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    print(list(pool.map(llm_query, 'abcdefghijklmnop')))
"""
    start = time.monotonic()
    observation = env.execute(code)
    assert time.monotonic() - start < 3
    assert (observation.status, observation.restarted) == ("timeout", False)


def test_a_call_that_outlives_its_cell_is_cancelled_and_recorded(make: MakeFacade) -> None:
    called = threading.Event()

    async def hangs(prompt: str) -> str:
        called.set()
        await asyncio.sleep(3600)
        return prompt

    env = make(llm_query_fn=hangs, tools={"is_called": lambda: called.wait(20)})
    env.reset()
    code = (
        "import threading; threading.Thread(target=llm_query, args=('x',), daemon=True).start(); is_called()"
    )
    assert env.execute(code).status == "ok"
    errors = {call.name: call.error for call in env.episode.turns[0].helper_calls}
    assert errors == {"is_called": None, "llm_query": "llm_query was cancelled: its cell has ended"}


def test_the_episode_has_a_time_limit_of_its_own(make: MakeFacade) -> None:
    env = make(limits=Limits(episode=1.0))
    env.reset()
    observation = env.execute("while True: pass")
    assert (observation.status, observation.done, observation.done_reason) == ("timeout", True, "timeout")
    assert observation.reward == -0.1
