"""The command line: `run` an episode and watch it, `doctor` the machine; with what `cli_records.py` has."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from jupyter_client.kernelspec import KernelSpecManager
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernel_env import example
from kernel_env.budget import Budget, cost_by
from kernel_env.cli_eval import compare_command, eval_command, prices_of
from kernel_env.cli_records import export_command, replay_command, show_command
from kernel_env.errors import ConfigError, KernelEnvError, ResetRequired, SandboxUnavailable
from kernel_env.kernelspecs import LOCAL, find_kernelspec, with_provisioner
from kernel_env.llm import HFChatModel
from kernel_env.local import LocalREPLEnv
from kernel_env.notebook import check_target, read_cells, write_notebook
from kernel_env.process import check_platform
from kernel_env.runner import LocalRLMRunner
from kernel_env.views import Job, JsonView, RunView, View

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="REPL episodes for language models, each in a Jupyter kernel of its own.",
)


app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.command("replay")(replay_command)
app.command("export")(export_command)
app.command("show")(show_command)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"kernel_env {importlib.metadata.version('kernel_env')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):  # what a model or a kernel says may hold lone surrogates
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@app.command()
def run(
    context: Annotated[
        str | None,
        typer.Option(help="File with the context, - for stdin; a .json file is parsed.", metavar="FILE|-"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task, shown to the policy.")] = None,
    expected: Annotated[
        str | None, typer.Option(help="The expected answer; never enters the kernel.")
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option(help="Notebook, or .py file with `# %%` lines: each code cell is one action."),
    ] = None,
    kernel: Annotated[str, typer.Option(help="An installed Jupyter kernelspec.")] = "python3",
    isolation: Annotated[
        str, typer.Option(help="sandbox, process, or auto: a sandbox where there can be one.")
    ] = "auto",
    max_iterations: Annotated[
        int | None, typer.Option(help="Steps of the episode; default 30, or as many as there are cells.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Active seconds of each cell; default 120.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seeds `random` and numpy in the kernel.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A model works on the task, by this name on its server.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Its OpenAI-compatible server; default the Hugging Face Hub.")
    ] = None,
    sub_model: Annotated[
        str | None, typer.Option(help="Asked by llm_query and by children; default the same.")
    ] = None,
    max_depth: Annotated[int, typer.Option(help="Levels of runs of the model; 1: no children.")] = 2,
    budget_tokens: Annotated[float | None, typer.Option(help="Of the whole tree of runs.")] = None,
    budget_seconds: Annotated[float | None, typer.Option(help="Of the whole tree of runs.")] = None,
    budget_calls: Annotated[float | None, typer.Option(help="Calls of models, of the whole tree.")] = None,
    budget_cost: Annotated[float | None, typer.Option(help="Of the whole tree, by --prices.")] = None,
    prices: Annotated[
        str | None,
        typer.Option(help="Of a million prompt and completion tokens, as 0.5,1.5.", metavar="IN,OUT"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The notebook to write.")] = Path("episode.ipynb"),
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON per turn, nothing else.")] = False,
) -> None:
    """Run one episode, show each turn as it happens, and write it as a notebook.

    A --script plays it, or a --model works on it; without either a built-in example on Python's own language
    reference is played.
    """
    console = Console(stderr=as_json)
    try:
        check_target(out)
        if model is not None or base_url is not None:
            if script is not None or as_json or seed is not None or timeout is not None:
                raise ConfigError("--script, --json, --seed and --timeout do not go with --model")
            given = {
                "tokens": budget_tokens,
                "seconds": budget_seconds,
                "model_calls": budget_calls,
                "cost": budget_cost,
            }
            if budget_cost is not None and prices is None:
                raise ConfigError("--budget-cost needs --prices: what a million tokens cost")
            view = RunView(console)
            runner = LocalRLMRunner(
                HFChatModel(model, base_url=base_url),
                max_iterations=30 if max_iterations is None else max_iterations,
                max_depth=max_depth,
                sub_model=sub_model,
                cost=None if prices is None else cost_by(prices_of(prices)),
                isolation=isolation,
                kernel_name=kernel,
                budget=Budget(**{name: value for name, value in given.items() if value is not None}),
                on_turn=view.turn,
                on_subcall_start=view.child_begins,
                on_subcall_complete=view.child_ends,
            )
            _work(runner, view, _read_context(context), task or "", expected, out)
        else:
            job = _job(context, task, expected, script)
            options: dict[str, Any] = {"kernel_name": kernel, "isolation": isolation}
            _play(job, JsonView() if as_json else View(console), options, max_iterations, timeout, seed, out)
    except KernelEnvError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


def _play(
    job: Job,
    view: View | JsonView,
    options: dict[str, Any],
    max_iterations: int | None,
    timeout: float | None,
    seed: int | None,
    out: Path,
) -> None:
    """Run the cells of a script, one action each."""
    env = LocalREPLEnv(llm_query_fn=job.llm_query_fn, on_output=view.output, on_turn=view.turn, **options)
    has_begun = False
    try:
        with env:
            env.reset(
                context=job.context,
                task_prompt=job.task,
                expected_answer=job.expected,
                max_iterations=max(30, len(job.cells)) if max_iterations is None else max_iterations,
                seed=seed,
            )
            has_begun = True
            view.start(job, env.episode)
            for number, cell in enumerate(job.cells, start=1):
                view.begin(number, cell)
                if env.execute(cell, timeout_s=timeout).done:
                    break
    finally:
        if has_begun:  # whatever ended it, Ctrl-C too
            env.export(out)
            view.end(env.episode, out, len(job.cells))


def _work(
    runner: LocalRLMRunner, view: RunView, context: Any, task: str, expected: str | None, out: Path
) -> None:
    """Have a model work on the task."""
    view.open_run(task, runner, len(context if isinstance(context, str) else json.dumps(context)))
    try:
        view.result(runner.run(context, task, expected_answer=expected))
    finally:
        view.close()
        with contextlib.suppress(ResetRequired):  # whatever ended it, Ctrl-C too
            write_notebook(runner.episode, out)
            view.end(runner.episode, out, 0)


def _job(context: str | None, task: str | None, expected: str | None, script: Path | None) -> Job:
    if script is not None:
        return Job(read_cells(script), _read_context(context), task or "", expected)
    given = [
        name
        for name, value in (("--context", context), ("--task", task), ("--expected", expected))
        if value is not None
    ]
    if given:
        raise ConfigError(
            f"{', '.join(given)} without --script: there is nothing to run; give the cells with --script FILE"
        )
    return Job(
        cells=read_cells(example.CELLS),
        context=example.language_reference(),
        task=example.TASK,
        expected=example.expected_answer(),
        llm_query_fn=example.stand_in_model,
        remark="Built-in example. A script plays the policy, and llm_query is answered by a small "
        "deterministic stand-in, not by a language model.",
    )


def _read_context(name: str | None) -> Any:
    if name is None:
        return ""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the context {name!r} as UTF-8 text: {error}") from error
    if not name.endswith(".json"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"the context {name!r} is not JSON: {error}; rename it to pass it as text"
        ) from error


@app.command()
def doctor() -> None:
    """Say what works on this machine; the last line starts a real kernel."""
    table = Table("", "", "", title="kernel_env doctor", title_justify="left")
    failures = 0
    for name, check in _CHECKS.items():
        try:
            mark, found = "[green]ok[/green]", check()
        except (KernelEnvError, OSError, AttributeError) as error:
            mark, found, failures = "[red]no[/red]", str(error), failures + 1
        table.add_row(name, mark, Text(found))
    Console().print(table)
    if failures:
        raise typer.Exit(1)


def _check_platform() -> str:
    check_platform()
    return f"{platform.platform()}, Python {platform.python_version()}"


def _check_packages() -> str:
    names = ("kernel_env", "ipykernel", "jupyter_client", "pyzmq", "nbformat", "pydantic")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def _check_kernelspecs() -> str:
    found = KernelSpecManager().find_kernel_specs()
    if not found:
        raise ConfigError("none; pip install ipykernel")
    return "\n".join(f"{name}: {_how_started(name)}" for name in sorted(found))


def _how_started(name: str) -> str:
    try:
        spec, reason = with_provisioner(find_kernelspec(name), ())
    except ConfigError as error:
        return f"not usable: {error}"
    if spec.metadata["kernel_provisioner"]["provisioner_name"] == LOCAL:
        return f"started, not forked: {reason}"
    return f"forked: {reason}"


def _check_system_calls() -> str:
    os.close(os.memfd_create("doctor"))
    os.close(os.pidfd_open(os.getpid()))
    return "memfd_create, pidfd_open"


def _check_temporary_folder() -> str:
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
    return f"{tempfile.gettempdir()}, {free / 1e9:.1f} GB free"


def _check_trial() -> str:
    start = time.perf_counter()
    with LocalREPLEnv(llm_query_fn=str.upper) as env:
        env.reset(context="doctor")
        ready = time.perf_counter()
        answer = env.execute("FINAL(llm_query(context))").observation.final_answer
    if answer != "DOCTOR":
        raise ConfigError(f"the trial episode answered {answer!r}")
    return f"kernel ready in {(ready - start) * 1000:.0f} ms; helpers, context and answer work"


def _check_isolation() -> str:
    try:
        with LocalREPLEnv(isolation="sandbox") as env:
            env.reset()
    except SandboxUnavailable as error:
        return (
            f"process: {error}. Kernels have a process tree, a folder and an environment of their own, and "
            "limits on memory, files and descriptors; the user's other files and the network are open to them"
        )
    return "sandbox: a kernel reaches its own folder, its interpreter and nothing else"


_CHECKS: dict[str, Callable[[], str]] = {
    "platform": _check_platform,
    "packages": _check_packages,
    "kernelspecs": _check_kernelspecs,
    "system calls": _check_system_calls,
    "temporary folder": _check_temporary_folder,
    "isolation": _check_isolation,
    "trial episode": _check_trial,
}
