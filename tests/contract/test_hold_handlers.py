"""Interrupts, a cell's own signal handlers and its finalizers, in the middle of what is printed and shown."""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from kernel_env import Limits

from .conftest import FORKED, SANDBOXED, STARTED, LendEnv, StartEnv


@pytest.mark.parametrize(
    "code",
    [
        "while True: logging.warning('x')",
        "while True: sys.stderr.write('x')",
        "while True: sys.stdout.flush()",
        "while True: display({'text/plain': 'x'}, raw=True)",
        "while True: print('x')",
    ],
)
def test_a_loop_that_only_puts_out_is_interrupted(lend: LendEnv, code: str) -> None:
    env = lend(limits=Limits(interrupt_grace=10))
    env.execute("import logging, sys\nfrom IPython.display import display\nlogging.basicConfig()\nkept = 1")
    for _ in range(5):
        observation = env.execute(code, timeout_s=0.2).observation
        assert (observation.status, observation.restarted) == ("timeout", False)
        assert observation.outputs[-1]["output_type"] == "error", observation.result.stderr
        assert "malformed" not in observation.result.stderr
    assert env.execute("kept").observation.result.stdout == "1\n"


@pytest.mark.parametrize("kind", [STARTED])
def test_an_interrupt_while_ipykernel_asks_for_its_thread_does_not_end_it(start: StartEnv) -> None:
    """Python 3.11 takes such a thread for ended, and the next interrupt cut a message in two."""
    env = start()
    code = """
        import sys
        hits, asking = [], ('_wait_for_tstate_lock', 'schedule')
        def strike(frame, event, arg):
            if event == 'c_return' and frame.f_code.co_name in asking and not hits:
                sys.setprofile(None)
                hits.append(frame)
                raise KeyboardInterrupt
        sys.setprofile(strike)
        try:
            display(1)
        except KeyboardInterrupt:
            pass
        print(len(hits), get_ipython().kernel.iopub_thread.thread.is_alive())
        """
    assert env.execute(textwrap.dedent(code)).observation.result.stdout.endswith("1 True\n")


def test_a_handler_that_raises_costs_no_line(start: StartEnv) -> None:
    env = start(max_output_length=10**7, limits=Limits(cell_output=10**7))
    code = """
        import signal, sys, time
        class Alarm(Exception): pass
        def ring(*_):
            global armed
            if armed:
                armed = False
                raise Alarm
        signal.signal(signal.SIGALRM, ring)
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0011)
        lines, hits, n = [], 0, 0
        while n < 60_000 or hits < 20:
            try:
                armed = True
                while n < 60_000 or hits < 20:
                    n += 1
                    sys.stdout.write(f'{n}\\n')
                    lines.append(n)
                armed = False
            except Alarm:
                hits += 1
        _ = signal.setitimer(signal.ITIMER_REAL, 0)
        """
    observation = env.execute(textwrap.dedent(code)).observation
    assert observation.status == "ok"
    got = list(map(int, observation.result.stdout.split()))
    assert got == sorted(set(got))
    env.execute("import json; open('lines.json', 'w').write(json.dumps(lines))")
    assert set(map(int, env.read_artifact("lines.json")[1:-1].split(b","))) <= set(got)


@pytest.mark.parametrize("kind", [SANDBOXED, FORKED])  # ipykernel's own publishing is not proof against it
@pytest.mark.parametrize(
    "code",
    [
        """
        import signal, time
        signal.signal(signal.SIGALRM, lambda *_: print('rung', flush=True))
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.0053)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            shown += 1
            show(shown)
        signal.setitimer(signal.ITIMER_REAL, 0)
        """,
        """
        import threading, time
        class Prints:
            def __init__(self): self.me = self
            def __del__(self): print('gone', flush=True)
        is_over = False
        def work():
            while not is_over: print('thread', flush=True)
        thread = threading.Thread(target=work)
        thread.start()
        end = time.monotonic() + 1
        while time.monotonic() < end:
            Prints()
            shown += 1
            show(shown)
        is_over = True
        thread.join()
        """,
    ],
    ids=["a handler that prints", "finalizers and a thread that print"],
)
def test_what_prints_in_the_middle_of_a_display_breaks_none(start: StartEnv, code: str) -> None:
    env = start(max_output_length=10**7, limits=Limits(cell_output=2**24))
    env.execute(
        "from IPython.display import display\nshown = 0\n"
        "def show(n): display({'text/plain': str(n)}, raw=True)"
    )
    observation = env.execute(textwrap.dedent(code), timeout_s=30).observation
    assert (observation.status, observation.result.stderr) == ("ok", "")
    shows = [o["data"]["text/plain"] for o in observation.outputs if o["output_type"] == "display_data"]
    assert shows == [str(n + 1) for n in range(len(shows))]
    counted = env.execute("shown").observation.result.stdout  # finalizers may still print
    assert counted.splitlines()[-1] == f"{len(shows)}"


def test_text_goes_out_in_time_after_a_print_at_the_end_of_the_stack(start: StartEnv) -> None:
    has_arrived = threading.Event()

    def note(output: dict[str, Any]) -> None:
        if "first" in output.get("text", ""):
            has_arrived.set()

    env = start(on_output=note, llm_query_fn=lambda prompt: str(has_arrived.wait(30)))
    code = """
        import time
        time.sleep(1.5)
        def down():
            try: down()
            except RecursionError: print('deep')
        down()
        """
    env.execute(textwrap.dedent(code))
    observation = env.execute("print('first')\nprint(llm_query('has it arrived?'))").observation
    assert observation.result.stdout == "first\nTrue\n"


def test_a_request_that_waits_behind_a_failing_async_cell_is_served(start: StartEnv) -> None:
    env = start()
    kernel = env._env._rollout._kernel  # type: ignore[union-attr]
    folder = kernel.folder
    client = BlockingKernelClient(connection_file=str(folder.path / "connection.json"))
    client.load_connection_file()
    client.start_channels()
    code = """
        import asyncio, os, time
        await asyncio.sleep(0.01)
        open('began', 'w').close()
        while not os.path.exists('go'): time.sleep(0.01)
        1 / 0
        """
    try:
        client.wait_for_ready(timeout=60)
        client.execute(textwrap.dedent(code))
        wait_for(lambda: (folder.work / "began").exists())
        with ThreadPoolExecutor(1) as pool:
            step = pool.submit(env.execute, "print('mine')")
            wait_for(lambda: kernel._live._running is not None)
            (folder.work / "go").touch()
            observation = step.result(60).observation
    finally:
        client.stop_channels()
    assert (observation.status, observation.result.stdout) == ("ok", "mine\n")


def test_a_buffer_that_cannot_be_sent_takes_no_message_along(lend: LendEnv) -> None:
    env = lend()
    code = """
        import comm
        try:
            comm.create_comm('target', buffers=[b'abc', memoryview(bytearray(10))[::2]])
        except ValueError as error:
            print(error)
        print('on')
        """
    observation = env.execute(textwrap.dedent(code)).observation
    assert observation.status == "ok"
    assert observation.result.stdout.endswith("contiguous\non\n")


def wait_for(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        threading.Event().wait(0.01)
