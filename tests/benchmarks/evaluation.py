"""What an evaluation costs beside its episodes, and beside the same work through stock jupyter_client.

    python tests/benchmarks/evaluation.py             # the table in the README
    python tests/benchmarks/evaluation.py --quick     # fewer of everything

The work is that of the oracle on needles of 8,000 characters: a kernel, its context, one cell that answers,
the end of the kernel. "Stock" does it with `AsyncKernelManager` and `execute_interactive`, as many at once,
and writes nothing down. Absolute times depend on the machine; the ratios are what to compare.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path

from jupyter_client.manager import AsyncKernelManager
from rich.console import Console
from rich.table import Table

from kernel_env import EvalConfig, REPLAction, REPLEnvironment, Task, evaluate
from kernel_env.metrics import METRICS
from kernel_env.rundir import Result
from kernel_env.suites import SUITES

AT_ONCE = 8


async def stock(tasks: list[Task]) -> float:
    """Episodes a second."""
    pending = iter(tasks)

    async def work() -> None:
        for task in pending:
            manager = AsyncKernelManager(kernel_name="python3")
            await manager.start_kernel()
            client = manager.client()
            client.start_channels()
            await client.wait_for_ready(timeout=60)
            answers: list[str] = []

            def note(message: dict[str, object], answers: list[str] = answers) -> None:
                if message["msg_type"] == "stream":
                    answers.append(message["content"]["text"])  # type: ignore[index]

            assert task.reference is not None
            await client.execute_interactive(f"context = {task.context!r}\nFINAL = print", output_hook=note)
            await client.execute_interactive(task.reference.solution, output_hook=note)
            assert METRICS[task.metric].score(task.expected_answer, "".join(answers)) == 1.0
            client.stop_channels()
            await manager.shutdown_kernel(now=True)

    begin = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return len(tasks) / (time.perf_counter() - begin)


def ours(folder: Path, count: int) -> tuple[float, float]:
    """Episodes a second, and the share of their time that went into the record."""
    config = EvalConfig(out=folder / "ours", splits=["8k"], num_tasks=count, at_once=AT_ONCE, report=False)
    begin = time.perf_counter()
    result = evaluate("needle", "oracle", config)
    seconds = time.perf_counter() - begin
    assert result.reward == 1.0
    spent = result.summary["seconds"]
    return count / seconds, spent["bookkeeping"] / spent["total"]


def resumed(folder: Path, count: int) -> float:
    """Seconds to list `count` tasks of a file and find that all of a run over them is done."""
    file, run = folder / "tasks.jsonl", folder / "resumed"
    rows = [{"id": f"t{n}", "context": f"context {n}", "expected_answer": f"{n}"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EvalConfig(out=run, num_tasks=1, report=False)
    (first,) = evaluate(str(file), "oracle", config).results
    settings = json.loads((run / "config.json").read_text())
    settings["settings"]["num_tasks"] = None
    (run / "config.json").write_text(json.dumps(settings))
    done = [first.model_copy(update={"task": f"t{n}"}) for n in range(count)]
    (run / "results.jsonl").write_text("".join(Result.model_dump_json(one) + "\n" for one in done))
    begin = time.perf_counter()
    result = evaluate(str(file), "oracle", EvalConfig(out=run, resume=True, report=False))
    assert (len(result.results), result.reward) == (count, 1.0)
    return time.perf_counter() - begin


def resident() -> float:
    """Megabytes of this process."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(folder: Path, counts: tuple[int, int]) -> list[float]:
    """Megabytes of this process after so many episodes of one run."""
    seen: dict[int, float] = {}
    played = 0

    async def policy(env: REPLEnvironment, task: Task) -> None:
        nonlocal played
        await env.step_async(REPLAction(code="FINAL(context[:9])"))
        played += 1
        if played in counts:
            seen[played] = resident()

    tasks = [Task(id=f"t{n}", context=f"{n}" * 1000, expected_answer="x") for n in range(counts[1])]
    evaluate(tasks, policy, EvalConfig(out=folder / "memory", at_once=AT_ONCE, report=False))
    return [seen[count] for count in counts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    table = Table("", "kernel_env", "beside it", "aim")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suite = SUITES["needle"]()
        peers = [suite.get_task("8k", n) for n in range(16 if quick else 48)]
        before = asyncio.run(stock(peers))
        rate, share = ours(folder, 100 if quick else 800)
        after = asyncio.run(stock(peers))
        peer = (before + after) / 2
        table.add_row(
            f"episodes a second, {AT_ONCE} at once",
            f"{rate:.1f}",
            f"stock {peer:.1f}: {rate / peer:.1f} ×",
            "8 ×",
        )
        table.add_row("bookkeeping, of the episodes' time", f"{share:.1%}", "", "5 %")
        count = 1_000 if quick else 10_000
        table.add_row(f"{count:,} tasks listed and resumed", f"{resumed(folder, count):.2f} s", "", "2 s")
        counts = (200, 500) if quick else (500, 5_000)
        early, late = memory(folder, counts)
        table.add_row(
            f"memory after {counts[0]:,} and {counts[1]:,} episodes",
            f"{early:.0f}, {late:.0f} MB",
            "",
            "level",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
