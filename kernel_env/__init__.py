"""REPL episodes for language models, each in a Jupyter kernel of its own."""

from __future__ import annotations

import logging

from kernel_env.budget import Budget, ModelUsage
from kernel_env.calls import HelperFailure
from kernel_env.config import Limits
from kernel_env.environment import REPLEnvironment
from kernel_env.episode import Episode, HelperCall, Turn
from kernel_env.errors import (
    ArtifactError,
    BudgetExceeded,
    ConfigError,
    EpisodeOver,
    HelperError,
    KernelDied,
    KernelEnvError,
    KernelError,
    KernelStartError,
    LimitExceeded,
    ModelError,
    NotebookError,
    ResetRequired,
    RubricError,
    SandboxUnavailable,
    UsageError,
)
from kernel_env.evaluate import EvalConfig, evaluate
from kernel_env.exporters import EXPORTERS
from kernel_env.llm import ChatModel, ChatReply, HFChatModel, ScriptedChatModel
from kernel_env.local import LocalREPLEnv
from kernel_env.notebook import to_notebook, write_notebook
from kernel_env.prompts import (
    RLM_SYSTEM_PROMPT,
    RLM_SYSTEM_PROMPT_QWEN,
    QueryMetadata,
    build_rlm_system_prompt,
    build_user_prompt,
    extract_code_blocks,
    format_observations,
)
from kernel_env.replay import ReplayReport, replay
from kernel_env.rubrics import (
    CodeExecutionRubric,
    CustomMetricRubric,
    ExactMatchRubric,
    FuzzyMatchRubric,
    REPLRubric,
    Rubric,
)
from kernel_env.runner import LocalRLMRunner
from kernel_env.tasks import Task
from kernel_env.tree import ChildTrace, RLMRunResult
from kernel_env.types import CodeBlockResult, REPLAction, REPLObservation, REPLState, StepResult, Usage
from kernel_env.workdir import Artifact

__all__ = [
    "EXPORTERS",
    "RLM_SYSTEM_PROMPT",
    "RLM_SYSTEM_PROMPT_QWEN",
    "Artifact",
    "ArtifactError",
    "Budget",
    "BudgetExceeded",
    "ChatModel",
    "ChatReply",
    "ChildTrace",
    "CodeBlockResult",
    "CodeExecutionRubric",
    "ConfigError",
    "CustomMetricRubric",
    "Episode",
    "EpisodeOver",
    "EvalConfig",
    "ExactMatchRubric",
    "FuzzyMatchRubric",
    "HFChatModel",
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
    "LocalRLMRunner",
    "ModelError",
    "ModelUsage",
    "NotebookError",
    "QueryMetadata",
    "REPLAction",
    "REPLEnvironment",
    "REPLObservation",
    "REPLRubric",
    "REPLState",
    "RLMRunResult",
    "ReplayReport",
    "ResetRequired",
    "Rubric",
    "RubricError",
    "SandboxUnavailable",
    "ScriptedChatModel",
    "StepResult",
    "Task",
    "Turn",
    "Usage",
    "UsageError",
    "build_rlm_system_prompt",
    "build_user_prompt",
    "evaluate",
    "extract_code_blocks",
    "format_observations",
    "replay",
    "to_notebook",
    "write_notebook",
]

logging.getLogger("kernel_env").addHandler(logging.NullHandler())

for _name in __all__:
    # So that reprs and tracebacks say kernel_env.ConfigError, whatever file it lives in.
    if not isinstance(globals()[_name], str | dict):
        globals()[_name].__module__ = "kernel_env"
del _name
