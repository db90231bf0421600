"""Kernels forked from a template: as any Jupyter client sees them, and what siblings share and do not."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

from kernel_env import ConfigError, KernelStartError, LocalREPLEnv
from kernel_env.provisioners import fork
from kernel_env.provisioners.forked import ForkedProcess
from kernel_env.provisioners.templates import _Template

from .conftest import NEEDS_SANDBOX, InstallKernelspec, MakeEnv
from .processes import pid_of, pid_outside, template_of, wait_for_the_end

IPYKERNEL = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
FORKED = {"kernel_provisioner": {"provisioner_name": fork.NAME}}


ISOLATIONS = pytest.mark.parametrize(
    "isolation", [pytest.param("sandbox", marks=NEEDS_SANDBOX), pytest.param("process")]
)


@pytest.fixture
def forked_kernelspec(install_kernelspec: InstallKernelspec) -> str:
    """A kernelspec that names the provisioner in its metadata."""
    install_kernelspec("forked", IPYKERNEL, metadata=FORKED)
    return "forked"


@contextmanager
def client_of(kernel_name: str) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    """A kernel that jupyter_client itself manages, over TCP."""
    manager, client = start_new_kernel(kernel_name=kernel_name)
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def printed(client: BlockingKernelClient, code: str) -> str:
    """What a cell of an ordinary client prints."""
    shown: list[str] = []
    reply = client.execute_interactive(
        code, timeout=30, output_hook=lambda m: shown.append(m["content"].get("text", ""))
    )
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(shown)


def test_any_jupyter_client_runs_cells_in_it(forked_kernelspec: str) -> None:
    with client_of(forked_kernelspec) as (manager, client):
        assert printed(client, "import os; os.system('echo shell'); print('printed')") == "shell\nprinted\n"
        assert client.hb_channel.is_beating()
        info = client.kernel_info(reply=True, timeout=30)["content"]
        assert info["implementation"] == "ipython"
        assert not {"debugger", "kernel subshells"} & set(info.get("supported_features", []))
        assert client.complete("pri", reply=True, timeout=30)["content"]["matches"]
        assert manager.is_alive()


def test_a_client_interrupts_and_restarts_it(forked_kernelspec: str) -> None:
    with client_of(forked_kernelspec) as (manager, client):
        first = int(printed(client, "import os; print(os.getpid())"))
        request = client.execute("print('begun', flush=True)\nwhile True: pass")
        while client.get_iopub_msg(timeout=30)["content"].get("text") != "begun\n":
            pass
        manager.interrupt_kernel()
        assert client._recv_reply(request, timeout=30)["content"]["ename"] == "KeyboardInterrupt"
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=30)
        assert int(printed(client, "import os; print(os.getpid())")) != first
        assert wait_for_the_end(first, 2)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import os; os._exit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
        ("exit()", 0),
    ],
)
def test_its_exit_status_is_that_of_a_local_kernel(forked_kernelspec: str, code: str, status: int) -> None:
    with client_of(forked_kernelspec) as (manager, client):
        client.execute(code)
        process = manager.provisioner.process  # type: ignore[union-attr]
        assert process.wait(timeout=20) == status
        assert not manager.is_alive()


def test_what_it_writes_to_its_streams_goes_where_the_client_says(
    forked_kernelspec: str, tmp_path: Path
) -> None:
    manager = KernelManager(kernel_name=forked_kernelspec)
    with (tmp_path / "log").open("wb") as log:
        manager.start_kernel(stdout=log, stderr=subprocess.STDOUT)
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=30)
        printed(client, "import sys; print('to the log', file=sys.__stderr__, flush=True)")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    with pytest.raises(ConfigError, match=r"os\.pipe"):
        KernelManager(kernel_name=forked_kernelspec).start_kernel(stderr=subprocess.PIPE)


def test_the_startup_files_of_its_own_home_run(forked_kernelspec: str, tmp_path: Path) -> None:
    startup = tmp_path / ".ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("from_startup = 5")
    manager, client = start_new_kernel(
        kernel_name=forked_kernelspec, env={**os.environ, "HOME": str(tmp_path)}
    )
    try:
        assert printed(client, "print(from_startup)") == "5\n"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_jupyter_console_attaches_to_an_episode(make_env: MakeEnv, tmp_path: Path) -> None:
    env = make_env()
    env.reset()
    env.execute("x = 41")
    file = env.execute("from ipykernel import get_connection_file; print(get_connection_file())")
    path = file.observation.result.stdout.strip()
    console = subprocess.run(
        [sys.executable, "-m", "jupyter_console", "--existing", path, "--simple-prompt", "--no-confirm-exit"],
        input="print('the answer is', x + 1)\ny = 'from the console'\n",
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert "the answer is 42" in console.stdout, console.stderr
    assert env.execute("y").observation.result.stdout == "'from the console'\n"


def test_a_command_that_is_not_ipykernel_s_is_refused(install_kernelspec: InstallKernelspec) -> None:
    install_kernelspec("other", [sys.executable, "-c", "pass"], metadata=FORKED)
    with pytest.raises(ConfigError, match="forks `python -m ipykernel_launcher -f FILE`, not"):
        LocalREPLEnv(kernel_name="other").reset()


def test_arguments_of_the_command_hold(install_kernelspec: InstallKernelspec, make_env: MakeEnv) -> None:
    install_kernelspec("magic", [*IPYKERNEL, "--InteractiveShell.automagic=False"])
    env = make_env(kernel_name="magic")
    env.reset()
    assert env.execute("get_ipython().automagic").observation.result.stdout == "False\n"


def test_a_foreign_python_is_started_not_forked(
    install_kernelspec: InstallKernelspec, tmp_path: Path
) -> None:
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    install_kernelspec("foreign", [str(other), *IPYKERNEL[1:]], env={"PYTHONPATH": os.pathsep.join(sys.path)})
    with LocalREPLEnv(kernel_name="foreign") as env:
        env.reset()
        assert (
            "ipykernel_launcher" in env.execute("import sys; print(sys.orig_argv)").observation.result.stdout
        )


SEEN = """
import os
def seen():
    found = {}
    for fd in os.listdir('/proc/self/fd'):
        try: found[fd] = os.readlink(f'/proc/self/fd/{fd}')
        except OSError: pass
    return sorted(v for v in found.values() if v.startswith(('socket:', 'pipe:', 'anon_inode:', '/memfd')))
