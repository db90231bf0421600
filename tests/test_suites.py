"""Suites: the same every time, of the size they say, solvable from the context, worth nothing for nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kernel_env import ConfigError, LocalREPLEnv, Task
from kernel_env.metrics import METRICS
from kernel_env.suites import SIZES, SUITES
from kernel_env.suites.needle import Needle

SMALL = [(name, split) for name in SUITES for split in ("8k", "32k")]
LARGE = [(name, split) for name in SUITES for split in ("128k", "512k", "2m")]


def length(context: Any) -> int:
    return len(context if isinstance(context, str) else json.dumps(context, ensure_ascii=False))


def solve(task: Task) -> str:
    """What the solution of a task submits, here: in kernels they run in test_evaluate.py."""
    submitted: list[str] = []
    names: dict[str, Any] = {"context": task.context, "FINAL": lambda value: submitted.append(str(value))}
    names["answer"] = {}
    assert task.reference is not None
    exec(task.reference.solution, names)
    return submitted[-1] if submitted else str(names["answer"]["content"])


def check(name: str, split: str, count: int) -> None:
    suite = SUITES[name]()
    for index in range(count):
        task = suite.get_task(split, index)
        assert SIZES[split] * 0.8 < length(task.context) < SIZES[split] * 1.1, task.id
        metric = METRICS[task.metric]
        assert metric.score(task.expected_answer, solve(task)) == 1.0, task.id
        assert metric.score(task.expected_answer, "") == 0.0, task.id
        assert task.metadata["kind"] == suite.kinds[index % len(suite.kinds)]


@pytest.mark.parametrize(("name", "split"), SMALL)
def test_a_solution_scores_one_and_nothing_scores_nothing(name: str, split: str) -> None:
    check(name, split, 3 * len(SUITES[name].kinds))


@pytest.mark.parametrize(("name", "split"), LARGE)
def test_so_it_is_with_larger_contexts(name: str, split: str) -> None:
    check(name, split, 1 if split == "2m" else 2)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SUITES)
def test_every_task_is_sound(name: str) -> None:
    for split, count in {"8k": 1000, "32k": 1000, "128k": 200, "512k": 50, "2m": 20, "16m": 8}.items():
        check(name, split, count)


@pytest.mark.parametrize("name", SUITES)
def test_a_task_is_the_same_for_the_same_seed_and_another_for_another(name: str) -> None:
    one, same, other = SUITES[name](seed=3), SUITES[name](seed=3), SUITES[name](seed=4)
    other.get_task("8k", 5)
    for index in (5, 0):
        first, second = one.get_task("8k", index), same.get_task("8k", index)
        assert first.model_dump() == second.model_dump()
        assert first.reference is not None
        assert second.reference is not None
        assert first.reference.solution == second.reference.solution
        assert one.get_task("8k", index).context != other.get_task("8k", index).context
    assert one.task_id("8k", 5) == one.get_task("8k", 5).id == f"{name}-8k-005"
    assert one.describe()["seed"] == 3
    assert one.source


def test_splits_are_sizes_and_what_is_not_there_is_named() -> None:
    suite = Needle()
    assert suite.list_splits() == ["8k", "32k", "128k", "512k", "2m", "16m"]
    assert suite.num_tasks("8k") == 1000
    with pytest.raises(ConfigError, match="needle has no split '9k'; it has 8k"):
        suite.get_task("9k", 0)
    with pytest.raises(ConfigError, match="there is no index 1000"):
        suite.get_task("8k", 1000)
    with pytest.raises(ConfigError, match="seed = -1"):
        Needle(seed=-1)


def test_the_needle_of_the_border_lies_across_the_middle() -> None:
    suite = Needle()
    for split in ("8k", "128k"):
        task = suite.get_task(split, suite.kinds.index("border"))
        middle = len(task.context) // 2
        assert (
            task.expected_answer not in task.context[:middle]
            or task.expected_answer not in (task.context[middle:])
        )
        needle = task.context.index('The special code of "')
        assert needle < middle < task.context.index(".", needle)


def test_the_adversarial_haystack_has_what_it_says_and_one_answer() -> None:
    suite = Needle()
    task = suite.get_task("2m", suite.kinds.index("adversarial"))
    for hazard in ("\nFINAL(", "\r\n", "\x1b[", "\x00", "Ignore the question"):
        assert hazard in task.context
    assert max(map(len, task.context.split("\n"))) > 500_000
    assert task.context.count(task.expected_answer) == 1


def test_answers_of_pairs_are_long() -> None:
    suite = SUITES["pairs"]()
    lengths = [len(solve(suite.get_task(split, n))) for split in ("8k", "32k", "512k") for n in range(3)]
    assert min(lengths) >= 1_000
    assert max(lengths) > 50_000
    assert max(lengths) < 110_000


def test_what_the_adversarial_haystack_prints_ends_no_episode() -> None:
    suite = Needle()
    task = suite.get_task("8k", suite.kinds.index("adversarial"))
    with LocalREPLEnv(max_output_length=100_000) as env:
        env.reset(context=task.context, task_prompt=task.task_prompt)
        assert not env.execute("print(context)").done
        assert task.reference is not None
        assert env.execute(task.reference.solution).observation.final_answer == task.expected_answer
