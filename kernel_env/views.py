"""An episode in a terminal, as it happens: played by a script, or worked on by a model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.syntax import Syntax
from rich.text import Text
from rich.tree import Tree as RichTree

from kernel_env.budget import ModelUsage
from kernel_env.episode import Episode, Turn
from kernel_env.outputs import stderr_text, stdout_text
from kernel_env.runner import LocalRLMRunner
from kernel_env.tree import Progress, RLMRunResult

__all__ = ["Job", "JsonView", "RunView", "View"]


@dataclass(frozen=True)
class Job:
    """What one `run` does: the cells in the policy's place, and the episode they act in."""

    cells: list[str]
    context: Any
    task: str
    expected: str | None
    llm_query_fn: Callable[[str], str] | None = None
    remark: str = ""


class View:
    """An episode in a terminal, as it happens."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._at_line_start = True

    def start(self, job: Job, episode: Episode) -> None:
        self.open(episode, job.remark)

    def open(self, episode: Episode, remark: str = "") -> None:
        """What the episode begins with."""
        lines = [remark] if remark else []
        lines += [f"Task: {episode.task_prompt}"] if episode.task_prompt else []
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

    def past_turn(self, number: int, turn: Turn) -> None:
        """A turn that has ended, whole."""
        self.begin(number, turn.action.code or f"# the answer: {turn.action.final_answer}")
        for output in turn.observation.outputs:
            self.output(output)
        View.turn(self, turn)

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


class JsonView:
    """The same for programs: a line of JSON for each turn on stdout."""

    def start(self, job: Job, episode: Episode) -> None:
        pass

    def begin(self, number: int, cell: str) -> None:
        self._number = number

    def output(self, output: dict[str, Any]) -> None:
        pass

    def turn(self, turn: Turn) -> None:
        typer.echo(json.dumps({"turn": self._number, **turn.model_dump(mode="python")}))

    def end(self, episode: Episode, out: Path, cells: int) -> None:
        pass


class RunView(View):
    """A run of a model: the turns of its root as they end, and below them, redrawn, the tree of its children.

    Where the output is no terminal, a line for each child instead of the tree.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._began = time.monotonic()
        self._number = 0
        self._live: Live | None = None

    def open_run(self, task: str, runner: LocalRLMRunner, length: int) -> None:
        lines = [f"Task: {task}"] if task else []
        lines += [f"Context: {length:,} characters", f"Model: {runner.model}"]
        self._console.print(Panel(Text("\n".join(lines)), title="Run", title_align="left"))
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=lambda: _tree(runner.progress, self._console.height // 2),
                transient=True,
                refresh_per_second=4,
            )
            self._live.start()

    def turn(self, turn: Turn) -> None:
        self._number += 1
        self.past_turn(self._number, turn)

    def child_begins(self, depth: int, model: str, prompt: str) -> None:
        self._tell(depth, f"child begins: {_line(prompt)}")

    def child_ends(self, depth: int, model: str, seconds: float, error: str | None) -> None:
        self._tell(depth, f"child ended after {seconds:.1f} s" + (f": {error}" if error else ""))

    def _tell(self, depth: int, text: str) -> None:
        if self._live is None:
            elapsed = time.monotonic() - self._began
            line = Text(f"{'│ ' * depth}{elapsed:6.1f} s  {text}", style="dim")
            self._console.print(line, highlight=False)

    def close(self) -> None:
        """Stop redrawing; what is printed from here on stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def result(self, result: RLMRunResult) -> None:
        self.close()
        children = len(result.child_traces)
        facts = [_spent(result.usage), f"{time.monotonic() - self._began:.1f} s"]
        facts += [f"{children} child" + "ren" * (children > 1)] if children else []
        self._console.print(Text(" · ".join(facts), style="cyan"))
        if result.stopped_by is not None:
            self._console.print(Text(f"Stopped: {result.stopped_by}", style="yellow"))


def _spent(usage: ModelUsage) -> str:
    tokens = usage.prompt_tokens + usage.completion_tokens
    cost = f" · cost {usage.cost:,.4g}" if usage.cost else ""
    return f"{usage.calls} model call{'s' * (usage.calls != 1)} · {tokens:,} tokens{cost}"


def _line(prompt: str) -> str:
    return " ".join(prompt.split())[:80]


def _tree(progress: tuple[Progress, ModelUsage] | None, most: int) -> RenderableType:
    """The runs as they stand, in at most `most` lines and one: of ended children, the latest."""
    if progress is None:
        return Text("waiting for a kernel …", style="dim")
    run, usage = progress
    tree = RichTree(Text(f"{_state(run)} · {_spent(usage)}", style="cyan"), guide_style="dim")
    _grow(tree, run, most)
    return tree


def _grow(tree: RichTree, run: Progress, most: int) -> int:
    """Add the children of `run` in at most `most` lines; returns the lines that are left."""
    children = list(run.children)
    going = [child for child in children if child.seconds is None]
    ended = [child for child in children if child.seconds is not None]
    shown = (ended[-max(most - len(going), 0) :] if most > len(going) else []) + going
    if len(shown) < len(children):
        tree.add(Text(f"… {len(children) - len(shown):,} more have ended", style="dim"))
    for child in shown:
        if most <= 0:
            break
        style = "red" if child.error else "dim" if child.seconds is not None else "default"
        branch = tree.add(Text(f"{_line(child.prompt)} · {_state(child)}", style=style, no_wrap=True))
        most = _grow(branch, child, most - 1)
    return most


def _state(run: Progress) -> str:
    seconds = time.monotonic() - run.began if run.seconds is None else run.seconds
    if run.error is not None:
        return f"failed after {seconds:.1f} s: {run.error}"
    return f"{'turn' if run.seconds is None else 'ended after turn'} {run.turn} · {seconds:.1f} s"
