"""What a kernel costs to start and to keep, beside stock kernels and an in-process `exec`, in the same run.

    python tests/benchmarks/starts.py                       # the table in the README
    python tests/benchmarks/starts.py --plot starts.png     # with the picture
    python tests/benchmarks/starts.py --quick               # fewer of everything

"Stock" is `start_new_kernel` and `execute_interactive` as jupyter_client's documentation shows them. A start
is timed from the call of `reset`, or its counterpart, to the result of the first cell; closing is not in it.
Absolute times depend on the machine; the ratios are what to compare.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager, start_new_kernel
from nbclient import NotebookClient
from rich.console import Console
from rich.table import Table

from kernel_env import REPLAction, REPLEnvironment
from kernel_env.pool import KernelPool
from kernel_env.provisioners import templates

CELLS = ["x = 1", "x += 1", "print(x)", "y = [n * n for n in range(100)]", "sum(y)"]
MB = 2**20


def median(values: list[float]) -> float:
    return statistics.median(values)


async def timed(work: Awaitable[Any]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    await work
    return (time.perf_counter() - start) * 1000


def private_and_proportional(pid: int) -> tuple[float, float]:
    """USS and PSS of a process in MB."""
    fields: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, size, _ = line.split()
        fields[name[:-1]] = int(size)
    return (fields["Private_Clean"] + fields["Private_Dirty"]) / 1024, fields["Pss"] / 1024


def family(pid: int) -> list[int]:
    """A template's process and, in a sandbox, the one in the namespace, which it watches."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    inner = [int(child) for child in children if "template.py" in Path(f"/proc/{child}/cmdline").read_text()]
    return [pid] if len(inner) != 1 else [pid, *inner]


def pid_of(env: REPLEnvironment) -> int:
    return env._rollout._kernel._live.process.pid  # type: ignore[union-attr]


async def first_result(env: REPLEnvironment) -> None:
    await env.reset_async()
    await env.step_async(REPLAction(code="x = 1"))


def stock_start() -> tuple[float, float]:
    """Milliseconds to the first result of a stock kernel, and its private memory then."""
    start = time.perf_counter()
    manager, client = start_new_kernel(kernel_name="python3")
    client.execute_interactive("x = 1")
    took = (time.perf_counter() - start) * 1000
    memory, _ = private_and_proportional(manager.provisioner.process.pid)  # type: ignore[union-attr]
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    return took, memory


def nbclient_start() -> float:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1")])  # type: ignore[no-untyped-call]
    start = time.perf_counter()
    NotebookClient(notebook, kernel_name="python3").execute()
    return (time.perf_counter() - start) * 1000


def exec_start() -> float:
    start = time.perf_counter()
    exec(compile("x = 1", "<cell>", "exec"), {})
    return (time.perf_counter() - start) * 1000


async def starts(rounds: int) -> dict[str, float]:
    """Medians in milliseconds, the kinds taking turns."""
    times: dict[str, list[float]] = {name: [] for name in ("stock", "nbclient", "exec", "fork", "pool")}
    memory: dict[str, list[float]] = {"stock MB": [], "fork MB": []}
    warm = REPLEnvironment()
    await first_result(warm)
    pool = KernelPool.of_loop("python3", (), warm.episode.isolation)
    await warm.close_async()
    await asyncio.sleep(0.5)  # the template settles
    for _ in range(rounds):
        took, used = await asyncio.to_thread(stock_start)
        times["stock"].append(took)
        memory["stock MB"].append(used)
        times["nbclient"].append(await asyncio.to_thread(nbclient_start))
        times["exec"].append(exec_start())
        for kind, spares in (("fork", 0), ("pool", 1)):
            await pool.drop_spares()
            await pool.fill(spares)
            env = REPLEnvironment()
            await asyncio.sleep(0.05)
            times[kind].append(await timed(first_result(env)))
            if kind == "fork":
                memory["fork MB"].append(private_and_proportional(pid_of(env))[0])
            await env.close_async()
    return {name: median(values) for name, values in (times | memory).items()}


async def stock_episode() -> None:
    manager = AsyncKernelManager(kernel_name="python3")
    await manager.start_kernel()
    client = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=60)
    for cell in CELLS:
        await client.execute_interactive(cell, output_hook=id)
    client.stop_channels()
    await manager.shutdown_kernel(now=True)


async def our_episode() -> None:
    env = REPLEnvironment()
    await env.reset_async()
    for cell in CELLS:
        await env.step_async(REPLAction(code=cell))
    await env.close_async()


async def episodes_per_second(episode: Callable[[], Awaitable[None]], count: int, at_once: int) -> float:
    slots = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with slots:
            await episode()

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(count)))
    return count / (time.perf_counter() - start)


