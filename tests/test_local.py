"""LocalREPLEnv where users use it: scripts, notebooks, terminals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from kernel_env import ConfigError, LocalREPLEnv, REPLAction, StepResult

from .conftest import MakeEnv
from .processes import PID_OF_ENV, wait_for_the_end


def test_the_seed_s_example(make_env: MakeEnv) -> None:
    env = make_env(llm_query_fn=lambda prompt: prompt.upper())
    result = env.reset(context="alpha beta", task_prompt="Shout the first word.", expected_answer="ALPHA")
    assert isinstance(result, StepResult)
    assert (result.reward, result.done) == (None, False)
    assert env.execute("word = context.split()[0]").reward == 0.0
    assert env.get_variable("word").observation.result.stdout == "'alpha'\n"
    assert "word" in env.list_variables()
    result = env.step(REPLAction(code="FINAL(llm_query(word))"))
    assert (result.reward, result.done, result.observation.final_answer) == (1.0, True, "ALPHA")
    assert env.state().final_answer == "ALPHA"


def test_submit_final_answer(env: LocalREPLEnv) -> None:
    result = env.submit_final_answer("42")
    assert (result.done, result.observation.final_answer) == (True, "42")
    assert result.observation.result.stdout == "Final answer submitted."


def test_unknown_action_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="is_finl"):
        REPLAction(code="1", is_finl=True)  # type: ignore[call-arg]


def test_it_works_inside_a_running_loop() -> None:
    async def cell_of_a_notebook() -> str:
        with LocalREPLEnv(llm_query_fn=str.upper) as env:
            env.reset()
            return env.execute("llm_query('x')").observation.result.stdout

    assert asyncio.run(cell_of_a_notebook()) == "'X'\n"


def test_environments_work_at_once_in_threads() -> None:
    async def several() -> list[str]:
        return await asyncio.gather(*(asyncio.to_thread(one, n) for n in range(4)))

    def one(number: int) -> str:
        with LocalREPLEnv() as env:
            env.reset(context=str(number))
            return env.execute("print(context)").observation.result.stdout

    assert asyncio.run(several()) == [f"{n}\n" for n in range(4)]


def test_ctrl_c_interrupts_the_cell_and_records_the_turn(env: LocalREPLEnv) -> None:
    printed = threading.Event()
    with LocalREPLEnv(on_output=lambda output: printed.set()) as env:
        env.reset()

        def press_ctrl_c() -> None:
            printed.wait(20)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        threading.Thread(target=press_ctrl_c).start()
        with pytest.raises(KeyboardInterrupt):
            env.execute("x = 1\nprint('on', flush=True)\nwhile True: pass")
        (turn,) = env.episode.turns
        assert turn.observation.result.stdout == "on\n"
        assert env.execute("x").observation.result.stdout == "1\n"


@pytest.mark.parametrize("end", ["", "raise ValueError('forgot to close')", "import sys; sys.exit(0)"])
def test_an_environment_left_open_does_not_keep_the_process(tmp_path: Path, end: str) -> None:
    script = f"""
        import os, threading, time
        from kernel_env import LocalREPLEnv

        env = LocalREPLEnv(llm_query_fn=lambda prompt: prompt)
        env.reset()
        env.execute("llm_query('a worker thread now idles')")
        print({PID_OF_ENV})
        {end}
    """
    folder = tmp_path if len(str(tmp_path)) < 80 else Path("/tmp")
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert wait_for_the_end(int(done.stdout), 0)
    assert ("forgot" in done.stderr) == ("forgot" in end)
    assert "Warning" not in done.stderr
    assert not list(tmp_path.glob("ke-*"))


def test_a_helper_that_hangs_does_not_keep_the_process() -> None:
    script = """
        import threading
        from kernel_env import LocalREPLEnv

        called = threading.Event()

        def hangs(prompt):
            called.set()
            threading.Event().wait()

        env = LocalREPLEnv(llm_query_fn=hangs)
        env.reset()
        threading.Thread(target=env.execute, args=("llm_query('x')",), daemon=True).start()
        called.wait()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


def test_export_works_after_close_and_checks_its_target(env: LocalREPLEnv, tmp_path: Path) -> None:
    env.execute("1")
    env.close()
    assert env.export(tmp_path / "episode.ipynb").stat().st_size > 1000
    for target, words in (("episode.txt", "must end in .ipynb"), ("missing/e.ipynb", "there is no folder")):
        with pytest.raises(ConfigError, match=words):
            env.export(tmp_path / target)
