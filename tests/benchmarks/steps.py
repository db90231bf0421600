"""What a step costs beside a stock kernel and client, in the same run, and where its time goes.

    python tests/benchmarks/steps.py            # the table in the README
    python tests/benchmarks/steps.py --quick    # fewer of everything

"Stock" is `start_new_kernel` and `execute_interactive` as jupyter_client's documentation shows them; "eight
at once" lets eight of its asyncio clients take turns in one loop. Absolute times depend on the machine; the
ratios are what to compare. The table by layer splits a step into the processor time of the kernel, that of
this process, and the rest: wake-ups and waiting for a processor.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import AsyncKernelManager, start_new_kernel
from rich.console import Console
from rich.table import Table

from kernel_env import LocalREPLEnv, REPLAction, REPLEnvironment
from kernel_env.kernel import Kernel

CELLS = ("x = 1", "print('x')")
PRINTS = "for i in range(20_000): print(i)"
DISPLAYS = "from IPython.display import display\nfor i in range(1000): display(i)"
AT_ONCE = 8


def p(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def timed(function: Callable[[], Any]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1000


def processor_time(pid: int) -> float:
    """Milliseconds that a process has used so far, by its clock (clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2) * 1000


def memory(pid: int) -> float:
    """Resident memory in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def kernel_of(env: REPLEnvironment | LocalREPLEnv) -> Kernel:
    environment = env._env if isinstance(env, LocalREPLEnv) else env
    return environment._rollout._kernel  # type: ignore[union-attr]


async def timed_async(work: Callable[[], Awaitable[Any]], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await work()
        times.append((time.perf_counter() - start) * 1000)
    return times


class Bench:
    """Runs the parts one after another and keeps their rows."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.table = Table("", "kernel_env", "stock", "ratio", "aim", "")
        self.layers = Table("by layer, ms", "kernel", "host", "rest", "in all")

    def row(self, what: str, ours: str, stock: str, value: float, aim: float, unit: str = " ×") -> None:
        met = value >= aim if "steps/s" in ours else value <= aim
        sign = "≥" if "steps/s" in ours else "≤"
        self.table.add_row(
            what, ours, stock, f"{value:.2f}{unit}", f"{sign} {aim:g}", "ok" if met else "missed"
        )

    def count(self, full: int) -> int:
        return max(int(full * self.scale), 2)

    def trivial(self, client: BlockingKernelClient) -> None:
        """The same cells through a stock client, an environment and a bare kernel, taking turns."""
        for code in CELLS:
            stock: list[float] = []
            steps: list[float] = []
            bare: list[float] = []
            with LocalREPLEnv() as env:
                env.reset(max_iterations=10**6)
                action = REPLAction(code=code)
                for _ in range(self.count(10)):
                    # Turns of a hundred: what each finds cold is the first of them.
                    run = partial(client.execute_interactive, code, output_hook=id)
                    stock += [timed(run) for _ in range(100)]
                    steps += [timed(partial(env.step, action)) for _ in range(100)]
                    bare += bare_times(env, code, 100)
            awaited = asyncio.run(self.async_steps(code, self.count(600)))
            half = p(stock, 0.5)
            for name, times, aim in (("env.step", steps, 0.25), ("kernel.execute", bare, 0.2)):
                mid, late = p(times, 0.5), p(times, 0.99)
                self.row(f"{name} `{code}`", f"{mid:.2f} ({late:.2f}) ms", f"{half:.2f} ms", mid / half, aim)
                self.row("… p99 by p50", f"{late:.2f} ms", f"{p(stock, 0.99):.2f} ms", late / mid, 2.5)
            saved = p(steps, 0.5) - p(awaited, 0.5)
            self.row(f"async step `{code}`", f"{p(awaited, 0.5):.2f} ms", "", -saved, -0.2, " ms")

    async def async_steps(self, code: str, count: int) -> list[float]:
        env = REPLEnvironment()
        await env.reset_async(max_iterations=10**6)
        action = REPLAction(code=code)
        await timed_async(lambda: env.step_async(action), 20)
        times = await timed_async(lambda: env.step_async(action), count)
        await env.close_async()
        return times

    def floods(self, client: BlockingKernelClient) -> None:
        """Many small outputs in one cell."""
        with LocalREPLEnv() as env:
            env.reset(max_iterations=10**6)
            for name, code in (("20,000 prints", PRINTS), ("1,000 displays", DISPLAYS)):
                stock, ours = [], []
                for _ in range(7):
                    stock.append(timed(partial(client.execute_interactive, code, output_hook=id)))
                    ours.append(timed(partial(env.execute, code)))
                mid, half = statistics.median(ours), statistics.median(stock)
                self.row(name, f"{mid:.0f} ms", f"{half:.0f} ms", mid / half, 0.5)

    def by_layer(self, client: BlockingKernelClient, pid: int) -> None:
        """Processor time of both sides, and what is left of the wall clock."""
        count = self.count(500)
        with LocalREPLEnv() as env:
            env.reset(max_iterations=10**6)
            runs = (
                ("stock", partial(client.execute_interactive, output_hook=id), pid),
                ("env.step", env.execute, kernel_of(env)._live.process.pid),
            )
            for name, run, kernel in runs:
                for code in CELLS:
                    start = time.perf_counter(), processor_time(kernel), time.process_time() * 1000
                    for _ in range(count):
                        run(code)
                    wall = (time.perf_counter() - start[0]) * 1000 / count
                    inside = (processor_time(kernel) - start[1]) / count
                    outside = (time.process_time() * 1000 - start[2]) / count
                    rest = wall - inside - outside
                    figures = (f"{figure:.2f}" for figure in (inside, outside, rest, wall))
                    self.layers.add_row(f"{name} `{code}`", *figures)

    def endurance(self) -> None:
        """Ten thousand cells in one kernel."""
        count = self.count(10_000)
        with LocalREPLEnv() as env:
            env.reset(max_iterations=10**6)
            pid, levels = kernel_of(env)._live.process.pid, []
            times = []
            for number in range(count):
                if number in (count // 5, count - 1):
                    levels.append(memory(pid))
                times.append(timed(partial(env.execute, f"x = {number}\nprint(x)")))
            tenth = count // 10
            early, late = p(times[tenth : 2 * tenth], 0.5), p(times[-tenth:], 0.5)
            self.row(f"{count:,} cells: late by early", f"{late:.2f} ms", "", late / early, 1.1)
            grown = (levels[1] - levels[0]) / (0.8 * count) * 10_000
            self.row("… memory of the kernel, per 10,000", f"{grown:.1f} MB", "", grown, 3, " MB")

    async def at_once(self) -> None:
        """Eight of each in one loop."""
        count = self.count(200)
        managers: list[AsyncKernelManager] = []
        clients: list[AsyncKernelClient] = []
        for _ in range(AT_ONCE):
            manager = AsyncKernelManager(kernel_name="python3")
            await manager.start_kernel()
            client = manager.client()
            client.start_channels()
            await client.wait_for_ready()
            managers.append(manager)
            clients.append(client)
        envs = [REPLEnvironment() for _ in range(AT_ONCE)]
        for env in envs:
            await env.reset_async(max_iterations=10**6)

        async def stock(client: AsyncKernelClient) -> None:
            for _ in range(count):
                await client.execute_interactive("x = 1", output_hook=id)

        async def ours(env: REPLEnvironment) -> None:
            for _ in range(count):
                await env.step_async(REPLAction(code="x = 1"))

        rates: list[list[float]] = [[], []]
        for _ in range(3):
            for rate, work in zip(rates, (map(stock, clients), map(ours, envs)), strict=True):
                start = time.perf_counter()
                await asyncio.gather(*work)
                rate.append(AT_ONCE * count / (time.perf_counter() - start))
        for client, manager in zip(clients, managers, strict=True):
            client.stop_channels()
            await manager.shutdown_kernel(now=True)
        for env in envs:
            await env.close_async()
        half, mid = map(statistics.median, rates)
        self.row("eight at once", f"{mid:.0f} steps/s", f"{half:.0f} steps/s", mid / half, 3)


def bare_times(env: LocalREPLEnv, code: str, count: int) -> list[float]:
    """Times of `Kernel.execute` on the loop that the environment lives on."""
    kernel = kernel_of(env)
    work = timed_async(lambda: kernel.execute(code), count)
    return asyncio.run_coroutine_threadsafe(work, kernel._live.process._loop).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a fifth of the rounds")
    bench = Bench(0.2 if parser.parse_args().quick else 1)
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        bench.trivial(client)
        bench.floods(client)
        bench.by_layer(client, manager.provisioner.process.pid)  # type: ignore[union-attr]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    bench.endurance()
    asyncio.run(bench.at_once())
    console = Console(width=120)
    console.print(bench.table)
    console.print(bench.layers)


if __name__ == "__main__":
    main()
