"""Records of episodes in the formats that others read: notebooks, a turn a line, conversations to train on.

To add a format, write a function from an episode to text, and its line in `EXPORTERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from kernel_env.episode import Episode
from kernel_env.notebook import notebook_text
from kernel_env.prompts import (
    RLM_SYSTEM_PROMPT,
    QueryMetadata,
    build_rlm_system_prompt,
    build_user_prompt,
    format_observations,
)

__all__ = ["EXPORTERS"]


def _jsonl(episode: Episode) -> str:
    """A line for each turn: the episode's id, the number of the turn, and all of the turn."""
    lines = []
    for number, turn in enumerate(episode.turns, start=1):
        row = {"episode_id": episode.episode_id, "turn": number, **turn.model_dump(mode="python")}
        lines.append(_line(row))
    return "".join(lines)


def _messages(episode: Episode) -> str:
    """A line for the conversation of the episode, and one for each of its descendants'.

    The messages have the shape of chat APIs. Those of the model, which a loss is for, have `weight` 1, as in
    the format of OpenAI for fine-tuning; the others have none. Of an episode without a conversation, whose
    actions came from elsewhere, it is the one that a runner would have had.
    """
    return "".join(map(_line, _conversations(episode, None, 0)))


def _conversations(episode: Episode, parent: str | None, depth: int) -> Iterator[dict[str, Any]]:
    messages = episode.messages or _conversation_of(episode)
    yield {
        "episode_id": episode.episode_id,
        "parent_id": parent,
        "depth": depth,
        "reward": episode.reward,
        "final_answer": episode.final_answer,
        "done_reason": episode.done_reason,
        "messages": [
            {**message, "weight": 1} if message["role"] == "assistant" else message for message in messages
        ],
    }
    for child in episode.children:
        yield from _conversations(child, episode.episode_id, depth + 1)


def _conversation_of(episode: Episode) -> list[dict[str, str]]:
    context = json.loads(episode.context) if episode.context_type == "json" else episode.context
    metadata = QueryMetadata.of(context, len(episode.context))
    messages = [*build_rlm_system_prompt(RLM_SYSTEM_PROMPT, metadata), build_user_prompt(episode.task_prompt)]
    for number, turn in enumerate(episode.turns, start=1):
        action = turn.action
        code = f"FINAL({action.final_answer!r})" if action.is_final else action.code
        messages.append({"role": "assistant", "content": f"```repl\n{code}\n```"})
        if not turn.observation.done:
            shown = format_observations([turn.observation], [code])
            following = build_user_prompt(episode.task_prompt, number)["content"]
            messages.append({"role": "user", "content": f"{shown}\n\n{following}"})
    return messages


def _line(row: dict[str, Any]) -> str:
    # Escapes, as lone surrogates have no UTF-8.
    return json.dumps(row, allow_nan=False, sort_keys=True) + "\n"


EXPORTERS: dict[str, Callable[[Episode], str]] = {
    "ipynb": notebook_text,
    "jsonl": _jsonl,
    "messages": _messages,
}
"""Name of a format → function from an episode to the text of a file."""
