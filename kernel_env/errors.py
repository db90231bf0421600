"""Every error kernel_env raises, as one tree.

    KernelEnvError
    ├─ UsageError            the caller broke the protocol
    │  ├─ ResetRequired      step or state before reset, or after close   (a RuntimeError)
    │  ├─ EpisodeOver        step after the episode ended
    │  ├─ ArtifactError      no such file in the working directory
    │  └─ ConfigError        an argument cannot be used                   (a ValueError)
    │     └─ SandboxUnavailable   kernels cannot be confined on this system
    ├─ KernelError           the kernel failed, not the code in it
    │  ├─ KernelStartError   no kernel became ready
    │  └─ KernelDied         the kernel is gone and no other took over
    ├─ LimitExceeded         more than was asked for                      (.limit .value .maximum)
    ├─ HelperError           a helper could not be served                 (raised inside the kernel too)
    ├─ BudgetExceeded        a run has used up what it was given          (.budget .used .maximum)
    ├─ ModelError            a chat model could not be asked              (the cause is the user's exception)
    ├─ NotebookError         a file is no episode, or no longer         (says which cell and field)
    └─ RubricError           a user's rubric raised, or returned no number

A cell that fails, runs out of time or kills its kernel raises nothing: it is an observation.
Exceptions are for the caller's mistakes and ours; each says what happened and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "ArtifactError",
    "BudgetExceeded",
    "ConfigError",
    "EpisodeOver",
    "HelperError",
    "KernelDied",
    "KernelEnvError",
    "KernelError",
    "KernelStartError",
    "LimitExceeded",
    "ModelError",
    "NotebookError",
    "ResetRequired",
    "RubricError",
    "SandboxUnavailable",
    "UsageError",
    "boundary",
]


class KernelEnvError(Exception):
    """Base class of every error that kernel_env raises on purpose."""


class UsageError(KernelEnvError):
    """Raised when the environment is used against its protocol."""


class ResetRequired(UsageError, RuntimeError):
    """Raised when there is no episode: before `reset`, or after `close`."""


class EpisodeOver(UsageError):
    """Raised by a step after the one that ended the episode."""


class ArtifactError(UsageError):
    """Raised when the working directory has no regular file of that name."""


class ConfigError(UsageError, ValueError):
    """Raised when an argument has a value that cannot be used, naming the value."""


class SandboxUnavailable(ConfigError):
    """Raised when a sandbox is asked for where there can be none; says what is missing."""


class KernelError(KernelEnvError):
    """Base class of failures of a kernel, as opposed to failures of the code it runs."""


class KernelStartError(KernelError):
    """Raised when a kernel does not become ready; carries the tail of its stderr."""


class KernelDied(KernelError):
    """Raised when the kernel is gone and none could replace it."""


class LimitExceeded(KernelEnvError):
    """Raised when something is larger than its limit; says which, how large, and how large it may be."""

    def __init__(self, limit: str, value: int, maximum: int) -> None:
        super().__init__(limit, value, maximum)
        self.limit, self.value, self.maximum = limit, value, maximum

    def __str__(self) -> str:
        return f"{self.value} is more than {self.limit} = {self.maximum}"


class HelperError(KernelEnvError):
    """Raised when a helper call fails.

    A user function that raises this chooses the text the model reads; of any other exception
    the model is told the type alone, because messages can hold paths, keys or prompts.
    """


class ModelError(KernelEnvError):
    """Raised when the model of a run cannot be asked, or replies with something that is no text.

    `is_transient`: the same request may succeed later; `retry_after` seconds, if the server said so.
    """

    def __init__(self, message: str, *, is_transient: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.is_transient, self.retry_after = is_transient, retry_after


class BudgetExceeded(KernelEnvError):
    """Raised when a run has used up one of its budgets; says which, how much, and how much there was."""

    def __init__(self, budget: str, used: float, maximum: float) -> None:
        super().__init__(budget, used, maximum)
        self.budget, self.used, self.maximum = budget, used, maximum

    def __str__(self) -> str:
        return f"the budget of the run is used up: {self.budget} {self.used:,.6g} of {self.maximum:,.6g}"


class NotebookError(KernelEnvError):
    """Raised when a file is not the notebook of an episode, or what it refers to is gone or altered."""


class RubricError(KernelEnvError):
    """Raised when a rubric raises or returns something that is not a finite number."""


@contextmanager
def boundary(kind: type[KernelEnvError], what: str) -> Iterator[None]:
    """Turn any exception of code that is not ours into `kind`, keeping it as the cause."""
    try:
        yield
    except kind:
        raise
    except Exception as error:
        raise kind(f"{what}: {type(error).__name__}: {error}") from error
