"""The attacks of `attacks.py`, run at each level of isolation, and what only the host can see of one."""

from __future__ import annotations

import os
import secrets
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kernel_env import ArtifactError, Limits, LocalREPLEnv, REPLObservation
from tests.processes import folder_of, pid_of, pid_outside, wait_for_the_end

from .attacks import ATTACKS, BOMBS, Attack, Bomb, table
from .conftest import FORKED, SANDBOXED, Kind

LEVELS = pytest.mark.parametrize("kind", [SANDBOXED, FORKED], indirect=True, scope="module")
README = Path(__file__).parents[2] / "README.md"


class Echo(socketserver.BaseRequestHandler):
    """Answers whoever reaches it."""

    def handle(self) -> None:
        if isinstance(self.request, tuple):
            self.request[1].sendto(b"hello", self.client_address)
        else:
            self.request.sendall(self.request.recv(10))


def serve(server: socketserver.BaseServer, stack: ExitStack) -> None:
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 53))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest) -> Kind:
    assert isinstance(request.param, Kind)
    return request.param


@pytest.fixture(scope="module")
def run_attack(
    kind: Kind, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], REPLObservation]]:
    """Run a cell in an episode with everything around it that it might reach."""
    home = tmp_path_factory.mktemp("home")
    for folder in (home, *list(home.parents)[:2]):
        folder.chmod(0o755)  # what keeps a kernel out is not that pytest's folders are private
    (home / "secret").write_text("HOME")
    name = f"kernel_env-{secrets.token_hex(8)}"
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # In a process of its own, for it must have begun with the variable.
        environment = os.environ | {"KEY": f"SECRET_OF_HOST-{secrets.token_hex(8)}"}
        patch.setenv("KEY", environment["KEY"])
        patch.setenv("KERNEL_ENV_SPARES", "0")
        bystander = subprocess.Popen(["sleep", "600"], env=environment)
        stack.callback(bystander.wait)
        stack.callback(bystander.kill)
        tcp = socketserver.TCPServer(("0.0.0.0", 0), Echo)
        udp = socketserver.UDPServer(("0.0.0.0", 0), Echo)
        unix = socketserver.UnixStreamServer(str(home / "socket"), Echo)
        (home / "socket").chmod(0o777)
        for server in (tcp, udp, unix, socketserver.UnixStreamServer(f"\0{name}", Echo)):
            serve(server, stack)
        other, env = (stack.enter_context(LocalREPLEnv(**kind.options)) for _ in range(2))
        data = f"OTHEREPISODE-{secrets.token_hex(8)}"
        other.reset(context=data)
        other.execute("open('data', 'w').write('OTHER')")
        context = {
            "home": str(home),
            "temporary": str(home.parent),
            "other": str(folder_of(other)),
            "other_pid": pid_of(other),
            "pid": bystander.pid,
            "bystander": bystander.pid,
            "tcp": tcp.server_address[1],
            "udp": udp.server_address[1],
            "address": own_address(),
            "abstract": name,
            "id": name,
        }
        env.reset(
            context=context, expected_answer=f"ANSWEREXPECTED-{secrets.token_hex(8)}", max_iterations=10**6
        )
        yield lambda code: env.execute(code, timeout_s=60).observation


@LEVELS
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_comes_to_what_the_table_says(
    run_attack: Callable[[str], REPLObservation], kind: Kind, attack: Attack
) -> None:
    expected = "held" if kind.isolation == "sandbox" else attack.process
    if expected == "not tried":
        pytest.skip("it could harm this machine")
    observation = run_attack(attack.code)
    has_reached = "reached" in observation.result.stdout
    if expected != "depends":
        assert has_reached == (expected == "reached"), observation.result
    assert not observation.restarted
    # It failed at what it tried, not before.
    assert "SyntaxError" not in observation.result.stderr
    assert "NameError" not in observation.result.stderr
    assert "AttributeError" not in observation.result.stderr


SMALL = Limits(
    memory_bytes=200 * 2**20,
    processes=60,
    open_files=200,
    file_bytes=20 * 2**20,
    workdir_bytes=40 * 2**20,
    workdir_files=500,
    cell_cpu=3,
    helper_calls=20,
    restarts=5,
)


