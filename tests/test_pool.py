"""Ready kernels: handed out once, like fresh ones, within the number there may be, gone with their loop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kernel_env import ConfigError, Limits, REPLAction, REPLEnvironment
from kernel_env.outputs import stdout_text
from kernel_env.pool import KernelPool

from .conftest import HAS_SANDBOX
from .processes import pid_of


@pytest.fixture(autouse=True)
def spares(clean_variables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels may be kept ready."""
    monkeypatch.setenv("KERNEL_ENV_SPARES", "2")


def run(body: Callable[[KernelPool], Coroutine[Any, Any, None]], kernel_name: str = "python3") -> None:
    async def with_pool() -> None:
        await body(KernelPool.of_loop(kernel_name, (), "sandbox" if HAS_SANDBOX else "process"))

    asyncio.run(with_pool())


async def spares_are(pool: KernelPool, number: int) -> None:
    async with asyncio.timeout(30):
        while pool.spares != number:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.005)


async def reset(env: REPLEnvironment, **options: Any) -> int:
    """The process id of the kernel after a reset."""
    await env.reset_async(**options)
    return pid_of(env)


def test_the_first_episode_makes_no_spare_and_the_second_does() -> None:
    async def body(pool: KernelPool) -> None:
        env = REPLEnvironment()
        await reset(env)
        await asyncio.sleep(0.1)
        assert pool.spares == 0
        await reset(env)
        await spares_are(pool, 1)
        await env.close_async()

    run(body)


def test_every_kernel_is_handed_out_once() -> None:
    async def body(pool: KernelPool) -> None:
        env, seen = REPLEnvironment(), []
        for _ in range(6):
            seen.append(await reset(env))
            if len(seen) > 1:
                await spares_are(pool, 1)
        assert len(set(seen)) == 6
        await env.close_async()

    run(body)


def test_as_many_are_kept_ready_as_were_in_use_at_once_up_to_the_most() -> None:
    async def body(pool: KernelPool) -> None:
        envs = [REPLEnvironment() for _ in range(3)]
        await asyncio.gather(*(reset(env) for env in envs))
        await spares_are(pool, 2)
        for env in envs:
            await env.close_async()

    run(body)


EVERYTHING = """
import random
print(context, sorted(SHOW_VARS()), double(21), llm_query('q'), random.random(), answer, In[-1][:3])
FINAL_VAR('context')
"""


def test_a_ready_kernel_is_like_a_fresh_one() -> None:
    async def body(pool: KernelPool) -> None:
        def double(number: int) -> int:
            "Twice."
            return 2 * number

        options: dict[str, Any] = {"tools": {"double": double}, "llm_query_fn": str.upper}
        observations = []
        for spares in (0, 1):
            await pool.drop_spares()
            await pool.fill(spares)
            env = REPLEnvironment(**options)
            first = await env.reset_async(context=["a", {"b": 1}], seed=5)
            step = await env.step_async(REPLAction(code=EVERYTHING))
            helped = await env.get_variable_async("double.__doc__")
            observations.append((first, step, helped.result.stdout))
            await env.close_async()
        (first, step, doc), (ready, ready_step, ready_doc) = observations
        assert ready.available_variables == first.available_variables
        assert (ready_step.result.stdout, ready_step.final_answer) == (step.result.stdout, step.final_answer)
        assert "['a', {'b': 1}] ['random'] 42 Q" in step.result.stdout
        assert ready_step.result.locals_snapshot == step.result.locals_snapshot
        assert ready_doc == doc == "'Twice.'\n"

    run(body)


def test_the_limits_of_its_episode_hold_in_a_ready_kernel() -> None:
    async def body(pool: KernelPool) -> None:
        await pool.fill(1)
        env = REPLEnvironment(limits=Limits(cell_output=10_000, answer_bytes=10, cell_active=0.3))
        await reset(env)
        flood = await env.step_async(REPLAction(code="for n in range(10**5): print(n)"))
        assert len(stdout_text(flood.outputs)) < 12_000
        refused = await env.step_async(REPLAction(code="FINAL('x' * 11)"))
        assert "Limits.answer_bytes is 10" in refused.result.stderr
        assert (await env.step_async(REPLAction(code="while True: pass"))).status == "timeout"
        await env.close_async()

    run(body)


