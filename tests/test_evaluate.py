"""Evaluation: many tasks in kernels of their own, and a directory that survives whatever ends the run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from kernel_env import (
    Budget,
    ChatReply,
    ConfigError,
    Episode,
    EvalConfig,
    Limits,
    REPLAction,
    REPLEnvironment,
    ScriptedChatModel,
    Task,
    evaluate,
)
from kernel_env.evaluate import Evaluation, RunResult
from kernel_env.policies import ChunkAndAsk, ModelPolicy
from kernel_env.rundir import Result, read_results
from kernel_env.suites import SUITES

FOUR = [*SUITES]


def config(out: Path, **options: Any) -> EvalConfig:
    return EvalConfig(**{"out": out, "report": False, "splits": (), **options})


def tasks(count: int, **fields: Any) -> list[Task]:
    return [Task(id=f"t{n}", context=f"{n}", **{"expected_answer": n, **fields}) for n in range(count)]


async def submits(env: REPLEnvironment, task: Task) -> None:
    """The right answer, by way of the kernel."""
    await env.step_async(REPLAction(code="FINAL(context)"))


def rewards(result: RunResult) -> list[float | None]:
    return [one.reward for one in result.results]


@pytest.mark.parametrize("policy", ["oracle", "empty", "adversarial"])
def test_policies_bound_what_can_be_reached_in_every_suite(tmp_path: Path, policy: str) -> None:
    count = 3 if policy == "adversarial" else None
    result = evaluate(FOUR, policy, config(tmp_path / "run", splits=["8k"], num_tasks=count))
    assert result.stopped_by is None
    assert set(rewards(result)) == ({1.0} if policy == "oracle" else {0.0})
    assert len(result.results) == sum(count or 2 * len(suite.kinds) for suite in SUITES.values())
    assert not any(one.error for one in result.results)


def test_a_run_is_the_same_with_one_and_with_eight_at_once_whatever_ran_before(tmp_path: Path) -> None:
    policy = ChunkAndAsk(error=0.1, failures=0.1, latency=0.002)
    runs = [
        evaluate(FOUR, policy, config(tmp_path / str(n), splits=["8k"], num_tasks=3, samples=2, at_once=n))
        for n in (1, 8)
    ]
    one, eight = ([(r.key, r.seed, r.final_answer, r.reward, r.usage) for r in run.results] for run in runs)
    assert one == eight
    assert len({r.seed for r in runs[0].results}) == len(one)
    assert 0 < (runs[0].reward or 0) < 1


def test_every_episode_begins_in_the_same_fresh_state(tmp_path: Path) -> None:
    code = (
        "import os, random, sys\n"
        "FINAL([random.random(), sorted(os.listdir()), sorted(globals()), len(sys.modules)])"
    )

    async def looks(env: REPLEnvironment, task: Task) -> None:
        await env.step_async(REPLAction(code=code))

    async def looks_and_soils(env: REPLEnvironment, task: Task) -> None:
        soil = "import random, os; random.seed(1); open('left', 'w').write('x'); left = 1; import colorsys"
        await env.step_async(REPLAction(code=soil if task.id != "t2" else code))
        await env.step_async(REPLAction(is_final=True, final_answer=""))

    alone = evaluate(tasks(3)[2:], looks, config(tmp_path / "a"))
    after = evaluate(tasks(3), looks_and_soils, config(tmp_path / "b", at_once=1))
    assert after.results[2].final_answer == alone.results[0].final_answer


def test_the_expected_answer_is_in_no_kernel_and_in_no_file(tmp_path: Path) -> None:
    code = (
        "import gc, os\n"
        "FINAL(repr([dict(os.environ), globals(), [o for o in gc.get_objects() if type(o) is dict]]))"
    )

    async def searches(env: REPLEnvironment, task: Task) -> None:
        await env.step_async(REPLAction(code=code))

    secret = "5ecret-answer"
    result = evaluate(tasks(1, expected_answer=secret), searches, config(tmp_path / "run"))
    assert result.results[0].answer_length > 1000
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or secret not in file.read_text()


def test_the_directory_has_all_of_the_run(tmp_path: Path) -> None:
    big = "word " * 20_000
    rows = [{"id": f"a/{n}", "context": big, "expected_answer": "x", "metadata": {"n": n}} for n in range(2)]
    run = tmp_path / "run"
    result = evaluate(rows, "oracle", config(run, samples=2, seed=7))
    written = json.loads((run / "config.json").read_text())
    assert written["settings"]["policy"] == {"name": "oracle"}
    assert written["settings"]["seed"] == 7
    (session,) = written["sessions"]
    assert session["isolation"] in ("sandbox", "process")
    assert session["versions"].keys() >= {"python", "kernel_env", "ipykernel"}
    assert session["machine"]["cores"] == os.cpu_count()
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert {(line["task"], line["sample"]) for line in lines} == {
        (f"a/{n}", s) for n in (0, 1) for s in (0, 1)
    }
    assert [one.metadata for one in result.results] == [{"n": 0}, {"n": 0}, {"n": 1}, {"n": 1}]
    assert json.loads((run / "summary.json").read_text())["reward"] == 1.0
    assert len(list((run / "contexts").iterdir())) == 1
    for one in result.results:
        assert one.notebook is not None
        episode = Episode.from_notebook(run / one.notebook)
        assert (episode.context, episode.final_answer, episode.seed) == (big, "x", one.seed)
        assert one.seconds >= one.kernel_seconds > 0
    moved = shutil.move(run, tmp_path / "moved")
    assert Episode.from_notebook(Path(moved) / str(result.results[0].notebook)).context == big


def test_what_failed_or_is_missing_is_run_again_and_nothing_else(tmp_path: Path) -> None:
    fails = {"t1", "t3"}
    played: list[str] = []

    async def policy(env: REPLEnvironment, task: Task) -> None:
        played.append(task.id)
        if task.id in fails:
            raise ZeroDivisionError(task.id)
        await submits(env, task)

    first = evaluate(tasks(5), policy, config(tmp_path / "run"))
    assert [one.error for one in first.results] == [
        None,
        "ZeroDivisionError",
        None,
        "ZeroDivisionError",
        None,
    ]
    assert rewards(first) == [1.0, None, 1.0, None, 1.0]
    assert (first.summary["failed"], first.reward) == (2, 0.6)
    assert first.results[1].notebook is not None
    fails.clear()
    played.clear()
    second = evaluate(tasks(5), policy, config(tmp_path / "run", resume=True))
    assert sorted(played) == ["t1", "t3"]
    assert rewards(second) == [1.0] * 5
    played.clear()
    third = evaluate(tasks(5), policy, config(tmp_path / "run", resume=True))
    assert (played, rewards(third)) == ([], [1.0] * 5)
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())["sessions"]) == 2


def test_a_line_that_was_torn_anywhere_is_run_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluate(tasks(3), submits, config(run, at_once=1))
    whole = (run / "results.jsonl").read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    (run / "episodes" / f".{'a' * 32}").write_text("half a notebook")
    for end in (last + 1, (last + len(whole)) // 2, len(whole) - 1):
        (run / "results.jsonl").write_bytes(whole[:end])
        assert len(read_results(run)) == 2
        result = evaluate(tasks(3), submits, config(run, resume=True))
        assert rewards(result) == [1.0] * 3
        assert [one.key for one in read_results(run)] == [("t0", 0), ("t1", 0), ("t2", 0)]
    assert not list((run / "episodes").glob(".a*"))


def test_another_config_is_refused_with_the_differences(tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluate(tasks(1), "oracle", config(run))
    with pytest.raises(ConfigError, match="has a run; go on with --resume"):
        evaluate(tasks(1), "oracle", config(run))
    with pytest.raises(ConfigError) as caught:
        evaluate(tasks(1), "empty", config(run, resume=True, samples=2, limits=Limits(restarts=1)))
    for difference in (
        "policy.name: 'oracle' there, 'empty' here",
        "samples: 1",
        "limits.restarts: 3 there, 1",
    ):
        assert difference in str(caught.value)
    with pytest.raises(ConfigError, match="sha256"):
        evaluate(tasks(2), "oracle", config(run, resume=True))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is no run: it has 'thesis\.tex'"):
        evaluate(tasks(1), "oracle", config(other))


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    async def scenario() -> None:
        begun, may_end = asyncio.Event(), asyncio.Event()

        async def waits(env: REPLEnvironment, task: Task) -> None:
            begun.set()
            await may_end.wait()
            await submits(env, task)

        running = asyncio.create_task(Evaluation(tasks(1), waits, config(tmp_path / "run")).run_async())
        await begun.wait()
        with pytest.raises(ConfigError, match=f"is being worked on by process {os.getpid()}"):
            await Evaluation(tasks(1), waits, config(tmp_path / "run", resume=True)).run_async()
        may_end.set()
        assert (await running).reward == 1.0

    asyncio.run(scenario())


def test_a_cancelled_run_can_be_gone_on_with(tmp_path: Path) -> None:
    async def scenario() -> None:
        begun = asyncio.Event()

        async def waits(env: REPLEnvironment, task: Task) -> None:
            if task.id == "t2":
                begun.set()
                await env.step_async(REPLAction(code="while True: pass"))
            await submits(env, task)

        running = asyncio.create_task(
            Evaluation(tasks(4), waits, config(tmp_path / "run", at_once=1)).run_async()
        )
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert (summary["episodes"], summary["missing"], summary["stopped_by"]) == (
            2,
            2,
            "it was interrupted",
        )

    asyncio.run(scenario())


SLOW = """
import asyncio, sys
from kernel_env import EvalConfig, REPLAction, Task, evaluate
async def policy(env, task):
    await env.step_async(REPLAction(code="x = 1"))
    print(task.id, flush=True)
    await env.step_async(REPLAction(code="FINAL(context)"))