def ticks(pids: list[int]) -> float:
    """Seconds of processor time that the processes have used."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


async def many(numbers: list[int]) -> list[dict[str, float]]:
    """Live kernels: the start of one more, their memory, whether all answer, what they use when idle."""
    envs: list[REPLEnvironment] = []
    rows = []
    for number in numbers:
        start, made = time.perf_counter(), 0
        while len(envs) < number:
            batch = [REPLEnvironment() for _ in range(min(8, number - len(envs)))]
            await asyncio.gather(*(first_result(env) for env in batch))
            envs += batch
            made += len(batch)
        per_second = made / (time.perf_counter() - start)
        one_more = []
        for _ in range(5):
            env = REPLEnvironment()
            one_more.append(await timed(first_result(env)))
            await env.close_async()
        pids = [pid_of(env) for env in envs]
        hosts = [pid for template in templates._templates.values() for pid in family(template._process.pid)]
        memory = sum(private_and_proportional(pid)[1] for pid in [os.getpid(), *hosts, *pids])
        answers = [
            (await env.step_async(REPLAction(code=f"print(x + {number})"))).result.stdout for env in envs
        ]
        assert answers == [f"{number + 1}\n"] * number
        await asyncio.sleep(1)
        before, clock = ticks([*hosts, *pids]), time.perf_counter()
        await asyncio.sleep(10)
        idle = (ticks([*hosts, *pids]) - before) / (time.perf_counter() - clock)
        rows.append(
            {
                "kernels": number,
                "start ms": median(one_more),
                "memory MB": memory,
                "idle share of a core": idle,
                "host descriptors": len(os.listdir("/proc/self/fd")),
                "forks per second": per_second,
            }
        )
    await asyncio.gather(*(env.close_async() for env in envs))
    return rows


FIRST = """
import sys, time
{imports}
start = time.perf_counter()
{episode}
print(time.perf_counter() - start)
"""
STOCK_FIRST = FIRST.format(
    imports="from jupyter_client.manager import start_new_kernel",
    episode="""manager, client = start_new_kernel(kernel_name="python3")
client.execute_interactive("x = 1")""",
)
OUR_FIRST = FIRST.format(
    imports="from kernel_env import LocalREPLEnv",
    episode="""env = LocalREPLEnv()
env.reset()
env.execute("x = 1")""",
)


def first_of_a_process(code: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return float(done.stdout) * 1000


def plot(found: dict[str, float], rows: list[dict[str, float]], path: str) -> None:
    """Bars of the starts, logarithmic, and memory against the number of live kernels."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    names = {
        "stock": "stock jupyter_client",
        "nbclient": "nbclient",
        "fork": "kernel_env, forked",
        "pool": "kernel_env, ready",
        "exec": "exec in process",
    }
    colours = ["#9a9a9a", "#9a9a9a", "#1f6fb4", "#1f6fb4", "#9a9a9a"]
    values = [found[name] for name in names]
    bars = left.barh(list(names.values()), values, color=colours)
    left.bar_label(bars, [f"{value:.3g} ms" for value in values], padding=3)
    left.set_xscale("log")
    left.set_xlim(min(values) / 2, max(values) * 12)
    left.invert_yaxis()
    left.set_title("from reset to the first result")
    left.spines[["top", "right"]].set_visible(False)
    kernels = [row["kernels"] for row in rows]
    right.plot(
        kernels, [row["memory MB"] for row in rows], "o-", color="#1f6fb4", label="kernel_env, all of it"
    )
    right.plot(
        kernels, [found["stock MB"] * n for n in kernels], "--", color="#9a9a9a", label="stock kernels alone"
    )
    right.set_xlabel("live kernels")
    right.set_title("memory, MB")
    right.legend(frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


async def measure(*, quick: bool) -> tuple[dict[str, float], list[dict[str, float]]]:
    found = await starts(4 if quick else 15)
    pool = KernelPool.of_loop("python3", ())
    await pool.drop_spares()
    found["stock episodes/s"] = await episodes_per_second(stock_episode, 16 if quick else 40, 8)
    found["our episodes/s"] = await episodes_per_second(our_episode, 60 if quick else 200, 8)
    await pool.drop_spares()
    firsts = {name: [] for name in ("stock", "ours")}  # type: dict[str, list[float]]
    for _ in range(3 if quick else 9):
        firsts["stock"].append(await asyncio.to_thread(first_of_a_process, STOCK_FIRST))
        firsts["ours"].append(await asyncio.to_thread(first_of_a_process, OUR_FIRST))
    found["stock first"], found["our first"] = median(firsts["stock"]), median(firsts["ours"])
    os.environ["KERNEL_ENV_SPARES"] = "0"
    await pool.close()
    return found, await many([1, 10, 40] if quick else [1, 10, 100, 200])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    found, rows = asyncio.run(measure(quick=options.quick))
    table = Table("", "kernel_env", "stock jupyter_client", "ratio", "within reach")
    for what, ours, stock, unit, reach in (
        ("reset to the first result, ready kernel", found["pool"], found["stock"], "ms", 1 / 50),
        ("the same, forked then", found["fork"], found["stock"], "ms", 1 / 15),
        ("first episode of a process", found["our first"], found["stock first"], "ms", 1.0),
        (
            "private memory after one cell",
            found["fork MB"],
            found["stock MB"],
            "MB",
            10.5 / found["stock MB"],
        ),
    ):
        figure = f"1/{stock / ours:.0f}" if ours < stock / 3 else f"{ours / stock:.2f}"
        table.add_row(
            what,
            f"{ours:.1f} {unit}",
            f"{stock:.1f} {unit}",
            figure,
            "yes" if ours / stock <= reach else "no",
        )
    ratio = found["our episodes/s"] / found["stock episodes/s"]
    table.add_row(
        "episodes of 5 steps a second, 8 at once",
        f"{found['our episodes/s']:.1f}",
        f"{found['stock episodes/s']:.2f}",
        f"{ratio:.1f} ×",
        "yes" if ratio >= 15 else "no",
    )
    table.add_row("nbclient, one cell", "", f"{found['nbclient']:.0f} ms", "", "")
    table.add_row("in-process exec", "", f"{found['exec']:.2f} ms", "", "")
    loads = Table(*rows[0])
    for row in rows:
        loads.add_row(*(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in row.values()))
    Console(width=130).print(table, loads)
    if options.plot:
        plot(found, rows, options.plot)


if __name__ == "__main__":
    main()
