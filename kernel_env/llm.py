"""Chat models: what a runner asks, one behind an OpenAI-compatible server, and one that follows a script.

A runner takes any function of `(messages)` or `(messages, model)`; these are such functions, whose replies
tell how many tokens they took.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kernel_env.config import check_count, check_seconds
from kernel_env.episode import Episode
from kernel_env.errors import ConfigError, ModelError, NotebookError, boundary
from kernel_env.notebook import read_cells
from kernel_env.reading import load_notebook

__all__ = ["ChatModel", "ChatReply", "HFChatModel", "ScriptedChatModel"]

log = logging.getLogger("kernel_env.llm")

Messages = list[dict[str, str]]

_LONGEST_WAIT = 60.0  # seconds that a server's Retry-After is followed


@dataclass(frozen=True)
class ChatReply:
    """What a model replied, and what that took."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str | None = None
    """As the server named it."""


class ChatModel(Protocol):
    """A function that answers a conversation."""

    async def __call__(self, messages: Messages, model: str | None = None) -> ChatReply:
        """Reply to the last message.

        Raises:
            ModelError: it could not.
        """
        ...


class ScriptedChatModel:
    """A model that follows a script, for tests and examples without one.

    Args:
        script: the replies in the order of asking; or a function of the messages; or the path of a notebook
            or of a Python file with `# %%` lines, each code cell of which is a reply. The notebook of a run
            has the replies itself: each conversation, by its first request, and each `llm_query`, by its
            prompt, goes as it went there, also those of children.

    Raises:
        ConfigError: the script is none of these, or cannot be read.
    """

    def __init__(self, script: Sequence[str] | Callable[[Messages], str] | Path) -> None:
        self.asked: list[Messages] = []
        """The conversations it was asked to go on with."""
        if isinstance(script, Path) and (recorded := _recorded_replies(script)) is not None:
            script = recorded
        elif isinstance(script, Path):
            script = [f"```repl\n{cell}\n```" for cell in read_cells(script)]
        if not callable(script) and not all(isinstance(reply, str) for reply in script):
            raise ConfigError("script: give replies, a function of the messages, or a path")
        self._script = script

    async def __call__(self, messages: Messages, model: str | None = None) -> ChatReply:
        self.asked.append(messages)
        if callable(self._script):
            text = self._script(messages)
        elif len(self.asked) <= len(self._script):
            text = self._script[len(self.asked) - 1]
        else:
            raise ModelError(f"the script has {len(self._script)} replies, and this would be the next")
        # There is no tokenizer: a word or a mark for a token is near enough to test budgets with.
        prompt = sum(len(message["content"].split()) for message in messages)
        return ChatReply(text, prompt, len(text.split()), model or "scripted")


def _recorded_replies(path: Path) -> Callable[[Messages], str] | None:
    """What the models of a run replied, from its notebook; None if this is not one."""
    try:
        if path.suffix != ".ipynb" or "kernel_env" not in load_notebook(path).get("metadata", {}):
            return None
    except NotebookError:
        return None  # `read_cells` says what is wrong
    with boundary(ConfigError, "the script"):
        episode = Episode.from_notebook(path)
    if not episode.messages:
        return None
    replies: dict[tuple[str, int], deque[str]] = defaultdict(deque)
    episodes = [episode]
    for one in episodes:
        episodes += one.children
    for one in sorted(episodes, key=lambda one: one.started):
        told = [message["content"] for message in one.messages if message["role"] == "assistant"]
        for number, reply in enumerate(told):
            replies[one.messages[2]["content"], number].append(reply)
    calls = [call for one in episodes for turn in one.turns for call in turn.helper_calls]
    for call in sorted(calls, key=lambda call: call.started):
        if call.name.startswith("llm_") and call.error is None:
            prompts = call.arguments.get("prompts", [call.arguments.get("prompt")])
            results = call.result if isinstance(call.result, list) else [call.result]
            for prompt, result in zip(prompts, results, strict=True):
                replies[prompt, 0].append(result)

    def reply_to(messages: Messages) -> str:
        key = (
            messages[min(2, len(messages) - 1)]["content"],
            sum(m["role"] == "assistant" for m in messages),
        )
        if not replies[key]:
            raise ModelError(
                f"the run in {str(path)!r} has no reply left to {key[0]!r:.200}, number {key[1] + 1}"
            )
        return replies[key].popleft()

    return reply_to


