"""Where there can be a sandbox, what is said where there can be none, and how it is taken down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_env import KernelStartError, LocalREPLEnv, SandboxUnavailable
from kernel_env.isolation import Support, is_own_user, kernel_user

from .conftest import NEEDS_SANDBOX, MakeEnv
from .processes import pid_of, template_of, wait_for_the_end

# A filter as container engines set it: unshare(2) is not permitted. For x86-64 and aarch64.
NO_NAMESPACES = """
import ctypes, logging, os, struct
number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
code = b"".join(struct.pack("HBBI", *i) for i in (
    (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7fff0000)))
held = ctypes.create_string_buffer(code, len(code))
program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(held))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 == libc.prctl(22, 2, program, 0, 0)
from kernel_env import LocalREPLEnv, SandboxUnavailable
logging.basicConfig()
"""
AUTO = """
with LocalREPLEnv() as env:
    print(env.reset().observation.metadata["isolation"], env.execute("x = 1").observation.status)
    print(env.reset().observation.metadata["isolation"], env.episode.isolation)
"""
SANDBOX = """
for _ in range(2):
    try:
        LocalREPLEnv(isolation="sandbox").reset()
    except SandboxUnavailable as error:
        print(error)
"""


def run(code: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(tmp_path) if len(str(tmp_path)) < 70 else "/tmp", **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done


def test_auto_falls_back_where_there_are_no_namespaces_and_says_so_once(tmp_path: Path) -> None:
    done = run(NO_NAMESPACES + AUTO, tmp_path)
    assert done.stdout == "process ok\nprocess process\n"
    assert done.stderr.count("kernels are not confined") == 1
    assert not list(tmp_path.glob("k?-*"))


def test_a_sandbox_that_cannot_be_had_is_an_error_that_says_what_is_missing(tmp_path: Path) -> None:
    lines = run(NO_NAMESPACES + SANDBOX, tmp_path).stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("isolation='sandbox' cannot be had")
        assert "namespace" in line
        assert "Operation not permitted" in line
        assert "a seccomp filter is on this process, as container engines set it: it must allow" in line
    assert not list(tmp_path.glob("k?-*"))


def test_doctor_says_what_the_rest_still_gives(tmp_path: Path) -> None:
    code = f"{NO_NAMESPACES}\nimport sys\nfrom kernel_env.cli import app\nsys.argv = ['x', 'doctor']\napp()"
    shown = " ".join(run(code, tmp_path, COLUMNS="200").stdout.replace("│", " ").split())
    assert "process: isolation='sandbox' cannot be had here" in shown
    assert "the user's other files and the network are open to them" in shown


@pytest.mark.parametrize("isolation", ["sandbox", "auto"])
def test_started_kernels_are_not_confined(make_env: MakeEnv, isolation: str) -> None:
    env = make_env(kernel_name="stock", isolation=isolation)
    if isolation == "auto":
        assert env.reset().observation.metadata["isolation"] == "process"
        return
    with pytest.raises(SandboxUnavailable, match="kernels of 'stock' are started, not forked"):
        env.reset()


def test_what_failed_once_others_worked_is_no_verdict(
    make_env: MakeEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    support = Support()
    monkeypatch.setattr("kernel_env.pool._support_of", lambda kernel_name: support)

    async def refuse(setup: object) -> None:
        raise SandboxUnavailable("user namespace: No space left on device")

    monkeypatch.setattr("kernel_env.pool.Kernel.start", refuse)
    env = make_env(isolation="sandbox")
    for _ in range(2):  # asked for, it is tried again
        with pytest.raises(SandboxUnavailable, match=r"No space left on device; .*'auto' falls back on it"):
            env.reset()
    support.is_proven, support.refusal = True, None
    with pytest.raises(KernelStartError, match="a kernel could not be confined: user namespace: No space"):
        make_env(isolation="auto").reset()


@NEEDS_SANDBOX
def test_it_is_the_default_where_it_can_be_had(make_env: MakeEnv) -> None:
    env = make_env()
    assert env.reset().observation.metadata["isolation"] == "sandbox"
    assert env.episode.isolation == "sandbox"


WORKS = """
import asyncio, getpass, multiprocessing, os, socket, sqlite3, ssl, subprocess, tempfile, threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import shared_memory
import matplotlib, numpy, psutil
context_of = multiprocessing.get_context
with context_of('fork').Pool(2) as pool: assert pool.map(abs, [-1, 2]) == [1, 2]
with context_of('spawn').Pool(2) as pool: assert pool.map(abs, [-1, 2]) == [1, 2]
memory = shared_memory.SharedMemory(create=True, size=2**20); memory.close(); memory.unlink()
with ProcessPoolExecutor(2) as pool: assert list(pool.map(abs, [-3])) == [3]
server = socket.create_server(('127.0.0.1', 0))
socket.create_connection(server.getsockname()).close()
assert socket.gethostbyname('localhost') == '127.0.0.1'
unix = socket.socket(socket.AF_UNIX); unix.bind('own'); unix.listen(); unix.close()
with tempfile.NamedTemporaryFile() as file: file.write(b'x')
open('/tmp/x', 'w').close(); open('/dev/shm/x', 'w').close()
sqlite3.connect('data.db').execute('create table t (x)')
ssl.create_default_context(cafile=None)
psutil.Process().memory_info(); psutil.net_if_addrs()
assert getpass.getuser() and os.path.expanduser('~') == os.environ['HOME'] and os.getcwd().endswith('work')
threads = [threading.Thread(target=int) for _ in range(32)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert asyncio.run is not None and await asyncio.to_thread(int) == 0
process = await asyncio.create_subprocess_exec('true'); assert await process.wait() == 0
assert subprocess.check_output(['bash', '-c', 'ls | sort | head -1']) == b'data.db\\n'
print('all')
"""


@NEEDS_SANDBOX
def test_what_programs_need_works_inside(make_env: MakeEnv) -> None:
    env = make_env(isolation="sandbox")
    env.reset()
    observation = env.execute(WORKS).observation
    assert observation.result.stdout == "all\n", observation.result.stderr
    assert env.execute("!echo shell").observation.result.stdout.split() == ["shell"]
    plotted = env.execute("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()").observation
    assert any("image/png" in output.get("data", {}) for output in plotted.outputs)


@NEEDS_SANDBOX
def test_everything_goes_with_the_host(tmp_path: Path) -> None:
    code = """
import os, signal
from kernel_env import LocalREPLEnv
from tests.processes import pid_of, template_of
env = LocalREPLEnv(isolation="sandbox")
env.reset()
env.execute("import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True, env={})")
pids = open(f"/proc/{template_of(env)}/task/{template_of(env)}/children").read().split()
print(pid_of(env), template_of(env), *pids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pids = list(map(int, done.stdout.split()))
    assert len(set(pids)) >= 3, done.stderr
    assert all(wait_for_the_end(pid, 2) for pid in pids)


@NEEDS_SANDBOX
def test_the_first_process_goes_with_its_kernel(make_env: MakeEnv) -> None:
    env = make_env(isolation="sandbox")
    env.reset()
    template = template_of(env)
    children = Path(f"/proc/{template}/task/{template}/children")
    before = children.read_text().split()
    assert str(pid_of(env)) in before
    first = int(before[before.index(str(pid_of(env))) - 1])
    env.close()
    assert wait_for_the_end(first, 2)


def test_folders_of_kernels_that_run_as_other_users_are_still_this_user_s() -> None:
    assert is_own_user(os.geteuid())
    user = kernel_user()
    if os.geteuid() != 0:
        assert user is None
        assert not is_own_user(0)
    else:
        assert user is not None
        assert is_own_user(user)
        assert not is_own_user(1000)


@NEEDS_SANDBOX
def test_files_that_are_given_belong_to_the_kernel(make_env: MakeEnv) -> None:
    env = make_env(isolation="sandbox", files={"a/b/c.txt": b"given"})
    env.reset()
    code = "open('a/b/c.txt', 'a').write('+'); open('a/b/new', 'w').close(); print(open('a/b/c.txt').read())"
    assert env.execute(code).observation.result.stdout == "given+\n"
    assert [artifact.name for artifact in env.artifacts()] == ["a/b/c.txt", "a/b/new"]


@NEEDS_SANDBOX
@pytest.mark.skipif(os.geteuid() != 0, reason="root's kernels alone run as another user")
def test_a_library_that_other_users_cannot_read_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    spec = tmp_path / "jupyter" / "kernels" / "closed"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        '{"argv": ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python",'
        f'"display_name": "closed", "env": {{"PYTHONPATH": "{closed}"}}}}'
    )
    start = "LocalREPLEnv(kernel_name='closed', isolation='sandbox').reset()"
    code = f"from kernel_env import LocalREPLEnv\n{start}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "JUPYTER_PATH": str(tmp_path / "jupyter")},
    )
    assert "SandboxUnavailable" in done.stderr
    assert f"{closed} is not open to other users, and kernels run as one; chmod a+rX it" in done.stderr


def test_environment_of_a_sandbox_can_be_reset_often(make_env: MakeEnv) -> None:
    env: LocalREPLEnv = make_env()
    for number in range(5):
        env.reset(context=str(number))
        assert env.execute("print(context)").observation.result.stdout == f"{number}\n"
