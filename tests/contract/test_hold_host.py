"""The host's side: forks, crashes, kills, threads, many environments, full disks, odd homes."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

from kernel_env import ConfigError, KernelStartError, LocalREPLEnv, UsageError
from kernel_env.folder import sweep
from kernel_env.process import KernelProcess
from tests.processes import PID_OF_ENV, pid_of, pid_outside, wait_for_the_end

from .conftest import Kind, StartEnv

RunHost = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def own_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of this test, for hosts that leave something in it."""
    folder = Path(tempfile.mkdtemp(prefix="h-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run_host(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program that uses kernel_env."""
    command = [sys.executable, "-c", f"from kernel_env import *\n{code}"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | variables
    )


@pytest.mark.parametrize(
    ("end", "code"),
    [("pass", 0), ("raise RuntimeError('between reset and close')", 1), ("import sys; sys.exit(3)", 3)],
)
def test_an_environment_that_is_never_closed_keeps_nothing(
    own_folder: Path, kind: Kind, end: str, code: int
) -> None:
    done = run_host(
        f"env = LocalREPLEnv(**{kind.options!r}); env.reset(); env.execute('x = 1')\n"
        f"print({PID_OF_ENV}, flush=True)\n{end}"
    )
    assert done.returncode == code, done.stderr
    assert wait_for_the_end(int(done.stdout), 2)
    assert not list(own_folder.iterdir())


def test_an_exception_between_reset_and_close_leaves_the_next_environment_alone(start: StartEnv) -> None:
    env = LocalREPLEnv()

    def fails() -> None:
        with env:
            env.reset()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert env.episode.done_reason == "closed"
    assert start().execute("1").observation.status == "ok"


def level() -> tuple[int, int, int]:
    """File descriptors, threads and children of this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(children)


def cycle(kind: Kind, times: int, temporary_folder: Path) -> None:
    def once() -> None:
        with LocalREPLEnv(**kind.options, llm_query_fn=str.upper) as env:
            env.reset(context="ctx")
            assert env.execute("print(llm_query(context))").observation.result.stdout == "CTX\n"

    for _ in range(3):
        once()
    before = level()
    for _ in range(times):
        once()
    # zmq closes sockets in a thread of its own, which tells nobody; idle workers end by themselves.
    end = time.monotonic() + 20
    while any(now > then + more for now, then, more in zip(level(), before, (0, 2, 0), strict=True)):
        assert time.monotonic() < end, (before, level())
        time.sleep(0.01)
    assert not list(temporary_folder.glob("*ke-*"))


def test_cycles_leave_everything_level(kind: Kind, temporary_folder: Path) -> None:
    cycle(kind, 12, temporary_folder)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_thousand_cycles_leave_everything_level(kind: Kind, temporary_folder: Path) -> None:
    cycle(kind, 1000, temporary_folder)


@pytest.mark.parametrize(
    "busy",
    [
        "import time; time.sleep(600)",
        "sum(range(10**12))",
        "while True: pass",
        "import os; os.read(os.pipe()[0], 1)",
    ],
)
def test_a_kernel_goes_with_a_host_that_is_killed_and_the_folder_at_the_next_start(
    own_folder: Path, kind: Kind, busy: str
) -> None:
    code = f"""
import os, signal, threading
def kill():
    print({PID_OF_ENV}, flush=True)
    # The cell is in its last line when the host goes, or a moment before it.
    threading.Timer(0.3, os.kill, args=(os.getpid(), signal.SIGKILL)).start()
env = LocalREPLEnv(tools={{"kill": kill}}, **{kind.options!r})
env.reset()
env.execute('''import os, subprocess
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
kill()
{busy}''')
"""
    done = run_host(code)
    assert done.returncode == -9, done.stderr
    assert wait_for_the_end(int(done.stdout), 2)
    (folder,) = own_folder.glob("ke-*")
    sleepers = inhabitants(folder)
    assert len(sleepers) <= 1  # none, if the template still saw the kernel end
    with LocalREPLEnv() as env:
        env.reset()
        assert not folder.exists()
    assert all(wait_for_the_end(pid, 2) for pid in sleepers)


def inhabitants(folder: Path) -> list[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"{folder}/".encode() in Path(f"/proc/{entry}/environ").read_bytes():
                found.append(int(entry))
        except OSError:
            continue
    return found


def test_the_folder_of_a_living_host_is_never_swept(start: StartEnv) -> None:
    env = start()
    for _ in range(3):
        sweep()
    done = run_host("with LocalREPLEnv() as env: env.reset()", TMPDIR=tempfile.gettempdir())
    assert done.returncode == 0, done.stderr
    assert env.execute("open('x', 'w').close(); print('there')").observation.result.stdout == "there\n"


def test_processes_in_sessions_of_their_own_go_with_their_kernel(start: StartEnv) -> None:
    code = "import subprocess\nprint(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)"
    env = start()
    lost = pid_outside(pid_of(env), int(env.execute(code).observation.result.stdout))
    env.execute("import os; os._exit(1)")
    assert wait_for_the_end(lost, 2)
    closed = pid_outside(pid_of(env), int(env.execute(code).observation.result.stdout))
    env.close()
    assert wait_for_the_end(closed, 2)


def test_sixteen_environments_in_threads_have_their_own_answers() -> None:
    together = threading.Barrier(16, timeout=100)

    def run(number: int) -> list[str | None]:
        with LocalREPLEnv(llm_query_fn=lambda prompt: f"{number}:{prompt}") as env:
            env.reset(context=f"context {number}", max_iterations=100)
            together.wait()
            for n in range(5):
                env.execute(f"x = {number} + {n}\nprint(x, context, llm_query('q'))")
            seen = [turn.observation.result.stdout for turn in env.episode.turns]
            return [*seen, env.execute(f"FINAL({number})").observation.final_answer]

    with ThreadPoolExecutor(16) as pool:
        for number, seen in enumerate(pool.map(run, range(16))):
            expected = [f"{number + n} context {number} {number}:q\n" for n in range(5)]
            assert seen == [*expected, str(number)]


def test_environments_work_through_to_thread() -> None:
    def run(number: int) -> str:
        with LocalREPLEnv() as env:
            env.reset()
            return env.execute(f"print({number})").observation.result.stdout

    async def body() -> list[str]:
        return await asyncio.gather(*(asyncio.to_thread(run, number) for number in range(4)))

    assert asyncio.run(body()) == ["0\n", "1\n", "2\n", "3\n"]


def test_an_environment_works_inside_a_running_kernel() -> None:
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        shown: list[str] = []

        def hook(message: dict[str, object]) -> None:
            content = message["content"]
            assert isinstance(content, dict)
            shown.append(content.get("text", "") or "".join(content.get("traceback", [])))

        for code in (
            "from kernel_env import LocalREPLEnv, REPLAction, REPLEnvironment",
            "with LocalREPLEnv(llm_query_fn=str.upper) as env:\n"
            "    _ = env.reset(); print(env.execute('print(llm_query(\"in\"))').observation.result.stdout)",
            "other = REPLEnvironment(); _ = await other.reset_async()\n"
            "print((await other.step_async(REPLAction(code='print(\"async\")'))).result.stdout)\n"
            "await other.close_async()",
        ):
            client.execute_interactive(code, output_hook=hook, timeout=60)
        assert "".join(shown) == "IN\n\nasync\n\n"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


FULL_DISK = """
import os
from pathlib import Path
disk = os.environ["TMPDIR"]
def fill():
    try:
        with open(disk + "/filler", "ab", buffering=0) as file:
            while True: file.write(b"x" * 512)
    except OSError: pass
env = LocalREPLEnv()
env.reset()
observation = env.execute("with open('big', 'wb') as f: f.write(b'x' * 10**8)").observation
print(observation.status, observation.result.exception)
print(env.execute("print('on')").observation.result.stdout.strip())
env.execute("import os; os.unlink('big')")
notebook = Path(env.export(disk + "/episode.ipynb"))
before = notebook.read_bytes()
env.execute("print('y' * 10**6)")
fill()
try: env.export(notebook)
except ConfigError as error: print(error)
print(notebook.read_bytes() == before, sorted(p.name for p in Path(disk).glob("*episode*")))
env.close()
fill()
try: LocalREPLEnv().reset()
except KernelStartError as error: print(error)
os.unlink(disk + "/filler")
print(list(Path(disk).glob("*ke-*")))
"""


def test_a_full_disk_is_an_error_that_names_it_and_loses_nothing(own_folder: Path) -> None:
    program = own_folder / "program.py"
    program.write_text(f"from kernel_env import *\n{FULL_DISK}")
    disk = own_folder / "d"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=2m none {disk} && TMPDIR={disk} {sys.executable} {program}"
    namespaces = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]
    if subprocess.run([*namespaces, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no mount namespaces here, so there is no small disk to fill")
    done = subprocess.run(
        [*namespaces, "sh", "-c", mount], capture_output=True, text=True, timeout=90, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == "error OSError: [Errno 28] No space left on device"
    assert lines[1] == "on"
    assert "No space left on device" in lines[2]
    assert "episode.ipynb" in lines[2]
    assert lines[3] == "True ['episode.ipynb']"
    assert "No space left on device" in lines[4]
    assert lines[5] == "[]"


IN_A_WORKER = """
import pytest
from kernel_env import LocalREPLEnv

KINDS = {kinds!r}

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(4))
def test_one(number, kind):
    with LocalREPLEnv(**kind, llm_query_fn=str.upper) as env:
        env.reset(context=f"context {{number}}")
        assert env.execute("print(llm_query(context))").observation.result.stdout == f"CONTEXT {{number}}\\n"

@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_never_closed(kind):
    env = LocalREPLEnv(**kind)
    env.reset()
"""


def test_environments_work_in_workers_of_xdist_and_leave_nothing(own_folder: Path) -> None:
    kinds = [Kind("python3", "auto"), Kind("python3", "process"), Kind("stock", "process")]
    (own_folder / "test_it.py").write_text(IN_A_WORKER.format(kinds=[kind.options for kind in kinds]))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(
        command, cwd=own_folder, capture_output=True, text=True, timeout=100, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stdout
    assert "15 passed" in done.stdout
    assert not list(own_folder.glob("ke-*"))


@pytest.mark.filterwarnings(
    "ignore:.*fork:DeprecationWarning"
)  # from Python 3.12 on, of a process with threads
def test_a_forked_child_of_the_host_is_told_to_make_its_own(start: StartEnv) -> None:
    env = start()
    env.execute("x = 1")
    uses: list[Callable[[], object]] = [
        env.reset,
        lambda: env.execute("x"),
        lambda: env.get_variable("x"),
    ]
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        said = []
        try:
            for use in uses:
                try:
                    use()
                except UsageError as error:
                    said.append(str(error))
            os.write(write_end, "\n".join(said).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    try:
        assert select.select([read_end], [], [], 30)[0], "the child hangs"
        said = os.read(read_end, 10_000).decode().splitlines()
    finally:
        os.close(read_end)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(said) == len(uses)
    assert all("a forked child must make its own" in line for line in said)
    assert env.execute("x").observation.result.stdout == "1\n"


@pytest.mark.parametrize("home", ["/proc", "/nonexistent/home"])
def test_a_home_that_cannot_be_written_to_does_not_matter(own_folder: Path, home: str) -> None:
    code = "with LocalREPLEnv() as env: env.reset(); print(env.execute('print(1)').observation.status)"
    done = run_host(code, HOME=home, JUPYTER_RUNTIME_DIR=home, IPYTHONDIR=home, XDG_CACHE_HOME=home)
    assert done.stdout == "ok\n", done.stderr


def test_a_long_temporary_folder_works(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    code = "with LocalREPLEnv() as env: env.reset(); print(env.execute('print(1)').observation.status)"
    done = run_host(code, TMPDIR=str(folder))
    assert done.stdout == "ok\n", done.stderr


def test_a_notebook_that_cannot_be_written_names_the_path(start: StartEnv, tmp_path: Path) -> None:
    env = start()
    env.execute("1")
    with pytest.raises(ConfigError, match="nowhere"):
        env.export(tmp_path / "nowhere" / "e.ipynb")
    assert json.loads(env.export(tmp_path / "e.ipynb").read_bytes())["nbformat"] == 4


def test_a_start_without_a_folder_names_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    begin = time.monotonic()
    with pytest.raises((KernelStartError, ConfigError), match="/proc/nowhere"):
        LocalREPLEnv().reset()
    assert time.monotonic() - begin < 5


def test_what_a_kernel_says_before_it_is_known_is_heard(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    original, told = KernelProcess.drain, []

    def drain(process: KernelProcess) -> None:
        if process.pid not in told:
            told.append(process.pid)
            starting = {"msg_type": "status", "content": {"execution_state": "starting"}, "parent_header": {}}
            process._on_message("iopub", starting)
        original(process)

    monkeypatch.setattr(KernelProcess, "drain", drain)
    with LocalREPLEnv(**kind.options) as env:
        env.reset()
        assert env.execute("1").observation.result.stdout == "1\n"
    assert told
