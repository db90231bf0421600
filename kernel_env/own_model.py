"""A model that is named at reset: for one episode, it answers `llm_query` and works on `rlm_query`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kernel_env.budget import Budget, Spending
from kernel_env.config import EnvConfig
from kernel_env.episode import Episode
from kernel_env.errors import ConfigError
from kernel_env.llm import HFChatModel
from kernel_env.prompts import RLM_SYSTEM_PROMPT
from kernel_env.recursion import Run
from kernel_env.tree import Environment, RunConfig, Tree

__all__ = ["OwnModel"]

_WORKERS = 8  # children that work at once, as for LocalRLMRunner


class OwnModel:
    """The model of one episode, and what the episode is configured with because of it."""

    def __init__(self, chat: HFChatModel, config: EnvConfig, run: Run) -> None:
        self._chat = chat
        self._run = run
        self.config = config

    def record_in(self, episode: Episode) -> None:
        """Have what the model takes, and the children that it works in, in this record."""
        self._run.record, episode.children = episode, self._run.children

    @classmethod
    def of(
        cls,
        config: EnvConfig,
        make_env: Callable[..., Environment],
        *,
        llm_model: object,
        hf_token: object,
    ) -> OwnModel | None:
        """The model that a reset asks for; None if it names none.

        Raises:
            ConfigError: what it says does not go together; a token is not in the message.
        """
        if hf_token is not None and not (isinstance(hf_token, str) and hf_token):
            raise ConfigError("reset(hf_token=…): give text")
        if llm_model is None:
            _refuse_without_model(config, hf_token)
            return None
        if not (isinstance(llm_model, str) and llm_model):
            raise ConfigError(f"reset(llm_model={llm_model!r}): give the name of a model, or its address")
        if config.rlm_max_depth > 1 and "budget" in config.tools:
            raise ConfigError("tools['budget']: the name is reserved in the children of a model's episode")
        chat = HFChatModel(llm_model, token=hf_token)
        run = Run(
            RunConfig(
                chat_fn=chat,
                make_env=make_env,
                system_prompt=RLM_SYSTEM_PROMPT,
                max_iterations=config.rlm_max_iterations or config.max_iterations,
                max_depth=config.rlm_max_depth,
                tools=config.tools,
                limits=config.limits,
                environment={"isolation": config.isolation, "kernel_name": config.kernel_name},
            ),
            Tree(_WORKERS, config.rlm_max_depth, Spending(Budget(), None)),
            work=None,
            model=None,
        )
        return cls(chat, replace(config, llm_batch_fn=None, **run.functions()), run)

    async def close(self) -> None:
        """Close the connections to the model."""
        await self._chat.close()


def _refuse_without_model(config: EnvConfig, hf_token: str | None) -> None:
    if hf_token is not None:
        raise ConfigError("reset(hf_token=…) without llm_model: name the model that it is for")
    for option, default in (("rlm_max_depth", 1), ("rlm_max_iterations", None)):
        value = getattr(config, option)
        if value != default:
            raise ConfigError(
                f"{option}={value}: children need a chat model; give llm_model to reset, or use "
                "LocalRLMRunner with a chat function"
            )
