"""The ledger of a turn: what the host saw a cell use."""

from __future__ import annotations

import asyncio

import pytest

from kernel_env import Limits, LocalREPLEnv, Usage, to_notebook

from .conftest import MakeEnv
from .processes import pid_of, wait_for_the_end

MB = 2**20


def use(env: LocalREPLEnv, code: str) -> Usage:
    observation = env.execute(code).observation
    assert observation.status == "ok", observation.result.stderr
    assert observation.usage is not None
    return observation.usage


@pytest.fixture(params=["python3", "stock"])
def env(request: pytest.FixtureRequest, make_env: MakeEnv) -> LocalREPLEnv:
    env = make_env(kernel_name=request.param, llm_query_fn=slow)
    env.reset()
    return env


async def slow(prompt: str) -> str:
    await asyncio.sleep(0.3)
    return prompt


def test_a_cell_that_spins_uses_processor_time_and_one_that_sleeps_none(env: LocalREPLEnv) -> None:
    spins = use(env, "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass")
    assert 0.29 < spins.cpu < 0.6
    assert spins.wall >= spins.active > 0.29
    sleeps = use(env, "time.sleep(0.3)")
    assert sleeps.cpu < 0.2
    assert sleeps.active > 0.29


SPIN = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"


def test_processes_count_that_were_waited_for_and_that_go_on(env: LocalREPLEnv) -> None:
    run = f"import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', {SPIN!r}]).returncode)"
    waited_for = use(env, run)
    assert 0.29 < waited_for.cpu < 1.5
    assert waited_for.processes >= 2
    goes_on = f"{SPIN}print('spun', flush=True); time.sleep(600)"
    code = (
        f"child = subprocess.Popen([sys.executable, '-c', {goes_on!r}], stdout=subprocess.PIPE)\n"
        "import time; child.stdout.readline()"
    )
    assert use(env, code).cpu > 0.2
    use(env, "child.kill(); print(child.wait())")
    assert use(env, "time.sleep(0.1)").cpu < 0.2  # long enough for all to be read
    assert use(env, "1").cpu < 0.2
    assert use(env, "1").processes == 1


def test_the_peak_of_memory_is_the_turn_s_own(env: LocalREPLEnv) -> None:
    before = use(env, "x = 1").peak_memory
    assert use(env, "x = bytearray(b'x') * (200 * 2**20); del x").peak_memory > before + 190 * MB
    assert use(env, "x = 1").peak_memory < before + 60 * MB


def test_waiting_for_helpers_and_output_are_counted(env: LocalREPLEnv) -> None:
    waits = use(env, "print(llm_query('x'))")
    assert 0.29 < waits.helper_wait < waits.wall
    assert waits.active < waits.wall - 0.25
    assert use(env, "print('x' * 10**6)").bytes_out > 10**6
    assert use(env, "1").bytes_out < 10**4


def test_it_is_in_the_record_the_notebook_and_for_rubrics(make_env: MakeEnv) -> None:
    seen: list[Usage | None] = []

    def rubric(action: object, observation: object) -> float:
        seen.append(observation.usage)  # type: ignore[attr-defined]
        return 0.0

    env = make_env(rubric=rubric)
    env.reset()
    usage = use(env, "1")
    env.submit_final_answer("x")
    assert seen == [usage, None]
    assert [turn.observation.usage for turn in env.episode.turns] == [usage, None]
    notebook = to_notebook(env.episode)
    assert notebook["cells"][3]["metadata"]["kernel_env"]["observation"]["usage"] == usage.model_dump()
    assert "| Isolation | " in notebook["cells"][0]["source"]
    assert "| Most memory | " in notebook["cells"][0]["source"]


def test_helper_calls_of_an_episode_are_bounded_across_its_kernels(make_env: MakeEnv) -> None:
    env = make_env(llm_query_fn=str.upper, limits=Limits(helper_calls=3))
    env.reset()
    assert env.execute("llm_query('a')").observation.status == "ok"
    env.execute("import os; os._exit(1)")
    assert env.execute("print(llm_query_batched(['b', 'c']))").observation.result.stdout == "['B', 'C']\n"
    refused = env.execute("llm_query('d')").observation
    assert "helper call 4 of the episode, and Limits.helper_calls = 3" in refused.result.stderr
    env.reset()
    assert env.execute("llm_query('a')").observation.status == "ok"


