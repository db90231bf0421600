"""A kernel's death, at any point, is a typed observation within a second."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kernel_env import KernelStartError, Limits, LocalREPLEnv
from kernel_env.bridge import Bridge
from tests.processes import pid_of

from .conftest import Kind, LendEnv, StartEnv

DEATHS = {
    "os._exit": ("import os; os._exit(3)", "exited with code 3"),
    "SIGKILL": ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
    "SIGTERM": ("import os; os.kill(os.getpid(), 15)", "was killed by SIGTERM"),
    "a segmentation fault": ("import ctypes; ctypes.string_at(0)", "was killed by SIGSEGV"),
    "abort": ("import os; os.abort()", "was killed by SIGABRT"),
    "in a thread": (
        "import os, threading, time; threading.Thread(target=os._exit, args=(4,)).start(); time.sleep(60)",
        "exited with code 4",
    ),
    "after it published 100 MB": (
        "from IPython.display import display\nimport os\n"
        "for _ in range(100): display({'image/png': 'x' * 1_000_000}, raw=True)\nos._exit(5)",
        "exited with code 5",
    ),
    "in the report": (
        "import os\nclass C:\n    def __repr__(self): os._exit(6)\nc = C()",
        "exited with code 6",
    ),
    "in a forked child's parent": ("import os\nif os.fork(): os._exit(7)\nos._exit(0)", "exited with code 7"),
    "in the parent of a child that lives on": (
        "import os, time\nif os.fork(): os._exit(9)\ntime.sleep(600)",
        "exited with code 9",
    ),
    "in await": (
        "import asyncio, os; asyncio.get_running_loop().call_later(0.1, os._exit, 8); await asyncio.sleep(9)",
        "exited with code 8",
    ),
}


class Death:
    """When a process ended, by this host's clock."""

    def __init__(self, pid: int) -> None:
        self._descriptor = os.pidfd_open(pid)
        self._moment = 0.0
        self._watcher = threading.Thread(target=self._wait)
        self._watcher.start()

    def _wait(self) -> None:
        if select.select([self._descriptor], [], [], 100)[0]:
            self._moment = time.time()
        os.close(self._descriptor)

    def until(self, moment: float) -> float:
        """Seconds from the death until `moment`."""
        self._watcher.join()
        assert self._moment, "it lives on"
        return moment - self._moment


def assert_told_within_a_second(env: LocalREPLEnv, death: Death) -> None:
    """The last turn of `env` ended at most a second after `death`; its fresh kernel came on top."""
    turn = env.episode.turns[-1]
    assert death.until(turn.started + turn.observation.result.execution_time) < 1.0
    assert death.until(time.time()) < 10  # on a busy machine


@pytest.mark.parametrize("name", DEATHS)
def test_a_death_in_a_cell_is_an_observation_within_a_second(lend: LendEnv, name: str) -> None:
    code, end = DEATHS[name]
    env = lend({"context": "ctx"}, limits=Limits(restarts=100))
    env.execute("lost = 1")
    death = Death(pid_of(env))
    observation = env.execute(f"print('before', flush=True)\n{code}").observation
    assert_told_within_a_second(env, death)
    assert (observation.status, observation.restarted, observation.done) == ("died", True, False)
    assert observation.result.exception == f"KernelDied: the kernel {end}"
    assert observation.lost_variables == ["lost"]
    assert env.execute("context").observation.result.stdout == "'ctx'\n"


def test_a_death_while_it_publishes_is_told_within_a_second_and_the_next_output_is_whole(
    start: StartEnv,
) -> None:
    def kill(output: dict[str, Any]) -> None:
        if output["output_type"] == "display_data" and not deaths:
            deaths.append(Death(pid_of(env)))
            os.kill(pid_of(env), signal.SIGKILL)

    deaths: list[Death] = []
    env = start(on_output=kill, limits=Limits(cell_output=100 * 2**20))
    code = (
        "from IPython.display import display\nwhile True: display({'image/png': 'x' * 1_000_000}, raw=True)"
    )
    observation = env.execute(code).observation
    assert_told_within_a_second(env, deaths[0])
    assert (observation.status, observation.restarted) == ("died", True)
    assert 1 <= len(observation.outputs) < 100
    assert env.execute("print('w' * 5000)").observation.result.stdout == "w" * 5000 + "\n"


@pytest.mark.timeout(300)
def test_deaths_cost_no_other_episode_anything(start: StartEnv) -> None:
    ended, calls = threading.Event(), [0]

    def go_on() -> bool:
        calls[0] += 1
        return not ended.wait(0.01)  # without it the two take a core from the kernels that start

    other = start(
        tools={"go_on": go_on}, llm_query_fn=str.upper, limits=Limits(helper_calls=10**7, cell_total=250)
    )
    env = start(limits=Limits(restarts=100))
    working = "n = 0\nwhile go_on():\n    n += 1\n    assert llm_query(f'a{n}') == f'A{n}'\nprint('whole')"
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(lambda: other.execute(working, timeout_s=250))
        try:
            for code, _ in DEATHS.values():
                before = calls[0]
                assert env.execute(code).observation.restarted
                assert calls[0] > before
        finally:
            ended.set()
        observation = work.result().observation
    assert (observation.status, observation.restarted, observation.result.stdout) == (
        "ok",
        False,
        "whole\n",
    ), observation.result


