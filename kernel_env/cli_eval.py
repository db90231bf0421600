"""Commands on many tasks: `eval` runs them, `compare` sets two runs side by side."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kernel_env.budget import Budget
from kernel_env.errors import ConfigError, KernelEnvError
from kernel_env.evaluate import EvalConfig, Evaluation, RunResult, Tally
from kernel_env.llm import HFChatModel
from kernel_env.policies import POLICIES, ModelPolicy
from kernel_env.rundir import Result, describe_differences, read_config, read_results
from kernel_env.suites import SUITES
from kernel_env.summary import Comparison, compare
from kernel_env.tasks import FileTasks

__all__ = ["compare_command", "eval_command", "prices_of"]

_LINE_EVERY = 10.0  # seconds between lines where the output is no terminal


class _Terminated(KeyboardInterrupt):
    """SIGTERM, or the terminal is gone: they end a run as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        self.number = number


def eval_command(
    tasks: Annotated[
        list[str],
        typer.Argument(
            help=f"Suites ({', '.join(SUITES)}), or files of tasks (.jsonl, .csv).",
            metavar="SUITE|FILE…",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run's directory.")],
    policy: Annotated[str | None, typer.Option(help=f"One of {', '.join(POLICIES)}.")] = None,
    model: Annotated[str | None, typer.Option(help="A model in place of a policy, by its name.")] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Its OpenAI-compatible server; default the Hugging Face Hub.")
    ] = None,
    sub_model: Annotated[str | None, typer.Option(help="Asked by llm_query and children.")] = None,
    max_depth: Annotated[int, typer.Option(help="Levels of runs of the model; 1: no children.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Run what is missing or failed there.")] = False,
    split: Annotated[
        list[str] | None, typer.Option(help="Of the tasks, as 8k, 128k, 16m; may be repeated.")
    ] = None,
    num_tasks: Annotated[int | None, typer.Option(help="The first so many of each split.")] = None,
    samples: Annotated[int, typer.Option(help="Episodes of each task, for pass@k and mean@k.")] = 1,
    at_once: Annotated[int, typer.Option(help="Episodes at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the suites' tasks and of the episodes.")] = 0,
    field: Annotated[
        list[str] | None,
        typer.Option(
            help="What a field of a task is called in the file, as task_prompt=question.",
            metavar="NAME=NAME",
        ),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Of tasks in files that name none.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out lines that are no task.")] = False,
    max_iterations: Annotated[int, typer.Option(help="Of an episode.")] = 30,
    isolation: Annotated[str, typer.Option(help="sandbox, process, or auto.")] = "auto",
    kernel: Annotated[str, typer.Option(help="An installed Jupyter kernelspec.")] = "python3",
    budget_tokens: Annotated[float, typer.Option(help="Of an episode.")] = math.inf,
    budget_seconds: Annotated[float, typer.Option(help="Of an episode.")] = math.inf,
    budget_calls: Annotated[float, typer.Option(help="Calls of models, of an episode.")] = math.inf,
    budget_cost: Annotated[float, typer.Option(help="Of an episode, by --prices.")] = math.inf,
    run_tokens: Annotated[float, typer.Option(help="Of the run; then none begins.")] = math.inf,
    run_seconds: Annotated[float, typer.Option(help="Of the run.")] = math.inf,
    run_calls: Annotated[float, typer.Option(help="Of the run.")] = math.inf,
    run_cost: Annotated[float, typer.Option(help="Of the run, by --prices.")] = math.inf,
    prices: Annotated[
        str | None,
        typer.Option(help="Of a million prompt and completion tokens, as 0.5,1.5.", metavar="IN,OUT"),
    ] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="End when an episode fails.")] = False,
    report: Annotated[bool, typer.Option(help="Write report.ipynb (extra: eval).")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON per episode, then one of the summary.")
    ] = False,
) -> None:
    """Run every task in a kernel of its own, and put all of it on record in a directory.

    Ends with 0 if every episode ran, with 1 if some failed or are missing, with 2 if it cannot begin or go
    on, with 130 after Ctrl-C and 143 after SIGTERM; what there is then can be gone on with.
    """
    console = Console(stderr=True, quiet=quiet)
    try:
        config = EvalConfig(
            out=out,
            resume=resume,
            splits=split or (),
            num_tasks=num_tasks,
            samples=samples,
            at_once=at_once,
            seed=seed,
            max_iterations=max_iterations,
            isolation=isolation,
            kernel_name=kernel,
            budget=Budget(
                tokens=budget_tokens, seconds=budget_seconds, model_calls=budget_calls, cost=budget_cost
            ),
            run_budget=Budget(tokens=run_tokens, seconds=run_seconds, model_calls=run_calls, cost=run_cost),
            prices=None if prices is None else prices_of(prices),
            fail_fast=fail_fast,
            report=report,
        )
        chosen: Any = policy
        if model is not None or base_url is not None:
            if policy is not None:
                raise ConfigError("--policy and --model: give one of them")
            chat = HFChatModel(model, base_url=base_url)
            chosen = ModelPolicy(chat, max_depth=max_depth, sub_model=sub_model)
        elif sub_model is not None or max_depth != 2:
            raise ConfigError("--sub-model and --max-depth go with --model")
        elif policy is None:
            raise ConfigError(f"give --model, or --policy with one of {', '.join(POLICIES)}")
        options: dict[str, Any] = {"fields": _fields(field), "metric": metric, "skip_bad": skip_bad}
        sources = [FileTasks(name, **options) if _is_file(name) else name for name in tasks]
        for source in sources:
            for bad in getattr(source, "bad", ()):
                console.print(Text(f"left out: {bad}", style="yellow"), soft_wrap=True)
        on_result = _print_line if as_json else None
        evaluation = Evaluation(sources, chosen, config, on_result=on_result)
        with _ended_by_signals(), _watched(evaluation.tally, Console(stderr=True, quiet=quiet or as_json)):
            result = evaluation.run()
    except KernelEnvError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, _Terminated) else signal.SIGINT
        Console(stderr=True).print(f"stopped; go on with --resume: {out}", soft_wrap=True)
        raise typer.Exit(128 + number) from None
    if as_json:
        typer.echo(json.dumps(result.summary))
    elif not quiet:
        _show(Console(), result)
    if result.summary["missing"] or result.summary["failed"]:
        raise typer.Exit(1)


