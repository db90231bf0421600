"""The command line: `run` an episode and watch it, `doctor` the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from jupyter_client.kernelspec import KernelSpecManager
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from kernel_env import example
from kernel_env.episode import Episode, Turn
from kernel_env.errors import ConfigError, KernelEnvError, SandboxUnavailable
from kernel_env.kernelspecs import LOCAL, find_kernelspec, with_provisioner
from kernel_env.local import LocalREPLEnv
from kernel_env.notebook import check_target, read_cells
from kernel_env.outputs import stderr_text, stdout_text
from kernel_env.process import check_platform

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="REPL episodes for language models, each in a Jupyter kernel of its own.",
)


@dataclass(frozen=True)
class _Job:
    """What one `run` does: the cells in the policy's place, and the episode they act in."""

    cells: list[str]
    context: Any
    task: str
    expected: str | None
    llm_query_fn: Callable[[str], str] | None = None
    remark: str = ""


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
    pass


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
    out: Annotated[Path, typer.Option(help="The notebook to write.")] = Path("episode.ipynb"),
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON per turn, nothing else.")] = False,
) -> None:
    """Run one episode, show each turn as it happens, and write it as a notebook.

    Without --script it runs a built-in example on Python's own language reference.
    """
    console = Console(stderr=as_json)
    try:
        job = _job(context, task, expected, script)
        limit = max_iterations if max_iterations is not None else max(30, len(job.cells))
        check_target(out)
        view = _JsonView() if as_json else _View(console)
        env = LocalREPLEnv(
            llm_query_fn=job.llm_query_fn,
            kernel_name=kernel,
            isolation=isolation,
            on_output=view.output,
            on_turn=view.turn,
        )
        has_begun = False
        try:
            with env:
                env.reset(
                    context=job.context,
                    task_prompt=job.task,
                    expected_answer=job.expected,
                    max_iterations=limit,
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
    except KernelEnvError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


def _job(context: str | None, task: str | None, expected: str | None, script: Path | None) -> _Job:
    if script is not None:
        return _Job(read_cells(script), _read_context(context), task or "", expected)
    given = [
        name
        for name, value in (("--context", context), ("--task", task), ("--expected", expected))
        if value is not None
    ]
    if given:
        raise ConfigError(
            f"{', '.join(given)} without --script: there is nothing to run; give the cells with --script FILE"
        )
    return _Job(
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


class _View:
    """An episode in a terminal, as it happens."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._at_line_start = True

    def start(self, job: _Job, episode: Episode) -> None:
        lines = [job.remark] if job.remark else []
        lines += [f"Task: {job.task}"] if job.task else []
        lines += [f"Context: {len(episode.context):,} characters"]
        lines += [
            f"Kernel: {episode.kernel_name}, isolation: {episode.isolation}, "
            f"ready in {episode.start_time:.2f} s"
        ]
        self._console.print(Panel(Text("\n".join(lines)), title="Episode", title_align="left"))

    def begin(self, number: int, cell: str) -> None:
        self._console.rule(f"Turn {number}", align="left", style="cyan")
        # The terminal's own sixteen colours: a theme's fixed ones vanish on one background or the other.
        self._console.print(Syntax(cell, "python", theme="ansi_light", word_wrap=True))

    def output(self, output: dict[str, Any]) -> None:
        # From the kernel, so anything: from_ansi keeps colours and drops every other escape sequence.
        if output["output_type"] == "error":
            text = "\n".join(output["traceback"]) + "\n"
        else:
            text = stdout_text([output]) or stderr_text([output])
        if not text:
            return
        if not self._at_line_start and output["output_type"] != "stream":
            text = "\n" + text
        self._at_line_start = text.endswith("\n")
        end = "\n" if self._at_line_start else ""
        self._console.print(Text.from_ansi(text.removesuffix("\n")), end=end, highlight=False)

    def turn(self, turn: Turn) -> None:
        observation = turn.observation
        if not self._at_line_start:
            self._console.print()
        self._at_line_start = True
        for line in observation.result.stderr.splitlines():
            if line.startswith("[kernel_env]"):
                self._console.print(Text(line, style="yellow"))
        facts = [observation.status, f"{observation.result.execution_time * 1000:.0f} ms"]
        if observation.usage is not None:
            facts.append(f"{observation.usage.peak_memory / 2**20:.0f} MB")
        if turn.helper_calls:
            facts.append(f"{len(turn.helper_calls)} helper call" + "s" * (len(turn.helper_calls) > 1))
        facts.append("no reward" if observation.reward is None else f"reward {observation.reward:g}")
        style = "green" if observation.status == "ok" else "red"
        self._console.print(Text(" · ".join(facts), style=style))

    def end(self, episode: Episode, out: Path, cells: int) -> None:
        lines = []
        if episode.final_answer is None:
            lines.append(f"No answer was submitted ({episode.done_reason}).")
        else:
            shown = episode.final_answer
            lines.append(
                "Answer: " + (shown if len(shown) <= 500 else f"{shown[:500]}… ({len(shown):,} chars)")
            )
        lines.append("Reward: " + ("none" if episode.reward is None else f"{episode.reward:g}"))
        if len(episode.turns) < cells:
            lines.append(f"Cells not run: {cells - len(episode.turns)} of {cells}")
        lines.append(f"Notebook: {out}")
        self._console.print(Panel(Text("\n".join(lines)), title="End", title_align="left", style="bold"))


class _JsonView:
    """The same for programs: a line of JSON for each turn on stdout."""

    def start(self, job: _Job, episode: Episode) -> None:
        pass

    def begin(self, number: int, cell: str) -> None:
        self._number = number

    def output(self, output: dict[str, Any]) -> None:
        pass

    def turn(self, turn: Turn) -> None:
        typer.echo(json.dumps({"turn": self._number, **turn.model_dump(mode="python")}))

    def end(self, episode: Episode, out: Path, cells: int) -> None:
        pass


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
    return f"forked, without a debugger: {reason}"


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