print([v for v in seen() if v.startswith(('socket:', 'pipe:'))])
"""


def test_siblings_share_no_descriptor_with_each_other_or_the_template(make_env: MakeEnv) -> None:
    envs = [make_env(), make_env()]
    for env in envs:
        env.reset()
    first, second = (set(eval(env.execute(SEEN).observation.result.stdout)) for env in envs)
    assert first
    assert not first & second
    folder = f"/proc/{template_of(envs[0])}/fd"
    held = {os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)}
    assert not (first | second) & held


RANDOM = """
import multiprocessing, os, random, secrets, ssl, tempfile, uuid
import numpy
print([random.random(), float(numpy.random.rand()), str(uuid.uuid4()), secrets.token_hex(8),
       ssl.RAND_bytes(8).hex(), tempfile.mktemp(), bytes(multiprocessing.current_process().authkey).hex()])
print([hash('text'), random.Random(5).random()])
"""


def test_siblings_share_no_randomness_but_the_hash_seed(make_env: MakeEnv) -> None:
    preload = ("numpy", "multiprocessing.process", "ssl", "uuid", "random")
    texts = []
    for _ in range(2):
        env = make_env(preload=preload)
        env.reset()
        texts.append(env.execute(RANDOM).observation.result.stdout.splitlines())
    first, second = (eval(lines[0]) for lines in texts)
    assert not set(first) & set(second)
    assert texts[0][1] == texts[1][1]


def test_seeded_siblings_draw_the_same(make_env: MakeEnv) -> None:
    drawn = set()
    for _ in range(2):
        env = make_env(preload=("numpy",))
        env.reset(seed=7)
        code = "import random, numpy; print(random.random(), numpy.random.rand())"
        drawn.add(env.execute(code).observation.result.stdout)
    assert len(drawn) == 1


@pytest.mark.parametrize("kernel_name", ["python3", "stock"])
def test_preloaded_modules_are_there_and_leave_no_name(make_env: MakeEnv, kernel_name: str) -> None:
    env = make_env(kernel_name=kernel_name, preload=("xml.dom.minidom", "wave"))
    env.reset()
    code = "import sys; print({'wave', 'xml.dom.minidom'} <= set(sys.modules), 'wave' in globals())"
    assert env.execute(code).observation.result.stdout == "True False\n"


@pytest.mark.parametrize("kernel_name", ["python3", "stock"])
def test_a_module_that_cannot_be_preloaded_is_named(make_env: MakeEnv, kernel_name: str) -> None:
    env = make_env(kernel_name=kernel_name, preload=("json", "no.such"))
    with pytest.raises(ConfigError, match=r"preload: no.such cannot be imported: ModuleNotFoundError"):
        env.reset()


def test_a_preload_that_starts_threads_is_named(
    install_kernelspec: InstallKernelspec, tmp_path: Path, make_env: MakeEnv
) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
    )
    install_kernelspec("path", IPYKERNEL, env={"PYTHONPATH": str(tmp_path)})
    with pytest.raises(ConfigError, match="preload: importing threaded starts 1 threads"):
        make_env(kernel_name="path", preload=("json", "threaded")).reset()
    tmp_path.chmod(0o755)  # pytest's are closed to the users that root's kernels run as
    env = make_env(kernel_name="path")
    env.reset()
    assert env.execute("import threaded").observation.status == "ok"


LEAVES = """
import os, time
r, w = os.pipe()
if os.fork() == 0:
    os.setsid(); os.environ.clear()
    if os.fork() == 0:
        os.write(w, str(os.getpid()).encode())
        time.sleep(600)
    os._exit(0)