tasks = [Task(id=f"t{n}", context=f"{n} " * 40_000, expected_answer=f"{n} " * 40_000) for n in range(60)]
config = EvalConfig(out=sys.argv[1], report=False, resume="resume" in sys.argv, at_once=4)
result = evaluate(tasks, policy, config)
print("reward", result.reward, flush=True)
"""


@pytest.mark.parametrize("after", [1, 9, 30])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, after: int) -> None:
    command = [sys.executable, "-c", SLOW, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for _ in range(after):
            running.stdout.readline()
        running.send_signal(signal.SIGKILL)
    before = read_results(tmp_path / "run")
    done = subprocess.run([*command, "resume"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    *played, last = done.stdout.splitlines()
    assert last == "reward 1.0"
    assert Counter(played) == Counter(f"t{n}" for n in range(60)) - Counter(r.task for r in before)
    assert len(read_results(tmp_path / "run")) == 60
    for result in read_results(tmp_path / "run"):
        assert Episode.from_notebook(tmp_path / "run" / str(result.notebook)).final_answer


async def raises(env: REPLEnvironment, task: Task) -> None:
    if task.id == "t1":
        raise ValueError("no idea")
    await submits(env, task)


def test_a_failure_ends_the_run_if_it_is_to(tmp_path: Path) -> None:
    result = evaluate(tasks(9), raises, config(tmp_path / "run", fail_fast=True, at_once=1))
    assert [one.task for one in result.results] == ["t0", "t1"]
    assert result.stopped_by == "t1 failed: ValueError: no idea"
    assert result.summary["missing"] == 7


BAD_METRICS = {
    "raises": (lambda expected, answer: 1 / 0, "ZeroDivisionError"),
    "nan": (lambda expected, answer: float("nan"), "nan; a reward is a finite number"),
    "text": (lambda expected, answer: "good", "'good'; a reward is a finite number"),
    "source raises": ("def metric(expected, answer):\n    return 1 / 0", "ZeroDivisionError"),
    "source nan": ("def metric(expected, answer):\n    return float('nan')", "finite number"),
    "source text": ("def metric(expected, answer):\n    return 'good'", "ValueError"),
    "source dies": ("def metric(expected, answer):\n    import os; os._exit(0)", "KernelDied"),
    "source exits": ("import sys\nsys.exit()\ndef metric(expected, answer):\n    return 1", "SystemExit"),
}


@pytest.mark.parametrize("name", BAD_METRICS)
def test_a_metric_that_fails_is_a_failure_of_that_episode_alone(tmp_path: Path, name: str) -> None:
    metric, says = BAD_METRICS[name]
    rows = [tasks(2)[0], Task(id="bad", context="x", expected_answer="x", metric=metric)]
    good, bad = evaluate(rows, submits, config(tmp_path / "run")).results
    assert good.reward == 1.0
    assert (bad.reward, bad.error) == (None, "RubricError")
    assert says in str(bad.message)
    assert bad.final_answer == "x"


def test_a_metric_given_as_source_runs_in_a_kernel_and_not_here(tmp_path: Path) -> None:
    metric = f"""
