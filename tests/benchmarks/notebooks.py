"""What notebooks cost: one written and read, a thousand made into training messages, large contexts.

    python tests/benchmarks/notebooks.py

Beside each stands what nbformat takes, in the same run, to write and read the same notebook: its JSON alone.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from rich.console import Console
from rich.table import Table

from kernel_env import Episode, LocalREPLEnv, write_notebook

TURNS, FILES, CONTEXT = 30, 1000, 100 * 10**6


def episode() -> Episode:
    """Of 30 turns, each with some output and a helper call."""
    with LocalREPLEnv(llm_query_fn=str.upper) as env:
        env.reset(context="some context " * 1000, task_prompt="t")
        for number in range(TURNS):
            env.execute(f"print('line\\n' * 20)\nreplies = llm_query_batched(['a', 'b'])\n{number}, replies")
        return env.episode


def milliseconds(work: Callable[[], Any], times: int = 20) -> float:
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        taken.append((time.perf_counter() - begin) * 1000)
    return statistics.median(taken)


def main() -> None:
    table = Table("", "took", "beside it", "aim")
    one = episode()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "e.ipynb"
        export = milliseconds(lambda: write_notebook(one, path))
        back = milliseconds(lambda: Episode.from_notebook(path))
        stored = nbformat.read(path, 4)  # type: ignore[no-untyped-call]
        other = Path(name) / "other.ipynb"
        writes = milliseconds(lambda: nbformat.write(stored, other))  # type: ignore[no-untyped-call]
        reads = milliseconds(lambda: nbformat.read(path, 4))  # type: ignore[no-untyped-call]
        table.add_row(
            f"export of {TURNS} turns", f"{export:.1f} ms", f"nbformat.write {writes:.1f} ms", "50 ms"
        )
        table.add_row(f"import of {TURNS} turns", f"{back:.1f} ms", f"nbformat.read {reads:.1f} ms", "50 ms")

        folder = Path(name) / "many"
        folder.mkdir()
        for number in range(FILES):
            (folder / f"{number}.ipynb").write_bytes(path.read_bytes())
        command = [sys.executable, "-m", "kernel_env", "export", f"{folder}/*.ipynb", "--to", "messages"]
        begin = time.perf_counter()
        subprocess.run([*command, "--out", f"{name}/m.jsonl"], check=True, capture_output=True)
        seconds = time.perf_counter() - begin
        beside = f"{FILES} × nbformat.read {FILES * reads / 1000:.1f} s"
        table.add_row(f"{FILES:,} notebooks to messages, all cores", f"{seconds:.1f} s", beside, "10 s")

        one.context = "the quick brown fox " * (CONTEXT // 20)
        first, second = milliseconds(lambda: write_notebook(one, path), 1), 0.0
        another = one.model_copy(update={"episode_id": "another"})
        second = milliseconds(lambda: write_notebook(another, path.with_name("b.ipynb")), 5)
        table.add_row("export over a context of 100 MB", f"{first:.0f} ms", "", "1 s")
        table.add_row("another over the same", f"{second:.1f} ms", "", "60 ms")
    Console().print(table)


if __name__ == "__main__":
    main()
