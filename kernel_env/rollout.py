"""One episode under way: its kernel, its record, and the rules by which a turn is made and judged."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import importlib.metadata
import logging
import math
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel

from kernel_env import portal
from kernel_env.answer import printed_marker
from kernel_env.calls import signature_text
from kernel_env.config import EnvConfig
from kernel_env.episode import Context, Episode, Turn
from kernel_env.errors import EpisodeOver, KernelDied, ResetRequired, RubricError
from kernel_env.execution import Execution
from kernel_env.fitting import clip
from kernel_env.folder import KernelFolder
from kernel_env.helpers import HostHelpers
from kernel_env.install import KernelSetup
from kernel_env.kernel import Kernel
from kernel_env.outputs import stderr_text, stdout_text, stream_text
from kernel_env.pool import start_kernel
from kernel_env.rubrics import Scorer
from kernel_env.types import CodeBlockResult, DoneReason, REPLAction, REPLObservation, Usage
from kernel_env.workdir import copy_in

__all__ = ["Rollout"]

log = logging.getLogger("kernel_env.rollout")

T = TypeVar("T")

_VERSIONED = ("kernel_env", "ipykernel", "jupyter_client", "nbformat")
_PLAIN = (str, int, float, bool, type(None))
_ANSWER_CONTENT = "answer.get('content') or '' if isinstance(answer, dict) else ''"


class Rollout:
    """An episode from its reset to its close; make one with `await Rollout.start(…)`."""

    def __init__(
        self, config: EnvConfig, scorer: Scorer, helpers: HostHelpers, record: Episode, kernel: Kernel
    ) -> None:
        self.record = record
        self.iteration = 0
        self._config = config
        self._scorer = scorer
        self._on_turn = portal.as_async(config.on_turn) if config.on_turn is not None else None
        self._helpers = helpers
        self._kernel = kernel
        self._deadline = time.monotonic() + config.limits.episode
        self._turn_lock = asyncio.Lock()
        # Apart from it, so that a rubric can read variables while the turn it judges is not over.
        self._kernel_lock = asyncio.Lock()
        self._is_closed = False

    @classmethod
    async def start(
        cls,
        config: EnvConfig,
        scorer: Scorer,
        context: Context,
        *,
        task_prompt: str,
        max_iterations: int,
        seed: int | None,
        episode_id: str | None,
    ) -> Rollout:
        """Start the episode's kernel and its record.

        Raises:
            ConfigError, KernelStartError: as `Kernel.start`.
        """
        limits, helpers = config.limits, HostHelpers(config)
        record = Episode(
            episode_id=episode_id or uuid.uuid4().hex,
            task_prompt=task_prompt,
            context=context.text,
            context_type=context.type,
            kernel_name=config.kernel_name,
            max_iterations=max_iterations,
            seed=seed,
            limits={name: value if value < math.inf else None for name, value in asdict(limits).items()},
            versions=_versions(),
            tools={name: signature_text(helper.signature) for name, helper in helpers.tools().items()},
            started=time.time(),
        )
        clock = time.monotonic()
        kernel = await start_kernel(
            KernelSetup(
                kernel_name=config.kernel_name,
                limits=limits,
                helpers=helpers.available(),
                context=context,
                seed=seed,
                preload=tuple(config.preload),
            ),
            config.isolation,
        )
        record.isolation = kernel.isolation
        if config.files:
            try:
                await portal.run_in_thread(copy_in, config.files, kernel.folder)
            except BaseException:
                await kernel.close()
                raise
        record.start_time = time.monotonic() - clock
        return cls(config, scorer, helpers, record, kernel)

    def first_observation(self) -> REPLObservation:
        """What the policy sees before its first action."""
        return self._observe(CodeBlockResult(stdout=_reset_message(self.record)))

    @property
    def names(self) -> list[str]:
        """The names in the kernel's namespace, sorted, as of the last cell."""
        return self._kernel.names

    @property
    def folder(self) -> KernelFolder:
        """The folder with the episode's working directory."""
        return self._kernel.folder

    @property
    def _time_left(self) -> float:
        return self._deadline - time.monotonic()

    async def step(self, action: REPLAction, timeout_s: float | None) -> REPLObservation:
        """Run one action, judge it, record it; a cancellation goes on once the turn is recorded.

        Raises:
            EpisodeOver: the episode has ended.
            ResetRequired: it was closed while this step waited for its turn.
            RubricError: the rubric failed; the turn is recorded, without a reward.
            UsageError: called in a helper that serves this very episode.
        """
        self._helpers.check_caller()
        async with self._turn_lock:
            async with self._kernel_lock:
                self._check_open()
                if self.record.done:
                    raise EpisodeOver("the episode is over; call reset() for the next one")
                (observation, execution), was_cancelled = await self._uninterrupted(
                    self._act(action, timeout_s)
                )
            failure = None
            try:
                observation.reward = await self._scorer.score(action, observation)
            except RubricError as error:
                failure = error
            finally:
                turn = _turn_of(action, observation, execution)
                self.record.turns.append(turn)
        await self._tell(turn)
        if was_cancelled:
            raise asyncio.CancelledError
        if failure is not None:
            raise failure
        return observation

    async def variable(self, expression: str, timeout_s: float | None) -> REPLObservation:
        """Evaluate an expression and show its `repr`; no turn.

        Raises:
            KernelDied: the kernel is gone and none replaced it.
            ResetRequired, UsageError: as `step`.
        """
        self._helpers.check_caller()
        async with self._kernel_lock:
            self._check_open()
            execution, was_cancelled = await self._uninterrupted(
                self._kernel.text_of(expression, convert="repr", active=timeout_s)
            )
        if was_cancelled:
            raise asyncio.CancelledError
        shown = f"{execution.answer}\n" if execution.answer is not None else ""
        return self._observe(self._result(execution, stdout_end=shown), execution)

    async def close(self) -> None:
        """End the episode and its kernel; a cell that runs is stopped first."""
        self._is_closed = True
        self._kernel.stop("the environment was closed")
        async with self._kernel_lock:
            if not self.record.done:
                self.record.done_reason = "closed"
            await self._kernel.close()

    def close_now(self) -> None:
        """The same when the loop it lived on is closed."""
        self._is_closed = True
        if not self.record.done:
            self.record.done_reason = "closed"
        self._kernel.close_now()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ResetRequired("the episode was closed; call reset() for the next one")

    async def _uninterrupted(self, work: Coroutine[Any, Any, T]) -> tuple[T, bool]:
        """Await `work` to its end, and say whether the caller was cancelled meanwhile.

        A cancellation, or several, only stops the cell: left alone, it would run on into the next step.
        """
        outcome = portal.Outcome(work, partial(self._kernel.stop, "the caller interrupted it"))
        return await outcome, outcome.was_cancelled

    async def _act(
        self, action: REPLAction, timeout_s: float | None
    ) -> tuple[REPLObservation, Execution | None]:
        self.iteration += 1
        execution: Execution | None = None
        answer: str | None = action.final_answer or ""
        if action.is_final:
            result = CodeBlockResult(stdout="Final answer submitted.")
        else:
            execution = await self._execute(action, timeout_s)
            answer = await self._answer(action, execution, timeout_s)
            result = self._result(execution)
        reason, answer = await self._judge_end(execution, answer, timeout_s)
        if reason == "max_iterations":
            note = f"Maximum iterations ({self.record.max_iterations}) reached."
            result.stdout += ("\n" if result.stdout and not result.stdout.endswith("\n") else "") + note
        self.record.done_reason, self.record.final_answer = reason, answer
        return self._observe(result, execution), execution

    async def _tell(self, turn: Turn) -> None:
        if self._on_turn is not None:
            try:
                await self._on_turn(turn)
            except Exception:
                log.exception("on_turn raised; the episode goes on")

    async def _execute(self, action: REPLAction, timeout_s: float | None) -> Execution:
        return await self._kernel.execute(
            action.code,
            active=timeout_s,
            total=max(self._time_left, 0.001),
            on_output=self._output_callback(),
        )

    def _output_callback(self) -> Callable[[dict[str, Any]], None] | None:
        callback = self._config.on_output
        if callback is None:
            return None

        def guarded(output: dict[str, Any]) -> None:
            try:
                callback(output)
            except Exception:
                log.exception("on_output raised; the cell goes on")

        return guarded

    async def _answer(self, action: REPLAction, execution: Execution, timeout_s: float | None) -> str | None:
        """The answer a cell gave: submitted from inside, or printed on purpose."""
        if execution.answer is not None:
            return execution.answer
        if execution.dropped:
            return None  # what is left of the output may hold half an answer
        marker = printed_marker(action.code, stream_text(execution.outputs, "stdout"))
        if marker is None or not marker.is_variable:
            return marker.text if marker is not None else None
        if execution.restarted or execution.kernel_lost or not marker.text.isidentifier():
            return None
        return await self._text_of(marker.text, timeout_s)

    async def _text_of(self, expression: str, timeout_s: float | None) -> str | None:
        total = max(self._time_left, 0.001)
        execution = await self._kernel.text_of(expression, convert="str", active=timeout_s, total=total)
        return execution.answer

    async def _judge_end(
        self, execution: Execution | None, answer: str | None, timeout_s: float | None
    ) -> tuple[DoneReason | None, str | None]:
        if answer is not None:
            return "final", answer
        if execution is not None and execution.kernel_lost:
            return "kernel_died", None
        if self._time_left <= 0:
            return "timeout", None
        if self.iteration < self.record.max_iterations:
            return None, None
        with contextlib.suppress(KernelDied):
            return "max_iterations", await self._text_of(_ANSWER_CONTENT, timeout_s) or None
        return "max_iterations", None

    def _result(self, execution: Execution, *, stdout_end: str = "") -> CodeBlockResult:
        limit = self._config.max_output_length
        stderr = stderr_text(execution.outputs)
        shows_error = any(output["output_type"] == "error" for output in execution.outputs)
        if execution.exception is not None and not shows_error:
            stderr = "\n".join(filter(None, [stderr, execution.exception]))
        notes = "\n".join(f"[kernel_env] {note}" for note in execution.notes)
        return CodeBlockResult(
            stdout=clip(
                stdout_text(execution.outputs) + stdout_end, limit, dropped=execution.dropped.get("stdout", 0)
            ),
            stderr="\n".join(
                filter(None, [clip(stderr, limit, dropped=execution.dropped.get("stderr", 0)), notes])
            ),
            locals_snapshot=execution.report.changed if execution.report else {},
            execution_time=execution.duration,
            success=execution.status == "ok",
            exception=execution.exception,
        )

    def _observe(self, result: CodeBlockResult, execution: Execution | None = None) -> REPLObservation:
        record = self.record
        metadata: dict[str, Any] = {"task_prompt": record.task_prompt}
        if self.iteration == 0 and execution is None:
            metadata |= {"message": "Environment ready.", "isolation": record.isolation}
        else:
            metadata |= {"final_answer": record.final_answer, "execution_time": result.execution_time}
        if record.done:
            spent = record.total_execution_time + result.execution_time
            metadata |= {"total_execution_time": spent, "total_iterations": self.iteration}
        return REPLObservation(
            result=result,
            context_preview=record.context[: self._config.context_preview_length],
            context_length=len(record.context),
            available_variables=list(self._kernel.names),
            iteration=self.iteration,
            max_iterations=record.max_iterations,
            done=record.done,
            metadata=metadata,
            final_answer=record.final_answer,
            done_reason=record.done_reason,
            status=execution.status if execution else "ok",
            restarted=execution.restarted if execution else False,
            lost_variables=list(execution.lost_variables) if execution else [],
            outputs=execution.outputs if execution else [],
            usage=execution.usage if execution else None,
        )