import os
def metric(expected, answer):
    assert os.getpid() != {os.getpid()} and expected["n"] == [1, 2]
    return len(answer) / 4
"""
    row = {"id": "a", "context": "ab", "expected_answer": {"n": [1, 2]}, "metric": metric}
    (result,) = evaluate([row], submits, config(tmp_path / "run")).results
    assert (result.reward, result.error) == (0.5, None)


def test_an_answer_of_any_characters_is_kept(tmp_path: Path) -> None:
    text = "a\ud800\x00\r\n\u2028\x1b[31m" + "z" * 10_000

    async def policy(env: REPLEnvironment, task: Task) -> None:
        await env.step_async(REPLAction(is_final=True, final_answer=text))

    rows = [Task(id="a\ud800/../b", context="x", expected_answer=text)]
    evaluate(rows, policy, config(tmp_path / "run"))
    (one,) = read_results(tmp_path / "run")
    assert (one.reward, one.answer_length, one.final_answer) == (1.0, len(text), text[:4096])
    assert one.notebook is not None
    assert Episode.from_notebook(tmp_path / "run" / one.notebook).final_answer == text
    assert (tmp_path / "run" / one.notebook).parent == tmp_path / "run" / "episodes"


def test_what_cannot_be_written_of_an_episode_is_a_failure_of_it_alone(tmp_path: Path) -> None:
    async def policy(env: REPLEnvironment, task: Task) -> None:
        if task.id == "t1":
            env.episode.expected_answer = object()
        await submits(env, task)

    result = evaluate(tasks(3), policy, config(tmp_path / "run"))
    assert [one.error for one in result.results] == [None, "NotebookError", None]


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, KeyboardInterrupt])
def test_whatever_a_policy_raises_is_a_failure_of_its_episode(
    tmp_path: Path, error: type[BaseException]
) -> None:
    async def policy(env: REPLEnvironment, task: Task) -> None:
        if task.id == "t0":
            raise error
        await submits(env, task)

    result = evaluate(tasks(3), policy, config(tmp_path / "run", at_once=1))
    assert [one.error for one in result.results] == [error.__name__, None, None]


def test_a_run_that_could_not_begin_leaves_a_directory_that_can_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-kernel"):
        evaluate(tasks(1), submits, config(tmp_path / "run", kernel_name="no-such-kernel"))
    assert evaluate(tasks(1), submits, config(tmp_path / "run")).reward == 1.0


def test_a_failed_metric_s_words_are_not_in_the_run(tmp_path: Path) -> None:
    source = "def metric(expected, answer):\n    raise ValueError(expected)"

    def metric(expected: str, answer: str) -> float:
        raise ValueError(expected)

    rows = [
        Task(id=f"t{n}", context="x", expected_answer="5ecret", metric=m)
        for n, m in enumerate((source, metric))
    ]
    result = evaluate(rows, submits, config(tmp_path / "run"))
    assert ["ValueError" in str(one.message) for one in result.results] == [True, True]
    assert not any("5ecret" in f.read_text() for f in (tmp_path / "run").rglob("*") if f.is_file())


def test_a_report_that_is_missing_is_made_by_a_resume(tmp_path: Path) -> None:
    evaluate(tasks(1, expected_answer=7), submits, config(tmp_path / "run"))
    evaluate(tasks(1, expected_answer=7), submits, config(tmp_path / "run", resume=True, report=True))
    assert (tmp_path / "run" / "report.ipynb").exists()


def test_a_budget_that_ends_before_the_kernel_is_there_is_a_failure(tmp_path: Path) -> None:
    result = evaluate(tasks(2), submits, config(tmp_path / "run", budget=Budget(seconds=1e-6)))
    assert [one.error for one in result.results] == ["TimeoutError", "TimeoutError"]


def test_budgets_of_episodes_and_of_the_run(tmp_path: Path) -> None:
    async def hangs(env: REPLEnvironment, task: Task) -> None:
        await env.step_async(REPLAction(code="answer['content'] = 'half'"))
        await asyncio.Event().wait()

    result = evaluate(tasks(1), hangs, config(tmp_path / "a", budget=Budget(seconds=2)))
    (one,) = result.results
    assert (one.reward, one.stopped_by, one.outcome, one.done_reason) == (
        0.0,
        "seconds 2",
        "budget",
        "closed",
    )
    policy = ChunkAndAsk(error=0, failures=0, latency=0)
    run = config(tmp_path / "b", splits=["8k"], num_tasks=6, at_once=1, run_budget=Budget(model_calls=5))
    result = evaluate("needle", policy, run)
    assert 1 <= len(result.results) < 6
    assert "model_calls" in str(result.stopped_by)
    same = config(tmp_path / "b", splits=["8k"], num_tasks=6, resume=True, run_budget=Budget(model_calls=5))
    assert len(evaluate("needle", policy, same).results) == len(result.results)
    more = config(tmp_path / "b", splits=["8k"], num_tasks=6, resume=True)
    assert len(evaluate("needle", policy, more).results) == 6
    run = config(tmp_path / "c", splits=["8k"], num_tasks=1, budget=Budget(model_calls=1), prices=(1e6, 0))
    (one,) = evaluate("needle", policy, run).results
    assert one.usage.calls == 1
    assert "model_calls" in str(one.stopped_by)
    assert one.usage.cost == one.usage.prompt_tokens


def test_a_model_works_on_the_tasks(tmp_path: Path) -> None:
    def chat(messages: list[dict[str, str]]) -> ChatReply:
        if len(messages) == 1:
            return ChatReply("leaf", 3, 1, "small")
        code = "FINAL(rlm_query('say it', context=context))"
        return ChatReply(
            f"```repl\n{'FINAL(context)' if 'say it' in messages[2]['content'] else code}\n```", 5, 2
        )

    policy = ModelPolicy(chat, name="mine", max_batch_workers=2)
    result = evaluate(tasks(2), policy, config(tmp_path / "run", at_once=2))
    assert rewards(result) == [1.0, 1.0]
    one = result.results[0]
    assert (one.children, one.usage.calls, one.steps) == (1, 2, 1)
    assert one.model_seconds > 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["policy"] == {
        "name": "mine",
        "max_batch_workers": 2,
        "base_url": None,
        "options": {},
    }


def test_a_seeded_run_of_a_model_seeds_its_children_too(tmp_path: Path) -> None:
    def chat(messages: list[dict[str, str]]) -> str:
        if "again" in messages[2]["content"]:
            return "```repl\nimport random\nFINAL(random.random())\n```"
        return (
            "```repl\nimport random\nFINAL([random.random(), *rlm_query_batched(['again', 'again 2'])])\n```"
        )

    answers = {
        evaluate(tasks(1), ModelPolicy(chat), config(tmp_path / str(n), at_once=1)).results[0].final_answer
        for n in range(2)
    }
    assert len(answers) == 1


def test_an_answer_that_a_model_gives_after_its_last_turn_is_scored(tmp_path: Path) -> None:
    chat = ScriptedChatModel(["```repl\nx = 1\n```", "FINAL(0)"])
    policy = ModelPolicy(chat, max_iterations=1, env_max_iterations_multiplier=1, max_depth=1)
    (one,) = evaluate(tasks(1), policy, config(tmp_path / "run")).results
    assert (one.final_answer, one.reward, one.error) == ("0", 1.0, None)


def test_what_a_run_cannot_be_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (tasks(1), {"samples": 0}, "samples = 0"),
        (tasks(1), {"splits": "8k"}, "give a list"),
        (tasks(1), {"budget": Budget(cost=1)}, "needs prices"),
        (tasks(1), {"prices": (1, -1)}, "prices"),
        ([], {}, "no task to run"),
        ("nothing", {}, "no suite and no file 'nothing'; the suites are needle"),
        ("needle", {"splits": ["9k"]}, "no split '9k'"),
        (["needle", SUITES["needle"](1)], {"splits": ["8k"]}, "the id 'needle-8k-000' is also that of"),
    ]
    for given, options, says in refused:
        with pytest.raises(ConfigError) as caught:
            evaluate(given, "oracle", config(run, **options))
        assert says in str(caught.value)
    for policy, says in [("genius", "one of oracle"), (lambda env, task: None, "async def")]:
        with pytest.raises(ConfigError, match=says):
            evaluate(tasks(1), policy, config(run))
    assert not run.exists()
    monkeypatch.setenv("KERNEL_ENV_MAX_KERNELS", "10")
    with pytest.raises(ConfigError, match="give a smaller at_once"):
        evaluate(tasks(1), "oracle", config(run))


FULL = """
import sys
from kernel_env import ConfigError, EvalConfig, Task, evaluate
tasks = [Task(id=f"t{n}", context=f"{n} " * 100_000, expected_answer="x") for n in range(40)]
disk = sys.argv[1]
def run(resume):
    return evaluate(tasks, "oracle", EvalConfig(out=disk + "/run", report=False, resume=resume, at_once=2))
