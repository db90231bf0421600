"""What a run costs beside its model and its cells, and how many children work at once.

    python tests/benchmarks/runner.py

The model is a script. The runner's own work of a turn is the time of the turn less that of the step, as the
record has; the ideal time of the children is that of their model calls, shared among the workers.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from kernel_env import LocalRLMRunner

TURNS = 200
CHILDREN, WORKERS, SECONDS = 64, 16, 0.2


def own_work() -> tuple[float, float]:
    """Median milliseconds of a turn, of the first fifty and of the last fifty of 200."""
    asked: list[float] = []

    def chat(messages: list[dict[str, str]]) -> str:
        asked.append(time.perf_counter())
        return "```repl\nx = 1\n```" if len(asked) < TURNS else "```repl\nFINAL(1)\n```"

    result = LocalRLMRunner(chat, max_iterations=TURNS).run("", "t")
    steps = [turn.observation.result.execution_time for turn in result.episode.turns]
    own = [(b - a - step) * 1000 for a, b, step in zip(asked, asked[1:], steps, strict=False)]
    return statistics.median(own[:50]), statistics.median(own[-50:])


def children() -> float:
    """Seconds for 64 children whose model takes 0.2 s, on 16 workers."""
    times: list[float] = []

    async def chat(messages: list[dict[str, str]]) -> Any:
        if "root" in messages[2]["content"]:
            times.append(time.perf_counter())
            if len(times) == 1:
                return f"```repl\nreplies = rlm_query_batched(['t'] * {CHILDREN})\n```"
            return "```repl\nFINAL(len(replies))\n```"
        await asyncio.sleep(SECONDS)
        return "```repl\nFINAL(1)\n```"

    result = LocalRLMRunner(chat, max_batch_workers=WORKERS).run("", "root")
    assert result.final_answer == str(CHILDREN)
    return times[1] - times[0]


def main() -> None:
    early, late = own_work()
    children()  # the spares that a second run finds
    took, ideal = children(), CHILDREN / WORKERS * SECONDS
    table = Table("", "found", "aim", "within reach")
    table.add_row(
        "own work of a turn, early; late", f"{early:.2f}; {late:.2f} ms", "≤ 2 ms, flat", _yes(late <= 2)
    )
    table.add_row(
        f"{CHILDREN} children of {SECONDS} s on {WORKERS} workers",
        f"{took:.2f} s, {took / ideal:.2f} × the ideal",
        "≤ 1.5 ×",
        _yes(took <= 1.5 * ideal),
    )
    Console(width=110).print(table)


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


if __name__ == "__main__":
    main()
