"""Interrupts reach whatever a cell does; where they cannot, the kill follows, and the observation says so."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from kernel_env import Limits, LocalREPLEnv, REPLAction, REPLEnvironment
from kernel_env.process import KernelProcess
from tests.processes import folder_of, pid_of

from .conftest import STARTED, Kind, LendEnv, StartEnv

INTERRUPTED = {
    "await": "import asyncio; await asyncio.sleep(600)",
    "await of a task": "import asyncio; await asyncio.create_task(asyncio.sleep(600))",
    "await of many": "import asyncio; await asyncio.gather(*(asyncio.sleep(600) for _ in range(9)))",
    "an async cell that spins": "import asyncio; await asyncio.sleep(0)\nwhile True: pass",
    "a task that spins": """
        import asyncio
        async def spin():
            while True: pass
        task = asyncio.create_task(spin())
        await asyncio.sleep(600)
        """,
    "a callback that spins": """
        import asyncio
        def spin():
            while True: pass
        asyncio.get_running_loop().call_soon(spin)
        await asyncio.sleep(600)
        """,
    "an async function that sleeps": "import asyncio, time\nawait asyncio.sleep(0)\ntime.sleep(600)",
    "a loop": "while True: pass",
    "sleep": "import time; time.sleep(600)",
    "a lock": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "a queue": "import queue; queue.Queue().get()",
    "a pipe": "import os; r, w = os.pipe(); os.read(r, 1)",
    "a C call that checks for signals": "import re; re.match(r'(a*)*b', 'a' * 40)",
    "a C call that is made again and again": "import ctypes\nwhile True: ctypes.CDLL(None).usleep(9)",
    "a loop that blocks SIGINT": """
        import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        while True: pass
        """,
    "a subprocess": "import subprocess; subprocess.run(['sleep', '600'])",
    "a subprocess in its own session": """
        import subprocess
        subprocess.run(['sleep', '600'], start_new_session=True)
        """,
    "a shell command": "!sleep 600",
    "a thread pool": """
        import time
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(4) as pool: list(pool.map(llm_query, 'abcdefghijklmnop'))
        """,
    "a helper": "llm_query('x')",
    "a finalizer": """
        class Value:
            def __del__(self):
                while True: pass
        Value()
        while True: pass
        """,
    "a finalizer in an async cell": """
        import asyncio, weakref
        await asyncio.sleep(0)
        class Value: pass
        def spin(_):
            while True: pass
        value = Value()
        reference = weakref.ref(value, spin)
        del value
        while True: pass
        """,
    "a finalizer in a task": """
        import asyncio
        class Value:
            def __del__(self):
                while True: pass
        async def spin():
            Value()
            while True: pass
        task = asyncio.create_task(spin())
        await asyncio.sleep(600)
        """,
    "a warning of a file that was not closed": """
        import ctypes, functools
        files = [open('/dev/null')]
        sleep = functools.partial(ctypes.PyDLL(None).usleep, 2_000_000)
        list(map(functools.partial.__call__, [sleep, functools.partial(files.clear)]))
        while True: pass
        """,
    "a generator": "all(True for _ in iter(int, 1))",
    "a handler that catches one": """
        try:
            while True: pass
        except BaseException: pass
        """,
}

KILLED = {
    "a handler that catches all": """
        import time
        while True:
            try:
                while True: time.sleep(0.01)
            except BaseException: pass
        """,
    "a loop with a handler of its own": """
        import signal; signal.signal(signal.SIGINT, lambda *a: None)
        while True: pass
        """,
    "a loop that ignores SIGINT": """
        import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)
        while True: pass
        """,
    "an async cell that catches all": """
        import asyncio
        while True:
            try: await asyncio.sleep(600)
            except BaseException: pass
        """,
    "C code that holds the GIL": "sum(range(10**12))",
    "foreign code that holds the GIL and does not return for signals": """
        import ctypes
        mutex = ctypes.create_string_buffer(64)
        while True: ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        """,
    "a kernel that stopped itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
}


async def never(prompt: str) -> str:
    await asyncio.sleep(3600)
    return prompt


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupt_reaches_the_cell_and_keeps_its_variables(lend: LendEnv, name: str) -> None:
    # Total time, because waiting for helpers is not active time.
    env = lend(llm_query_fn=never, limits=Limits(cell_total=1.0, interrupt_grace=10))
    env.execute("kept = 1")
    begin = time.monotonic()
    observation = env.execute(textwrap.dedent(INTERRUPTED[name])).observation
    assert (observation.status, observation.restarted) == ("timeout", False)
    assert time.monotonic() - begin < 5  # 1 s until the interrupt, at once on a quiet machine from there
    assert "it was interrupted and its variables are kept" in observation.result.stderr
    assert observation.lost_variables == []
    after = env.execute("print(kept)").observation
    assert (after.status, after.result.stdout) == ("ok", "1\n")


def test_what_a_cell_does_about_an_interrupt_is_not_interrupted(lend: LendEnv) -> None:
    env = lend(limits=Limits(cell_total=3.0, interrupt_grace=10))
    code = """
