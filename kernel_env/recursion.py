"""One run of a tree of runs: an episode, the conversation about it, and the children that its cells start."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kernel_env.answer import first_marker
from kernel_env.budget import ModelUsage
from kernel_env.calls import HelperFailure, note_to_cell
from kernel_env.episode import Episode, SkippedBlocks
from kernel_env.errors import BudgetExceeded, HelperError, ModelError
from kernel_env.prompts import (
    QueryMetadata,
    build_rlm_system_prompt,
    build_user_prompt,
    describe_helpers,
    describe_limits,
    extract_code_blocks,
    format_observations,
)
from kernel_env.syntax import parse
from kernel_env.tree import (
    ChildTrace,
    Environment,
    Progress,
    RLMRunResult,
    RunConfig,
    Tree,
    Work,
    derived_seed,
)
from kernel_env.types import REPLAction, REPLObservation

__all__ = ["Run"]

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


class Run:
    """One run of the tree: one episode, and the conversation about it."""

    def __init__(
        self, config: RunConfig, tree: Tree, work: Work | None, model: str | None, prompt: str = ""
    ) -> None:
        self._config = config
        self._tree = tree
        self._work = work
        self._is_root = work is None
        self._model = model
        self._seed: int | None = None
        self._traces: list[ChildTrace] = []
        self.children: list[Episode] = []
        self.record: Episode | None = None
        self.progress = Progress(prompt, model or "")

    async def go(
        self, context: Any, task_prompt: str, expected_answer: Any = None, seed: int | None = None
    ) -> RLMRunResult:
        config = self._config
        self._seed = seed
        tools = {**config.tools, "budget": self._tree.spending_left}
        steps = config.max_iterations * config.env_max_iterations_multiplier
        options = {
            **config.environment,
            "limits": config.limits,
            "tools": tools,
            "max_iterations": steps,
            **self.functions(),
        }
        if self._is_root:
            options |= config.of_root
        env = config.make_env(**options)
        try:
            first = await env.reset_async(
                context=context, task_prompt=task_prompt, expected_answer=expected_answer, seed=seed
            )
            record = self.record = env.episode
            record.children = self.children
            metadata = QueryMetadata.of(context, first.context_length)
            notes = [
                describe_helpers(env.helpers),
                describe_limits(config.limits, config.max_iterations, steps),
                *self._tree.spending.describe(),
            ]
            record.messages = build_rlm_system_prompt(config.system_prompt, metadata, notes=notes)
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
            depth=config.depth,
            child_traces=self._traces,
            episode=record,
            usage=spending.total,
            usage_by_model=dict(spending.by_model),
            usage_by_depth=dict(spending.by_depth),
            stopped_by=stopped_by,
        )

    async def _converse(self, env: Environment, task_prompt: str) -> int:
        config, messages = self._config, env.episode.messages
        messages.append(build_user_prompt(task_prompt))
        for iteration in range(1, config.max_iterations + 1):
            reply = await self._reply_to(messages)
            self.progress.turn = iteration
            messages.append({"role": "assistant", "content": reply})
            blocks = extract_code_blocks(reply)
            log.log(config.log_level, "depth %d, turn %d: %d blocks", config.depth, iteration, len(blocks))
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

    async def _execute(self, env: Environment, blocks: list[str]) -> list[REPLObservation]:
        observations = []
        for number, block in enumerate(blocks, start=1):
            observations.append(await env.step_async(REPLAction(code=block)))
            if observations[-1].done:
                if blocks[number:]:
                    skipped = SkippedBlocks(after_turn=len(env.episode.turns), blocks=blocks[number:])
                    env.episode.skipped.append(skipped)
                break
        return observations

    async def _ask_for_the_last(self, env: Environment) -> None:
        """Without iterations left, what the model says is the answer."""
        messages = env.episode.messages
        if messages[-1]["role"] == "user":
            messages[-1] = {"role": "user", "content": f"{messages[-1]['content']}\n\n{_LAST}"}
        else:
            messages.append({"role": "user", "content": _LAST})
        reply = await self._reply_to(messages)
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

    async def _reply_to(self, messages: list[dict[str, str]]) -> str:
        """The next reply of this run's own conversation."""
        asked = time.monotonic()
        try:
            return await self._ask(messages)
        finally:
            self.progress.model_seconds += time.monotonic() - asked

    async def _ask(self, messages: list[dict[str, str]], model: str | None = None) -> str:
        spending = self._tree.spending
        while True:
            spending.check()
            try:
                return await self._ask_once(messages, model or self._model)
            except ModelError:
                if not spending.may_fail_again():
                    raise
                log.warning("the model failed and is asked again", exc_info=True)

    async def _ask_once(self, messages: list[dict[str, str]], model: str | None) -> str:
        given = [dict(message) for message in messages]  # the function may keep or change it
        options = {"model": model} if "model" in self._config.chat.options else {}
        try:
            reply = await self._config.chat.call(given, **options)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"the model could not be asked: {type(error).__name__}: {error}") from error
        text = reply if isinstance(reply, str) else getattr(reply, "text", None)
        if not isinstance(text, str):
            raise ModelError(f"the model replied with {type(reply).__name__}, which is no text")
        name, usage = self._tree.spending.add(reply, model, self._config.depth)
        if self.record is not None:
            self.record.model_usage[name] = self.record.model_usage.get(name, ModelUsage()) + usage
        return text

    # What the kernel's helpers come to.

    def functions(self) -> dict[str, Any]:
        config = self._config
        if config.backend_factory is None:
            return {"llm_query_fn": self._query, "subcall_fn": self._child, "subcall_batch_fn": self._batch}
        backend = config.backend_factory(
            config.chat_fn,
            system_prompt=config.system_prompt,
            max_iterations=config.max_iterations,
            depth=config.depth,
            env_max_iterations_multiplier=config.env_max_iterations_multiplier,
        )
        return {
            "llm_query_fn": backend.query,
            "llm_batch_fn": backend.query_batched,
            "subcall_fn": backend.recursive_query,
            "subcall_batch_fn": backend.recursive_query_batched,
        }

    async def _query(self, prompt: str, model: str | None = None) -> str:
        try:
            return await self._ask([{"role": "user", "content": prompt}], model or self._config.sub_model)
        except BudgetExceeded as breach:
            raise HelperError(f"llm_query: {breach}") from None

    async def _batch(
        self, prompts: list[str], model: str | None = None, contexts: list[Any] | None = None
    ) -> list[str]:
        most = self._config.max_children_per_batch

        async def answer(number: int) -> str:
            if most is not None and number >= most:
                return HelperFailure(f"rlm_query_batched: a batch has at most {most} children")
            try:
                return await self._child(prompts[number], model, contexts[number] if contexts else None)
            except HelperError as error:
                return HelperFailure(error)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer(number)) for number in range(len(prompts))]
        return [task.result() for task in tasks]

    async def _child(self, prompt: str, model: str | None = None, context: Any = None) -> str:
        config, depth = self._config, self._config.depth + 1
        if depth >= config.max_depth:
            return await self._query(prompt if context is None else f"{prompt}\n\n{_text(context)}", model)
        if config.max_children_total is not None and self._tree.children >= config.max_children_total:
            raise HelperError(f"rlm_query: the run has had its {config.max_children_total} children")
        self._tree.children += 1
        if self._work is None:
            return await self._run_child(prompt, model, context)
        async with self._work.lent():
            return await self._run_child(prompt, model, context)

    async def _run_child(self, prompt: str, model: str | None, context: Any) -> str:
        config = replace(self._config, depth=self._config.depth + 1)
        work, model = Work(self._tree.workers), model or config.sub_model or self._model
        async with self._tree.levels[config.depth], work.held():
            preview = prompt[:_PREVIEW]
            answer, failure = "", None
            run = Run(config, self._tree, work, model, preview)
            self.progress.children.append(run.progress)
            _tell(config.on_subcall_start, config.depth, model or "", preview)
            try:
                async with asyncio.timeout(config.per_child_timeout_s):
                    given = prompt if context is None else context
                    # By its prompt: the order of the children of a batch is anybody's guess.
                    seed = None if self._seed is None else derived_seed(self._seed, prompt)
                    result = await run.go(given, prompt, seed=seed)
                if result.final_answer is None:
                    raise HelperError("rlm_query: the child gave no answer")
                answer = result.final_answer
            except TimeoutError:
                failure = f"the child took more than {config.per_child_timeout_s:g} s"
                raise HelperError(f"rlm_query: {failure}") from None
            except BaseException as error:
                failure = f"{type(error).__name__}: {error}"
                raise
            finally:
                if run.record is not None:
                    self.children.append(run.record)
                seconds = run.progress.end(failure)
                self._traces.append(ChildTrace(config.depth, seconds, preview, answer[:_PREVIEW], failure))
                _tell(config.on_subcall_complete, config.depth, model or "", seconds, failure)
        limit = config.result_truncation_limit
        if limit is None or len(answer) <= limit:
            return answer
        note_to_cell(f"An answer of a child was cut to result_truncation_limit = {limit} characters.")
        return answer[:limit]


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
        value = ast.literal_eval(parse(text.strip(), "eval"))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, str) else text