filler = open(disk + "/filler", "wb")
filler.write(bytes(10 * 2**20)); filler.close()
try: print("complete", run(False).reward)
except ConfigError as error: print(error)
import os; os.unlink(disk + "/filler")
result = run(True)
print(result.reward, result.summary["missing"])
"""


def test_a_full_disk_stops_the_run_cleanly_and_it_goes_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "program.py").write_text(FULL)
    namespaces = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]
    if subprocess.run([*namespaces, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no mount namespaces here, so there is no small disk to fill")
    mount = f"mount -t tmpfs -o size=16m none {disk} && {sys.executable} {tmp_path}/program.py {disk}"
    done = subprocess.run(
        [*namespaces, "sh", "-c", mount], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    *stopped, last = done.stdout.splitlines()
    assert "No space left on device" in " ".join(stopped)
    assert last == "1.0 0"


def test_the_report_is_executed_and_can_be_run_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    policy = ChunkAndAsk(error=0.2, failures=0.1, latency=0.001)
    result = evaluate(["needle", "aggregation"], policy, config(run, splits=["8k"], num_tasks=6, report=True))
    notebook = nbformat.read(run / "report.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs and cell.execution_count for cell in codes)
    pictures = [o for cell in codes for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
    text = json.dumps(notebook)
    for word in ("aggregation", "partly right" if "partly right" in result.summary["outcomes"] else "right"):
        assert word in text
    worst = [one for one in result.results if (one.reward or 0) < 1]
    assert worst
    for one in worst[:1]:
        assert f"({one.notebook})" in text
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(run)}}).execute()


def test_results_of_a_later_version_are_read_as_far_as_they_are_known() -> None:
    line = {"task": "t", "sample": 0, "tasks": "s", "split": "all", "seed": 1, "started": 0.0, "seconds": 1.0}
    assert Result.model_validate({**line, "new": 1}).outcome == "no end"
