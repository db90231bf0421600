"""What a sandbox adds to a kernel's start, memory and steps, beside the same kernels without one.

    python tests/benchmarks/sandbox.py            # the table in the README
    python tests/benchmarks/sandbox.py --quick    # fewer of everything

Kernels are forked for each start, none is ready; the two kinds take turns. A start is timed from the call of
`reset` to the result of the first cell. Absolute times depend on the machine: compare within a run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kernel_env import REPLAction, REPLEnvironment

KINDS = ("process", "sandbox")
STEP = REPLAction(code="x = 1")


async def started(isolation: str) -> tuple[REPLEnvironment, float]:
    """An environment after its first cell, and the milliseconds that took."""
    env = REPLEnvironment(isolation=isolation, max_iterations=10**6)
    begin = time.perf_counter()
    await env.reset_async()
    await env.step_async(STEP)
    return env, (time.perf_counter() - begin) * 1000


async def one_at_a_time(rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            env, took = await started(kind)
            times[kind].append(took)
            await env.close_async()
            await asyncio.sleep(0.05)
    return times


async def eight_at_once(rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            found = await asyncio.gather(*(started(kind) for _ in range(8)))
            times[kind] += [took for _, took in found]
            await asyncio.gather(*(env.close_async() for env, _ in found))
            await asyncio.sleep(0.1)
    return times


async def steps(count: int) -> dict[str, list[float]]:
    envs = {kind: (await started(kind))[0] for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(count):
        for kind, env in envs.items():
            begin = time.perf_counter()
            await env.step_async(STEP)
            times[kind].append((time.perf_counter() - begin) * 1000)
    for env in envs.values():
        await env.close_async()
    return times


async def memory(kernels: int) -> dict[str, float]:
    """Private MB of a kernel and, in a sandbox, of the first process of its namespace."""
    found = {}
    for kind in KINDS:
        envs = [(await started(kind))[0] for _ in range(kernels)]
        pids = [pid for env in envs for pid in env._rollout._kernel._live.process.roots]  # type: ignore[union-attr]
        found[kind] = sum(map(private, pids)) / kernels
        for env in envs:
            await env.close_async()
    return found


def private(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    few = parser.parse_args().quick
    for kind in KINDS:  # the templates
        await (await started(kind))[0].close_async()
    await asyncio.sleep(0.5)
    table = Table("", "process", "sandbox", "added", "within reach")
    rows = (
        ("start one at a time, median, ms", await one_at_a_time(10 if few else 60), statistics.median, 10.0),
        ("start eight at once, p95, ms", await eight_at_once(3 if few else 12), p95, 25.0),
        ("step, median, ms", await steps(300 if few else 3000), statistics.median, 0.02),
    )
    for what, times, summary, reach in rows:
        process, sandbox = (summary(times[kind]) for kind in KINDS)
        added = sandbox - process
        table.add_row(
            what, f"{process:.2f}", f"{sandbox:.2f}", f"{added:+.2f}", "yes" if added <= reach else "no"
        )
    used = await memory(5 if few else 20)
    added = used["sandbox"] - used["process"]
    table.add_row(
        "private memory, MB",
        f"{used['process']:.2f}",
        f"{used['sandbox']:.2f}",
        f"{added:+.2f}",
        "yes" if added <= 1 else "no",
    )
    Console(width=110).print(table)


if __name__ == "__main__":
    os.environ["KERNEL_ENV_SPARES"] = "0"
    asyncio.run(main())