print(os.read(r, 20).decode(), flush=True)
"""


@ISOLATIONS
@pytest.mark.parametrize("end", ["close", "os._exit", "kill"])
def test_what_left_the_session_of_its_kernel_ends_with_it(
    make_env: MakeEnv, end: str, isolation: str
) -> None:
    env = make_env(isolation=isolation)
    env.reset()
    pid = pid_outside(pid_of(env), int(env.execute(LEAVES).observation.result.stdout))
    if end == "close":
        env.close()
    else:
        env.execute("import os; os._exit(1)" if end == "os._exit" else "import os; os.kill(os.getpid(), 9)")
    assert wait_for_the_end(pid, 2)


def test_a_template_that_is_killed_costs_no_episode_anything(make_env: MakeEnv) -> None:
    first, second = make_env(isolation="process"), make_env(isolation="process")
    first.reset()
    first.execute("x = 1")
    os.kill(template_of(first), signal.SIGKILL)
    second.reset()
    assert first.execute("x += 1; print(x)").observation.result.stdout == "2\n"
    assert second.execute("print('fresh')").observation.result.stdout == "fresh\n"
    died = first.execute("import os; os._exit(3)").observation
    assert (died.status, died.restarted) == ("died", True)
    assert "how is not known, for its template was killed" in died.result.stderr
    assert first.execute("print('again')").observation.result.stdout == "again\n"


def test_a_template_that_a_cell_stops_goes_on(make_env: MakeEnv) -> None:
    first, second = make_env(isolation="process"), make_env(isolation="process")
    first.reset()
    stop = f"import os, signal; os.kill({template_of(first)}, signal.SIGSTOP)"
    first.execute(stop)
    second.reset()
    assert second.execute("1").observation.status == "ok"
    died = first.execute(f"{stop}; os._exit(3)").observation
    assert (died.status, died.restarted) == ("died", True)
    assert died.result.exception == "KernelDied: the kernel exited with code 3"
    assert first.execute("print('again')").observation.result.stdout == "again\n"


def test_a_template_that_is_stopped_in_the_middle_of_a_start_goes_on(
    make_env: MakeEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_env(isolation="process"), make_env(isolation="process")
    first.reset()
    woken: list[bool] = []
    wake = _Template._wake

    def wake_later(template: _Template) -> None:
        if woken:  # the stop comes just after the first time
            wake(template)
        woken.append(True)

    monkeypatch.setattr(_Template, "_wake", wake_later)
    os.kill(template_of(first), signal.SIGSTOP)
    second.reset()
    assert second.execute("print('on')").observation.result.stdout == "on\n"
    assert len(woken) >= 2


def test_a_process_that_was_released_has_ended_somehow() -> None:
    channel, template = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lifeline, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = ForkedProcess(channel, lifeline, lambda: None)
    with template, kernel, subprocess.Popen(["true"]) as ended:
        process.pidfd = os.pidfd_open(ended.pid)
        os.close(process.pidfd)
        process.release()  # its number may be another's by now
        assert (process.poll(), process.wait()) == (255, 255)


@pytest.mark.parametrize(("word", "status"), [(b'{"status": 3}', 3), (None, 255)])
def test_the_word_of_a_kernel_s_end_is_waited_for_without_keeping_the_loop(
    monkeypatch: pytest.MonkeyPatch, word: bytes | None, status: int
) -> None:
    if word is None:
        monkeypatch.setattr("kernel_env.provisioners.forked._TELLS_WITHIN", 1.0)

    async def body(ended: subprocess.Popen[bytes], pidfd: int) -> None:
        channel, template = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lifeline, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        woken: list[bool] = []
        told = asyncio.Event()
        process = ForkedProcess(channel, lifeline, lambda: woken.append(True))
        with template, kernel:
            socket.send_fds(template, [b'{"forked": true}'], [pidfd])
            kernel.send(b'{"bound": true}')
            await process.until_bound()
            assert process.pid == ended.pid
            process.watch(asyncio.get_running_loop(), told.set)
            await asyncio.sleep(0)
            assert (process.poll(), told.is_set(), woken) == (None, False, [True])
            if word is not None:
                template.send(word)
            await asyncio.wait_for(told.wait(), 20)
        assert process.returncode == process.wait() == status
        assert process.is_alone == (word is not None)

    with subprocess.Popen(["true"]) as ended:
        pidfd = os.pidfd_open(ended.pid)
        assert select.select([pidfd], [], [], 20)[0]
        asyncio.run(body(ended, pidfd))
        os.close(pidfd)


@NEEDS_SANDBOX
def test_a_template_that_is_killed_takes_confined_kernels_along_but_no_episode(make_env: MakeEnv) -> None:
    first, second = make_env(isolation="sandbox"), make_env(isolation="sandbox")
    first.reset(context="kept")
    first.execute("x = 1")
    os.kill(template_of(first), signal.SIGKILL)
    second.reset()
    observation = first.execute("x").observation
    assert (observation.status, observation.restarted) == ("died", True)
    assert observation.lost_variables == ["x"]
    assert first.execute("context").observation.result.stdout == "'kept'\n"
    assert second.execute("print('fresh')").observation.result.stdout == "fresh\n"


def test_a_fork_that_fails_is_an_error_and_the_next_one_works(
    install_kernelspec: InstallKernelspec, tmp_path: Path, make_env: MakeEnv
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"""
import errno, os
real = os.fork
def fork():
    if os.path.exists({str(tmp_path / "full")!r}): raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return real()
