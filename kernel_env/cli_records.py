"""Commands on the notebooks of episodes: `replay`, `export`, `show`."""

from __future__ import annotations

import glob
import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from kernel_env.config import check_count
from kernel_env.episode import Episode
from kernel_env.errors import ConfigError, KernelEnvError, boundary
from kernel_env.exporters import EXPORTERS
from kernel_env.replay import ReplayReport, replay, rescore
from kernel_env.sidefiles import write_whole
from kernel_env.views import View

__all__ = ["export_command", "replay_command", "show_command"]


def replay_command(
    notebook: Annotated[Path, typer.Argument(help="The notebook of an episode.")],
    isolation: Annotated[str, typer.Option(help="sandbox, process, or auto.")] = "auto",
    kernel: Annotated[str | None, typer.Option(help="A kernelspec; default the recorded one.")] = None,
    rubric: Annotated[
        str | None,
        typer.Option("--rescore", help="Run nothing: score the recorded turns.", metavar="MODULE:RUBRIC"),
    ] = None,
    expected: Annotated[str | None, typer.Option(help="The expected answer, for --rescore.")] = None,
) -> None:
    """Run an episode again in a fresh kernel, with helpers that answer from its record, and compare.

    Ends with 0 if all came out the same, but for what differs in every run; with 1 if it did not; with 2 if
    the notebook cannot be read.
    """
    console = Console()
    try:
        if expected is not None and rubric is None:
            raise ConfigError("--expected goes with --rescore")
        episode = Episode.from_notebook(notebook)
        _tell_edits(console, episode)
        if rubric is not None:
            _show_scores(console, episode, rescore(episode, _load(rubric), expected_answer=expected))
            return
        report = replay(episode, isolation=isolation, kernel_name=kernel)
    except KernelEnvError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(2) from None
    _show_report(console, report)
    if not report.is_reproduced:
        raise typer.Exit(1)


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"--rescore {name!r}: give MODULE:RUBRIC, as my_rubrics:strict")
    sys.path.insert(0, os.getcwd())
    with boundary(ConfigError, f"--rescore {name!r}: it cannot be imported"):
        found = getattr(importlib.import_module(module), attribute)
        return found() if isinstance(found, type) else found


def _tell_edits(console: Console, episode: Episode) -> None:
    for edit in episode.edits:
        console.print(Text(f"changed by hand: {edit}", style="yellow"), soft_wrap=True)


def _show_scores(console: Console, episode: Episode, rewards: list[float]) -> None:
    table = Table("turn", "recorded", "now")
    for number, (turn, reward) in enumerate(zip(episode.turns, rewards, strict=True), start=1):
        was = turn.observation.reward
        table.add_row(str(number), "–" if was is None else f"{was:g}", f"{reward:g}")
    console.print(table)


def _show_report(console: Console, report: ReplayReport) -> None:
    for cell in report.cells:
        mark = "[green]same[/green]" if cell.is_equal else "[red]differs[/red]"
        volatile = f" (but for {', '.join(cell.volatile)})" if cell.volatile else ""
        console.print(f"turn {cell.turn}: {mark}", Text(volatile, style="dim"))
        for line in cell.differences:
            style = {"+": "green", "-": "red"}.get(line[:1], "default")
            console.print(Text(f"    {line}", style=style), soft_wrap=True)
    for title, calls in (("not in the record", report.unrecorded), ("answered by order", report.by_order)):
        for call in calls:
            console.print(Text(f"helper call {title}: {call}", style="yellow"), soft_wrap=True)
    then, now = report.final_answers
    if then != now:
        console.print(Text(f"answer then: {then!r:.200}\nanswer now:  {now!r:.200}", style="red"))
    console.print(f"reproduced: {report.score:.0%} of {len(report.cells)} turns", style="bold")


def export_command(
    notebooks: Annotated[
        str, typer.Argument(help="Notebooks, as a path or a pattern such as 'runs/*.ipynb'.")
    ],
    to: Annotated[str, typer.Option(help=f"One of {', '.join(EXPORTERS)}.")],
    out: Annotated[Path, typer.Option(help="The file to write; for ipynb a folder.")],
    jobs: Annotated[int, typer.Option(help="Processes; default as many as there are cores.")] = 0,
) -> None:
    """Write many episodes in another format: into one file, sorted by their names; notebooks into a folder.

    What cannot be read is named, the rest is written, and the command ends with 1.
    """
    console = Console(stderr=True)
    try:
        if to not in EXPORTERS:
            raise ConfigError(f"--to {to!r}; give one of {', '.join(EXPORTERS)}")
        check_count("--jobs", jobs, least=0)
        paths = sorted(glob.glob(notebooks, recursive=True))
        if not paths:
            raise ConfigError(f"no notebook matches {notebooks!r}")
        if to == "ipynb":
            names = Counter(Path(path).name for path in paths)
            if twice := [name for name, times in names.items() if times > 1]:
                raise ConfigError(
                    f"{twice[0]!r} is in several folders, and would be in one; export each alone"
                )
            out.mkdir(parents=True, exist_ok=True)
        written = _exported(console, paths, to, jobs or os.cpu_count() or 1)
        failures = _write(console, written, to, out)
    except (OSError, KernelEnvError) as error:
        console.print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(2) from None
    console.print(f"{len(paths) - failures} of {len(paths)} episodes: {out}")
    if failures:
        raise typer.Exit(1)


def _exported(
    console: Console, paths: list[str], to: str, jobs: int
) -> Iterator[tuple[str, str, str | None]]:
    """Path, text, and what went wrong, of each notebook in order."""
    if jobs == 1 or len(paths) < 8:
        yield from track(((p, *export_one(p, to)) for p in paths), "exporting", len(paths), console=console)
        return
    with ProcessPoolExecutor(min(jobs, len(paths))) as pool:
        results = pool.map(export_one, paths, [to] * len(paths), chunksize=4)
        for path, result in zip(paths, track(results, "exporting", len(paths), console=console), strict=True):
            yield path, *result


def export_one(path: str, to: str) -> tuple[str, str | None]:
    """The text of an episode in a format, or nothing and the reason."""
    try:
        return EXPORTERS[to](Episode.from_notebook(path)), None
    except KernelEnvError as error:
        return "", str(error)


def _write(console: Console, exported: Iterator[tuple[str, str, str | None]], to: str, out: Path) -> int:
    failures, texts = 0, []
    for path, text, failure in exported:
        if failure is not None:
            failures += 1
            console.print(Text(f"error: {failure}", style="red"), soft_wrap=True)
        elif to == "ipynb":
            write_whole(out / Path(path).name, text.encode("utf-8"))
        else:
            texts.append(text)
    if to != "ipynb":
        write_whole(out, "".join(texts).encode("utf-8"))
    return failures


def show_command(
    notebook: Annotated[Path, typer.Argument(help="The notebook of an episode.")],
) -> None:
    """Show an episode in the terminal, turn by turn, as `run` does while it happens."""
    console = Console()
    try:
        episode = Episode.from_notebook(notebook)
    except KernelEnvError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(2) from None
    _tell_edits(console, episode)
    view = View(console)
    view.open(episode)
    for number, turn in enumerate(episode.turns, start=1):
        view.past_turn(number, turn)
    view.end(episode, notebook, 0)
