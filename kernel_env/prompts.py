"""What a recursive language model is told, what of its reply is code, and how results are shown to it.

The message lists have the shape of chat APIs: `{"role": …, "content": …}`. The names are OpenEnv's.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markdown_it import MarkdownIt

from kernel_env.calls import Helper
from kernel_env.config import Limits
from kernel_env.fitting import clip
from kernel_env.types import REPLObservation

__all__ = [
    "RLM_SYSTEM_PROMPT",
    "RLM_SYSTEM_PROMPT_QWEN",
    "QueryMetadata",
    "build_rlm_system_prompt",
    "build_user_prompt",
    "describe_helpers",
    "describe_limits",
    "extract_code_blocks",
    "format_observations",
    "split_reply",
]

_LENGTHS_SHOWN = 100
_LANGUAGES = frozenset({"repl", "python", "py"})

_SYSTEM = """\
You answer a query about a context that may be far larger than what you can read at once. The
context is not in this conversation. It is in the variable `context` of a persistent Python REPL
(an IPython kernel), which you work with over several turns until you submit an answer.

# How to run code

Put code into fenced blocks marked `repl`. All blocks of a reply run in the order written, in one
namespace that lasts for the whole episode. You then see what they printed, cut if it is long:
print what you need, and keep the rest in variables.

```repl
print(type(context), len(context))
print(context[:1000])
```

# How to work

Look at the context first: its type, its size, samples from its beginning, middle and end. Then
make a plan that suits it, and carry it out in code: filter and count with Python where that is
exact, cut the context into pieces and ask a model about them where it takes understanding, and
combine the results in code. Check what you found before you submit it.

- `llm_query(prompt)` asks a language model once and returns its reply. It sees the prompt alone:
  put the text it is to read into it. Several hundred thousand characters fit.
- `llm_query_batched(prompts)` asks many at once, and is far faster than a loop; the replies come
  in the same order.
- `rlm_query(prompt, context=data)` gives a task to a model with a REPL of its own, in which
  `data` is `context`. Use it for parts of the work that take several steps themselves; for a
  single question `llm_query` is cheaper.
- `rlm_query_batched(prompts, contexts=[…])` does so for several tasks at once.

```repl
pieces = [context[i : i + 100_000] for i in range(0, len(context), 100_000)]
replies = llm_query_batched([f"List every date in this text, or say none.\\n\\n{piece}" for piece in pieces])
for number, reply in enumerate(replies):
    print(number, reply[:200])
```
{cost}
# How to answer

When you are sure, and not before, submit the answer from a `repl` block, in one of these ways:

- `FINAL(value)` submits a value.
- `FINAL_VAR("name")` submits a variable, whole, however long it is.
- `answer["content"] = value` and `answer["ready"] = True` do the same.

The first block that submits ends the episode; blocks after it do not run. `SHOW_VARS()` lists
your variables. A failed call raises `HelperError`, which you can catch; a failed item of a batch
is a text that says so.

Do not only describe what you would do: write the code that does it, in this reply.
"""

_COST = """
# What it costs

