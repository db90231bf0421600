"""What of an episode is written into a notebook for people: its head, a section per turn, its helper calls.

Task, answer, replies of models and arguments of calls may hold anything: they are shown, never rendered as
HTML, and no link or picture of theirs is loaded.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

from kernel_env.episode import Episode, HelperCall, Turn
from kernel_env.prompts import split_reply

__all__ = ["call_html", "call_preview", "call_text", "children_text", "head", "reasoning_of_turns", "section"]

_ITEMS = 20
_CHARS = 400
_LONGEST = 20_000
_ACTIVE = re.compile(r"<(?=[A-Za-z/!?])|\](?=[(:\[])")
_ZERO_WIDTH = "​"
_NOTE = "[kernel_env] "  # of the environment, on the stderr of an observation
_SPECIAL = "\\`*_{}[]()#+!|$~"


def head(episode: Episode) -> str:
    """The title, the task, and a table of what came of the episode."""
    usage, turns = episode.total_usage, episode.turns
    facts = [("Answer", _shown(episode.final_answer))]
    if episode.expected_answer is not None:
        facts.append(("Expected", _shown(_text(episode.expected_answer))))
    facts += [
        ("Reward", "–" if episode.reward is None else f"{episode.reward:g}"),
        ("Ended by", (episode.done_reason or "not ended").replace("_", " ")),
        ("Turns", f"{len(turns)} of {episode.max_iterations}"),
        ("Context", f"{len(episode.context):,} characters"),
    ]
    if episode.model_usage:
        facts.append(
            ("Model", ", ".join(_escaped(name) or "unnamed" for name in sorted(episode.model_usage)))
        )
    if usage.calls:
        cost = f", cost {usage.cost:,.4g}" if usage.cost else ""
        tokens = usage.prompt_tokens + usage.completion_tokens
        told = f", {usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens" if tokens else ""
        facts.append(("Model calls", f"{usage.calls:,}{told}{cost}"))
    if calls := sum(len(turn.helper_calls) for turn in turns):
        facts.append(("Helper calls", f"{calls:,}"))
    if episode.children:
        facts.append(("Children", f"{len(episode.children):,}"))
    seed = "" if episode.seed is None else f", seed {episode.seed}"
    facts.append(("Kernel", f"{_escaped(episode.kernel_name)}{seed}"))
    facts.append(("Isolation", episode.isolation))
    facts.append(("Time in cells", f"{episode.total_execution_time:.2f} s"))
    ledgers = [turn.observation.usage for turn in turns if turn.observation.usage is not None]
    if ledgers:
        facts.append(("Processor time", f"{sum(ledger.cpu for ledger in ledgers):.2f} s"))
        facts.append(("Most memory", f"{max(ledger.peak_memory for ledger in ledgers) / 2**20:,.0f} MB"))
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    task = "\n".join(f"> {_escaped(line)}" for line in episode.task_prompt.splitlines())
    task = task or "> *no task prompt*"
    return f"# Episode {_escaped(episode.episode_id)}\n\n{task}\n\n| | |\n|---|---|\n{rows}\n"


def section(number: int, turn: Turn, reasoning: str) -> str:
    """The heading of a turn, what came of it in a line, and what the model said before its code."""
    observation = turn.observation
    facts = [f"**{observation.status}**" if observation.status != "ok" else "ok"]
    facts.append(f"{observation.result.execution_time:.2f} s")
    facts += [f"reward {observation.reward:g}"] if observation.reward is not None else []
    if turn.helper_calls:
        facts.append(f"{len(turn.helper_calls)} helper call{'s' * (len(turn.helper_calls) > 1)}")
    facts += ["a fresh kernel took over"] if observation.restarted else []
    if observation.done:
        facts.append(f"ended: {(observation.done_reason or '').replace('_', ' ')}")
    notes = [line for line in observation.result.stderr.splitlines() if line.startswith(_NOTE)]
    told = "".join(f"\n\n*{_escaped(note.removeprefix(_NOTE))}*" for note in notes)
    said = f"\n\n{_inert(_cut(reasoning, _LONGEST))}" if reasoning.strip() else ""
    return f"## Turn {number}\n\n{' · '.join(facts)}{told}{said}"


def children_text(children: Sequence[tuple[str | None, Episode]]) -> str:
    """A list of the episodes that a cell started, with links to those that have a file."""
    lines = ["Children of this cell:", ""]
    for file, child in children:
        task, answer = _shown(child.task_prompt), _shown(child.final_answer)
        lines.append(f"- {task if file is None else f'[{task}]({file})'}: {answer}")
    return "\n".join(lines)


def reasoning_of_turns(episode: Episode) -> list[str]:
    """Of each turn, what the model said before its code; the turns of a reply are found by their code."""
    said: list[list[str]] = [[] for _ in episode.turns]
    at = 0
    for message in episode.messages:
        if message["role"] != "assistant":
            continue
        parts = split_reply(message["content"])
        if not parts and at < len(said):
            said[at].append(message["content"].strip())
        for before, code in parts:
            if at == len(said) or episode.turns[at].action.code != code:
                break  # it was not run
            said[at].append(before)
            at += 1
    return ["\n\n".join(filter(None, pieces)) for pieces in said]


def call_preview(call: HelperCall) -> dict[str, Any]:
    """What a viewer may show of a call; the whole of it is in the metadata of its cell."""
    asked, replied = _items(call)
    return {
        "name": call.name,
        "seconds": round(call.duration, 3),
        "error": call.error,
        "failed": len(call.failed),
        "asked": [_cut(text, _CHARS) for text in asked[:_ITEMS]],
        "replied": [_cut(text, _CHARS) for text in replied[:_ITEMS]],
        "items": len(asked),
    }


def call_text(call: HelperCall) -> str:
    """A call in a line of plain text."""
    asked, _ = _items(call)
    items = f"{len(asked)} prompts" if "prompts" in call.arguments else _cut(" ".join(asked).strip(), 80)
    outcome = f"failed: {call.error}" if call.error else "ok"
    if call.failed:
        outcome = f"{len(call.failed)} failed"
    return f"{call.name}({items}) · {call.duration:.2f} s · {outcome}"


def call_html(call: HelperCall) -> str:
    """A call as a line that opens to its prompts and replies."""
    preview = call_preview(call)
    rows = []
    for number, asked in enumerate(preview["asked"]):
        replied = preview["replied"][number] if number < len(preview["replied"]) else ""
        style = "white-space:pre-wrap;text-align:left;vertical-align:top"
        cells = "".join(f'<td style="{style}">{html.escape(text)}</td>' for text in (asked, replied))
        rows.append(f"<tr>{cells}</tr>")
    if preview["items"] > len(rows):
        rows.append(f'<tr><td colspan="2">… {preview["items"] - len(rows):,} more</td></tr>')
    header = "<tr><th>asked</th><th>replied</th></tr>"
    summary = html.escape(call_text(call))
    return (
        f"<details><summary><code>{summary}</code></summary><table>{header}{''.join(rows)}</table></details>"
    )


def _items(call: HelperCall) -> tuple[list[str], list[str]]:
    arguments = call.arguments
    if isinstance(arguments.get("prompts"), list):
        replied = call.result if isinstance(call.result, list) else [call.error] * len(arguments["prompts"])
        return [_text(prompt) for prompt in arguments["prompts"]], [_text(reply) for reply in replied]
    if set(arguments) <= {"prompt", "model"} and "prompt" in arguments:
        asked = _text(arguments["prompt"])
    else:
        asked = ", ".join(f"{name}={_cut(_text(arguments[name]), _CHARS)}" for name in sorted(arguments))
    return [asked], [call.error or _text(call.result)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def _shown(answer: str | None) -> str:
    if answer is None:
        return "*none*"
    line = " ".join(answer[: 4 * 300].split())
    return _escaped(line if len(line) <= 300 else line[:300] + "…") or "*empty*"


def _escaped(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in _SPECIAL else c for c in text)


def _inert(markdown: str) -> str:
    # A space without width after what would begin a tag or a link: entities would show inside of code.
    return _ACTIVE.sub(lambda match: match[0] + _ZERO_WIDTH, markdown)
