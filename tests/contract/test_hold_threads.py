"""Which cell a helper call belongs to: threads, tasks, pools, and processes forked and spawned."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kernel_env import LocalREPLEnv

from .conftest import LendEnv, StartEnv

LATE = "refused: its cell has ended"
FORK = "import os\nr, w = os.pipe()\nif os.fork() == 0:\n"
POOLS = "import multiprocessing as m\nfrom concurrent.futures import ProcessPoolExecutor as P\n"


def prompts_by_turn(env: LocalREPLEnv) -> list[list[str]]:
    """Which prompts each turn of the record has."""
    return [sorted(call.arguments["prompt"] for call in turn.helper_calls) for turn in env.episode.turns]


CALLED: list[str] = []
TOOL = {"tool": lambda: CALLED.append("tool")}


def called_with(prompt: str) -> str:
    CALLED.append(prompt)
    return prompt


@pytest.mark.parametrize("call", ["FINAL('late')", "llm_query('late')", "tool()"])
def test_a_call_of_a_thread_whose_cell_has_ended_is_refused_and_changes_nothing(
    lend: LendEnv, call: str
) -> None:
    CALLED.clear()
    env = lend(llm_query_fn=called_with, tools=TOOL)
    code = f"""
import threading
go, said = threading.Event(), []
def late():
    go.wait()
    try: {call}
    except Exception as error: said.append(str(error))
thread = threading.Thread(target=late)
thread.start()
"""
    env.execute(code)
    observation = env.execute("go.set(); thread.join(); print(said[0])").observation
    assert observation.result.stdout.startswith(LATE)
    assert (observation.done, observation.final_answer, CALLED) == (False, None, [])
    assert not any(turn.helper_calls for turn in env.episode.turns[-2:])
    assert env.execute("llm_query('own')").observation.result.stdout == "'own'\n"


@pytest.mark.parametrize(
    "call", ["FINAL('late')", "llm_query('late')", "await asyncio.to_thread(llm_query, 'late')"]
)
def test_a_call_of_a_task_whose_cell_has_ended_is_refused(lend: LendEnv, call: str) -> None:
    env = lend(llm_query_fn=str.upper)
    code = f"""
import asyncio
go, said = asyncio.Event(), []
async def late():
    await go.wait()
    try: {call}
    except Exception as error: said.append(str(error))
task = asyncio.create_task(late())
"""
    env.execute(code)
    observation = env.execute("go.set(); await task; print(said[0])").observation
    assert observation.result.stdout.startswith(LATE)
    assert not observation.done
    assert not any(turn.helper_calls for turn in env.episode.turns[-2:])


def test_work_given_to_an_old_pool_belongs_to_the_cell_that_gives_it(start: StartEnv) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute("from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)")
    env.execute("list(pool.map(llm_query, 'ab'))")
    assert env.execute("list(pool.map(llm_query, 'cd'))").observation.result.stdout == "['C', 'D']\n"
    assert prompts_by_turn(env) == [[], ["a", "b"], ["c", "d"]]


def test_sixteen_threads_have_their_own_replies(start: StartEnv) -> None:
    together = threading.Barrier(16, timeout=60)

    def model(prompt: str) -> str:
        together.wait()
        return prompt * 2

    env = start(llm_query_fn=model)
    code = """
import threading
replies = {}
def ask(n): replies[n] = [llm_query(f"{n}.{k}") for k in range(5)]
threads = [threading.Thread(target=ask, args=(n,)) for n in range(16)]
for t in threads: t.start()
for t in threads: t.join()
print(all(replies[n] == [f"{n}.{k}" * 2 for k in range(5)] for n in range(16)))
"""
    assert env.execute(code).observation.result.stdout == "True\n"
    assert len(env.episode.turns[0].helper_calls) == 80


def test_tasks_call_helpers_side_by_side(start: StartEnv) -> None:
    together = asyncio.Event()
    waiting = []

    async def model(prompt: str) -> str:
        waiting.append(prompt)
        if len(waiting) == 8:
            together.set()
        await together.wait()
        return prompt.upper()

    env = start(llm_query_fn=model)
    code = (
        "import asyncio\nprint(await asyncio.gather(*(asyncio.to_thread(llm_query, c) for c in 'abcdefgh')))"
    )
    # to_thread's own pool has two threads more than cores, or so: make it wide enough.
    wide = (
        "from concurrent.futures import ThreadPoolExecutor\nasyncio.get_running_loop().set_default_executor"
    )
    env.execute(f"import asyncio\n{wide}(ThreadPoolExecutor(8))")
    assert env.execute(code).observation.result.stdout == f"{list('ABCDEFGH')}\n"
    assert prompts_by_turn(env) == [[], list("abcdefgh")]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (f"{FORK}    os.write(w, llm_query('a').encode()); os._exit(0)\n_ = os.wait(); os.read(r, 9)", b"A"),
        (f"{POOLS}with m.get_context('fork').Pool(2) as p: r = p.map(llm_query, 'ab')\nr", ["A", "B"]),
        (f"{POOLS}with m.get_context('spawn').Pool(2) as p: r = p.map(llm_query, 'ab')\nr", ["A", "B"]),
        (f"{POOLS}with P(2, m.get_context('forkserver')) as p: r = [*p.map(llm_query, 'ab')]\nr", ["A", "B"]),
    ],
    ids=["fork", "fork pool", "spawn pool", "forkserver pool"],
)
def test_helpers_work_in_child_processes(lend: LendEnv, code: str, expected: bytes | list[str]) -> None:
    env = lend(llm_query_fn=str.upper)
    observation = env.execute(code).observation
    assert (observation.result.stdout, observation.result.stderr) == (f"{expected!r}\n", "")
    assert prompts_by_turn(env)[-1] == ["a", "b"][: len(expected)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_can_answer_and_a_late_one_cannot(start: StartEnv, method: str) -> None:
    env = start()
    env.execute(f"import multiprocessing\nm = multiprocessing.get_context({method!r})")
    env.execute("pool = m.Pool(1); pool.map(abs, [1])")
    code = "try: pool.map(FINAL, ['late'])\nexcept HelperError as error: print(error)"
    late = env.execute(code).observation
    assert late.result.stdout.startswith(LATE)
    assert not late.done
    observation = env.execute(
        "p = m.Process(target=FINAL, args=('from a child',)); p.start(); p.join()"
    ).observation
    assert (observation.done, observation.final_answer) == (True, "from a child")


def test_a_failed_helper_in_a_child_process_raises_in_the_parent(start: StartEnv) -> None:
    def fails(prompt: str) -> str:
        raise RuntimeError(prompt)

    env = start(llm_query_fn=fails)
    code = "import multiprocessing as m\nwith m.get_context('spawn').Pool(1) as p: p.map(llm_query, ['a'])"
    assert env.execute(code).observation.result.exception == "HelperError: llm_query failed: RuntimeError"
