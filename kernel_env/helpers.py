"""The functions of the host that a kernel may call.

To add one, write an `async def` on `HostHelpers` and say in `available` when it is there: its name,
signature and docstring appear in the kernel by themselves.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any

from kernel_env.calls import Helper, HelperFailure
from kernel_env.config import EnvConfig
from kernel_env.errors import HelperError, UsageError
from kernel_env.portal import as_async

__all__ = ["Adapted", "HostHelpers"]

log = logging.getLogger("kernel_env.helpers")

_serving: ContextVar[frozenset[int]] = ContextVar("kernel_env_serving", default=frozenset())
"""The `HostHelpers` whose call this code runs in, and those that its call came from."""

AsyncFunction = Callable[..., Awaitable[Any]]


class HostHelpers:
    """The helpers of one environment, over the functions its user gave."""

    def __init__(self, config: EnvConfig) -> None:
        self._config = config
        self._slots = asyncio.Semaphore(config.limits.helper_concurrency)
        self._query = _adapt(config.llm_query_fn, "model")
        self._batch = _adapt(config.llm_batch_fn, "model")
        self._subcall = _adapt(config.subcall_fn, "model", "context")
        self._subcall_batch = _adapt(config.subcall_batch_fn, "model", "contexts")

    def check_caller(self) -> None:
        """Raise UsageError in code that serves these helpers: its cell waits for it, so it must not wait."""
        if id(self) in _serving.get():
            raise UsageError("a helper of this episode cannot step or read it: its own cell is still running")

    def available(self) -> dict[str, Helper]:
        """Name in the kernel → helper, for what this environment was configured with."""
        functions: dict[str, AsyncFunction] = {}
        if self._query or self._batch:
            functions["llm_query"] = self.llm_query
            functions["llm_query_batched"] = functions["llm_batch"] = self.llm_query_batched
        if functions or self._subcall or self._subcall_batch:
            functions["rlm_query"] = self.rlm_query
            functions["rlm_query_batched"] = self.rlm_query_batched
        helpers = {
            name: Helper(function, inspect.signature(function), inspect.getdoc(function) or "", is_typed=True)
            for name, function in functions.items()
        }
        return helpers | self.tools()

    def tools(self) -> dict[str, Helper]:
        """Of these, the user's own functions."""
        return {name: self._tool(name, tool) for name, tool in self._config.tools.items()}

    async def llm_query(self, prompt: str, model: str | None = None) -> str:
        """Ask a language model and return its reply.

        Raises HelperError if the model cannot be asked.
        """
        if self._query is None:
            return _single(await self._llm_batch([prompt], model))
        return await self._text("llm_query", self._query, prompt, model=model)

    async def llm_query_batched(self, prompts: list[str], model: str | None = None) -> list[str]:
        """Ask a language model several prompts at once; the replies come in the same order.

        An item that failed is a HelperFailure, a text that reads as the error.
        """
        if self._batch is not None:
            return await self._llm_batch(prompts, model)
        return await self._each("llm_query", self._query, [{"prompt": p, "model": model} for p in prompts])

    async def rlm_query(self, prompt: str, model: str | None = None, context: Any = None) -> str:
        """Give a task to a recursive model with a REPL of its own and return its answer.

        `context`, any JSON value, becomes the child's `context`; without it the child gets the prompt.
        Without recursion configured, asks a plain model. Raises HelperError if that fails.
        """
        if self._subcall is None and self._subcall_batch is not None:
            return _single(
                await self.rlm_query_batched([prompt], model, None if context is None else [context])
            )
        if self._subcall is None and context is None:
            return await self.llm_query(prompt, model)
        return await self._text("rlm_query", self._subcall, prompt, model=model, context=context)

    async def rlm_query_batched(
        self, prompts: list[str], model: str | None = None, contexts: list[Any] | None = None
    ) -> list[str]:
        """Give several tasks to recursive models at once; the answers come in the same order.

        `contexts` has one item for each prompt. An item that failed is a HelperFailure.
        """
        if contexts is not None and len(contexts) != len(prompts):
            raise HelperError(f"rlm_query_batched: {len(prompts)} prompts but {len(contexts)} contexts")
        if self._subcall_batch is not None:
            return await self._many(
                "rlm_query_batched", self._subcall_batch, prompts, model=model, contexts=contexts
            )
        if self._subcall is None and contexts is None:
            return await self.llm_query_batched(prompts, model)
        given = contexts if contexts is not None else [None] * len(prompts)
        calls = [{"prompt": p, "model": model, "context": c} for p, c in zip(prompts, given, strict=True)]
        return await self._each("rlm_query", self._subcall, calls)

    async def _llm_batch(self, prompts: list[str], model: str | None) -> list[str]:
        return await self._many("llm_query_batched", self._batch, prompts, model=model)

    async def _text(self, name: str, function: Adapted | None, prompt: str, **options: Any) -> str:
        if function is None:
            raise HelperError(
                f"{name}: this environment has no function that takes a context (give subcall_fn)"
            )
        _check_texts(name, [prompt])
        reply = await self._call(name, function, prompt, options)
        if not isinstance(reply, str):
            raise HelperError(f"{name} failed: the host's function returned {type(reply).__name__}, not str")
        return reply

    async def _each(self, name: str, function: Adapted | None, calls: Sequence[dict[str, Any]]) -> list[str]:
        async def one(prompt: str, **options: Any) -> str:
            try:
                return await self._text(name, function, prompt, **options)
            except HelperError as error:
                return HelperFailure(error)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(**call)) for call in calls]
        return [task.result() for task in tasks]

    async def _many(
        self, name: str, function: Adapted | None, prompts: list[str], **options: Any
    ) -> list[str]:
        _check_texts(name, prompts)
        if not prompts:
            return []
        try:
            if function is None:
                raise HelperError(f"{name}: no function is configured for it")
            replies = await self._call(name, function, list(prompts), options)
            if not isinstance(replies, list | tuple) or len(replies) != len(prompts):
                got = f"{len(replies)} items" if isinstance(replies, list | tuple) else type(replies).__name__
                raise HelperError(
                    f"{name} failed: the host's function returned {got} for {len(prompts)} prompts"
                )
        except HelperError as error:
            return [HelperFailure(error)] * len(prompts)
        return [
            reply
            if isinstance(reply, str)
            else HelperFailure(f"{name} failed: item {index} is {type(reply).__name__}, not str")
            for index, reply in enumerate(replies)
        ]

    async def _call(self, name: str, function: Adapted, subject: Any, options: dict[str, Any]) -> Any:
        untaken = {key for key, value in options.items() if value is not None} - function.options
        if missing := sorted(untaken - {"model"}):  # a function of the prompt alone has one model
            raise HelperError(f"{name}: the host's function does not take {', '.join(missing)}")
        given = {
            key: value
            for key, value in options.items()
            if key in function.options and (value is not None or key not in function.defaults)
        }
        return await self._guarded(name, function.call, subject, **given)

    async def _guarded(self, name: str, function: AsyncFunction, /, *args: Any, **kwargs: Any) -> Any:
        _serving.set(_serving.get() | {id(self)})
        try:
            async with self._slots:
                return await function(*args, **kwargs)
        except HelperError:
            raise
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # it is ours; otherwise a failure like any other, as SystemExit must be too
            log.warning("%s failed", name, exc_info=error)
            raise HelperError(f"{name} failed: {type(error).__name__}") from error

    def _tool(self, name: str, tool: Callable[..., Any]) -> Helper:
        call = as_async(tool)

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            return await self._guarded(name, call, *args, **kwargs)

        return Helper(guarded, _signature(tool) or _ANYTHING, inspect.getdoc(tool) or "")


