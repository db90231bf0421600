"""A model that works in an episode, turn by turn, and its recursion into episodes of their own.

`LocalRLMRunner` asks a chat function, runs the code of its replies, shows it the results, and goes on until
there is an answer. `rlm_query` in the kernel starts the same with another task: children are runs of one
tree, which share its limits.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import copy
import inspect
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kernel_env import portal
from kernel_env.answer import first_marker
from kernel_env.budget import Budget, ModelUsage, Spending
from kernel_env.calls import HelperFailure, note_to_cell
from kernel_env.config import Limits, check_count, check_seconds, check_text, from_env
from kernel_env.environment import REPLEnvironment
from kernel_env.episode import Episode, SkippedBlocks
from kernel_env.errors import BudgetExceeded, ConfigError, HelperError, ModelError
from kernel_env.helpers import Adapted
from kernel_env.prompts import (
    RLM_SYSTEM_PROMPT,
    QueryMetadata,
    build_rlm_system_prompt,
    build_user_prompt,
    describe_helpers,
    extract_code_blocks,
    format_observations,
)
from kernel_env.types import REPLAction, REPLObservation

__all__ = ["ChildTrace", "LocalRLMRunner", "RLMRunResult"]

log = logging.getLogger("kernel_env.runner")

_PREVIEW = 200
_NO_CODE = (
    "There was no code in that reply. Go on with a ```repl block, or submit your answer in one with "
    "FINAL(…) or FINAL_VAR(…)."
)
_LAST = (
    "You have run out of REPL iterations. Give the best answer you can now, from what you have seen: write "
    "FINAL(your answer) on a line of its own, or FINAL_VAR(name) for a variable. No more code runs."
)
_SUBMIT_WHAT_THERE_IS = """\
# The budget of the run is used up.
if isinstance(answer, dict) and answer.get('content'):
    answer['ready'] = True
"""


@dataclass(frozen=True)
class ChildTrace:
    """One child run, as the run that started it saw it."""

    depth: int
    duration_s: float
    prompt_preview: str
    result_preview: str
    error: str | None


@dataclass(frozen=True)
class RLMRunResult:
    """How a run ended."""

    final_answer: str | None
    messages: list[dict[str, str]]
    """The conversation, with the last reply."""
    iterations: int
    """Replies of the model that were acted on."""
    depth: int
    child_traces: list[ChildTrace]
    """Of this run's own children, in the order in which they ended."""
    episode: Episode
    """The record, with those of the children."""
    usage: ModelUsage
    """Of this run and all its children; of a child's result, of the whole tree so far."""
    usage_by_model: dict[str, ModelUsage]
    usage_by_depth: dict[int, ModelUsage]
    stopped_by: str | None
    """The budget that ended the run, with what was used of it; None if none did."""


class _Tree:
    """What all runs of one tree share.

    A child has one of its level's places for as long as it lives, so that there are never more kernels than
    these, and one of the workers' while it works. Who holds a place of a level waits for deeper ones alone,
    and the deepest level waits for none: so no tree can wait for itself.
    """

    def __init__(self, workers: int, depth: int, spending: Spending) -> None:
        self.spending = spending
        self.workers = asyncio.Semaphore(workers)
        self.levels = [asyncio.Semaphore(workers) for _ in range(depth + 1)]
        self.children = 0
        """Children that were started."""

    async def spending_left(self) -> dict[str, float | None]:
        """What is left of the whole run's budget: tokens, cost, seconds, …; None where there is no bound."""
        return self.spending.left()