def test_a_ready_kernel_that_died_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    async def body(pool: KernelPool) -> None:
        await pool.fill(2)
        dead = pool._spares[0]._live.process.pid
        os.kill(dead, signal.SIGKILL)
        env = REPLEnvironment()
        assert await reset(env) != dead
        await env.close_async()

    run(body)


def test_a_start_waits_while_there_are_as_many_as_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNEL_ENV_MAX_KERNELS", "2")

    async def body(pool: KernelPool) -> None:
        envs = [REPLEnvironment() for _ in range(4)]
        await asyncio.gather(*(reset(env) for env in envs[:2]))
        third, fourth = (asyncio.create_task(reset(env)) for env in envs[2:])
        done, _ = await asyncio.wait({third, fourth}, timeout=0.3)
        assert not done
        assert pool.spares == 0
        third.cancel()
        await asyncio.wait({third})
        await envs[0].close_async()
        assert await fourth
        for env in envs:
            await env.close_async()

    run(body)


def test_spares_of_another_kind_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNEL_ENV_MAX_KERNELS", "2")

    async def body(pool: KernelPool) -> None:
        await pool.fill(2)
        env = REPLEnvironment(kernel_name="stock")
        await reset(env)
        await env.close_async()

    run(body)


def test_kinds_that_are_not_forked_are_not_pooled() -> None:
    async def main() -> None:
        from kernel_env import pool

        env = REPLEnvironment(kernel_name="stock")
        await reset(env)
        assert asyncio.get_running_loop() not in pool._pools
        await env.close_async()

    asyncio.run(main())


def test_a_pool_ends_with_its_loop(temporary_folder: Path) -> None:
    pids: list[int] = []

    async def body(pool: KernelPool) -> None:
        await pool.fill(2)
        pids.extend(kernel._live.process.pid for kernel in pool._spares)

    run(body)
    assert not list(temporary_folder.glob("ke-*"))
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_program_that_ends_takes_its_spares_along() -> None:
    code = """
import time
from kernel_env import LocalREPLEnv
env = LocalREPLEnv()
for _ in range(3):
    env.reset()
    time.sleep(0.3)
"""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="p-") as folder:
        environment = {**os.environ, "TMPDIR": folder}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
        assert not os.listdir(folder)


def test_an_idle_pool_sleeps() -> None:
    async def body(pool: KernelPool) -> None:
        await pool.fill(2)
        pids = [os.getpid(), *(kernel._live.process.pid for kernel in pool._spares)]
        await asyncio.sleep(0.2)

        def ticks() -> int:
            stats = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in pids]
            return sum(int(fields[11]) + int(fields[12]) for fields in stats)

        before = ticks()
        await asyncio.sleep(2)
        assert ticks() - before <= 4  # hundredths of a second

    run(body)


@pytest.mark.parametrize(
    ("name", "value"),
    [("KERNEL_ENV_SPARES", "-1"), ("KERNEL_ENV_MAX_KERNELS", "0"), ("KERNEL_ENV_MAX_KERNELS", "many")],
)
def test_a_number_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}='{value}' in the environment; give a whole number"):
        REPLEnvironment().reset()


def test_resets_cancelled_at_any_moment_leave_the_count_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNEL_ENV_MAX_KERNELS", "2")

    async def body(pool: KernelPool) -> None:
        for moment in range(0, 40, 2):
            env = REPLEnvironment()
            await pool.fill(moment % 3 % 2)
            task = asyncio.create_task(reset(env))
            await asyncio.wait({task}, timeout=moment / 1000)
            task.cancel()
            await asyncio.wait({task})
            await env.close_async()
        await pool.drop_spares()
        envs = [REPLEnvironment() for _ in range(2)]
        async with asyncio.timeout(30):
            await asyncio.gather(*(reset(env) for env in envs))
        for env in envs:
            await env.close_async()

    run(body)
