"""Policies: what acts in the episodes of an evaluation: a model, what bounds one from both sides, your own.

To add one, subclass `Policy` and write its line in `POLICIES`; or give any `async def (env, task)`.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from kernel_env.budget import ModelUsage
from kernel_env.config import check_seconds
from kernel_env.environment import REPLEnvironment
from kernel_env.errors import BudgetExceeded, ConfigError, HelperError, ResetRequired
from kernel_env.llm import ChatReply
from kernel_env.metrics import answer_text
from kernel_env.runner import LocalRLMRunner
from kernel_env.suites.suite import code_of
from kernel_env.trial import Trial
from kernel_env.types import REPLAction

__all__ = ["POLICIES", "ChunkAndAsk", "ModelPolicy", "Policy", "find_policy"]


class Policy:
    """What acts in the episodes of an evaluation, one object for all of them.

    A subclass has `name`, and defines `act` or, to make the environment itself, `play`.
    """

    name: str
    kernels = 1
    """How many an episode may hold at once."""

    def settings(self) -> dict[str, Any]:
        """What makes it act as it does, in JSON types: a run goes on only with the same."""
        return {}

    async def play(self, trial: Trial) -> None:
        """Play an episode to its end, with its record in `trial.episode`."""
        async with trial.environment() as env:
            await self.act(env, trial)

    async def act(self, env: REPLEnvironment, trial: Trial) -> None:
        """Step until the episode is over, or until there is nothing left to do."""
        raise NotImplementedError


class Oracle(Policy):
    """Does the task as its suite knows how, by code that sees the context; else submits what is expected."""

    name = "oracle"

    async def act(self, env: REPLEnvironment, trial: Trial) -> None:
        task = trial.task
        if task.reference is not None:
            await env.step_async(REPLAction(code=task.reference.solution))
        else:  # not through the kernel, which must not have it
            answer = answer_text(task.expected_answer)
            await env.step_async(REPLAction(is_final=True, final_answer=answer))


class Empty(Policy):
    """Submits an empty answer."""

    name = "empty"

    async def act(self, env: REPLEnvironment, trial: Trial) -> None:
        await env.step_async(REPLAction(is_final=True, final_answer=""))


_TEXT = r"""
parts = context.values() if isinstance(context, dict) else context if isinstance(context, list) else [context]
text = "\n".join(map(str, parts))
"""
_GREP = r"""
import re
lines = [line for line in text.splitlines() if all(term in line for term in terms)]
values = re.findall(r"[\w-]*\d[\w-]*", lines[0]) if lines else []
values = [value for value in values if not any(value in term for term in terms)]
print(len(lines), "lines;", lines[0][:200] if lines else "none")
FINAL(values[-1] if values else len(lines))
"""


class Grep(Policy):
    """Looks for lines with what the task has in quotes: the last number of the first one, else how many."""

    name = "grep"

    async def act(self, env: REPLEnvironment, trial: Trial) -> None:
        prompt = trial.task.task_prompt
        terms = re.findall(r'["`]([^"`]+)["`]', prompt) or re.findall(r"\b[A-Z]\w{3,}", prompt)
        await env.step_async(REPLAction(code=code_of(_TEXT + _GREP, terms=terms)))


_CHUNKED = r"""
size = max(4_000, len(text) // 40)
replies = llm_query_batched([f"{question}\n\n{text[n:n + size]}" for n in range(0, len(text), size)])
said = [reply for reply in replies if not isinstance(reply, HelperFailure) and reply]
FINAL(max(said, key=lambda reply: len(words & set(reply.split())), default="unknown"))
"""


def _read(prompt: str, errs: Callable[[], bool]) -> str:
    """The line of a part that shares most words with the question."""
    question, _, text = prompt.partition("\n\n")
    words = set(question.split())
    lines = text.splitlines()
    if errs() or not lines:
        return ""
    return max(lines, key=lambda line: len(words & set(line.split())))


class ChunkAndAsk(Policy):
    """Asks a model about parts of the context, as many at once as there are, and puts the replies together.

    A stand-in is the model: what it replies depends on the seed of the episode and on the prompt alone.

    Args:
        error: share of wrong replies, of labels where labels are asked for.
        failures: share of requests that fail; failed ones are asked again a few times.
        latency: seconds of a reply, on average.

    Raises:
        ConfigError: one is no number that it can be.
    """

    name = "chunk-and-ask"

    def __init__(self, *, error: float = 0.02, failures: float = 0.02, latency: float = 0.01) -> None:
        for name, share in (("error", error), ("failures", failures)):
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ConfigError(f"{name} = {share!r}; give a number from 0 to 1")
        if latency != 0:
            check_seconds("latency", latency)
        self._error, self._failures, self._latency = error, failures, latency

    def settings(self) -> dict[str, Any]:
        return {"error": self._error, "failures": self._failures, "latency": self._latency}

    async def play(self, trial: Trial) -> None:
        reference, asked = trial.task.reference, Counter[str]()
        read = _read if reference is None else reference.reader

        async def model(prompt: str) -> str:
            asked[prompt] += 1
            try:
                trial.spending.check()
            except BudgetExceeded as breach:
                trial.stopped_by = str(breach)
                raise HelperError(f"llm_query: {breach}") from None
            rng = random.Random(f"{trial.seed}:{prompt}")
            again = random.Random(f"{trial.seed}:{asked[prompt]}:{prompt}")
            if self._latency:
                await asyncio.sleep(again.uniform(0.5, 1.5) * self._latency)
            if again.random() < self._failures:
                raise HelperError("the stand-in fails, as it is told to")
            text = read(prompt, lambda: rng.random() < self._error)
            reply = ChatReply(text, len(prompt) // 4 + 1, len(text) // 4 + 1, "stand-in")
            name, usage = trial.spending.add(reply, None, 0)
            if trial.episode is not None:
                used = trial.episode.model_usage.get(name, ModelUsage())
                trial.episode.model_usage[name] = used + usage
            return text

        words = set(trial.task.task_prompt.split())
        generic = code_of(_TEXT + _CHUNKED, question=trial.task.task_prompt, words=words)
        code = generic if reference is None else reference.chunked
        async with trial.environment(llm_query_fn=model) as env:
            await env.step_async(REPLAction(code=code))


_ATTACKS = (
    "while True: pass",
    "while True: print('x' * 10_000)",
    "import os; os.kill(os.getpid(), 9)",
    "import os; os._exit(0)",
    "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\ntime.sleep(60)",
    "FINAL = FINAL_VAR = print; context = None; answer = 1",
    "import builtins; builtins.print = builtins.len = None",
    "get_ipython().reset(); del get_ipython",
    "import sys; sys.stdout.close(); sys.stdout = None",
    "import threading\nfor _ in range(100): threading.Thread(target=lambda: [0] * 10**6).start()",
    "import os, glob\nprint(os.environ, glob.glob('/proc/*/environ'), open('/etc/hostname').read())",
    "open('big', 'wb').write(b'x' * 10**8)",
)


class Adversarial(Policy):
    """Four attacks on its kernel of a dozen (loops, floods, kills, overwrites), then a wrong answer."""

    name = "adversarial"

    async def act(self, env: REPLEnvironment, trial: Trial) -> None:
        for attack in random.Random(trial.seed).sample(_ATTACKS, 4):
            if (await env.step_async(REPLAction(code=attack), timeout_s=1.0)).done:
                return
        await env.step_async(REPLAction(is_final=True, final_answer="let me in"))


class FunctionPolicy(Policy):
    """A user's `async def (env, task)`, which steps a `REPLEnvironment` after its reset."""

    def __init__(self, function: Callable[..., Any]) -> None:
        if not inspect.iscoroutinefunction(function):
            raise ConfigError(f"policy = {function!r}; give a Policy, a name, or an async def (env, task)")
        self._function = function
        self.name = getattr(function, "__qualname__", type(function).__name__)

    async def act(self, env: REPLEnvironment, trial: Trial) -> None:
        await self._function(env, trial.task)


class ModelPolicy(Policy):
    """A chat model that works in the episodes by itself; see `LocalRLMRunner`.

    Args:
        chat_fn: of the runner.
        name: in the run's config, with `settings`; default what the model calls itself.
        options: of the runner, such as `max_depth` and `sub_model`.
    """

    def __init__(self, chat_fn: Callable[..., Any], *, name: str | None = None, **options: Any) -> None:
        self._chat, self._options = chat_fn, options
        LocalRLMRunner(chat_fn, **options)  # what it refuses is refused here
        called = getattr(chat_fn, "model", None) or getattr(chat_fn, "__name__", type(chat_fn).__name__)
        self.name = name or str(called)
        self.kernels = 1 + options.get("max_batch_workers", 8) * (options.get("max_depth", 2) - 1)

    def settings(self) -> dict[str, Any]:
        plain = {key: value for key, value in self._options.items() if isinstance(value, str | int | float)}
        if "system_prompt" in plain:
            plain["system_prompt"] = hashlib.sha256(str(plain["system_prompt"]).encode()).hexdigest()
        options = {key: repr(value) for key, value in sorted(getattr(self._chat, "options", {}).items())}
        return plain | {"base_url": getattr(self._chat, "base_url", None), "options": options}

    async def play(self, trial: Trial) -> None:
        runner = LocalRLMRunner(
            self._chat,
            **{"max_iterations": trial.max_iterations} | self._options,
            **trial.options,
            limits=trial.limits,
            rubric=trial.grader,
            budget=trial.budget,
            cost=trial.cost,
        )
        try:
            result = await runner.run_async(trial.context, trial.task.task_prompt, seed=trial.seed)
            trial.stopped_by = result.stopped_by
        finally:
            if runner.progress is not None:
                trial.model_seconds = runner.progress[0].model_seconds
            try:
                trial.episode = runner.episode
            except ResetRequired:
                trial.episode = None


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Oracle, Empty, Grep, ChunkAndAsk, Adversarial)
}
"""Name → class."""


def find_policy(policy: Any) -> Policy:
    """The policy that is meant: one, the name of one, or an `async def (env, task)`.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ConfigError(f"policy {policy!r}; give one of {', '.join(POLICIES)}")
        return POLICIES[policy]()
    return FunctionPolicy(policy)