os.fork = fork
""")
    install_kernelspec("full", IPYKERNEL, env={"PYTHONPATH": str(tmp_path)})
    (tmp_path / "full").touch()
    env = make_env(kernel_name="full", isolation="process")
    with pytest.raises(
        KernelStartError, match="no process could be forked: Resource temporarily unavailable"
    ):
        env.reset()
    (tmp_path / "full").unlink()
    env.reset()
    assert env.execute("1").observation.status == "ok"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("raise RuntimeError('no way')", "could not start: RuntimeError: no way"),
        ("import os; os._exit(9)", "ended before it was ready, with exit status 9"),
    ],
)
def test_a_child_that_dies_before_it_is_ready_is_an_error(
    install_kernelspec: InstallKernelspec, tmp_path: Path, damage: str, words: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"""
import os
real = os.setsid
def chdir(folder):
    {damage}
os.chdir = chdir
""")
    install_kernelspec("damaged", IPYKERNEL, env={"PYTHONPATH": str(tmp_path)})
    with pytest.raises(KernelStartError, match=words):
        LocalREPLEnv(kernel_name="damaged", isolation="process").reset()


def test_starts_at_once_get_a_kernel_each(make_env: MakeEnv) -> None:
    async def main() -> list[int]:
        from kernel_env import REPLAction, REPLEnvironment

        async def one() -> int:
            env = REPLEnvironment()
            await env.reset_async()
            assert (await env.step_async(REPLAction(code="x = 1"))).status == "ok"
            pid = pid_of(env)
            await env.close_async()
            return pid

        return await asyncio.gather(*(one() for _ in range(40)))

    assert len(set(asyncio.run(main()))) == 40


def test_starts_at_once_from_more_templates_than_are_kept_all_succeed() -> None:
    modules = ("wave", "zipfile", "tarfile", "csv", "sched", "cmd", "mailbox")

    async def main() -> list[str]:
        from kernel_env import REPLAction, REPLEnvironment

        async def one(module: str) -> str:
            env = REPLEnvironment(preload=[module])
            await env.reset_async()
            code = f"import sys; print({module!r} in sys.modules)"
            observation = await env.step_async(REPLAction(code=code))
            await env.close_async()
            return observation.result.stdout

        return await asyncio.gather(*map(one, modules))

    assert asyncio.run(main()) == ["True\n"] * 7


def test_a_template_goes_with_a_host_that_is_killed(tmp_path: Path) -> None:
    code = """
import os, signal
from kernel_env import LocalREPLEnv
env = LocalREPLEnv()
env.reset()
from tests.processes import pid_of, template_of
print(pid_of(env), template_of(env), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -9, done.stderr
    for pid in done.stdout.split():
        assert wait_for_the_end(int(pid), 2)


def test_a_forked_child_of_the_host_does_not_keep_its_kernels(tmp_path: Path) -> None:
    code = """
import os, signal, time
from kernel_env import LocalREPLEnv
env = LocalREPLEnv()
env.reset()
child = os.fork()
if child == 0:
    os.closerange(0, 3)
    time.sleep(600)
from tests.processes import pid_of
kernel = pid_of(env)
print(child, kernel, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    child, kernel = map(int, done.stdout.split())
    try:
        assert wait_for_the_end(kernel, 2)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_kernel_has_few_threads_and_little_memory_of_its_own(make_env: MakeEnv) -> None:
    env = make_env()
    env.reset()
    env.close()  # from the second on, the template has settled
    env.reset()
    pid = pid_of(env)
    assert len(os.listdir(f"/proc/{pid}/task")) <= 4
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) for line in rollup if line.startswith("Private"))
    assert private < 14 * 1024