Every call of a model costs time and money. Put as much into one prompt as is sensible, a hundred
thousand characters rather than a hundred, use batches, and do not ask a model what Python can
compute.
"""

RLM_SYSTEM_PROMPT = _SYSTEM.replace("{cost}", "")
"""How to work in the REPL, without a word on cost."""
RLM_SYSTEM_PROMPT_QWEN = _SYSTEM.replace("{cost}", _COST)
"""The same with guidance on cost, for models that call others for every line."""


@dataclass(frozen=True)
class QueryMetadata:
    """What a model is told of its context in place of the context."""

    context_lengths: list[int]
    """Characters of each part; a context that is no list has one."""
    context_total_length: int
    context_type: str = "str"

    @classmethod
    def of(cls, context: Any, total: int) -> QueryMetadata:
        """Of a context, whose text has `total` characters."""
        if isinstance(context, list):
            return cls(
                [len(item) if isinstance(item, str) else len(repr(item)) for item in context], total, "list"
            )
        return cls([total], total, type(context).__name__)


def build_rlm_system_prompt(
    system_prompt: str, query_metadata: QueryMetadata, *, notes: Iterable[str] = ()
) -> list[dict[str, str]]:
    """The first messages: the system prompt, then what there is to know of the context.

    `notes` are sections that follow, such as helpers and budgets.
    """
    lengths = query_metadata.context_lengths
    shown = ", ".join(map(str, lengths[:_LENGTHS_SHOWN]))
    if len(lengths) > _LENGTHS_SHOWN:
        shown += f", and {len(lengths) - _LENGTHS_SHOWN} more"
    parts = f", in {len(lengths)} parts of {shown} characters" if len(lengths) > 1 else ""
    kind, total = query_metadata.context_type, query_metadata.context_total_length
    size = f"`context` is a {kind} of {total:,} characters{parts}."
    return [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": "\n\n".join([size, *notes])},
    ]


def build_user_prompt(
    root_prompt: str | None = None, iteration: int = 0, context_count: int = 1, history_count: int = 0
) -> dict[str, str]:
    """The request for the next action; `iteration` 0 is the first."""
    lines = []
    if iteration == 0:
        lines.append("You have not seen the context yet: look at it before you answer.")
    lines.append(f"The query: {root_prompt}" if root_prompt else "The query is in `context`.")
    if context_count > 1:
        lines.append(f"There are {context_count} contexts, `context_0` to `context_{context_count - 1}`.")
    if history_count:
        lines.append(f"Earlier conversations, {history_count} of them, are in `history`.")
    lines.append("Go on with a `repl` block. Your next action:")
    return {"role": "user", "content": "\n\n".join(lines)}


def describe_helpers(helpers: Mapping[str, Helper]) -> str:
    """The functions that are in the REPL, with their signatures and the first paragraph of what they do."""
    lines = ["These functions are there:"]
    for name, helper in helpers.items():
        signature = helper.signature.replace(
            parameters=[
                p.replace(annotation=_plain(p.annotation)) for p in helper.signature.parameters.values()
            ],
            return_annotation=_plain(helper.signature.return_annotation),
        )
        doc = " ".join(helper.doc.split("\n\n")[0].split())
        lines.append(f"- `{name}{signature}`" + (f": {doc}" if doc else ""))
    return "\n".join(lines)


def describe_limits(limits: Limits, replies: int, blocks: int) -> str:
    """What bounds a run: its replies and blocks of code, and what each block may take."""
    seconds = [f"after {limits.cell_active:g} s of its own work"] if limits.cell_active < math.inf else []
    seconds += [f"after {limits.cell_total:g} s in all"] if limits.cell_total < math.inf else []
    bounds = [f"{replies} replies with at most {blocks} blocks of code"]
    bounds += [f"a block is stopped {' or '.join(seconds)}"] if seconds else []
    bounds.append(f"variables may take {limits.memory_bytes / 2**20:,.0f} MB")
    bounds.append(f"helpers may be called {limits.helper_calls:,} times, a batch counting as its prompts")
    bounds += [f"all of it may take {limits.episode:g} s"] if limits.episode < math.inf else []
    return f"Limits: {'; '.join(bounds)}."


def _plain(annotation: Any) -> Any:
    # Annotations that are text would be shown in quotes.
    return _Bare(annotation) if isinstance(annotation, str) else annotation


class _Bare:
    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def extract_code_blocks(text: str, language: str = "python") -> list[str]:
    """The fenced blocks marked `repl`, `python` or `py`, or with `language`, in the order written.

    Fences are those of CommonMark: of backticks or tildes, three or more, with the closing one as long; an
    unclosed block goes to the end of the text. A block without code is none.
    """
    return [code for _, code in split_reply(text, language)]


def split_reply(text: str, language: str = "python") -> list[tuple[str, str]]:
    """Of each block of code of a reply: what stands before it, other blocks included, and the code."""
    languages = _LANGUAGES | {language}
    lines = re.split("\r\n|\r|\n", text)  # as the parser counts them
    parts, end = [], 0
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "fence" and token.info.split(maxsplit=1)[:1] and token.info.split()[0] in languages:
            code = textwrap.dedent(token.content).strip("\n")
            if code.strip() and token.map is not None:
                parts.append(("\n".join(lines[end : token.map[0]]).strip(), code))
                end = token.map[1]
    return parts


def format_observations(
    observations: Sequence[REPLObservation],
    code_blocks: Sequence[str] | None = None,
    max_character_length: int = 20_000,
) -> str:
    """What a model is shown of its blocks: the code, if it is given, and what came of each."""
    parts = []
    for number, observation in enumerate(observations):
        result = observation.result
        shown = [result.stdout.strip("\n")] if result.stdout.strip() else ["(no output)"]
        if result.stderr.strip():
            shown.append(f"stderr:\n{result.stderr.strip()}")
        elif result.exception:
            shown.append(f"stderr:\n{result.exception}")
        output = clip("\n".join(shown), max_character_length)
        code = ""
        if code_blocks is not None and number < len(code_blocks):
            fence = _fence_around(code_blocks[number])
            code = f"Code:\n{fence}python\n{code_blocks[number]}\n{fence}\n\n"
        parts.append(f"{code}Output of block {number + 1}:\n{output}")
    return "\n\n".join(parts)


def _fence_around(code: str) -> str:
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    return "`" * max(3, longest + 1)
