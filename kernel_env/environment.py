"""REPLEnvironment: the protocol around episodes. The coroutines are the body, the sync methods the edge."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from kernel_env import portal
from kernel_env.calls import Helper
from kernel_env.config import EnvConfig, Limits, check_count, check_seconds, check_text, from_env
from kernel_env.episode import Context, Episode, Turn
from kernel_env.errors import ConfigError, ResetRequired, UsageError
from kernel_env.helpers import HostHelpers
from kernel_env.own_model import OwnModel
from kernel_env.rollout import Rollout
from kernel_env.rubrics import REPLRubric, Scorer
from kernel_env.types import EnvironmentMetadata, REPLAction, REPLObservation, REPLState
from kernel_env.workdir import ARTIFACT_BYTES, Artifact, check_files, list_artifacts, read_artifact

__all__ = ["REPLEnvironment"]

T = TypeVar("T")


class REPLEnvironment:
    """An OpenEnv REPL environment whose every episode is an IPython kernel.

    Args:
        context, task_prompt: used by resets that give none; then `REPL_CONTEXT`, `REPL_TASK_PROMPT`.
        max_iterations: steps of an episode that gives no number of its own.
        max_output_length, context_preview_length: characters the policy sees.
        rubric: `(action, observation) -> float`, sync or async; default `REPLRubric()`.
        llm_query_fn: `(prompt)` or `(prompt, model)` → text, behind `llm_query`; sync or async, as all four.
        llm_batch_fn: `(prompts)` or `(prompts, model)` → texts; without it batches are concurrent singles.
        subcall_fn: `(prompt, model)` and, if it can, `context` → text, behind `rlm_query`.
        subcall_batch_fn: the same for `prompts` and `contexts`.
        rlm_max_depth, rlm_max_iterations: for episodes with an `llm_model`; see `reset_async`.
        kernel_name: an installed kernelspec of an IPython kernel.
        limits: bounds on time, memory, processes, files, sizes and restarts.
        isolation: "sandbox", "process", or "auto", a sandbox where there can be one.
        tools: name → function of the host, callable from the kernel.
        preload: modules that every kernel has imported when it starts; forked kernels share one import.
        files: name in the working directory → bytes, or the path of a file, copied before the first cell.
        on_output: called with each output (nbformat-shaped) as it arrives; must be quick.
        on_turn: called with each finished `Turn`; sync or async.

    Raises:
        ConfigError: an argument cannot be used.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(
        self,
        context: Any = None,
        task_prompt: str | None = None,
        max_iterations: int = 30,
        max_output_length: int = 8192,
        context_preview_length: int = 500,
        rubric: Any = None,
        llm_query_fn: Callable[..., Any] | None = None,
        llm_batch_fn: Callable[..., Any] | None = None,
        subcall_fn: Callable[..., Any] | None = None,
        subcall_batch_fn: Callable[..., Any] | None = None,
        rlm_max_depth: int = 1,
        rlm_max_iterations: int | None = None,
        *,
        kernel_name: str = "python3",
        limits: Limits | None = None,
        tools: Mapping[str, Callable[..., Any]] | None = None,
        isolation: str = "auto",
        preload: Sequence[str] = (),
        files: Mapping[str, bytes | str | os.PathLike[str]] | None = None,
        on_output: Callable[[dict[str, Any]], None] | None = None,
        on_turn: Callable[[Turn], Any] | None = None,
    ) -> None:
        config = EnvConfig(
            max_iterations=max_iterations,
            max_output_length=max_output_length,
            context_preview_length=context_preview_length,
            kernel_name=kernel_name,
            limits=limits or Limits(),
            rubric=rubric,
            llm_query_fn=llm_query_fn,
            llm_batch_fn=llm_batch_fn,
            subcall_fn=subcall_fn,
            subcall_batch_fn=subcall_batch_fn,
            tools=tools or {},
            on_output=on_output,
            on_turn=on_turn,
            isolation=isolation,
            preload=preload,
            files=files,
            rlm_max_depth=rlm_max_depth,
            rlm_max_iterations=rlm_max_iterations,
        )
        check_files({} if files is None else files, config.limits.files_bytes)
        self._default_context = context
        self._default_task_prompt = task_prompt
        self._config = config
        self._scorer = Scorer(config.rubric if config.rubric is not None else REPLRubric())
        self._owner = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lifecycle = asyncio.Lock()
        self._rollout: Rollout | None = None
        self._episode: Episode | None = None
        self._in_force = config
        """The config of the present episode, which may have a model of its own."""
        self._model: OwnModel | None = None

    # The sync edge.

    def reset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        context: Any = None,
        task_prompt: str | None = None,
        hf_token: str | None = None,
        llm_model: str | None = None,
        **kwargs: Any,
    ) -> REPLObservation:
        """See `reset_async`."""
        arguments = (seed, episode_id, context, task_prompt, hf_token, llm_model)
        return self._run(partial(self.reset_async, *arguments, **kwargs))

    def step(self, action: REPLAction, timeout_s: float | None = None) -> REPLObservation:
        """See `step_async`. Ctrl-C interrupts the cell, records the turn, then goes on."""
        return self._run(self.step_async, action, timeout_s)

    def get_variable(self, name: str, *, timeout_s: float | None = None) -> REPLObservation:
        """See `get_variable_async`."""
        return self._run(self.get_variable_async, name, timeout_s)

    def close(self) -> None:
        """See `close_async`."""
        if self._owner == os.getpid():  # in a forked child there is nothing of ours to close
            self._run(self.close_async)

    def _run(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        self._check_process()
        return portal.run(function, *args)

    @property
    def state(self) -> REPLState:
        """The episode as it stands, with the whole text of the context.

        Raises:
            ResetRequired: there is no episode.
        """
        rollout = self._require_rollout()
        return REPLState(
            episode_id=rollout.record.episode_id,
            step_count=rollout.iteration,
            context=rollout.record.context,
            task_prompt=rollout.record.task_prompt,
            iteration=rollout.iteration,
            max_iterations=rollout.record.max_iterations,
            namespace_keys=rollout.names,
            final_answer=rollout.record.final_answer,
            total_execution_time=rollout.record.total_execution_time,
        )

    @property
    def episode(self) -> Episode:
        """The record of the present episode, or after `close` of the last.

        Raises:
            ResetRequired: there was none yet.
        """
        if self._episode is None:
            raise ResetRequired("there is no episode yet; call reset() first")
        return self._episode

    @property
    def helpers(self) -> dict[str, Helper]:
        """Name → helper, of what the present episode has in its kernel."""
        return HostHelpers(self._in_force).available()

    def get_metadata(self) -> EnvironmentMetadata:
        """Name, description and version, for a server or a registry; the name is OpenEnv's."""
        return EnvironmentMetadata(
            name="repl_env",
            description="A Python REPL for recursive language models; every episode is an IPython kernel.",
            version=importlib.metadata.version("kernel_env"),
        )

    # The body.

    async def reset_async(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        context: Any = None,
        task_prompt: str | None = None,
        hf_token: str | None = None,
        llm_model: str | None = None,
        *,
        expected_answer: Any = None,
        max_iterations: int | None = None,
        rlm_max_depth: int | None = None,
        rlm_max_iterations: int | None = None,
    ) -> REPLObservation:
        """End the episode there was, if any, and begin one in a fresh kernel.

        Nothing given here reaches the next reset. `seed` seeds `random` and numpy's global generator;
        `expected_answer` goes to the rubric and nowhere else. `llm_model`, with `hf_token`, is an
        `HFChatModel` that answers `llm_query` in this episode, in place of functions given at construction;
        `rlm_max_depth` above 1 lets its `rlm_query` calls work in child episodes, of at most
        `rlm_max_iterations` replies each, default the `max_iterations` of construction.

        Raises:
            ConfigError: an argument cannot be used; the episode there was goes on.
            SandboxUnavailable: `isolation="sandbox"`, and this system cannot confine kernels.
            KernelStartError: no kernel became ready; there is no episode.
        """
        self._check_process()
        if seed is not None:
            check_count("seed", seed, least=0)
            if seed >= 2**64:
                raise ConfigError("seed has more than 64 bits; give one below 2**64")
        if episode_id is not None:
            check_text("episode_id", episode_id)
        max_iterations = self._config.max_iterations if max_iterations is None else max_iterations
        check_count("max_iterations", max_iterations)
        defaults = from_env()
        given = Context.of(_first(context, self._default_context, defaults.context, ""))
        prompt = _first(task_prompt, self._default_task_prompt, defaults.task_prompt, "")
        check_text("task_prompt", prompt)
        config = replace(
            self._config,
            rlm_max_depth=_first(rlm_max_depth, self._config.rlm_max_depth),
            rlm_max_iterations=(
                self._config.rlm_max_iterations if rlm_max_iterations is None else rlm_max_iterations
            ),
        )
        model = OwnModel.of(config, REPLEnvironment, llm_model=llm_model, hf_token=hf_token)
        config = config if model is None else model.config
        self._bind()
        async with self._lifecycle:
            await self._end_rollout()
            self._in_force, self._model = config, model
            self._scorer.begin(expected_answer)
            self._rollout = await Rollout.start(
                config,
                self._scorer,
                given,
                task_prompt=prompt,
                max_iterations=max_iterations,
                seed=seed,
                episode_id=episode_id,
            )
            self._episode = self._rollout.record
            if model is not None:
                model.record_in(self._episode)
            return self._rollout.first_observation()

    async def step_async(self, action: REPLAction, timeout_s: float | None = None) -> REPLObservation:
        """Run one action to its end and judge it.

        `timeout_s` bounds the active seconds of the cell, default `Limits.cell_active`. Cancelled, it
        interrupts the cell and records the turn before the cancellation goes on.

        Raises:
            ResetRequired, EpisodeOver: there is no episode to step in.
            RubricError: the rubric failed; the turn is recorded, without a reward.
        """
        rollout = self._enter()
        _check_action(action)
        _check_timeout(timeout_s)
        return await rollout.step(action, timeout_s)

    async def get_variable_async(self, name: str, timeout_s: float | None = None) -> REPLObservation:
        """Evaluate an expression and show its `repr` as stdout; no turn, and possible until close or reset.

        Raises:
            ResetRequired: there is no episode.
            KernelDied: the kernel is gone and none replaced it.
        """
        rollout = self._enter()
        _check_timeout(timeout_s)
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"get_variable({name!r}): give a name or an expression")
        return await rollout.variable(name.strip(), timeout_s)

    def artifacts(self) -> list[Artifact]:
        """The regular files in the episode's working directory, sorted by name; until close or reset.

        What was given as `files` is among them. A working directory outlives the kernels that are lost.

        Raises:
            ResetRequired: there is no episode.
        """
        return list_artifacts(self._require_rollout().folder)

    def read_artifact(self, name: str, *, max_bytes: int = ARTIFACT_BYTES) -> bytes:
        """The content of one of `artifacts()`, at most `max_bytes` (default 64 MiB).

        Raises:
            ArtifactError: there is no regular file of that name.
            LimitExceeded: it is larger.
            ResetRequired: there is no episode.
        """
        check_count("max_bytes", max_bytes)
        return read_artifact(self._require_rollout().folder, name, max_bytes)

    async def close_async(self) -> None:
        """End the episode and its kernel; the record and `export` stay usable. Closing twice is fine."""
        self._check_process()
        if self._loop is None:
            return
        if self._loop.is_closed():
            rollout, self._rollout = self._rollout, None
            if rollout is not None:
                rollout.close_now()
        else:
            self._check_loop()
            async with self._lifecycle:
                await self._end_rollout()
        self._loop = None

    async def _end_rollout(self) -> None:
        if self._rollout is not None:
            await self._rollout.close()
            self._rollout = None
        if self._model is not None:
            await self._model.close()
            self._model = None

    # What must hold before anything runs.

    def _enter(self) -> Rollout:
        rollout = self._require_rollout()
        self._check_loop()
        return rollout

    def _require_rollout(self) -> Rollout:
        self._check_process()
        if self._rollout is None:
            raise ResetRequired("there is no episode: call reset() first (also after close())")
        return self._rollout

    def _check_process(self) -> None:
        if os.getpid() != self._owner:
            raise UsageError(
                f"this environment belongs to process {self._owner}; a forked child must make its own"
            )

    def _bind(self) -> None:
        if self._rollout is not None:
            self._check_loop()
        if self._loop is not asyncio.get_running_loop():
            self._loop, self._lifecycle = asyncio.get_running_loop(), asyncio.Lock()

    def _check_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            raise UsageError(
                "the episode was reset on another event loop: use either reset/step/close or, on one loop, "
                "reset_async/step_async/close_async"
            )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _check_action(action: object) -> None:
    if not isinstance(action, REPLAction):
        raise UsageError(
            f"step() takes a REPLAction, not {type(action).__name__}; for code alone: REPLAction(code=…)"
        )
    try:
        json.dumps(action.metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the action's metadata is no JSON value: {error}") from None


def _check_timeout(timeout_s: float | None) -> None:
    if timeout_s is not None:
        check_seconds("timeout_s", timeout_s)