class _Work:
    """A child's place among the workers, lent to its own children while it waits for them."""

    def __init__(self, workers: asyncio.Semaphore) -> None:
        self._workers = workers
        self._is_held = False
        self._waits = 0

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        await self._take()
        try:
            yield
        finally:
            self._give_back()

    @contextlib.asynccontextmanager
    async def lent(self) -> AsyncIterator[None]:
        self._waits += 1
        self._give_back()
        try:
            yield
        finally:
            self._waits -= 1  # several threads of a cell may wait at once
        if self._waits == 0:
            await self._take()

    async def _take(self) -> None:
        await self._workers.acquire()
        self._is_held = True

    def _give_back(self) -> None:
        if self._is_held:
            self._is_held = False
            self._workers.release()


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
        tools, limits, isolation, rubric: of every episode of the tree, as for `REPLEnvironment`.
        budget: of the whole tree; a run that has used it up ends with what it has in `answer["content"]`.
            `budget()` in the kernels tells what is left.
        cost: of one reply, from the tokens it took.

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
        rubric: Any = None,
        budget: Budget | None = None,
        cost: Callable[[ModelUsage], float] | None = None,
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
        for name, bound in (
            ("max_children_total", max_children_total),
            ("max_children_per_batch", max_children_per_batch),
            ("result_truncation_limit", result_truncation_limit),
        ):
            if bound is not None:
                check_count(name, bound, least=0)
        if per_child_timeout_s is not None:
            check_seconds("per_child_timeout_s", per_child_timeout_s)
        self.max_iterations = max_iterations
        self.max_depth = max_depth
        self.depth = depth
        self.system_prompt = system_prompt
        self._chat_fn = llm_chat_fn
        self._chat = Adapted(llm_chat_fn, ("model",))
        self._steps = max_iterations * env_max_iterations_multiplier
        self._multiplier = env_max_iterations_multiplier
        self._workers = max_batch_workers
        self._backend_factory = backend_factory
        self._most_children = max_children_total
        self._most_of_batch = max_children_per_batch
        self._truncation = result_truncation_limit
        self._child_seconds = per_child_timeout_s
        self._on_start, self._on_complete = on_subcall_start, on_subcall_complete
        self._level = logging.INFO if verbose else logging.DEBUG
        self._budget, self._cost = budget or Budget(), cost
        self._tools = tools or {}
        self._environment: dict[str, Any] = {
            "tools": tools,
            "limits": limits,
            "isolation": isolation,
            "rubric": rubric,
        }
        REPLEnvironment(**self._environment)  # what it refuses is refused here
        if "budget" in self._tools:
            raise ConfigError("tools['budget']: the name is reserved in runs; choose another")

    def run(
        self,
        context: Any,
        task_prompt: str,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        expected_answer: Any = None,
    ) -> RLMRunResult:
        """See `run_async`; works inside a running event loop, too."""
        return portal.run(self._run_here, context, task_prompt, model, timeout_s, expected_answer)

    async def _run_here(self, *arguments: Any) -> RLMRunResult:
        context, task_prompt, model, timeout_s, expected_answer = arguments
        return await self.run_async(
            context, task_prompt, model=model, timeout_s=timeout_s, expected_answer=expected_answer
        )

    def _at_depth(self, depth: int) -> LocalRLMRunner:
        runner = copy.copy(self)
        runner.depth = depth
        return runner

    async def run_async(
        self,
        context: Any,
        task_prompt: str,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        expected_answer: Any = None,
    ) -> RLMRunResult:
        """Run to an answer, or to the end of the iterations; no kernel of the tree outlives it.

        `timeout_s` bounds the seconds of the whole tree. `expected_answer` goes to the rubric alone.

        Raises:
            ConfigError: there may not be as many kernels as the tree may hold.
            ModelError: the model could not be asked.
            TimeoutError: the time was up.
        """
        if timeout_s is not None:
            check_seconds("timeout_s", timeout_s)
        at_once, most = 1 + self._workers * (self.max_depth - 1), from_env().max_kernels
        if at_once > most:
            raise ConfigError(
                f"KERNEL_ENV_MAX_KERNELS is {most}, and a tree with max_depth={self.max_depth} and "
                f"max_batch_workers={self._workers} may hold {at_once} kernels at once"
            )
        async with asyncio.timeout(timeout_s):
            tree = _Tree(self._workers, self.max_depth, Spending(self._budget, self._cost))
            return await _Run(self, tree, None, model).go(context, task_prompt, expected_answer)


