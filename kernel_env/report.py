"""The report of a run: a notebook over its results, executed, to be read and to be run again."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from kernel_env.errors import ConfigError
from kernel_env.local import LocalREPLEnv
from kernel_env.sidefiles import write_whole
from kernel_env.types import REPLObservation

__all__ = ["check_report", "write_report"]

_NEEDED = ("matplotlib", "pandas")

_INTRODUCTION = """\
# {title}

{policy} on {tasks}: **{done}** episodes, mean reward **{reward}**. {state}

Every episode ran in a kernel of its own ({isolation}). What stands here is computed by the cells from
`results.jsonl`, `summary.json` and `config.json` beside this notebook: run them again when there is more.
Rewards are means over tasks, with 95 % confidence intervals (Wilson's); a failed episode counts as 0."""

_CELLS = [
    (
        "",
        """\
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown, display

from kernel_env.rundir import read_results
from kernel_env.summary import size_of, summarise

config, results = json.loads(Path("config.json").read_bytes()), read_results(".")
summary = json.loads(Path("summary.json").read_bytes())
frame = pd.DataFrame([{**r.model_dump(), "outcome": r.outcome, "size": size_of(r)} for r in results])
pd.Series(
    {
        "tasks": summary["tasks"],
        "episodes": f"{summary['episodes']} of {summary['expected_episodes']}",
        "failed": summary["failed"],
        "reward": f"{summary['reward']:.3f}",
        "95 % interval": "unknown" if summary["low"] is None
        else f"{summary['low']:.3f} to {summary['high']:.3f}",
        **{f"pass@{k}": f"{value:.3f}" for k, value in summary["pass@k"].items()},
        **{f"mean@{k}": f"{value:.3f}" for k, value in summary["mean@k"].items()},
        "steps of an episode": f"{summary['steps']:.1f}",
    },
    name="run",
).to_frame()""",
    ),
    (
        "## Reward by suite and context size",
        """\
def table_of(results):
    numbers = summarise(results, samples=config["settings"]["samples"], expected=len(results))
    names = {"n": "tasks"} | {name: name for name in ("episodes", "failed", "reward", "low", "high")}
    return {name: numbers[key] for name, key in names.items()}

order = list(dict.fromkeys(size_of(r) for r in sorted(results, key=lambda r: r.context_length)))
groups = [(name, size, [r for r in results if r.tasks == name and size_of(r) == size])
          for name in dict.fromkeys(r.tasks for r in results) for size in order]
rows = [{"tasks": name, "context": size, **table_of(group)} for name, size, group in groups if group]
rewards = pd.DataFrame(rows)
rewards.round(3)""",
    ),
    (
        "",
        """\
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[2, 3], layout="constrained")
names = list(summary["by_tasks"])
for place, name in enumerate(names):
    n = summary["by_tasks"][name]
    low, high = (n["reward"] if n[end] is None else n[end] for end in ("low", "high"))
    errors = [[n["reward"] - low], [high - n["reward"]]]
    left.errorbar(n["reward"], place, xerr=errors, fmt="o", capsize=3)
left.set(yticks=range(len(names)), yticklabels=names, xlabel="reward", title="by suite")
left.axvspan(0, 1, color="0.95", zorder=0)
left.invert_yaxis()
for place, (name, rows) in enumerate(rewards.groupby("tasks", sort=False)):
    at = [order.index(size) + 0.06 * (place - len(names) / 2) for size in rows["context"]]
    errors = [(rows["reward"] - rows["low"]).clip(0), (rows["high"] - rows["reward"]).clip(0)]
    right.errorbar(at, rows["reward"], yerr=errors, fmt="o-", capsize=3, label=name)
right.axhspan(0, 1, color="0.95", zorder=0)
right.set(xticks=range(len(order)), xticklabels=order, xlabel="characters of the context",
          title="by context size")
right.legend(loc="best")
plt.show()""",
    ),
    (
        "## Where the time goes\n\nKernel: its start and the active time of its cells. Model: waiting for "
        "replies, the runner's own and those behind helpers. The rest: making tasks, waiting for a "
        "processor, scoring, writing.",
        """\
parts = frame[["kernel_seconds", "model_seconds"]].assign(
    rest=(frame["seconds"] - frame["kernel_seconds"] - frame["model_seconds"]).clip(0), tasks=frame["tasks"]
)
times = parts.groupby("tasks", sort=False).mean().rename(columns=lambda name: name.removesuffix("_seconds"))
axes = times.plot.barh(stacked=True, figsize=(9, 0.6 + 0.5 * len(times)), xlabel="seconds of an episode")
axes.invert_yaxis()
axes.set_ylabel("")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
by = frame.groupby("tasks", sort=False)
pd.DataFrame({
    "steps": by["steps"].mean(), "seconds": by["seconds"].mean(), "slowest": by["seconds"].max(),
    "children": by["children"].sum(), "restarts": by["restarts"].sum(),
}).round(2)""",
    ),
    (
        "## Tokens and cost",
        """\
usage = pd.DataFrame(list(frame["usage"])).assign(tasks=frame["tasks"]).groupby("tasks", sort=False).sum()
usage.loc["all"] = usage.sum()
usage.round(6)""",
    ),
    (
        "## Outcomes, and failures by kind",
        """\
outcomes = frame.pivot_table(index="outcome", columns="tasks", values="seed", aggfunc="count", fill_value=0)
outcomes["all"] = outcomes.sum(axis=1)
display(outcomes.sort_values("all", ascending=False))
failed = frame[frame["error"].notna()]
if len(failed):
    display(failed[["task", "sample", "error", "message"]].head(20))""",
    ),
    (
        "## The worst episodes\n\nLowest reward first, then most steps; each opens as a notebook.",
        """\
worst = frame.assign(reward=frame["reward"].fillna(-1))
worst = worst.sort_values(["reward", "steps"], ascending=[True, False])
lines = ["| episode | reward | outcome | steps | seconds | answer |", "|---|---|---|---|---|---|"]
for r in worst[worst["reward"] < 1].head(15).itertuples():
    name = r.task.replace("|", "\\\\|") + f" #{r.sample}"
    link = f"[{name}]({r.notebook})" if isinstance(r.notebook, str) else name
    answer = json.dumps((r.final_answer or "")[:60]).replace("|", "\\\\|").replace("`", "'")
    shown = "failed" if r.reward == -1 else f"{r.reward:.3f}"
    lines.append(f"| {link} | {shown} | {r.outcome} | {r.steps} | {r.seconds:.2f} | `{answer}` |")
display(Markdown("\\n".join(lines) if len(lines) > 2 else "Every episode has a reward of 1."))""",
    ),
]


def check_report() -> None:
    """Raise ConfigError unless what a report needs is installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"report.ipynb needs {' and '.join(missing)}: pip install 'kernel_env[eval]', or ask for none"
        )


def write_report(path: Path, *, title: str) -> Path:
    """Write and execute `report.ipynb` of the run at `path`.

    Raises:
        ConfigError: it cannot be written, or a cell of it failed.
        KernelStartError: no kernel for it became ready.
    """
    summary = json.loads((path / "summary.json").read_bytes())
    config = json.loads((path / "config.json").read_bytes())
    settings = config["settings"]
    state = (
        "It is complete."
        if not summary["missing"] and not summary["failed"]
        else (f"{summary['missing']} are missing and {summary['failed']} failed; `--resume` runs these.")
    )
    head = _INTRODUCTION.format(
        title=title,
        policy=f"`{settings['policy']['name']}`",
        tasks=", ".join(f"`{tasks['name']}`" for tasks in settings["tasks"]),
        done=summary["episodes"],
        reward="none" if summary["reward"] is None else f"{summary['reward']:.3f}",
        state=state,
        isolation=config["sessions"][-1]["isolation"],
    )
    cells: list[dict[str, Any]] = [_cell("head", "markdown", head)]
    # The run is the user's own, and so is this code: it works in the run's directory, unconfined.
    with LocalREPLEnv(isolation="process", max_output_length=10**6) as env:
        env.reset(max_iterations=len(_CELLS) + 2)
        _run(env, f"import os, sys\nos.chdir({str(path.resolve())!r})\nsys.path[:0] = {_package_path()!r}")
        for number, (text, code) in enumerate(_CELLS, start=1):
            if text:
                cells.append(_cell(f"text-{number}", "markdown", text))
            observation = _run(env, code)
            cell = _cell(f"cell-{number}", "code", code)
            cell |= {"outputs": observation.outputs, "execution_count": number}
            cell["metadata"] = {"jupyter": {"source_hidden": True}, "tags": ["hide-input"]}
            cells.append(cell)
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        },
        "cells": cells,
    }
    import nbformat  # as in notebook.py

    nbformat.validate(notebook)
    text = json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    target = path / "report.ipynb"
    try:
        write_whole(target, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise ConfigError(f"cannot write {str(target)!r}: {error.strerror}") from error
    return target


def _run(env: LocalREPLEnv, code: str) -> REPLObservation:
    observation = env.execute(code).observation
    if observation.status != "ok":
        raise ConfigError(
            f"the report could not be made: {observation.result.exception}\n{observation.result.stderr}"
        )
    return observation


def _package_path() -> list[str]:
    """Where this package is, for a kernel that would not find it by itself."""
    return [os.fspath(Path(__file__).resolve().parents[1])]


def _cell(id: str, kind: str, source: str) -> dict[str, Any]:
    return {"id": id, "cell_type": kind, "metadata": {}, "source": source}