import time
ended = []
def rows():
    try:
        yield
    finally:
        time.sleep(0.5)
        ended.append(True)
for row in rows(): time.sleep(600)
"""
    observation = env.execute(code).observation
    assert (observation.status, observation.restarted) == ("timeout", False)
    assert observation.result.stderr.count("KeyboardInterrupt") == 2  # above the traceback and below
    assert env.execute("ended").observation.result.stdout == "[True]\n"


def test_an_interrupt_that_was_caught_keeps_nothing_alive(start: StartEnv) -> None:
    env = start(limits=Limits(cell_total=1.0, interrupt_grace=10))
    code = """
import gc, time
ended = []
class Value:
    def __del__(self): ended.append(True)
def work():
    value = Value()
    time.sleep(600)
gc.disable()
try:
    work()
except KeyboardInterrupt:
    pass
print(len(ended))
"""
    observation = env.execute(code).observation
    assert (observation.status, observation.result.stdout) == ("timeout", "1\n")


def test_the_calls_of_a_thread_pool_are_cancelled_and_it_ends_within_a_second(start: StartEnv) -> None:
    cancelled: dict[str, float] = {}

    async def model(prompt: str) -> str:
        try:
            return await never(prompt)
        except asyncio.CancelledError:
            cancelled[prompt] = time.time()
            raise

    env = start(llm_query_fn=model, limits=Limits(cell_total=1.0, interrupt_grace=10))
    took: list[float] = []
    for _ in range(5):  # what else this machine does only adds to it
        cancelled.clear()
        observation = env.execute(textwrap.dedent(INTERRUPTED["a thread pool"])).observation
        assert (observation.status, observation.restarted) == ("timeout", False)
        turn = env.episode.turns[-1]
        if not cancelled:
            continue  # the second was over before the first call
        took.append(turn.started + observation.result.execution_time - min(cancelled.values()))
        # What the pool had not begun never came to the model.
        assert sorted(cancelled) == sorted(call.arguments["prompt"] for call in turn.helper_calls)
        assert 1 <= len(cancelled) <= 4
        assert all("cancelled" in (call.error or "") for call in turn.helper_calls)
        if took[-1] < 1.0:
            break
    assert min(took) < 1.0


@pytest.mark.parametrize("name", KILLED)
def test_a_cell_that_no_interrupt_reaches_costs_the_kernel(lend: LendEnv, name: str) -> None:
    env = lend(limits=Limits(interrupt_grace=0.5, restarts=100))
    env.execute("lost = 1")
    observation = env.execute(textwrap.dedent(KILLED[name]).strip(), timeout_s=0.5).observation
    assert (observation.status, observation.restarted) == ("timeout", True)
    # Half a second, half a second of grace; what a cell was active is known a while later on a busy machine.
    assert observation.result.execution_time < 8
    assert "it ignored the interrupt and its kernel was killed" in observation.result.stderr
    assert "lost" in observation.lost_variables
    assert env.execute("1 + 1").observation.result.stdout == "2\n"


def test_code_that_holds_the_gil_from_the_start_is_bounded_by_its_active_time(start: StartEnv) -> None:
    env = start(limits=Limits(interrupt_grace=0.5))
    begin = time.monotonic()
    observation = env.execute("sum(range(10**12))", timeout_s=1.0).observation
    assert time.monotonic() - begin < 8
    assert observation.status == "timeout"


def test_a_cell_after_an_interrupted_one_is_not_interrupted(start: StartEnv) -> None:
    env = start()
    for _ in range(5):
        assert env.execute("while True: pass", timeout_s=0.1).observation.status == "timeout"
        assert env.execute("import time; time.sleep(0.2)").observation.status == "ok"


CTRL_C = """
import asyncio, json, os, signal, sys
from kernel_env import Limits, LocalREPLEnv

def interrupt(output):
    if not interrupted:
        interrupted.append(output)
        os.kill(os.getpid(), signal.SIGINT)