class _Run:
    """One run of the tree: one episode, and the conversation about it."""

    def __init__(self, runner: LocalRLMRunner, tree: _Tree, work: _Work | None, model: str | None) -> None:
        self._runner = runner
        self._tree = tree
        self._work = work
        self._model = model
        self._traces: list[ChildTrace] = []
        self._children: list[Episode] = []
        self.record: Episode | None = None

    async def go(self, context: Any, task_prompt: str, expected_answer: Any = None) -> RLMRunResult:
        runner = self._runner
        tools = {**runner._tools, "budget": self._tree.spending_left}
        options = {**runner._environment, "tools": tools, **self._functions()}
        env = REPLEnvironment(**options, max_iterations=runner._steps)
        try:
            first = await env.reset_async(
                context=context, task_prompt=task_prompt, expected_answer=expected_answer
            )
            record = self.record = env.episode
            record.children = self._children
            metadata = QueryMetadata.of(context, first.context_length)
            notes = [describe_helpers(env.helpers)]
            record.messages = build_rlm_system_prompt(runner.system_prompt, metadata, notes=notes)
            stopped_by = None
            try:
                iterations = await self._converse(env, task_prompt)
            except BudgetExceeded as breach:
                stopped_by = str(breach)
                iterations = sum(message["role"] == "assistant" for message in record.messages)
                if not record.done:
                    await env.step_async(REPLAction(code=_SUBMIT_WHAT_THERE_IS))
        finally:
            await env.close_async()
        spending = self._tree.spending
        return RLMRunResult(
            final_answer=record.final_answer,
            messages=record.messages,
            iterations=iterations,
            depth=runner.depth,
            child_traces=self._traces,
            episode=record,
            usage=spending.total,
            usage_by_model=dict(spending.by_model),
            usage_by_depth=dict(spending.by_depth),
            stopped_by=stopped_by,
        )

    async def _converse(self, env: REPLEnvironment, task_prompt: str) -> int:
        runner, messages = self._runner, env.episode.messages
        messages.append(build_user_prompt(task_prompt))
        for iteration in range(1, runner.max_iterations + 1):
            reply = await self._ask(messages)
            messages.append({"role": "assistant", "content": reply})
            blocks = extract_code_blocks(reply)
            log.log(runner._level, "depth %d, turn %d: %d blocks", runner.depth, iteration, len(blocks))
            observations = await self._execute(env, blocks)
            if env.episode.done:
                if env.episode.final_answer is None:
                    break
                return iteration
            shown = format_observations(observations, blocks) if blocks else _NO_CODE
            following = build_user_prompt(task_prompt, iteration)["content"]
            messages.append({"role": "user", "content": f"{shown}\n\n{following}"})
        await self._ask_for_the_last(env)
        return iteration

    async def _execute(self, env: REPLEnvironment, blocks: list[str]) -> list[REPLObservation]:
        observations = []
        for number, block in enumerate(blocks, start=1):
            observations.append(await env.step_async(REPLAction(code=block)))
            if observations[-1].done:
                if blocks[number:]:
                    skipped = SkippedBlocks(after_turn=len(env.episode.turns), blocks=blocks[number:])
                    env.episode.skipped.append(skipped)
                break
        return observations

    async def _ask_for_the_last(self, env: REPLEnvironment) -> None:
        """Without iterations left, what the model says is the answer."""
        messages = env.episode.messages
        if messages[-1]["role"] == "user":
            messages[-1] = {"role": "user", "content": f"{messages[-1]['content']}\n\n{_LAST}"}
        else:
            messages.append({"role": "user", "content": _LAST})
        reply = await self._ask(messages)
        messages.append({"role": "assistant", "content": reply})
        marker = first_marker(reply)
        if marker is not None and marker.is_variable and not env.episode.done:
            await env.step_async(REPLAction(code=f"FINAL_VAR({marker.text!r})"))
            return
        answer = reply.strip() if marker is None else _literal(marker.text)
        if answer and not env.episode.done:
            await env.step_async(REPLAction(is_final=True, final_answer=answer))
        elif answer:
            env.episode.final_answer = answer

    async def _ask(self, messages: list[dict[str, str]]) -> str:
        spending = self._tree.spending
        while True:
            spending.check()
            try:
                return await self._ask_once(messages)
            except ModelError:
                if not spending.may_fail_again():
                    raise
                log.warning("the model failed and is asked again", exc_info=True)

    async def _ask_once(self, messages: list[dict[str, str]]) -> str:
        given = [dict(message) for message in messages]  # the function may keep or change it
        options = {"model": self._model} if "model" in self._runner._chat.options else {}
        try:
            reply = await self._runner._chat.call(given, **options)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"the model could not be asked: {type(error).__name__}: {error}") from error
        text = reply if isinstance(reply, str) else getattr(reply, "text", None)
        if not isinstance(text, str):
            raise ModelError(f"the model replied with {type(reply).__name__}, which is no text")
        self._tree.spending.add(reply, self._model, self._runner.depth)
        return text

    # What the kernel's helpers come to.

    def _functions(self) -> dict[str, Any]:
        runner = self._runner
        if runner._backend_factory is None:
            return {"llm_query_fn": self._query, "subcall_fn": self._child, "subcall_batch_fn": self._batch}
        backend = runner._backend_factory(
            runner._chat_fn,
            system_prompt=runner.system_prompt,
            max_iterations=runner.max_iterations,
            depth=runner.depth,
            env_max_iterations_multiplier=runner._multiplier,
        )
        return {
            "llm_query_fn": backend.query,
            "llm_batch_fn": backend.query_batched,
            "subcall_fn": backend.recursive_query,
            "subcall_batch_fn": backend.recursive_query_batched,
        }

    async def _query(self, prompt: str, model: str | None = None) -> str:
        run = _Run(self._runner, self._tree, None, model or self._model)
        try:
            return await run._ask([{"role": "user", "content": prompt}])
        except BudgetExceeded as breach:
            raise HelperError(f"llm_query: {breach}") from None

    async def _batch(
        self, prompts: list[str], model: str | None = None, contexts: list[Any] | None = None
    ) -> list[str]:
        most = self._runner._most_of_batch

        async def one(number: int) -> str:
            if most is not None and number >= most:
                raise HelperError(f"rlm_query_batched: a batch has at most {most} children")
            return await self._child(prompts[number], model, contexts[number] if contexts else None)

        async def item(number: int) -> str | HelperFailure:
            try:
                return await one(number)
            except HelperError as error:
                return HelperFailure(error)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(item(number)) for number in range(len(prompts))]
        return [task.result() for task in tasks]

    async def _child(self, prompt: str, model: str | None = None, context: Any = None) -> str:
        runner, depth = self._runner, self._runner.depth + 1
        if depth >= runner.max_depth:
            return await self._query(prompt if context is None else f"{prompt}\n\n{_text(context)}", model)
        if runner._most_children is not None and self._tree.children >= runner._most_children:
            raise HelperError(f"rlm_query: the run has had its {runner._most_children} children")
        self._tree.children += 1
        if self._work is None:
            return await self._run_child(prompt, model, context)
        async with self._work.lent():
            return await self._run_child(prompt, model, context)

    async def _run_child(self, prompt: str, model: str | None, context: Any) -> str:
        runner = self._runner._at_depth(self._runner.depth + 1)
        work = _Work(self._tree.workers)
        async with self._tree.levels[runner.depth], work.held():
            began, told = time.monotonic(), model or self._model or ""
            _tell(runner._on_start, runner.depth, told, prompt[:_PREVIEW])
            answer, failure = "", None
            run = _Run(runner, self._tree, work, model or self._model)
            try:
                async with asyncio.timeout(runner._child_seconds):
                    result = await run.go(prompt if context is None else context, prompt)
                if result.final_answer is None:
                    raise HelperError("rlm_query: the child gave no answer")
                answer = result.final_answer
            except BudgetExceeded as breach:
                failure = str(breach)
                raise HelperError(f"rlm_query: {breach}") from None
            except TimeoutError:
                failure = f"the child took more than {runner._child_seconds:g} s"
                raise HelperError(f"rlm_query: {failure}") from None
            except BaseException as error:
                failure = f"{type(error).__name__}: {error}"
                raise
            finally:
                if run.record is not None:
                    self._children.append(run.record)
                seconds = time.monotonic() - began
                self._traces.append(
                    ChildTrace(runner.depth, seconds, prompt[:_PREVIEW], answer[:_PREVIEW], failure)
                )
                _tell(runner._on_complete, runner.depth, told, seconds, failure)
        limit = runner._truncation
        if limit is None or len(answer) <= limit:
            return answer
        note_to_cell(f"An answer of a child was cut to result_truncation_limit = {limit} characters.")
        return answer[:limit]


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


def _tell(callback: Callable[..., Any] | None, *arguments: Any) -> None:
    if callback is not None:
        try:
            callback(*arguments)
        except Exception:
            log.exception("a callback raised; the run goes on")


def _text(context: Any) -> str:
    return context if isinstance(context, str) else json.dumps(context, ensure_ascii=False)


def _literal(text: str) -> str:
    """An answer in quotes, without them."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, str) else text
