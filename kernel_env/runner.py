"""A model that works in an episode, turn by turn, and its recursion into episodes of their own.

`LocalRLMRunner` asks a chat function, runs the code of its replies, shows it the results, and goes on until
there is an answer. `rlm_query` in the kernel starts the same with another task: children are runs of one
tree, which share its limits (`recursion.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from kernel_env import portal
from kernel_env.budget import Budget, ModelUsage, Spending
from kernel_env.config import Limits, check_count, check_seconds, check_text
from kernel_env.environment import REPLEnvironment
from kernel_env.episode import Episode, Turn
from kernel_env.errors import ConfigError, ResetRequired
from kernel_env.helpers import Adapted
from kernel_env.prompts import RLM_SYSTEM_PROMPT
from kernel_env.recursion import Run
from kernel_env.tree import Progress, RLMRunResult, RunConfig, Tree

__all__ = ["LocalRLMRunner"]


class LocalRLMRunner:
    """Drives a chat model through an episode, and its `rlm_query` calls through episodes of their own.

    Args:
        llm_chat_fn: `(messages)` or `(messages, model)` → the reply, text or an object with `.text`; sync or
            async. It also answers `llm_query`, with the prompt as the one message.
        system_prompt: the first message.
        max_iterations: replies that a run acts on.
        max_depth: levels of runs; 1 has no children, and `rlm_query` asks the model once there.
        depth: of this run; the root is 0.
        env_max_iterations_multiplier: blocks of code a run may execute for each of `max_iterations`.
        max_batch_workers: children that work at once, over the whole tree; one that waits for children of its
            own does not count.
        backend_factory: `(llm_chat_fn, *, system_prompt, max_iterations, depth,
            env_max_iterations_multiplier)` → an object with OpenEnv's `query`, `query_batched`,
            `recursive_query` and `recursive_query_batched`, in place of the recursion here.
        max_children_total: children of the whole tree; `rlm_query` is refused beyond.
        max_children_per_batch: of one batch; the items beyond are refused.
        result_truncation_limit: characters of a child's answer that its parent gets.
        per_child_timeout_s: seconds for each child, waiting for its place not counted.
        on_subcall_start: `(depth, model, prompt_preview)`, called on the loop.
        on_subcall_complete: `(depth, model, duration_s, error)`.
        verbose: log each turn on the logger `kernel_env.runner`, at INFO instead of DEBUG.
        tools, limits, isolation, kernel_name: of every episode of the tree, as for `REPLEnvironment`.
        sub_model: asked by `llm_query` and by children, unless a call names another; default the run's own.
        budget: of the whole tree; a run that has used it up ends with what it has in `answer["content"]`.
            `budget()` in the kernels tells what is left.
        cost: of one reply, from the tokens it took.
        rubric, on_output, on_turn: of the root's episode, as for `REPLEnvironment`.

    Raises:
        ConfigError: an argument cannot be used.
    """

    def __init__(
        self,
        llm_chat_fn: Callable[..., Any],
        *,
        system_prompt: str = RLM_SYSTEM_PROMPT,
        max_iterations: int = 30,
        max_depth: int = 2,
        depth: int = 0,
        env_max_iterations_multiplier: int = 5,
        max_batch_workers: int = 8,
        backend_factory: Callable[..., Any] | None = None,
        max_children_total: int | None = None,
        max_children_per_batch: int | None = None,
        result_truncation_limit: int | None = None,
        per_child_timeout_s: float | None = None,
        on_subcall_start: Callable[[int, str, str], Any] | None = None,
        on_subcall_complete: Callable[[int, str, float, str | None], Any] | None = None,
        verbose: bool = False,
        tools: Mapping[str, Callable[..., Any]] | None = None,
        limits: Limits | None = None,
        isolation: str = "auto",
        kernel_name: str = "python3",
        rubric: Any = None,
        sub_model: str | None = None,
        budget: Budget | None = None,
        cost: Callable[[ModelUsage], float] | None = None,
        on_output: Callable[[dict[str, Any]], None] | None = None,
        on_turn: Callable[[Turn], Any] | None = None,
    ) -> None:
        _check_chat(llm_chat_fn)
        check_text("system_prompt", system_prompt)
        for name, value in (
            ("max_iterations", max_iterations),
            ("max_depth", max_depth),
            ("env_max_iterations_multiplier", env_max_iterations_multiplier),
            ("max_batch_workers", max_batch_workers),
        ):
            check_count(name, value)
        check_count("depth", depth, least=0)
        if sub_model is not None:
            check_text("sub_model", sub_model)
            if "model" not in Adapted(llm_chat_fn, ("model",)).options:
                raise ConfigError(f"sub_model = {sub_model!r}: llm_chat_fn takes no model")
        for name, bound in (
            ("max_children_total", max_children_total),
            ("max_children_per_batch", max_children_per_batch),
            ("result_truncation_limit", result_truncation_limit),
        ):
            if bound is not None:
                check_count(name, bound, least=0)
        if per_child_timeout_s is not None:
            check_seconds("per_child_timeout_s", per_child_timeout_s)
        if budget is not None and not isinstance(budget, Budget):
            raise ConfigError(f"budget = {budget!r}; give a Budget")
        environment: dict[str, Any] = {
            "isolation": isolation,
            "kernel_name": kernel_name,
        }
        # A rubric knows one expected answer at a time: children's would make it forget the root's.
        of_root: dict[str, Any] = {"rubric": rubric, "on_output": on_output, "on_turn": on_turn}
        REPLEnvironment(
            tools=tools, limits=limits, **environment, **of_root
        )  # what it refuses is refused here
        if "budget" in (tools or {}):
            raise ConfigError("tools['budget']: the name is reserved in runs; choose another")
        self._workers = max_batch_workers
        self._budget, self._cost = budget or Budget(), cost
        self._config = RunConfig(
            chat_fn=llm_chat_fn,
            make_env=REPLEnvironment,
            system_prompt=system_prompt,
            max_iterations=max_iterations,
            max_depth=max_depth,
            depth=depth,
            sub_model=sub_model,
            env_max_iterations_multiplier=env_max_iterations_multiplier,
            backend_factory=backend_factory,
            max_children_total=max_children_total,
            max_children_per_batch=max_children_per_batch,
            result_truncation_limit=result_truncation_limit,
            per_child_timeout_s=per_child_timeout_s,
            on_subcall_start=on_subcall_start,
            on_subcall_complete=on_subcall_complete,
            log_level=logging.INFO if verbose else logging.DEBUG,
            tools=tools or {},
            limits=limits or Limits(),
            environment=environment,
            of_root=of_root,
        )
        self._last: Run | None = None
        self._spending: Spending | None = None

    @property
    def model(self) -> Callable[..., Any]:
        """The chat function."""
        return self._config.chat_fn

    @property
    def episode(self) -> Episode:
        """The record of the last run, also of one that raised.

        Raises:
            ResetRequired: there was none, or it had no kernel yet.
        """
        if self._last is None or self._last.record is None:
            raise ResetRequired("there is no episode yet; call run() first")
        return self._last.record

    @property
    def progress(self) -> tuple[Progress, ModelUsage] | None:
        """The present or last run as it stands, and what its tree has used; readable from any thread."""
        if self._last is None or self._spending is None:
            return None
        return self._last.progress, self._spending.total

    def run(
        self,
        context: Any,
        task_prompt: str,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        expected_answer: Any = None,
        seed: int | None = None,
    ) -> RLMRunResult:
        """See `run_async`; works inside a running event loop, too."""
        options = {"model": model, "timeout_s": timeout_s, "expected_answer": expected_answer, "seed": seed}
        return portal.run(partial(self.run_async, context, task_prompt, **options))

    async def run_async(
        self,
        context: Any,
        task_prompt: str,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        expected_answer: Any = None,
        seed: int | None = None,
    ) -> RLMRunResult:
        """Run to an answer, or to the end of the iterations; no kernel of the tree outlives it.

        `timeout_s` bounds the seconds of the whole tree. `expected_answer` goes to the rubric alone.
        `seed` is that of the root's kernel; children's are made of it and their prompts.

        Raises:
            ConfigError: there may not be as many kernels as the tree may hold.
            ModelError: the model could not be asked.
            TimeoutError: the time was up.
        """
        if timeout_s is not None:
            check_seconds("timeout_s", timeout_s)
        async with asyncio.timeout(timeout_s):
            tree = Tree(self._workers, self._config.max_depth, Spending(self._budget, self._cost))
            self._last = Run(self._config, tree, None, model, task_prompt)
            self._spending = tree.spending
            try:
                return await self._last.go(context, task_prompt, expected_answer, seed)
            finally:
                self._last.progress.end(None)


def _check_chat(function: object) -> None:
    if not callable(function):
        raise ConfigError(f"llm_chat_fn = {function!r} is not callable; give (messages) or (messages, model)")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    for arguments in ((None,), (None, None)):
        with contextlib.suppress(TypeError):
            signature.bind(*arguments)
            return
    raise ConfigError(f"llm_chat_fn takes {signature}; it is called with (messages) or (messages, model)")