async def never(prompt): await asyncio.sleep(3600)

options, cells = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for code, grace in cells:
    interrupted = []
    limits = Limits(interrupt_grace=grace)
    with LocalREPLEnv(on_output=interrupt, llm_query_fn=never, limits=limits, **options) as env:
        env.reset()
        try:
            env.execute(code)
        except KeyboardInterrupt:
            (turn,) = env.episode.turns
            print(turn.observation.restarted, turn.observation.result.exception)
        print(env.execute("print('x' in globals())").observation.result.stdout, end="")
"""
ON = "x = 1; print('on', flush=True)\n"
STOPPED: dict[str, tuple[str, bool]] = {
    "a loop": (f"{ON}while True: pass", False),
    "sleep": (f"{ON}import time; time.sleep(600)", False),
    "await": (f"{ON}import asyncio; await asyncio.sleep(600)", False),
    "a helper": (f"{ON}llm_query('x')", False),
    "what ignores SIGINT": (
        f"import signal; _ = signal.signal(signal.SIGINT, signal.SIG_IGN)\n{ON}while True: pass",
        True,
    ),
}
"""What the caller stops once it prints, and whether that costs the kernel."""


def grace(is_killed: bool) -> float:
    """Seconds until the kill; an interrupt that is on its way must not run into it on a busy machine."""
    return 0.5 if is_killed else 20


def test_ctrl_c_in_the_caller_leaves_the_episode_usable(kind: Kind) -> None:
    cells = json.dumps([(code, grace(is_killed)) for code, is_killed in STOPPED.values()])
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C, json.dumps(kind.options), cells],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    expected = [
        f"{is_killed} KeyboardInterrupt: the cell was stopped because the caller interrupted it\n"
        f"{not is_killed}\n"
        for _, is_killed in STOPPED.values()
    ]
    assert done.stdout == "".join(expected), done.stderr


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_cancelled_step_leaves_the_episode_usable(kind: Kind, is_killed: bool) -> None:
    async def stop(env: REPLEnvironment, code: str) -> None:
        printed.clear()
        await env.step_async(REPLAction(code="globals().pop('x', None)"))
        step = asyncio.create_task(env.step_async(REPLAction(code=code)))
        await printed.wait()
        step.cancel()
        begin = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await step
        # Less than the grace; else half a second of it, and a fresh kernel.
        assert time.monotonic() - begin < 18
        observation = env.episode.turns[-1].observation
        assert observation.restarted == is_killed
        assert "the caller interrupted it" in (observation.result.exception or "")
        observation = await env.step_async(REPLAction(code="print('x' in globals())"))
        assert (observation.status, observation.result.stdout) == ("ok", f"{not is_killed}\n")

    async def body() -> None:
        env = REPLEnvironment(
            **kind.options,
            llm_query_fn=never,
            on_output=lambda output: printed.set() if "on" in output.get("text", "") else None,
            limits=Limits(interrupt_grace=grace(is_killed)),
        )
        await env.reset_async()
        for code in [code for code, costs_kernel in STOPPED.values() if costs_kernel == is_killed]:
            await stop(env, code)
        await env.close_async()

    printed = asyncio.Event()
    asyncio.run(body())


def test_a_signal_in_the_middle_of_anything_costs_no_reply(start: StartEnv) -> None:
    """SIGINT at random moments: in IPython, in the report, in the streams, between cells."""
    env = start()
    pid = pid_of(env)
    ended = threading.Event()

    def shoot() -> None:
        while not ended.wait(0.003):
            os.kill(pid, signal.SIGINT)

    shooter = threading.Thread(target=shoot)
    shooter.start()
    try:
        for _ in range(150):
            observation = env.execute("class C: pass\nc = C()\nprint('x' * 1000)\nc").observation
            assert observation.status in ("ok", "error"), observation.result.stderr
            assert not observation.restarted
    finally:
        ended.set()
        shooter.join()
    assert env.execute("print('whole')").observation.result.stdout == "whole\n"


def test_an_interrupt_before_the_cell_s_first_line_stops_it_and_no_other(start: StartEnv) -> None:
    """As when the kernel is kept from the processor from its `busy` until the time of the cell is over."""
    env = start()
    code = """
import os, signal
guest, kernel = __import__('sys').modules['_kernel_env_helpers']._guest, get_ipython().kernel
def interrupted(before_cell=guest.limits.before_cell):
    os.kill(os.getpid(), signal.SIGINT)
    guest.limits.before_cell = before_cell
    before_cell()