@LEVELS
@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.name)
def test_a_bomb_does_not_get_past_its_limit(kind: Kind, bomb: Bomb) -> None:
    if kind.isolation == "process" and bomb.process == "not tried":
        pytest.skip("it could harm this machine")
    with LocalREPLEnv(**kind.options, limits=SMALL, llm_query_fn=str.upper) as env:
        env.reset(context="kept")
        observation = env.execute(bomb.code, timeout_s=60).observation
        told = f"{observation.result.exception} {observation.result.stderr}"
        if kind.isolation == "sandbox":
            assert (observation.status, bomb.says in told) == (bomb.status, True), told
        else:
            assert observation.status in ("error", "timeout", "out_of_memory"), told
        usage = observation.usage
        assert usage is not None
        assert usage.peak_memory < 5 * SMALL.memory_bytes
        if kind.isolation == "sandbox":  # Linux counts them; elsewhere the host does, a little later
            assert usage.processes < SMALL.processes
        sizes = [artifact.size for artifact in env.artifacts()]
        assert sum(sizes) < 4 * SMALL.workdir_bytes
        assert len(sizes) < 8 * SMALL.workdir_files
        assert env.execute("import os; os.system('rm -rf *'); print(context)").observation.status == "ok"


@LEVELS
def test_a_bomb_in_one_episode_costs_another_nothing(kind: Kind) -> None:
    with (
        LocalREPLEnv(**kind.options, limits=SMALL) as bombed,
        LocalREPLEnv(**kind.options, limits=SMALL) as other,
    ):
        bombed.reset()
        other.reset()
        code = "import os, time\nfor _ in range(45):\n    if os.fork() == 0: time.sleep(600)\nprint('forked')"
        assert bombed.execute(code).observation.result.stdout == "forked\n"
        assert other.execute(code).observation.result.stdout == "forked\n"


ORPHAN = """
import os
r, w = os.pipe()
if os.fork() == 0:
    os.setsid(); os.environ.clear()
    if os.fork() == 0:
        os.write(w, str(os.getpid()).encode())
        {work}
    os._exit(0)
print(os.read(r, 20).decode(), flush=True)
"""


GROWS = """import mmap, time
        m = mmap.mmap(-1, 2**29)
        time.sleep(1)
        for n in range(0, 2**29, 4096): m[n] = 1
        time.sleep(600)"""


@LEVELS
def test_what_is_left_running_goes_over_a_limit_and_the_next_step_says_so(kind: Kind) -> None:
    with LocalREPLEnv(**kind.options, limits=SMALL) as env:
        env.reset()
        inner = env.execute(ORPHAN.format(work=GROWS)).observation.result.stdout
        pid = pid_outside(pid_of(env), int(inner))
        assert wait_for_the_end(pid, 30)
        observation = env.execute("1").observation
        assert (observation.status, observation.restarted) == ("out_of_memory", True)
        assert "Limits.memory_bytes = 209,715,200" in observation.result.stderr


@LEVELS
def test_orphans_in_sessions_of_their_own_are_reaped_and_end_with_the_kernel(kind: Kind) -> None:
    with LocalREPLEnv(**kind.options) as env:
        env.reset()
        orphan = ORPHAN.format(work="import time; time.sleep(600)")
        pid = pid_outside(pid_of(env), int(env.execute(orphan).observation.result.stdout))
        gone = [env.execute(ORPHAN.format(work="pass")).observation.result.stdout for _ in range(20)]
        assert len(set(gone)) == 20
        if kind.isolation == "sandbox":
            shown = env.execute("import os; os.system('ps ax -o stat=')").observation.result.stdout
            assert shown.count("Z") <= 21  # the ones in the middle, which are the cells' to wait for
        env.close()
        assert wait_for_the_end(pid, 2)