def test_what_an_earlier_cell_left_running_is_not_blamed_on_the_next(make_env: MakeEnv) -> None:
    env = make_env(limits=Limits(cell_cpu=1.0))
    env.reset()
    work = "import time\nwhile time.process_time() < 0.7: pass\nopen('done', 'w').close()\ntime.sleep(600)"
    code = f"import os, subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', {work!r}])"
    use(env, code)
    use(env, "while not os.path.exists('done'): time.sleep(0.01)")
    later = use(env, "time.sleep(0.5)")
    assert later.cpu < 0.3
    assert later.processes == 2


def test_files_that_are_there_at_first_do_not_stop_a_cell_that_adds_none(make_env: MakeEnv) -> None:
    env = make_env(files={"big": bytes(8 * MB)}, limits=Limits(workdir_bytes=2 * MB))
    env.reset()
    use(env, "import time; time.sleep(2.5)")
    env.execute("import os; os._exit(1)")
    use(env, "import time; time.sleep(2.5)")
    code = "for n in range(100):\n    open(f'more{n}', 'wb').write(bytes(2**18)); time.sleep(0.1)"
    stopped = env.execute(code).observation
    assert "its files take" in str(stopped.result.exception)
    assert "more than Limits.workdir_bytes = 2,097,152" in stopped.result.stderr
    use(env, "import os\nfor name in os.listdir(): os.unlink(name)\ntime.sleep(2.5)")


def test_files_of_short_cells_are_told_of_later(make_env: MakeEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernel_env.meter._COUNT_OF_SHORT_CELLS", 0.0)
    env = make_env(limits=Limits(workdir_bytes=2 * MB))
    env.reset(max_iterations=10**6)
    use(env, "n = 0")
    for _ in range(3000):
        observation = env.execute("n += 1; open(f'part{n}', 'wb').write(bytes(2**16))").observation
        assert observation.status == "ok"
        if observation.result.stderr:
            break
    assert "An earlier cell went over a limit: its files take" in observation.result.stderr


def test_deleted_files_that_are_open_count(make_env: MakeEnv) -> None:
    env = make_env(limits=Limits(workdir_bytes=8 * MB))
    env.reset()
    code = (
        "import os, time\nheld = open('held', 'wb')\nos.unlink('held')\n"
        "for _ in range(200): held.write(bytes(2**18)); held.flush(); time.sleep(0.05)"
    )
    observation = env.execute(code).observation
    assert "its files take" in str(observation.result.exception)


def test_a_kernel_that_lowers_its_own_limits_keeps_working(env: LocalREPLEnv) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))\n1 / 0"
    assert env.execute(code).observation.result.exception == "ZeroDivisionError: division by zero"
    for _ in range(2):
        assert env.execute("1 / 0").observation.result.exception == "ZeroDivisionError: division by zero"
    use(env, "x = 1")


def test_the_reason_is_told_once_of_a_kernel_that_went_over_a_limit_at_rest(make_env: MakeEnv) -> None:
    env = make_env(limits=Limits(memory_bytes=100 * MB))
    env.reset()
    grow = (
        "import mmap, time; time.sleep(0.5); m = mmap.mmap(-1, 2**29)\n"
        "for n in range(0, 2**29, 4096): m[n] = 1\ntime.sleep(600)"
    )
    use(env, f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {grow!r}])")
    assert wait_for_the_end(pid_of(env), 30)
    told = env.execute("1").observation
    assert told.status == "out_of_memory"
    assert "bytes of memory, more than Limits.memory_bytes = 104,857,600" in told.result.stderr
    plain = env.execute("import os; os._exit(5)").observation
    assert (plain.status, plain.result.exception) == ("died", "KernelDied: the kernel exited with code 5")
