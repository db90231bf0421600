"""LocalREPLEnv: OpenEnv's local facade over REPLEnvironment, with a `StepResult` from every call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kernel_env.config import Limits
from kernel_env.environment import REPLEnvironment
from kernel_env.episode import Episode, Turn
from kernel_env.notebook import write_notebook
from kernel_env.types import REPLAction, REPLObservation, REPLState, StepResult
from kernel_env.workdir import ARTIFACT_BYTES, Artifact

__all__ = ["LocalREPLEnv"]


class LocalREPLEnv:
    """A REPL environment in this process, for callers without an event loop; also inside a notebook.

    The arguments are those of `REPLEnvironment`. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        *,
        llm_query_fn: Callable[..., Any] | None = None,
        llm_batch_fn: Callable[..., Any] | None = None,
        subcall_fn: Callable[..., Any] | None = None,
        subcall_batch_fn: Callable[..., Any] | None = None,
        max_output_length: int = 8192,
        context_preview_length: int = 500,
        rubric: Any = None,
        rlm_max_depth: int = 1,
        rlm_max_iterations: int | None = None,
        kernel_name: str = "python3",
        limits: Limits | None = None,
        tools: Mapping[str, Callable[..., Any]] | None = None,
        isolation: str = "auto",
        preload: Sequence[str] = (),
        files: Mapping[str, bytes | str | os.PathLike[str]] | None = None,
        on_output: Callable[[dict[str, Any]], None] | None = None,
        on_turn: Callable[[Turn], Any] | None = None,
    ) -> None:
        self._env = REPLEnvironment(
            llm_query_fn=llm_query_fn,
            llm_batch_fn=llm_batch_fn,
            subcall_fn=subcall_fn,
            subcall_batch_fn=subcall_batch_fn,
            max_output_length=max_output_length,
            context_preview_length=context_preview_length,
            rubric=rubric,
            rlm_max_depth=rlm_max_depth,
            rlm_max_iterations=rlm_max_iterations,
            kernel_name=kernel_name,
            limits=limits,
            tools=tools,
            isolation=isolation,
            preload=preload,
            files=files,
            on_output=on_output,
            on_turn=on_turn,
        )

    def reset(
        self,
        *,
        context: Any = "",
        task_prompt: str = "",
        max_iterations: int = 30,
        seed: int | None = None,
        episode_id: str | None = None,
        hf_token: str | None = None,
        llm_model: str | None = None,
        expected_answer: Any = None,
        rlm_max_depth: int | None = None,
        rlm_max_iterations: int | None = None,
    ) -> StepResult[REPLObservation]:
        """Begin an episode in a fresh kernel; see `REPLEnvironment.reset_async`."""
        return _wrapped(
            self._env.reset(
                seed=seed,
                episode_id=episode_id,
                context=context,
                task_prompt=task_prompt,
                hf_token=hf_token,
                llm_model=llm_model,
                max_iterations=max_iterations,
                expected_answer=expected_answer,
                rlm_max_depth=rlm_max_depth,
                rlm_max_iterations=rlm_max_iterations,
            )
        )

    def step(self, action: REPLAction, *, timeout_s: float | None = None) -> StepResult[REPLObservation]:
        """Run one action; see `REPLEnvironment.step_async`."""
        return _wrapped(self._env.step(action, timeout_s))

    def execute(self, code: str, *, timeout_s: float | None = None) -> StepResult[REPLObservation]:
        """Run one cell."""
        return self.step(REPLAction(code=code), timeout_s=timeout_s)

    def submit_final_answer(self, answer: str) -> StepResult[REPLObservation]:
        """End the episode with this answer."""
        return self.step(REPLAction(is_final=True, final_answer=answer))

    def get_variable(self, name: str, *, timeout_s: float | None = None) -> StepResult[REPLObservation]:
        """Show the `repr` of a variable or an expression; not a step."""
        return _wrapped(self._env.get_variable(name, timeout_s=timeout_s))

    def state(self) -> REPLState:
        """The episode as it stands."""
        return self._env.state

    def list_variables(self) -> list[str]:
        """The names in the kernel's namespace, sorted, helpers included."""
        return self.state().namespace_keys

    @property
    def episode(self) -> Episode:
        """The record of the present episode, or after `close` of the last."""
        return self._env.episode

    def export(self, path: str | Path) -> Path:
        """Write the record as a Jupyter notebook, also after `close`; returns the path.

        Raises:
            ConfigError: the path cannot be written, or does not end in `.ipynb`.
        """
        return write_notebook(self.episode, path)

    def artifacts(self) -> list[Artifact]:
        """The regular files in the working directory; see `REPLEnvironment.artifacts`."""
        return self._env.artifacts()

    def read_artifact(self, name: str, *, max_bytes: int = ARTIFACT_BYTES) -> bytes:
        """The content of one of them; see `REPLEnvironment.read_artifact`."""
        return self._env.read_artifact(name, max_bytes=max_bytes)

    def close(self) -> None:
        """End the episode and its kernel."""
        self._env.close()

    def __enter__(self) -> LocalREPLEnv:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _wrapped(observation: REPLObservation) -> StepResult[REPLObservation]:
    return StepResult(observation, observation.reward, observation.done)