class HFChatModel:
    """A model behind an OpenAI-compatible server, or the Hugging Face Hub; needs the extra `llm`.

    Args:
        model: its name there; one that a call names instead goes before it.
        base_url: of the server's API, as `http://localhost:8000/v1` (vLLM, SGLang, Ollama, llama.cpp);
            without it the Hub's inference providers are asked.
        token: of the Hub or the server; it is in no message, log or `repr`.
        timeout: seconds for one request.
        attempts: requests for one reply; only what may pass is tried again (429, 5xx, a broken connection,
            nothing in time), after what Retry-After says or a growing pause.
        options: of `chat_completion`, such as `temperature` and `max_tokens`.

    Raises:
        ConfigError: the extra is not installed, or an argument cannot be used.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        token: str | None = None,
        timeout: float = 120.0,
        attempts: int = 5,
        **options: Any,
    ) -> None:
        try:
            import stamina
            from huggingface_hub import AsyncInferenceClient
        except ImportError as error:
            raise ConfigError("HFChatModel needs the extra: pip install 'kernel_env[llm]'") from error
        if model is None and base_url is None:
            raise ConfigError("HFChatModel: give a model, or the base_url of a server with one")
        check_seconds("timeout", timeout)
        check_count("attempts", attempts)
        self.model, self.base_url = model, base_url
        self._timeout = timeout
        self.options = options
        self._client = AsyncInferenceClient(base_url=base_url, token=token, timeout=timeout)
        self._retrying = stamina.AsyncRetryingCaller(
            attempts=attempts, timeout=None, wait_initial=0.5, wait_max=30.0
        ).on(_pause_after)

    def __repr__(self) -> str:
        return f"HFChatModel({self.model!r}, base_url={self.base_url!r})"

    async def __call__(self, messages: Messages, model: str | None = None) -> ChatReply:
        reply: ChatReply = await self._retrying(self._ask, messages, model or self.model)
        return reply

    async def close(self) -> None:
        """Close the connections to the server."""
        await self._client.close()  # type: ignore[no-untyped-call]

    async def _ask(self, messages: Messages, model: str | None) -> ChatReply:
        try:
            async with asyncio.timeout(self._timeout):
                completion = await self._client.chat_completion(messages, model=model, **self.options)
            choice, usage = completion.choices[0], completion.usage
            text = choice.message.content or ""
        except TimeoutError as error:
            raise ModelError(f"no reply within {self._timeout:g} s", is_transient=True) from error
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            if getattr(error, "response", None) is not None:
                raise _model_error(error) from error
            raise ModelError(f"the server's reply is no chat completion: {error}") from error
        except Exception as error:
            raise _model_error(error) from error
        prompt, replied = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (0, 0)
        return ChatReply(text, prompt or 0, replied or 0, completion.model)


def _model_error(error: Exception) -> ModelError:
    """What a request came to; the server's own words are kept."""
    response = getattr(error, "response", None)
    if response is None:  # it never came to a reply
        return ModelError(f"the server cannot be reached: {error or type(error).__name__}", is_transient=True)
    status = response.status_code
    words = " ".join(str(getattr(error, "server_message", None) or error).split())
    return ModelError(
        f"the server replied {status}: {words}",
        is_transient=status == 429 or status >= 500,
        retry_after=_seconds(response.headers.get("retry-after")),
    )


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header: a number of seconds, or a date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    try:
        return max(float(retry_after), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _pause_after(error: Exception) -> bool | float:
    if not isinstance(error, ModelError) or not error.is_transient:
        return False
    log.warning("a model is asked again: %s", error)
    return True if error.retry_after is None else min(error.retry_after, _LONGEST_WAIT)
