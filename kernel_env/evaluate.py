"""Many tasks → many episodes, each in a kernel of its own → a run directory."""

from __future__ import annotations

import asyncio
import importlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kernel_env import portal, report
from kernel_env.budget import Budget, ModelUsage, Spending, cost_by
from kernel_env.config import Limits, check_count, from_env
from kernel_env.environment import REPLEnvironment
from kernel_env.episode import Episode
from kernel_env.errors import BudgetExceeded, ConfigError, KernelEnvError, NotebookError
from kernel_env.grading import Grader
from kernel_env.notebook import write_notebook
from kernel_env.policies import find_policy
from kernel_env.rundir import Result, RunDirectory
from kernel_env.suites import SUITES
from kernel_env.summary import summarise
from kernel_env.tasks import Task, TaskSet, load_tasks
from kernel_env.tree import derived_seed
from kernel_env.trial import Trial, slug

__all__ = ["EvalConfig", "Evaluation", "RunResult", "evaluate"]

log = logging.getLogger("kernel_env.evaluate")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a run is done.

    Raises:
        ConfigError: a value cannot be used.
    """

    out: str | Path
    """The run's directory; it is made."""
    resume: bool = False
    """Go on with the run there: only what is missing or failed is run."""
    splits: Sequence[str] = ()
    """Of the sets of tasks; default all of them, of suites those to 128 k characters."""
    num_tasks: int | None = None
    """The first so many of each split; default all, of suites twice as many as it has kinds."""
    samples: int = 1
    """Episodes of each task."""
    at_once: int = 8
    """Episodes at once."""
    seed: int = 0
    """Of the episodes' own seeds, by task and sample."""
    max_iterations: int = 30
    """Of an episode; a task may have its own."""
    limits: Limits = field(default_factory=Limits)
    isolation: str = "auto"
    kernel_name: str = "python3"
    budget: Budget = field(default_factory=Budget)
    """Of each episode, with its children."""
    run_budget: Budget = field(default_factory=Budget)
    """Of the run with what it used before, `seconds` of this session alone. When it is used up, no further
    episode begins; a resume may give more."""
    prices: tuple[float, float] | None = None
    """Of a million prompt and completion tokens; what costs are counted by."""
    fail_fast: bool = False
    """End with the first episode that fails."""
    report: bool = True
    """Write `report.ipynb`, which needs the extra `eval`."""

    def __post_init__(self) -> None:
        for name in ("samples", "at_once", "max_iterations"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, least=0)
        if self.num_tasks is not None:
            check_count("num_tasks", self.num_tasks)
        if isinstance(self.splits, str):
            raise ConfigError(f"splits = {self.splits!r}; give a list of names")
        if self.prices is not None and not all(0 <= price < math.inf for price in self.prices):
            raise ConfigError(f"prices = {self.prices!r}; give two numbers >= 0")
        if self.prices is None and math.inf > min(self.budget.cost, self.run_budget.cost):
            raise ConfigError("a budget of cost needs prices")
        if self.report:
            report.check_report()


@dataclass
class Tally:
    """How a run stands, for whoever watches; readable from any thread."""

    total: int = 0
    done: int = 0
    running: int = 0
    failed: int = 0
    resumed: int = 0
    """Of those done, how many were there before."""
    rewards: float = 0.0
    usage: ModelUsage = field(default_factory=ModelUsage)
    began: float = field(default_factory=time.monotonic)

    def add(self, result: Result) -> None:
        self.done += 1
        self.failed += result.error is not None
        self.rewards += result.reward or 0.0
        self.usage += result.usage


@dataclass(frozen=True)
class RunResult:
    """What a run came to."""

    out: Path
    results: list[Result] = field(repr=False)
    """Of every episode that ended, in the order of the tasks."""
    summary: dict[str, Any]
    stopped_by: str | None
    """What ended the run before its end; None if it is complete."""

    @property
    def reward(self) -> float | None:
        """The mean over the tasks."""
        reward: float | None = self.summary["reward"]
        return reward


@dataclass(frozen=True)
class _Place:
    """Where a task is, and which of its episodes this is."""

    tasks: TaskSet
    split: str
    index: int
    sample: int
    id: str

    @property
    def key(self) -> tuple[str, int]:
        return self.id, self.sample


class _StopError(Exception):
    """Ends a run in which an episode failed."""


