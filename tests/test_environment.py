"""REPLEnvironment's protocol: loops, processes, cancellation, concurrent callers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

from kernel_env import Limits, REPLAction, REPLEnvironment, REPLObservation, ResetRequired, UsageError

CELL = REPLAction(code="x = 1")


def test_async_functions_run_on_the_loop_of_reset_async() -> None:
    async def body() -> None:
        loops = []

        async def model(prompt: str) -> str:
            loops.append(asyncio.get_running_loop())
            return prompt

        env = REPLEnvironment(llm_query_fn=model)
        await env.reset_async()
        await env.step_async(REPLAction(code="llm_query('x')"))
        await env.close_async()
        assert loops == [asyncio.get_running_loop()]

    asyncio.run(body())


def test_an_episode_runs_on_another_kind_of_loop() -> None:
    # Servers bring uvloop, whose transports are none of asyncio's classes.
    async def body() -> None:
        env = REPLEnvironment(llm_query_fn=str.upper)
        await env.reset_async(context="ctx" * 1000)
        observation = await env.step_async(REPLAction(code="print(llm_query('x'), len(context))"))
        assert observation.result.stdout == "X 3000\n"
        observation = await env.step_async(REPLAction(code="while True: pass"), timeout_s=0.2)
        assert observation.status == "timeout"
        await env.close_async()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body())


def test_sync_and_async_calls_do_not_mix() -> None:
    env = REPLEnvironment()

    async def body() -> None:
        await env.reset_async()
        with pytest.raises(UsageError, match="another event loop"):
            env.step(CELL)
        with pytest.raises(UsageError, match="another event loop"):
            env.close()
        await env.close_async()

    asyncio.run(body())
    env.reset()
    with pytest.raises(UsageError, match="another event loop"):
        asyncio.run(env.step_async(CELL))
    env.close()


CLOSED_LATE = """
import asyncio
from kernel_env import REPLAction, REPLEnvironment
env = REPLEnvironment()
asyncio.run(env.reset_async())
env.close()
assert env.episode.done_reason == "closed"
env.reset()
assert env.step(REPLAction(code="x = 1")).status == "ok"
env.close()
"""


def test_an_environment_can_be_closed_after_its_loop_has_ended(temporary_folder: Path) -> None:
    # In a process of its own: asyncio warns of the sockets of a loop that was closed under them, whenever
    # they are collected.
    command = [sys.executable, "-W", "ignore::ResourceWarning", "-c", CLOSED_LATE]
    subprocess.run(command, check=True, timeout=60, env=os.environ | {"TMPDIR": str(temporary_folder)})
    assert not list(temporary_folder.glob("ke-*"))


def test_a_cancelled_step_is_recorded_and_leaves_the_episode_usable() -> None:
    async def body() -> None:
        printed = asyncio.Event()
        env = REPLEnvironment(on_output=lambda output: printed.set())
        await env.reset_async()
        code = "y = 2\nprint('on', flush=True)\nwhile True: pass"
        task = asyncio.create_task(env.step_async(REPLAction(code=code)))
        await printed.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (turn,) = env.episode.turns
        assert turn.observation.result.stdout == "on\n"
        assert turn.observation.result.exception is not None
        assert turn.observation.result.exception.startswith("KeyboardInterrupt")
        assert (await env.get_variable_async("y")).result.stdout == "2\n"
        await env.close_async()

    asyncio.run(body())


def test_a_timeout_around_a_step_works_like_a_cancellation() -> None:
    async def body() -> None:
        env = REPLEnvironment()
        await env.reset_async()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await env.step_async(REPLAction(code="while True: pass"))
        assert (await env.step_async(CELL)).status == "ok"
        await env.close_async()

    asyncio.run(body())


def test_cancelling_again_and_again_changes_nothing() -> None:
    async def body() -> None:
        printed = asyncio.Event()
        limits = Limits(interrupt_grace=0.5)
        env = REPLEnvironment(on_output=lambda output: printed.set(), limits=limits)
        await env.reset_async()
        code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        code += "print('on', flush=True)\nwhile True: pass"
        task = asyncio.create_task(env.step_async(REPLAction(code=code)))
        await printed.wait()
        while not task.done():  # through the interrupt, the kill and the start of a fresh kernel
            task.cancel()
            await asyncio.wait({task}, timeout=0.05)
        assert task.cancelled()
        assert [turn.observation.restarted for turn in env.episode.turns] == [True]
        assert (await env.step_async(REPLAction(code="1 + 1"))).result.stdout == "2\n"
        await env.close_async()

    asyncio.run(body())


@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.01, 0.015, 0.03, 0.1, 0.3])
def test_a_reset_cancelled_at_any_moment_leaves_nothing(temporary_folder: Path, seconds: float) -> None:
    async def body() -> None:
        env = REPLEnvironment()
        resetting = asyncio.create_task(env.reset_async())
        await asyncio.wait({resetting}, timeout=seconds)
        resetting.cancel()
        await asyncio.wait({resetting})
        await env.close_async()

    asyncio.run(body())
    assert not list(temporary_folder.glob("ke-*"))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if "ipykernel" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_cancelled_close_still_closes(temporary_folder: Path) -> None:
    async def body() -> None:
        env = REPLEnvironment()
        await env.reset_async()
        closing = asyncio.create_task(env.close_async())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait({closing})
        await env.close_async()
        assert env.episode.done_reason == "closed"

    asyncio.run(body())
    assert not list(temporary_folder.glob("ke-*"))


def test_closing_does_not_wait_for_steps_in_the_queue() -> None:
    async def body() -> None:
        printed = asyncio.Event()
        env = REPLEnvironment(on_output=lambda output: printed.set())
        await env.reset_async()
        code = REPLAction(code="print('on', flush=True)\nimport time; time.sleep(60)")
        steps = [asyncio.create_task(env.step_async(code)) for _ in range(3)]
        await printed.wait()
        async with asyncio.timeout(10):
            await env.close_async()
        first, *others = await asyncio.gather(*steps, return_exceptions=True)
        assert isinstance(first, REPLObservation)
        assert [type(error) for error in others] == [ResetRequired, ResetRequired]

    asyncio.run(body())


def test_steps_from_several_threads_take_turns() -> None:
    env = REPLEnvironment()
    env.reset()
    env.step(REPLAction(code="n = 0"))
    with ThreadPoolExecutor(4) as pool:
        codes = [REPLAction(code="n += 1\nprint(n)")] * 8
        seen = [observation.result.stdout for observation in pool.map(env.step, codes)]
    assert sorted(seen) == [f"{n}\n" for n in range(1, 9)]
    assert [turn.observation.iteration for turn in env.episode.turns] == list(range(1, 10))
    env.close()


def test_closing_ends_a_step_that_runs() -> None:
    printed = threading.Event()
    env = REPLEnvironment(on_output=lambda output: printed.set())
    env.reset()
    code = REPLAction(code="print('on', flush=True)\nwhile True: pass")
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(env.step, code)
        assert printed.wait(20)
        env.close()
        observation = step.result(20)
    assert observation.result.exception is not None
    assert "the environment was closed" in observation.result.exception
    with pytest.raises(ResetRequired):
        env.step(CELL)


def test_resets_from_several_threads_leave_one_kernel() -> None:
    env = REPLEnvironment()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: env.reset(), range(3)))
    assert env.step(CELL).status == "ok"
    env.close()


def test_a_forked_child_is_told_to_make_its_own() -> None:
    env = REPLEnvironment()
    env.reset()
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        try:
            os.write(write_end, _use_in_a_child(env).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read().decode()
    os.wait()
    assert said.count("a forked child must make its own") == 2
    assert said.endswith("\nok")
    assert env.step(CELL).status == "ok"
    env.close()


def _use_in_a_child(env: REPLEnvironment) -> str:
    said = []
    for function in (env.reset, partial(env.step, CELL)):
        try:
            function()
        except UsageError as error:
            said.append(str(error))
    env.close()
    own = REPLEnvironment()
    own.reset()
    said.append(own.step(CELL).status)
    own.close()
    return "\n".join(said)


def test_the_episode_there_was_is_closed_by_the_next_reset() -> None:
    env = REPLEnvironment()
    with pytest.raises(ResetRequired):
        _ = env.episode
    env.reset(episode_id="a")
    first = env.episode
    env.reset(episode_id="b")
    assert (first.done_reason, env.episode.episode_id) == ("closed", "b")
    env.close()


def test_unknown_options_are_refused() -> None:
    env = REPLEnvironment()
    options: dict[str, Any] = {"temperature": 1}
    with pytest.raises(TypeError, match="temperature"):
        env.reset(**options)
    env.close()


def test_the_metadata_names_openenv_s_environment() -> None:
    metadata = REPLEnvironment().get_metadata()
    assert (metadata.name, metadata.version) == ("repl_env", "0.1.0")