class Adapted:
    """A user's model function as a coroutine function that takes exactly the options in `options` by keyword.

    What it can take is read from its signature once: trying and catching TypeError would call a model
    twice when the TypeError came from inside.
    """

    def __init__(self, function: Callable[..., Any], names: Sequence[str]) -> None:
        signature = _signature(function)
        parameters = list(signature.parameters.values()) if signature is not None else []
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        # The model comes second whatever its name is, unless that parameter is an option of the user's own,
        # as in `lambda prompt, client=client: …`.
        second = positional[0] if positional else None
        self._second = second is not None and (
            second.name == "model" or (second.default is second.empty and second.name not in names)
        )
        self._second |= second is None and any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self.options = {
            name for name in names if takes_all or name in by_name or (name == "model" and self._second)
        }
        self.defaults = {p.name for p in parameters if p.default is not p.empty}
        self._call = as_async(function)

    async def call(self, subject: Any, **options: Any) -> Any:
        args = [options.pop("model")] if self._second and "model" in options else []
        return await self._call(subject, *args, **options)


def _adapt(function: Callable[..., Any] | None, *names: str) -> Adapted | None:
    return None if function is None else Adapted(function, names)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return None


_ANYTHING = inspect.Signature(
    [
        inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)


def _check_texts(name: str, prompts: object) -> None:
    # The kernel checks this first; whoever speaks the protocol without our code is checked here.
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise HelperError(f"{name}: prompts are text")


def _single(replies: list[str]) -> str:
    if isinstance(replies[0], HelperFailure):
        raise HelperError(replies[0].error)
    return replies[0]