@functools.cache
def _versions() -> dict[str, str]:
    # Each look-up searches the whole path for the package: not at every reset.
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def _turn_of(action: REPLAction, observation: REPLObservation, execution: Execution | None) -> Turn:
    return Turn(
        action=_own(action),
        observation=_own(observation),
        execution_count=execution.execution_count if execution else None,
        started=execution.started if execution else time.time(),
        active_time=execution.active_time if execution else 0.0,
        helper_calls=execution.calls if execution else (),
    )


def _own(value: Any) -> Any:
    """A copy of a wire type that shares no container with it: `deepcopy`, faster where all is plain data."""
    if isinstance(value, Usage):  # it cannot be changed
        return value
    if isinstance(value, BaseModel):
        fields = {name: _own(item) for name, item in value if type(item) not in _PLAIN}
        return value.model_copy(update=fields)
    if type(value) is dict:
        return {key: item if type(item) in _PLAIN else _own(item) for key, item in value.items()}
    if type(value) is list:
        return [item if type(item) in _PLAIN else _own(item) for item in value]
    return copy.deepcopy(value)


def _reset_message(record: Episode) -> str:
    lines = ["REPL environment initialized."]
    if record.context:
        lines.append(f"Context loaded ({len(record.context)} chars). Use 'context' variable to access it.")
    if record.task_prompt:
        lines.append(f"Task: {record.task_prompt}")
    lines.append("Use answer['content'] to store your answer, and set answer['ready'] = True when done.")
    return "\n".join(lines)
