"""An episode again, in a fresh kernel: its actions, with helpers that answer from its record.

What a cell publishes is compared with what it published then. Differences in what no run repeats (addresses,
times, the order of sets) are told apart from the others, and told.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kernel_env import portal
from kernel_env.calls import HelperFailure
from kernel_env.config import Limits
from kernel_env.environment import REPLEnvironment
from kernel_env.episode import Episode, Turn
from kernel_env.errors import HelperError, NotebookError
from kernel_env.recorded import RecordedCalls
from kernel_env.rubrics import Scorer

__all__ = ["CellComparison", "ReplayReport", "replay", "replay_async", "rescore", "rescore_async"]

_VOLATILE: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("an address", re.compile(r"\b0x[0-9a-fA-F]{4,}\b")),
    (
        "a date or time",
        re.compile(r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?|\b\d\d:\d\d:\d\d\b"),
    ),
    ("a duration", re.compile(r"\b\d+(?:\.\d+)?\s?(?:ns|µs|us|ms|s|min|seconds?)\b")),
    ("an identifier", re.compile(r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b|\b[0-9a-f]{32}\b")),
    ("a temporary name", re.compile(r"/tmp/[\w./-]+")),
)
_SET = re.compile(r"\{([^{}:]+)\}")
_SHOWN_LINES = 12


@dataclass(frozen=True)
class CellComparison:
    """One turn, then and now."""

    turn: int
    """Counted from 1."""
    differences: list[str]
    """What is not the same, as lines of a diff; empty where all is."""
    volatile: list[str]
    """Kinds of what differs in every run, where that is all that differs."""

    @property
    def is_equal(self) -> bool:
        return not self.differences


@dataclass(frozen=True)
class ReplayReport:
    """What came of a replay."""

    episode: Episode
    """The record of the replay."""
    cells: list[CellComparison]
    """Of each turn that was recorded; one that was not reached again differs."""
    final_answers: tuple[str | None, str | None]
    """Then and now."""
    unrecorded: list[str]
    """Helper calls that the record does not have; they failed."""
    by_order: list[str]
    """Helper calls that were answered with the next reply, for nothing like them was recorded."""

    @property
    def score(self) -> float:
        """The share of the turns that came out the same, volatile differences left out; 1.0 without turns."""
        return sum(cell.is_equal for cell in self.cells) / len(self.cells) if self.cells else 1.0

    @property
    def is_reproduced(self) -> bool:
        """Whether every turn and the answer came out the same, and every helper call was recorded."""
        return self.score == 1.0 and self.final_answers[0] == self.final_answers[1] and not self.unrecorded


def replay(episode: Episode, *, isolation: str = "auto", kernel_name: str | None = None) -> ReplayReport:
    """See `replay_async`; for callers without an event loop."""
    return portal.run(lambda: replay_async(episode, isolation=isolation, kernel_name=kernel_name))


async def replay_async(
    episode: Episode, *, isolation: str = "auto", kernel_name: str | None = None
) -> ReplayReport:
    """Run the actions of an episode again and compare what they come to.

    The kernel gets the same context, seed and limits; what was in `files` is not in the record. No model is
    asked: helpers answer from the record, first by what is asked, then in order.

    Raises:
        NotebookError: the record has limits or tools that cannot be.
        ConfigError, KernelStartError: as `REPLEnvironment`.
    """
    calls = [call.model_dump(mode="python") for turn in episode.turns for call in turn.helper_calls]
    signatures = {name: _signature(name, text) for name, text in episode.tools.items()}
    record = RecordedCalls(calls, signatures, HelperError, HelperFailure)
    env = REPLEnvironment(
        kernel_name=kernel_name or episode.kernel_name,
        isolation=isolation,
        limits=_limits(episode.limits),
        max_iterations=episode.max_iterations,
        tools={name: _tool(record, name, signature) for name, signature in signatures.items()},
        **_model_functions(record, episode),
    )
    try:
        await env.reset_async(
            context=json.loads(episode.context) if episode.context_type == "json" else episode.context,
            task_prompt=episode.task_prompt,
            seed=episode.seed,
        )
        cells = []
        for number, then in enumerate(episode.turns, start=1):
            if env.episode.done:
                cells.append(CellComparison(number, ["the episode had ended before"], []))
                continue
            # A cell that ran out of its time is given as much again, not the whole of its limit.
            timeout = max(then.active_time, 0.05) if then.observation.status == "timeout" else None
            await env.step_async(then.action, timeout_s=timeout)
            cells.append(_compared(number, then, env.episode.turns[-1]))
    finally:
        await env.close_async()
    answers = (episode.final_answer, env.episode.final_answer)
    return ReplayReport(env.episode, cells, answers, record.unrecorded, record.by_order)


def rescore(episode: Episode, rubric: Any, *, expected_answer: Any = None) -> list[float]:
    """See `rescore_async`; for callers without an event loop."""
    return portal.run(lambda: rescore_async(episode, rubric, expected_answer=expected_answer))


async def rescore_async(episode: Episode, rubric: Any, *, expected_answer: Any = None) -> list[float]:
    """The rewards that another rubric gives to the turns of an episode; no kernel runs.

    `expected_answer` defaults to the one in the record, which has it only where the user put it there.

    Raises:
        RubricError: the rubric failed.
    """
    scorer = Scorer(rubric)
    scorer.begin(episode.expected_answer if expected_answer is None else expected_answer)
    return [
        await scorer.score(turn.action, turn.observation.model_copy(update={"reward": None}, deep=True))
        for turn in episode.turns
    ]


def _limits(recorded: Mapping[str, float | None]) -> Limits:
    kinds = {entry.name: entry.type for entry in fields(Limits)}
    if unknown := sorted(recorded.keys() - kinds.keys()):
        raise NotebookError(f"the record has limits that this kernel_env does not know: {', '.join(unknown)}")
    given: dict[str, Any] = {}
    for name, value in recorded.items():
        given[name] = math.inf if value is None else int(value) if kinds[name] == "int" else value
    return Limits(**given)


def _model_functions(record: RecordedCalls, episode: Episode) -> dict[str, Any]:
    there = set(episode.turns[0].observation.available_variables) if episode.turns else set()
    functions: dict[str, Any] = {}
    if "llm_query" in there:
        functions["llm_query_fn"] = lambda prompt, model=None: record.answer(
            "llm_query", {"prompt": prompt, "model": model}
        )
        functions["llm_batch_fn"] = lambda prompts, model=None: record.answer(
            "llm_query_batched", {"prompts": prompts, "model": model}
        )
    if "rlm_query" in there:
        functions["subcall_fn"] = lambda prompt, model=None, context=None: record.answer(
            "rlm_query", {"prompt": prompt, "model": model, "context": context}
        )
        functions["subcall_batch_fn"] = lambda prompts, model=None, contexts=None: record.answer(
            "rlm_query_batched", {"prompts": prompts, "model": model, "contexts": contexts}
        )
    return functions


def _tool(record: RecordedCalls, name: str, signature: inspect.Signature) -> Callable[..., Any]:
    async def tool(*args: Any, **kwargs: Any) -> Any:
        return record.answer(name, dict(signature.bind(*args, **kwargs).arguments))

    tool.__signature__ = signature  # type: ignore[attr-defined]
    return tool


def _signature(name: str, text: str) -> inspect.Signature:
    """Of a recorded tool; only read, for a notebook may say anything."""
    try:
        given = ast.parse(f"lambda {text[1:-1]}: None", mode="eval").body
        assert isinstance(given, ast.Lambda)
        assert text[:1] + text[-1:] == "()"
        arguments = given.args
        plain = [*arguments.posonlyargs, *arguments.args]
        defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
        kinds: list[Any] = [inspect.Parameter.POSITIONAL_ONLY] * len(arguments.posonlyargs)
        kinds += [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(arguments.args)
        parameters = [_parameter(*entry) for entry in zip(plain, kinds, defaults, strict=True)]
        if arguments.vararg:
            parameters.append(_parameter(arguments.vararg, inspect.Parameter.VAR_POSITIONAL, None))
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            parameters.append(_parameter(argument, inspect.Parameter.KEYWORD_ONLY, default))
        if arguments.kwarg:
            parameters.append(_parameter(arguments.kwarg, inspect.Parameter.VAR_KEYWORD, None))
        return inspect.Signature(parameters)
    except (SyntaxError, ValueError, AssertionError) as error:
        raise NotebookError(f"the record has tools[{name!r}] = {text!r}, which is no signature") from error


def _parameter(argument: ast.arg, kind: Any, default: ast.expr | None) -> inspect.Parameter:
    value = inspect.Parameter.empty if default is None else ast.literal_eval(default)
    return inspect.Parameter(argument.arg, kind, default=value)


def _compared(number: int, then: Turn, now: Turn) -> CellComparison:
    differences: list[str] = []
    volatile: set[str] = set()
    for name, a, b in _parts(then, now):
        if a == b:
            continue
        plain_a, kinds_a = _settled(a)
        plain_b, kinds_b = _settled(b)
        if plain_a == plain_b:
            volatile |= kinds_a | kinds_b
        else:
            lines = list(difflib.unified_diff(a.splitlines(), b.splitlines(), n=0, lineterm=""))[2:]
            more = [f"… {len(lines) - _SHOWN_LINES} more lines"] if len(lines) > _SHOWN_LINES else []
            differences += [f"{name}:", *lines[:_SHOWN_LINES], *more]
    return CellComparison(number, differences, sorted(volatile))


def _parts(then: Turn, now: Turn) -> Iterator[tuple[str, str, str]]:
    """What is compared, as text: the status, then the outputs one by one."""
    yield "status", then.observation.status, now.observation.status
    a, b = (list(map(_described, turn.observation.outputs)) for turn in (then, now))
    for index in range(max(len(a), len(b))):
        (kind_a, text_a), (kind_b, text_b) = (x[index] if index < len(x) else ("", "") for x in (a, b))
        kind = kind_a or kind_b
        yield f"output {index + 1} ({kind})", f"{kind_a}\n{text_a}", f"{kind_b}\n{text_b}"


def _described(output: dict[str, Any]) -> tuple[str, str]:
    kind = output["output_type"]
    if kind == "stream":
        return output["name"], output["text"]
    if kind == "error":  # its traceback has paths and numbers of cells
        return "error", f"{output['ename']}: {output['evalue']}"
    return kind, json.dumps(output["data"], sort_keys=True, ensure_ascii=False, indent=0)


def _settled(text: str) -> tuple[str, set[str]]:
    """The text without what differs in every run, and the kinds of that."""
    kinds = set()
    for kind, pattern in _VOLATILE:
        text, count = pattern.subn(f"<{kind}>", text)
        kinds |= {kind} if count else set()
    ordered = _SET.sub(lambda match: "{" + ", ".join(sorted(match[1].split(", "))) + "}", text)
    return ordered, kinds | ({"the order of a set"} if ordered != text else set())