@LEVELS
def test_links_that_change_while_the_host_looks_lead_nowhere(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("SECRET")
    tmp_path.chmod(0o755)
    code = f"""
import os, threading
os.makedirs('folder/inner', exist_ok=True)
open('folder/inner/file', 'w').write('own')
os.symlink({str(tmp_path)!r}, 'link')
def swap():
    while True:
        for a, b in (('folder', 'aside'), ('link', 'folder'), ('folder', 'link'), ('aside', 'folder')):
            os.rename(a, b)
threading.Thread(target=swap, daemon=True).start()
"""
    with LocalREPLEnv(**kind.options) as env:
        env.reset()
        assert env.execute(code).observation.status == "ok"
        end = time.monotonic() + 2
        read = set()
        while time.monotonic() < end:
            env.artifacts()
            try:
                read.add(env.read_artifact("folder/inner/file"))
            except ArtifactError:
                continue
        assert read <= {b"own"}


LEADS_ELSEWHERE = """
import os, shutil
os.chdir(os.environ['HOME'])
shutil.rmtree('.ipython')
os.makedirs('.ipython/profile_default')
os.symlink({victim!r}, '.ipython/profile_default/ipython_kernel_config.py')
for number in range(1000):  # a name that comes before the other in the folder
    os.mkdir(f'd{{number}}')
    if os.listdir('.').index(f'd{{number}}') < os.listdir('.').index('.ipython'): break
    os.rmdir(f'd{{number}}')
os.chdir(f'd{{number}}')
for _ in range({depth}):
    os.mkdir('x' * 250); os.chdir('x' * 250)
os.makedirs('y/z')
os.chmod('y', 0)
os._exit(1)
"""


@LEVELS
@pytest.mark.parametrize("depth", [40, 1500])
def test_what_a_lost_kernel_leaves_does_not_lead_the_host_elsewhere(
    kind: Kind, tmp_path: Path, depth: int
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    with LocalREPLEnv(**kind.options) as env:
        env.reset()
        observation = env.execute(LEADS_ELSEWHERE.format(victim=str(victim), depth=depth)).observation
        assert (observation.status, observation.restarted) == ("died", True)
        assert env.execute("print('on')").observation.result.stdout == "on\n"
        folder = folder_of(env)
    assert victim.read_text() == "whole"
    assert not folder.exists()


MOVES = """
import os
folder = os.path.dirname(os.environ['HOME'])
try:
    os.rename(folder, folder + '-moved')
    os.symlink({victim!r}, folder)
finally:
    os._exit(1)
"""
LINKS = """
import os, shutil
folder, home = os.path.dirname(os.environ['HOME']), os.environ['HOME']
try:
    shutil.rmtree(home, ignore_errors=True)
    os.symlink({victim!r}, home)
    os.chmod(folder, 0o500)
finally:
    os._exit(1)
"""


@LEVELS
@pytest.mark.parametrize("code", [MOVES, LINKS], ids=["moves its folder", "locks its folder"])
def test_a_folder_that_a_cell_turned_into_a_link_costs_nothing_behind_it(
    kind: Kind, tmp_path: Path, code: str
) -> None:
    victim = tmp_path / "victim"
    (victim / "inner").mkdir(parents=True)
    (victim / "precious").write_text("whole")
    (victim / "precious").chmod(0o400)
    before = {path.name: path.stat().st_mode for path in (victim, *victim.iterdir())}
    with LocalREPLEnv(**kind.options) as env:
        env.reset()
        folder = folder_of(env)
        parent = folder.parent
        observation = env.execute(code.format(victim=str(victim))).observation
        assert observation.status == "died"
        if not observation.restarted:
            assert (kind.isolation, code) == ("process", MOVES)
            assert observation.done_reason == "kernel_died"
    assert {path.name: path.stat().st_mode for path in (victim, *victim.iterdir())} == before
    assert not [path for path in parent.iterdir() if path.name.startswith(folder.name)]


FIFO = """
import contextlib, os
guest = os.path.dirname(os.environ['HOME']) + '/guest'
with contextlib.suppress(OSError):
    os.unlink(guest + '/helpers.json'); os.mkfifo(guest + '/helpers.json')
del get_ipython().kernel.do_execute
"""
NO_FOLDER = """
import os, shutil
shutil.rmtree(os.path.dirname(os.environ['HOME']) + '/guest', ignore_errors=True)
del get_ipython().kernel.do_execute
"""


@LEVELS
@pytest.mark.parametrize("code", [FIFO, NO_FOLDER], ids=["a pipe", "nothing"])
def test_what_stands_in_the_place_of_the_host_s_files_does_not_stop_the_host(kind: Kind, code: str) -> None:
    with LocalREPLEnv(**kind.options, llm_query_fn=str.upper) as env:
        env.reset(context="kept")
        env.execute(code)
        observation = env.execute("1").observation
        assert "hooks were gone" in observation.result.stderr
        assert observation.restarted == ((kind.isolation, code) == ("process", NO_FOLDER))
        assert env.execute("llm_query(context)").observation.result.stdout == "'KEPT'\n"


@LEVELS
def test_the_context_is_not_a_source_of_memory(kind: Kind) -> None:
    with LocalREPLEnv(**kind.options) as env:
        env.reset(context="x" * 10**6)
        code = """
import _kernel_env_helpers
channel = _kernel_env_helpers._guest.channel
for _ in range(300):
    del context
    context = channel.receive_context()
"""
        observation = env.execute(code).observation
        assert "the kernel has had the context too often" in observation.result.stderr


def test_the_readme_has_the_table() -> None:
    assert table() in README.read_text("utf-8")