def _is_file(name: str) -> bool:
    return name not in SUITES and Path(name).exists()


def _fields(given: list[str] | None) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in given or ()]
    if wrong := [name for name, mark, value in pairs if not mark or not value]:
        raise ConfigError(f"--field {wrong[0]!r}: give NAME=NAME, as task_prompt=question")
    return {name: value for name, _, value in pairs}


def prices_of(text: str) -> tuple[float, float]:
    """The prices of a million prompt and completion tokens.

    Raises:
        ConfigError: the text is none.
    """
    try:
        prompt, completion = map(float, text.split(","))
    except ValueError:
        prompt = completion = -1.0
    if not (0 <= prompt < math.inf and 0 <= completion < math.inf):
        raise ConfigError(f"--prices {text!r}: give two numbers >= 0 with a comma, as 0.5,1.5")
    return prompt, completion


def _print_line(result: Result) -> None:
    sys.stdout.write(result.line() + "\n")
    sys.stdout.flush()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise _Terminated(number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watched(tally: Tally, console: Console) -> Iterator[None]:
    """Show how the run stands: redrawn on a terminal, else a line now and then."""
    if console.quiet:
        yield
    elif console.is_terminal:
        with Live(console=console, get_renderable=lambda: _drawn(tally), refresh_per_second=4):
            yield
    else:
        over = threading.Event()

        def tell() -> None:
            while not over.wait(_LINE_EVERY):
                console.print(_standing(tally), soft_wrap=True, highlight=False)

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()
            console.print(_standing(tally), soft_wrap=True, highlight=False)


def _drawn(tally: Tally) -> RenderableType:
    grid = Table.grid()  # in a group, a bar does not end its line
    grid.add_row(ProgressBar(total=tally.total, completed=tally.done, width=60))
    grid.add_row(Text(_standing(tally)))
    return grid


def _standing(tally: Tally) -> str:
    seconds = time.monotonic() - tally.began
    now = tally.done - tally.resumed
    parts = [f"{tally.done:,} of {tally.total:,} done", f"{tally.running} running"]
    parts += [f"{tally.failed} failed"] if tally.failed else []
    parts += [f"reward {tally.rewards / tally.done:.3f}"] if tally.done else []
    tokens = tally.usage.prompt_tokens + tally.usage.completion_tokens
    parts += [f"{tokens:,} tokens"] if tokens else []
    parts += [f"cost {tally.usage.cost:,.4f}"] if tally.usage.cost else []
    parts += [f"{_clock(seconds)} gone"]
    if now and tally.done < tally.total:
        parts += [f"{_clock(seconds / now * (tally.total - tally.done))} left"]
    return " · ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _show(console: Console, result: RunResult) -> None:
    summary = result.summary
    table = Table("", "tasks", "episodes", "reward", "95 % interval")
    for group in ("by_tasks", "by_context_size"):
        for name, n in summary[group].items():
            table.add_row(name, f"{n['tasks']:,}", f"{n['episodes']:,}", *_reward(n))
        table.add_section()
    table.add_row("all", f"{summary['tasks']:,}", f"{summary['episodes']:,}", *_reward(summary), style="bold")
    console.print(table)
    outcomes = ", ".join(f"{count} {name}" for name, count in summary["outcomes"].items())
    console.print(Text(f"outcomes: {outcomes}"), soft_wrap=True)
    for k, value in list(summary["pass@k"].items())[1:]:
        console.print(f"pass@{k}: {value:.3f}", highlight=False)
    if result.stopped_by is not None:
        console.print(Text(f"stopped: {result.stopped_by}", style="yellow"), soft_wrap=True)
    console.print(Text(f"run: {result.out}"), soft_wrap=True)


def _reward(numbers: dict[str, Any]) -> tuple[str, str]:
    if numbers["reward"] is None:
        return "–", "–"
    if numbers["low"] is None:
        return f"{numbers['reward']:.3f}", "–"
    return f"{numbers['reward']:.3f}", f"{numbers['low']:.3f} – {numbers['high']:.3f}"


def compare_command(
    a: Annotated[Path, typer.Argument(help="The directory of a run.")],
    b: Annotated[Path, typer.Argument(help="That of another one over the same tasks.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    most: Annotated[int, typer.Option(help="Tasks to list, those that differ most.")] = 20,
) -> None:
    """Compare two runs task by task: who did better at how many, and by how much on average."""
    try:
        results = read_results(a), read_results(b)
        compared = compare(*results)
        settings = read_config(a)["settings"], read_config(b)["settings"]
        _check_same_tasks(*settings)
        differences = describe_differences(*settings)
    except KernelEnvError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(2) from None
    if as_json:
        numbers = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(compared).items()
        }
        typer.echo(json.dumps({**numbers, "differences": differences}))
        return
    console = Console()
    for line in differences:
        shown = line.replace(" there, ", " in A, ").removesuffix(" here") + " in B"
        console.print(Text(shown, style="dim"), soft_wrap=True)
    _show_comparison(console, compared)
    if compared.changes:
        notebooks = [{result.task: result.notebook for result in run} for run in results]
        table = Table("A", "B", "A less B", "episode")
        for task, mean_a, mean_b in compared.changes[:most]:
            rewards = [
                Text(f"{mean:.3f}", style=_link(run, names.get(task)))
                for mean, run, names in zip((mean_a, mean_b), (a, b), notebooks, strict=True)
            ]
            table.add_row(
                *rewards, f"{mean_a - mean_b:+.3f}", Text(notebooks[0].get(task) or task, overflow="fold")
            )
        console.print(table)
        if len(compared.changes) > most:
            console.print(f"… and {len(compared.changes) - most:,} more that differ")


def _check_same_tasks(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Raise ConfigError if tasks of one name are not the same: their ids would be, and mean nothing."""
    of_b = {tasks["name"]: tasks for tasks in b["tasks"]}
    for tasks in a["tasks"]:
        if differences := describe_differences(tasks, of_b.get(tasks["name"], tasks)):
            raise ConfigError(
                f"the tasks {tasks['name']!r} are not the same in both runs: {'; '.join(differences)}"
            )


def _show_comparison(console: Console, compared: Comparison) -> None:
    table = Table("", "", show_header=False)
    table.add_row("tasks in both", f"{compared.tasks:,}")
    table.add_row("A better, B better, equal", f"{compared.wins:,}, {compared.losses:,}, {compared.ties:,}")
    table.add_row("mean reward of A, of B", f"{compared.mean_a:.3f}, {compared.mean_b:.3f}")
    interval = f"{compared.low:+.3f} to {compared.high:+.3f}" if math.isfinite(compared.low) else "unknown"
    table.add_row("A less B, 95 % interval", f"{compared.difference:+.3f}, {interval}")
    table.add_row("sign test", f"p = {compared.p_value:.3g}")
    for name, only in (("A", compared.only_a), ("B", compared.only_b)):
        if only:
            table.add_row(f"only in {name}, not compared", f"{len(only):,}, as {only[0]}")
    console.print(table)


def _link(run: Path, notebook: str | None) -> str:
    return "" if notebook is None else f"link {(run / notebook).resolve().as_uri()}"
