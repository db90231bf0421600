"""What crosses the environment's boundary, under OpenEnv's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "CodeBlockResult",
    "DoneReason",
    "EnvironmentMetadata",
    "Isolation",
    "REPLAction",
    "REPLObservation",
    "REPLState",
    "Status",
    "StepResult",
    "Usage",
]

Status = Literal["ok", "error", "timeout", "out_of_memory", "died"]
Isolation = Literal["sandbox", "process"]
"""`process`: a process, a folder and an environment of its own. `sandbox`: and nothing else within reach."""
DoneReason = Literal["final", "max_iterations", "timeout", "kernel_died", "closed"]
ObservationT = TypeVar("ObservationT")


class REPLAction(BaseModel):
    """One action of the policy: a cell to run, or (`is_final`) a final answer."""

    model_config = ConfigDict(extra="forbid")

    code: str = ""
    is_final: bool = False
    final_answer: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class CodeBlockResult(BaseModel):
    """What one cell printed, changed and raised, as clipped text."""

    stdout: str = ""
    """The stdout stream and the text of results and displays, in order of arrival."""
    stderr: str = ""
    """The stderr stream, the traceback without colours or host paths, then notes of the environment."""
    locals_snapshot: dict[str, str] = Field(default_factory=dict)
    """`repr`, at most 500 characters, of each name that is new, rebound or of another length."""
    execution_time: float = 0.0
    """Wall seconds from the request to its end, helper calls included."""
    success: bool = True
    exception: str | None = None
    """`Type: message` of what ended the cell early."""


class Usage(BaseModel):
    """What one cell used, as the host saw it."""

    model_config = ConfigDict(frozen=True)

    wall: float
    """Seconds from the request to its end."""
    active: float
    """Of these, seconds in which the cell was busy and waited for no helper."""
    helper_wait: float
    """Of these, seconds in which a helper call of the cell was in flight."""
    cpu: float
    """Processor seconds of the kernel and of the processes it started, as far as those were seen."""
    peak_memory: int
    """Bytes in memory, the most at once, the template's shared pages included; of a cell of less than 5 ms,
    those at its end."""
    bytes_out: int
    """Bytes of the messages that it published."""
    processes: int
    """The most at once, the kernel among them, as far as they were seen (every 0.1 s)."""


class REPLObservation(BaseModel):
    """What the policy sees after `reset` or a step; the same fields at every point of an episode."""

    result: CodeBlockResult
    context_preview: str | None = None
    context_length: int = 0
    """Characters of the context; of its JSON text for lists and dicts."""
    available_variables: list[str] = Field(default_factory=list)
    iteration: int = 0
    max_iterations: int = 30
    done: bool = False
    reward: float | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    final_answer: str | None = None
    done_reason: DoneReason | None = None
    status: Status = "ok"
    restarted: bool = False
    """A fresh kernel took over after this cell; `lost_variables` names what went with the old one."""
    lost_variables: list[str] = Field(default_factory=list)
    outputs: list[dict[str, Any]] = Field(default_factory=list)
    """Everything the cell published, shaped like a notebook cell's outputs (nbformat 4.5)."""
    usage: Usage | None = None
    """What the cell used; None where none ran."""


class REPLState(BaseModel):
    """The episode as the environment knows it, the whole context included."""

    model_config = ConfigDict(extra="allow")

    episode_id: str | None = None
    step_count: int = 0
    context: str | None = None
    task_prompt: str | None = None
    iteration: int = 0
    max_iterations: int = 30
    namespace_keys: list[str] = Field(default_factory=list)
    final_answer: str | None = None
    total_execution_time: float = 0.0


class EnvironmentMetadata(BaseModel):
    """What `get_metadata` tells a server or a registry."""

    name: str
    description: str
    version: str


@dataclass(frozen=True)
class StepResult(Generic[ObservationT]):
    """An observation with the two values every training loop reads first."""

    observation: ObservationT
    reward: float | None = None
    done: bool = False
