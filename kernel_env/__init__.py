"""REPL episodes for language models, each in a Jupyter kernel of its own."""

from __future__ import annotations

import logging

from kernel_env.calls import HelperFailure
from kernel_env.config import Limits
from kernel_env.environment import REPLEnvironment
from kernel_env.episode import Episode, HelperCall, Turn
from kernel_env.errors import (
    ArtifactError,
    ConfigError,
    EpisodeOver,
    HelperError,
    KernelDied,
    KernelEnvError,
    KernelError,
    KernelStartError,
    LimitExceeded,
    ResetRequired,
    RubricError,
    SandboxUnavailable,
    UsageError,
)
from kernel_env.local import LocalREPLEnv
from kernel_env.notebook import to_notebook, write_notebook
from kernel_env.rubrics import (
    CodeExecutionRubric,
    CustomMetricRubric,
    ExactMatchRubric,
    FuzzyMatchRubric,
    REPLRubric,
    Rubric,
)
from kernel_env.types import CodeBlockResult, REPLAction, REPLObservation, REPLState, StepResult, Usage
from kernel_env.workdir import Artifact

__all__ = [
    "Artifact",
    "ArtifactError",
    "CodeBlockResult",
    "CodeExecutionRubric",
    "ConfigError",
    "CustomMetricRubric",
    "Episode",
    "EpisodeOver",
    "ExactMatchRubric",
    "FuzzyMatchRubric",
    "HelperCall",
    "HelperError",
    "HelperFailure",
    "KernelDied",
    "KernelEnvError",
    "KernelError",
    "KernelStartError",
    "LimitExceeded",
    "Limits",
    "LocalREPLEnv",
    "REPLAction",
    "REPLEnvironment",
    "REPLObservation",
    "REPLRubric",
    "REPLState",
    "ResetRequired",
    "Rubric",
    "RubricError",
    "SandboxUnavailable",
    "StepResult",
    "Turn",
    "Usage",
    "UsageError",
    "to_notebook",
    "write_notebook",
]

logging.getLogger("kernel_env").addHandler(logging.NullHandler())

for _name in __all__:
    # So that reprs and tracebacks say kernel_env.ConfigError, whatever file it lives in.
    globals()[_name].__module__ = "kernel_env"
del _name