def test_a_death_while_a_helper_is_called_is_seen_and_the_call_recorded(start: StartEnv) -> None:
    called = threading.Event()

    def kill() -> None:
        called.set()
        os.kill(pid_of(env), signal.SIGKILL)
        threading.Event().wait(600)

    env = start(tools={"kill": kill})
    death = Death(pid_of(env))
    observation = env.execute("kill()").observation
    assert_told_within_a_second(env, death)
    assert (observation.status, observation.restarted) == ("died", True)
    (call,) = env.episode.turns[-1].helper_calls
    assert call.error is not None
    assert "cancelled" in call.error


def test_a_death_between_steps_is_told_by_the_next(start: StartEnv) -> None:
    env = start()
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
        pid = pid_of(env)
        descriptor = os.pidfd_open(pid)
        os.kill(pid, number)
        select.select([descriptor], [], [], 20)
        os.close(descriptor)
        observation = env.execute("x = 1").observation
        assert (observation.status, observation.restarted) == ("died", True)
        assert observation.result.execution_time < 1
        assert observation.result.exception == f"KernelDied: the kernel was killed by {number.name}"


def test_a_reset_over_a_dead_kernel_is_a_reset_like_any_other(start: StartEnv) -> None:
    env = start({"context": "first"})
    os.kill(pid_of(env), signal.SIGKILL)
    observation = env.reset(context="second").observation
    assert not observation.restarted
    assert env.execute("context").observation.result.stdout == "'second'\n"


def test_a_forked_child_may_die_as_it_likes(start: StartEnv) -> None:
    env = start()
    code = """
import os, signal
for number in (9, 11, 15):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    observation = env.execute(code).observation
    assert (observation.status, observation.result.stdout) == ("ok", "-9\n-11\n-15\n")


def test_quit_ends_the_cell_only(start: StartEnv) -> None:
    env = start()
    for code in ("quit()", "exit()", "get_ipython().ask_exit()", "import sys; sys.exit(3)", "%exit", "exit"):
        env.execute("x = 1")
        assert not env.execute(f"{code}\nx = 2").observation.restarted
        assert env.execute("print('on')").observation.result.stdout == "on\n"


def test_memory_that_is_not_there_is_an_error_of_the_cell(start: StartEnv) -> None:
    env = start()
    observation = env.execute("kept = 1\nx = bytearray(10**14)").observation
    assert (observation.status, observation.result.exception) == ("error", "MemoryError: ")
    assert env.execute("kept").observation.result.stdout == "1\n"


def test_a_kernel_that_runs_out_of_memory_for_good_is_replaced(start: StartEnv) -> None:
    env = start()
    code = """
import resource
size = int(open('/proc/self/statm').read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + 2**24, size + 2**24))
hoard = []
try:
    while True: hoard.append(bytearray(2**20))
except MemoryError: pass
try:
    while True: hoard.append(bytearray(100))
except MemoryError: pass
"""
    observation = env.execute(code, timeout_s=20).observation
    if not observation.restarted:
        # What the cell left is enough to go on, or the next step finds that it is not; it may have to wait.
        observation = env.execute("1 + 1", timeout_s=20).observation
        assert observation.result.stdout == "2\n" or observation.restarted
    assert env.execute("print('on')").observation.result.stdout == "on\n"


@pytest.mark.parametrize(
    ("boot", "end"),
    [
        ("__import__('os')._exit(9)", "exited with code 9"),
        ("__import__('os').kill(__import__('os').getpid(), 9)", "was killed by SIGKILL"),
        ("__import__('ctypes').string_at(0)", "was killed by SIGSEGV"),
    ],
)
def test_a_death_at_the_start_is_an_error_that_says_how(
    kind: Kind, monkeypatch: pytest.MonkeyPatch, boot: str, end: str
) -> None:
    env = LocalREPLEnv(**kind.options, limits=Limits(kernel_start=40))
    with monkeypatch.context() as patch:
        patch.setattr("kernel_env.live.RUN_BOOT", boot)
        begin = time.monotonic()
        with pytest.raises(KernelStartError, match=end):
            env.reset()
        assert time.monotonic() - begin < 10  # it was not waited for until `kernel_start`
    env.reset()
    assert env.execute("print('on')").observation.result.stdout == "on\n"
    env.close()


def test_a_kernel_killed_while_it_takes_its_context_is_an_error(kind: Kind) -> None:
    env = LocalREPLEnv(**kind.options)
    original = Bridge.context_piece

    def kill(bridge: Bridge, request: dict[str, object]) -> tuple[int, dict[str, object]]:
        connection = next(iter(bridge.connections))
        credentials = connection._transport.get_extra_info("socket").getsockopt(1, 17, 12)  # SO_PEERCRED
        os.kill(int.from_bytes(credentials[:4], "little"), signal.SIGKILL)
        return original(bridge, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bridge, "context_piece", kill)
        with pytest.raises(KernelStartError, match="was killed by SIGKILL"):
            env.reset(context="x" * 100)
    env.reset(context="x" * 100)
    assert env.execute("len(context)").observation.result.stdout == "100\n"
    env.close()


SHARED = """
import mmap
size = 10**9
shared = mmap.mmap(-1, size)
for at in range(0, size, 4096): shared[at] = 1
"""


def test_memory_past_its_limit_is_out_of_memory_and_says_what_was_lost(start: StartEnv) -> None:
    env = start({"context": "ctx"}, limits=Limits(memory_bytes=300 * 2**20))
    env.execute("lost = 1")
    death = Death(pid_of(env))
    observation = env.execute(SHARED).observation
    assert_told_within_a_second(env, death)
    assert (observation.status, observation.restarted) == ("out_of_memory", True)
    assert "lost" in observation.lost_variables
    assert "Limits.memory_bytes" in observation.result.stderr
    assert env.execute("context").observation.result.stdout == "'ctx'\n"