class Evaluation:
    """A run: the tasks, the policy, the config, checked, and how it stands (`tally`).

    Args:
        tasks: the name of a suite, a `TaskSet`, the path of a file, or rows; or a list of such.
        policy: a `Policy`, the name of one, or an `async def (env, task)`.
        on_result: called with each `Result`, on the loop.

    Raises:
        ConfigError: as `EvalConfig`, `load_tasks`, `find_policy`; two tasks have one id; there may not be as
            many kernels as the run may hold.
    """

    def __init__(
        self,
        tasks: Any,
        policy: Any,
        config: EvalConfig,
        *,
        on_result: Callable[[Result], None] | None = None,
    ) -> None:
        self.config = config
        self.policy = find_policy(policy)
        is_several = isinstance(tasks, list | tuple) and all(
            isinstance(each, str | Path | TaskSet) for each in tasks
        )
        self._sets = [_find_tasks(each, config.seed) for each in (tasks if is_several else [tasks])]
        self._on_result = on_result
        self._stopped_by: str | None = None
        self._spending = Spending(config.run_budget, None)
        self._places = list(self._all_places())
        self._check_kernels()
        self.tally = Tally(total=len(self._places))

    def _all_places(self) -> Iterator[_Place]:
        seen: dict[str, str] = {}
        for tasks in self._sets:
            for split in self.config.splits or tasks.usual_splits():
                count = min(tasks.num_tasks(split), self.config.num_tasks or tasks.usual_number(split))
                for index in range(count):
                    id = tasks.task_id(split, index)
                    where = f"{tasks.name}, split {split!r}, index {index}"
                    if id in seen:
                        raise ConfigError(f"{where}: the id {id!r} is also that of {seen[id]}")
                    seen[id] = where
                    for sample in range(self.config.samples):
                        yield _Place(tasks, split, index, sample, id)
        if not seen:
            raise ConfigError("there is no task to run")

    def _settings(self) -> dict[str, Any]:
        config = self.config
        bounds: dict[str, Any] = {"limits": config.limits, "budget": config.budget}
        return {
            "tasks": [tasks.describe() for tasks in self._sets],
            "splits": list(config.splits),
            "num_tasks": config.num_tasks,
            "policy": {"name": self.policy.name, **self.policy.settings()},
            "samples": config.samples,
            "seed": config.seed,
            "max_iterations": config.max_iterations,
            "isolation": config.isolation,
            "kernel_name": config.kernel_name,
            "prices": list(config.prices) if config.prices else None,
            **{name: _finite(bound) for name, bound in bounds.items()},
        }

    def run(self) -> RunResult:
        """See `run_async`; works inside a running event loop, too."""
        return portal.run(self.run_async)

    async def run_async(self) -> RunResult:
        """Do the run, or what is left of it.

        Cancelled, or interrupted by Ctrl-C, it ends the episodes that run, which a resume begins again, and
        writes the summary of what there is.

        Raises:
            ConfigError: as `RunDirectory.open`; or the directory cannot be written any more.
            SandboxUnavailable, KernelStartError: no kernel can be had at all.
        """
        with RunDirectory.open(
            Path(self.config.out), self._settings(), resume=self.config.resume
        ) as directory:
            done = {key: result for key, result in directory.results.items() if result.error is None}
            pending = [place for place in self._places if place.key not in done]
            for place in self._places:
                if place.key in done:
                    self.tally.add(done[place.key])
            self.tally.resumed = self.tally.done
            failed = (result for key, result in directory.results.items() if key not in done)
            self.tally.usage = sum((result.usage for result in failed), self.tally.usage)
            finished = False
            try:
                if pending:
                    await self._work_off(directory, pending)
                finished = True
            finally:
                if not finished:
                    self._stopped_by = self._stopped_by or "it was interrupted"
                outcome = self._end(directory)
            is_due = pending or not (directory.path / "report.ipynb").exists()
            if is_due and self.config.report and outcome.results:
                title = f"{self.policy.name}: {', '.join(tasks.name for tasks in self._sets)}"
                await portal.run_in_thread(partial(report.write_report, directory.path, title=title))
            return outcome

    async def _work_off(self, directory: RunDirectory, pending: list[_Place]) -> None:
        isolation = await self._isolation()
        directory.begin_session(
            isolation=isolation, at_once=self.config.at_once, run_budget=_finite(self.config.run_budget)
        )
        # It may take a second, which is none of the first episode's.
        await portal.run_in_thread(importlib.import_module, "nbformat")
        queue = iter(pending)

        async def work() -> None:
            for place in queue:
                if self._is_spent():
                    return
                self.tally.running += 1
                try:
                    result = await self._episode(directory.path, place, isolation)
                finally:
                    self.tally.running -= 1
                directory.append(result)
                self.tally.add(result)
                if self._on_result is not None:
                    self._on_result(result)
                if result.error is not None and self.config.fail_fast:
                    self._stopped_by = f"{result.task} failed: {result.error}: {result.message}"
                    raise _StopError

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.config.at_once, len(pending))):
                    group.create_task(work())
        except* _StopError:
            pass
        except* KernelEnvError as several:
            self._stopped_by = str(several.exceptions[0])
            raise several.exceptions[0] from None

    async def _isolation(self) -> str:
        """What kernels get here, found with one that does nothing; all then get that and nothing less."""
        env = REPLEnvironment(
            isolation=self.config.isolation, kernel_name=self.config.kernel_name, limits=self.config.limits
        )
        try:
            await env.reset_async()
            return env.episode.isolation
        finally:
            await env.close_async()

    def _check_kernels(self) -> None:
        most = from_env().max_kernels
        needed = self.config.at_once * (self.policy.kernels + 1)
        if needed > most:
            raise ConfigError(
                f"KERNEL_ENV_MAX_KERNELS is {most}, and {self.config.at_once} episodes at once may hold "
                f"{needed} kernels, with those of metrics and children; give a smaller at_once"
            )

    def _is_spent(self) -> bool:
        self._spending.total = self.tally.usage
        try:
            self._spending.check()
        except BudgetExceeded as breach:
            self._stopped_by = str(breach)
        return self._stopped_by is not None

    async def _episode(self, folder: Path, place: _Place, isolation: str) -> Result:
        """Run one episode and write its notebook."""
        started, clock = time.time(), time.perf_counter()
        facts: dict[str, Any] = {
            "task": place.id,
            "sample": place.sample,
            "tasks": place.tasks.name,
            "split": place.split,
            "seed": derived_seed(self.config.seed, place.sample, place.id),
            "started": started,
        }
        trial = None
        try:
            task = await portal.run_in_thread(place.tasks.get_task, place.split, place.index)
            facts["metadata"] = task.metadata
            context = await portal.run_in_thread(task.load_context)
            trial = self._trial(task, context, place.sample, facts["seed"], isolation)
            await self._play(trial)
            facts["reward"] = await trial.score()
        except BaseException as error:  # the policy's, whatever it is, but for a cancellation from outside
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            log.warning("%s failed", place.id, exc_info=True)
            facts |= _failure(error)
        if trial is not None and trial.episode is not None:
            facts |= trial.figures() | await self._written(folder, place, trial.episode)
        return Result(**facts, seconds=time.perf_counter() - clock)

    def _trial(self, task: Task, context: Any, sample: int, seed: int, isolation: str) -> Trial:
        config = self.config
        options = {"isolation": isolation, "kernel_name": config.kernel_name}
        return Trial(
            task=task,
            context=context,
            sample=sample,
            seed=seed,
            max_iterations=task.max_iterations or config.max_iterations,
            limits=task.limits_over(config.limits),
            grader=Grader(task, **options),
            budget=config.budget,
            cost=cost_by(config.prices) if config.prices else None,
            options=options,
        )

    async def _play(self, trial: Trial) -> None:
        seconds = self.config.budget.seconds
        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds) as deadline:
                await self.policy.play(trial)
        except TimeoutError:
            if not deadline.expired() or trial.episode is None:
                raise
            trial.stopped_by = f"seconds {seconds:g}"

    async def _written(self, folder: Path, place: _Place, episode: Episode) -> dict[str, Any]:
        name = f"episodes/{slug(place.id)}.{place.sample}.ipynb"
        clock = time.perf_counter()
        try:
            await portal.run_in_thread(write_notebook, episode, folder / name)
        except NotebookError as error:  # of something that the policy put into it
            return _failure(error)
        return {"notebook": name, "bookkeeping_seconds": time.perf_counter() - clock}

    def _end(self, directory: RunDirectory) -> RunResult:
        results = [
            result for place in self._places if (result := directory.results.get(place.key)) is not None
        ]
        summary = summarise(results, samples=self.config.samples, expected=len(self._places))
        summary["stopped_by"] = self._stopped_by
        directory.write_json("summary.json", summary)
        return RunResult(directory.path, results, summary, self._stopped_by)


def evaluate(tasks: Any, policy: Any, config: EvalConfig) -> RunResult:
    """Run every task in episodes of its own and put them on record; see `Evaluation`, also for async callers.

    Raises:
        ConfigError: an argument cannot be used, or the run's directory cannot be written any more.
        SandboxUnavailable, KernelStartError: no kernel can be had at all.
    """
    return Evaluation(tasks, policy, config).run()


def _find_tasks(tasks: Any, seed: int) -> TaskSet:
    if isinstance(tasks, str) and tasks in SUITES:
        return SUITES[tasks](seed)
    if isinstance(tasks, str) and not Path(tasks).exists():
        raise ConfigError(f"there is no suite and no file {tasks!r}; the suites are {', '.join(SUITES)}")
    return load_tasks(tasks)


def _finite(bounds: Limits | Budget) -> dict[str, float | None]:
    return {key: value if value < math.inf else None for key, value in asdict(bounds).items()}


def _failure(error: BaseException) -> dict[str, Any]:
    return {"reward": None, "error": type(error).__name__, "message": f"{error}"[:2000]}
