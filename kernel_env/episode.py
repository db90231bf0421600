"""The record of an episode: what exporters, rubrics and trainers read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kernel_env.budget import ModelUsage
from kernel_env.errors import ConfigError, NotebookError
from kernel_env.reading import MAX_BYTES, read
from kernel_env.types import DoneReason, Isolation, REPLAction, REPLObservation

__all__ = ["Context", "Episode", "HelperCall", "Turn"]

_DEEPEST = 500


class HelperCall(BaseModel):
    """One call from the kernel to the host, as it was made and as it ended."""

    model_config = ConfigDict(frozen=True)

    name: str
    arguments: dict[str, Any]
    result: Any = None
    failed: dict[int, str] = Field(default_factory=dict)
    """Of a batch: index of each item that failed → the text the kernel got in its place."""
    error: str | None = None
    started: float
    """Seconds since the epoch."""
    duration: float
    """Seconds."""


class Turn(BaseModel):
    """One counted step: the action, what the policy saw of it, and what only the host knows."""

    model_config = ConfigDict(frozen=True)

    action: REPLAction
    observation: REPLObservation
    execution_count: int | None = None
    """The kernel's `In [n]`; None where no cell ran."""
    started: float
    """Seconds since the epoch."""
    active_time: float = 0.0
    """Seconds the cell was busy, without the time its helper calls were in flight."""
    helper_calls: tuple[HelperCall, ...] = ()


class SkippedBlocks(BaseModel):
    """What was not run of a reply."""

    model_config = ConfigDict(frozen=True)

    after_turn: int
    """The turn that ended the episode, counted from 1."""
    blocks: list[str]


class Episode(BaseModel):
    """An episode as a list of turns. The environment appends; everybody else reads."""

    episode_id: str
    task_prompt: str = ""
    context: str = ""
    """The text of the context; of lists and dicts, their JSON."""
    context_type: Literal["str", "json"] = "str"
    kernel_name: str
    max_iterations: int
    seed: int | None = None
    isolation: Isolation = "process"
    limits: dict[str, float | None] = Field(default_factory=dict)
    """The `Limits` in force; None where there is no bound."""
    versions: dict[str, str] = Field(default_factory=dict)
    started: float
    """Seconds since the epoch."""
    start_time: float = 0.0
    """Seconds `reset` took, the kernel's start included."""
    turns: list[Turn] = Field(default_factory=list)
    done_reason: DoneReason | None = None
    final_answer: str | None = None
    messages: list[dict[str, str]] = Field(default_factory=list)
    """The conversation of a run, whole; empty where no runner asked a model."""
    skipped: list[SkippedBlocks] = Field(default_factory=list)
    """Blocks of replies that were not run, because one before them had ended the episode."""
    children: list[Episode] = Field(default_factory=list)
    """The episodes that `rlm_query` started, in the order in which they ended."""
    model_usage: dict[str, ModelUsage] = Field(default_factory=dict)
    """Name of each model that was asked in this episode → what that took; children have their own."""
    tools: dict[str, str] = Field(default_factory=dict)
    """Name → signature, without annotations, of the user's functions that were there."""
    expected_answer: Any = None
    """Only where the user puts it into the record; the environment never does."""
    edits: list[str] = Field(default_factory=list)
    """What was changed by hand in the notebook that this was read from."""

    @classmethod
    def from_notebook(cls, path: str | Path, *, max_bytes: int = MAX_BYTES) -> Episode:
        """The episode that was written to a notebook, with its children, equal to what it was.

        Of a notebook that was edited since it is what that now is, and `edits` says what was changed.

        Raises:
            NotebookError: the file cannot be read or is no episode; says which cell and field.
        """
        found = read(path, max_bytes=max_bytes)
        try:
            return cls.model_validate(found.record)
        except ValidationError as error:
            where, *fields = (first := error.errors()[0])["loc"]
            if where == "turns" and fields and isinstance(fields[0], int):
                where, fields = found.cells[fields[0]], fields[1:]
            field = ".".join(map(str, fields))
            message = f"{str(path)!r}, {where}{', field ' + field if field else ''}: {first['msg']}"
            raise NotebookError(message) from error

    @property
    def done(self) -> bool:
        return self.done_reason is not None

    @property
    def reward(self) -> float | None:
        """The reward of the last turn; the earlier ones are on their observations."""
        return self.turns[-1].observation.reward if self.turns else None

    @property
    def total_usage(self) -> ModelUsage:
        """What models took in this episode and in its children."""
        own = sum((self.model_usage[name] for name in sorted(self.model_usage)), ModelUsage())
        return sum((child.total_usage for child in self.children), own)

    @property
    def total_execution_time(self) -> float:
        """Wall seconds of all cells."""
        return sum(turn.observation.result.execution_time for turn in self.turns)


@dataclass(frozen=True)
class Context:
    """The input of an episode: its exact text, and whether the kernel sees that text or its JSON value."""

    text: str
    type: Literal["str", "json"]

    @classmethod
    def of(cls, value: object) -> Context:
        """Read a context given by a caller.

        Raises:
            ConfigError: `value` is no JSON value; the message has the path to what is not.
        """
        if isinstance(value, str):
            return cls(value, "str")
        _check_json(value)
        try:
            return cls(json.dumps(value, ensure_ascii=False, allow_nan=False), "json")
        except RecursionError:
            raise ConfigError("the context is nested too deeply for JSON") from None


def _check_json(value: object) -> None:
    # json.dumps makes lists of tuples, and "1" of the key 1, without a word: another value.
    pending: list[tuple[str, object, int]] = [("context", value, 0)]
    while pending:
        path, item, depth = pending.pop()
        if depth > _DEEPEST:
            raise ConfigError(f"the context is nested over {_DEEPEST} deep, or contains itself")
        if isinstance(item, dict):
            for key, child in item.items():
                if not isinstance(key, str):
                    raise ConfigError(f"{path} has the key {key!r}; JSON has only text keys")
                pending.append((f"{path}[{key!r}]", child, depth + 1))
        elif isinstance(item, list):
            pending.extend((f"{path}[{index}]", child, depth + 1) for index, child in enumerate(item))
        elif isinstance(item, float) and (item != item or item in (float("inf"), float("-inf"))):
            raise ConfigError(f"{path} is {item!r}, which JSON does not have")
        elif item is not None and not isinstance(item, str | int | float):
            raise ConfigError(
                f"{path} is a {type(item).__name__}; a context is text or a JSON value"
                " (dict, list, str, number, bool, None)"
            )