guest.limits.before_cell = interrupted
"""
    assert env.execute(code).observation.status == "ok"
    observation = env.execute("print('ran'); ran = True").observation
    assert (observation.status, observation.restarted) == ("error", False)
    assert observation.result.stdout == ""
    assert (observation.result.exception or "").startswith("KeyboardInterrupt")
    assert observation.outputs[-1]["output_type"] == "error"
    assert env.execute("print('ran' in globals())").observation.result.stdout == "False\n"


def test_an_interrupt_before_the_kernel_has_read_the_request_is_sent_again(start: StartEnv) -> None:
    env = start(limits=Limits(interrupt_grace=60))
    env.execute("kept = 1")
    pid = pid_of(env)
    os.kill(pid, signal.SIGSTOP)
    interrupted = threading.Event()
    interrupt = KernelProcess.interrupt

    async def noted(process: KernelProcess) -> None:
        await interrupt(process)
        interrupted.set()

    def go_on() -> None:
        interrupted.wait(60)
        os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=go_on)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelProcess, "interrupt", noted)
        thread.start()
        begin = time.monotonic()
        observation = env.execute("while True: pass", timeout_s=0.3).observation
    thread.join()
    assert time.monotonic() - begin < 30
    assert (observation.status, observation.restarted) == ("timeout", False)
    assert env.execute("kept").observation.result.stdout == "1\n"


@pytest.mark.parametrize("kind", [STARTED])  # a forked kernel has no subshells
def test_a_request_in_a_subshell_does_not_keep_interrupts_from_the_cell(start: StartEnv) -> None:
    began = threading.Event()
    env = start(limits=Limits(interrupt_grace=20), tools={"began": began.set})
    client = BlockingKernelClient()
    client.load_connection_file(str(folder_of(env) / "connection.json"))
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        request = client.session.msg("create_subshell_request", {})
        client.control_channel.send(request)
        subshell = client.get_control_msg(timeout=30)["content"]["subshell_id"]
        with ThreadPoolExecutor(1) as pool:
            step = pool.submit(env.execute, "began()\nwhile True: pass", timeout_s=3)
            assert began.wait(30)
            message = client.session.msg("kernel_info_request", {})
            message["header"]["subshell_id"] = subshell
            client.shell_channel.send(message)
            client.get_shell_msg(timeout=30)
            observation = step.result(60).observation
    finally:
        client.stop_channels()
    assert (observation.status, observation.restarted) == ("timeout", False)


def test_a_second_interrupt_in_the_handler_of_the_first_is_dropped(start: StartEnv) -> None:
    """It would be raised where the handler had found that none may be."""
    code = """
import signal, types
handle = signal.getsignal(signal.SIGINT)
handle(signal.SIGINT, types.SimpleNamespace(f_code=handle.__func__.__code__, f_back=None))
print('on')
"""
    observation = start().execute(code).observation
    assert (observation.status, observation.result.stdout) == ("ok", "on\n")


def test_what_another_client_asks_for_can_be_interrupted(start: StartEnv) -> None:
    env = start()
    shown = env.get_variable("__import__('os').environ['HOME']").observation.result.stdout[1:-2]
    code = """
import os, time
def handle(comm, message):
    open('began', 'w').close()
    while True: time.sleep(0.01)
get_ipython().kernel.comm_manager.register_target('hangs', handle)
"""
    env.execute(code)
    folder = Path(shown).parent
    client = BlockingKernelClient()
    client.load_connection_file(str(folder / "connection.json"))
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        opening = {"comm_id": "a", "target_name": "hangs", "data": {}}
        client.shell_channel.send(client.session.msg("comm_open", opening))
        while not (folder / "work" / "began").exists():
            threading.Event().wait(0.01)
        os.kill(pid_of(env), signal.SIGINT)
        observation = env.execute("print('on')", timeout_s=10).observation
    finally:
        client.stop_channels()
    assert (observation.status, observation.result.stdout) == ("ok", "on\n")


def test_the_environment_is_usable_after_every_kind_of_stop_in_one_episode(start: StartEnv) -> None:
    env: LocalREPLEnv = start(limits=Limits(interrupt_grace=0.5))
    for code, status in [
        ("while True: pass", "timeout"),
        ("import os; os._exit(1)", "died"),
        (textwrap.dedent(KILLED["a loop that ignores SIGINT"]), "timeout"),
    ]:
        assert env.execute(code, timeout_s=0.5).observation.status == status
        assert env.execute("print(1)").observation.result.stdout == "1\n"
