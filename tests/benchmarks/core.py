"""Contexts, helper calls and exports of one environment; starts and steps are in scripts of their own.

    python tests/benchmarks/core.py            # the table in the README
    python tests/benchmarks/core.py --quick    # without the 1 GB context

Times depend on the machine; what is compared with a stock kernel is in `starts.py` and `steps.py`.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kernel_env import LocalREPLEnv

MB = 10**6


@dataclass
class Row:
    """One line of the table: what, how much, what is aimed at, and whether that is reached."""

    what: str
    figure: str
    reference: str
    is_met: bool


def milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1000


def contexts(count: int) -> list[Row]:
    """Resets with and without a context of 10 MB, taking turns."""
    empty: list[float] = []
    filled: list[float] = []
    text = "kernel_env " * (10 * MB // 11)
    with LocalREPLEnv() as env:
        for _ in range(count):
            for context, times in (("", empty), (text, filled)):
                env.close()
                times.append(milliseconds(partial(env.reset, context=context)))
    extra = statistics.median(filled) - statistics.median(empty)
    return [Row("a context of 10 MB adds", f"{extra:.0f} ms", "≤ 60 ms", extra <= 60)]


class Memory:
    """Peak of the memory in use on the machine above its level at the start, sampled in a thread."""

    def __enter__(self) -> Memory:
        self.peak, self._base, self._stop = 0, self._used(), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, self._used() - self._base)

    @staticmethod
    def _used() -> int:
        lines = Path("/proc/meminfo").read_text().splitlines()
        info = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return (info["MemTotal"] - info["MemAvailable"]) * 1024


def large_context() -> list[Row]:
    """One episode whose context is 1 GB of ASCII."""
    with Memory() as memory, LocalREPLEnv() as env:
        text = "kernel_env " * (1000 * MB // 11)
        seconds = milliseconds(lambda: env.reset(context=text)) / 1000
        assert env.execute("len(context)").observation.result.stdout.strip() == str(len(text))
    return [
        Row("reset with 1 GB of ASCII", f"{seconds:.1f} s", "≤ 5 s", seconds <= 5),
        Row(
            "… memory of host and kernel, at most",
            f"{memory.peak / 1e9:.2f} GB",
            "≤ 2.3 GB",
            memory.peak <= 2.3e9,
        ),
    ]


MEASURE_CALLS = """
import statistics, time
def measure(count):
    times = []
    for _ in range(count):
        start = time.perf_counter()
        llm_query("x")
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)
measure(50)
print(measure(1000))
"""

MEASURE_THREADS = """
import threading, time
threads = [threading.Thread(target=llm_query, args=("wait",)) for _ in range(32)]
start = time.perf_counter()
for thread in threads: thread.start()
for thread in threads: thread.join()
print((time.perf_counter() - start) * 1000)
"""


def helper_calls() -> list[Row]:
    """Round trips of `llm_query`, timed inside the kernel."""

    def sync_model(prompt: str) -> str:
        if prompt == "wait":
            time.sleep(0.1)
        return prompt

    async def async_model(prompt: str) -> str:
        return prompt

    rows = []
    for name, function in (("sync", sync_model), ("async", async_model)):
        with LocalREPLEnv(llm_query_fn=function) as env:
            env.reset()
            median = float(env.execute(MEASURE_CALLS).observation.result.stdout)
            rows.append(
                Row(f"helper call, {name} function, p50", f"{median:.2f} ms", "≤ 0.3 ms", median <= 0.3)
            )
            if name == "sync":
                runs = [float(env.execute(MEASURE_THREADS).observation.result.stdout) for _ in range(5)]
                total = statistics.median(runs)
                rows.append(
                    Row("32 threads × 100 ms in `llm_query`", f"{total:.0f} ms", "≤ 200 ms", total <= 200)
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="leave the 1 GB context out")
    quick = parser.parse_args().quick
    rows = [*contexts(7), *([] if quick else large_context()), *helper_calls()]
    table = Table("", "", "aim", "")
    for row in rows:
        table.add_row(row.what, row.figure, row.reference, "ok" if row.is_met else "missed")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
