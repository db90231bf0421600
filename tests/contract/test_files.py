"""What goes into the working directory and what comes out of it, whatever a cell did there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kernel_env import (
    ArtifactError,
    ConfigError,
    KernelStartError,
    LimitExceeded,
    Limits,
    LocalREPLEnv,
    ResetRequired,
)

from .conftest import Kind, LendEnv, StartEnv


def names(env: LocalREPLEnv) -> list[str]:
    return [artifact.name for artifact in env.artifacts()]


def test_files_are_there_before_the_first_cell(start: StartEnv, tmp_path: Path) -> None:
    source = tmp_path / "numbers.csv"
    source.write_text("1,2\n")
    env = start(files={"data/deep/n.csv": source, "a.bin": b"\x00\xff", "s.csv": str(source)})
    observation = env.execute("open('data/deep/n.csv').read(), open('a.bin', 'rb').read()").observation
    assert observation.result.stdout == "('1,2\\n', b'\\x00\\xff')\n"
    assert names(env) == ["a.bin", "data/deep/n.csv", "s.csv"]
    env.execute("open('a.bin', 'w').write('changed')")
    env.reset()
    assert env.read_artifact("a.bin") == b"\x00\xff"


def test_what_cells_write_can_be_listed_and_read(start: StartEnv) -> None:
    env = start()
    assert env.artifacts() == []
    env.execute("import os; os.makedirs('out'); open('out/b.txt', 'w').write('bbb'); open('a.txt', 'w')")
    assert [(artifact.name, artifact.size) for artifact in env.artifacts()] == [
        ("a.txt", 0),
        ("out/b.txt", 3),
    ]
    assert env.read_artifact("out/b.txt") == env.read_artifact("./out/b.txt", max_bytes=3) == b"bbb"
    with pytest.raises(LimitExceeded, match="3 is more than max_bytes = 2") as caught:
        env.read_artifact("out/b.txt", max_bytes=2)
    assert (caught.value.limit, caught.value.value, caught.value.maximum) == ("max_bytes", 3, 2)
    env.close()
    for call in (env.artifacts, lambda: env.read_artifact("a.txt")):
        with pytest.raises(ResetRequired):
            call()


TRAPS = """
import os, socket
open('plain', 'w').write('x')
os.symlink('/etc/passwd', 'link')
os.symlink('plain', 'inner link')
os.symlink('/etc', 'folder link')
os.symlink('/proc/self', 'proc')
os.mkfifo('fifo')
socket.socket(socket.AF_UNIX).bind('socket')
os.makedirs('locked/inside')
open('locked/file', 'w').close()
os.symlink('..', 'locked/inside/up')
try:
    os.mknod('device', 0o20666, os.makedev(1, 5))
except PermissionError:
    pass
"""


@pytest.mark.parametrize(
    "name",
    [
        *("link", "inner link", "folder link/passwd", "proc/environ", "fifo", "socket", "device", "locked"),
        *(
            "locked/inside/up/plain",
            "../h",
            "/etc/passwd",
            "locked/../plain",
            "",
            ".",
            "..",
            "a\0b",
            "\ud800",
        ),
        *("nothing", "plain/x", 5, None, "x" * 5000),
    ],
)
def test_only_a_regular_file_of_the_working_directory_comes_out(lend: LendEnv, name: Any) -> None:
    env = lend()
    if not env.artifacts():  # else an earlier test laid them
        assert env.execute(TRAPS).observation.status == "ok"
    assert names(env) == ["locked/file", "plain"]
    with pytest.raises(ArtifactError):
        env.read_artifact(name)


@pytest.mark.parametrize(
    "code",
    [
        "os.rename(here, here + '2'); os.symlink('/etc', here)",
        "os.rename(parent, moved); os.symlink('/', parent)",
        "shutil.rmtree(here)",
        "os.chmod(here, 0)",
    ],
)
def test_a_working_directory_that_is_gone_or_another_shows_nothing_else(start: StartEnv, code: str) -> None:
    env = start()
    env.execute(
        "import os, shutil\nopen('mine', 'w').close()\n"
        f"here = os.getcwd(); parent = os.path.dirname(here); moved = parent + '-moved'; {code}"
    )
    try:
        assert names(env) in ([], ["mine"])
        with pytest.raises(ArtifactError):
            env.read_artifact("passwd")
    finally:
        env.execute("if os.path.islink(parent): os.unlink(parent); os.rename(moved, parent)")


def test_many_and_deep_files_are_bounded(start: StartEnv) -> None:
    env = start()
    env.execute("import os\nfor n in range(10_100): open(f'{n:05}', 'w').close()")
    assert len(env.artifacts()) == 10_000
    env.execute(
        "for n in range(10_100): os.unlink(f'{n:05}')\n"
        "for n in range(3000): os.mkdir('d'); os.chdir('d')\nopen('deep', 'w').close()"
    )
    assert env.artifacts() == []


def test_files_that_come_and_go_hide_no_others(start: StartEnv) -> None:
    env = start()
    code = """
import os, threading
for n in range(50): open(f'stays{n}', 'w').close()
def churn():
    while True:
        for n in range(50): open(f'goes{n}', 'w').close()
        for n in range(50): os.unlink(f'goes{n}')
threading.Thread(target=churn, daemon=True).start()
"""
    env.execute(code)
    for _ in range(100):
        assert len([name for name in names(env) if name.startswith("stays")]) == 50


@pytest.mark.parametrize("restarts", [1, 0])
def test_the_working_directory_outlives_a_lost_kernel(start: StartEnv, restarts: int) -> None:
    env = start(files={"given": b"g"}, limits=Limits(restarts=restarts))
    code = "import os\nopen('made', 'w').write('m')\nopen(os.environ['HOME'] + '/x', 'w')\nos._exit(3)"
    observation = env.execute(code).observation
    assert observation.restarted == bool(restarts)
    assert names(env) == ["given", "made"]
    assert env.read_artifact("made") == b"m"
    if restarts:
        assert env.execute("open('made').read()").observation.result.stdout == "'m'\n"
        assert (
            env.execute("import os; os.listdir(os.environ['HOME'])").observation.result.stdout
            == "['.ipython']\n"
        )


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], "a mapping of names"),
        ({"a": "/nowhere/at/all"}, "'/nowhere/at/all' cannot be read: No such file"),
        ({"a": "/tmp"}, "'/tmp' is no regular file"),
        ({"a": "/dev/null"}, "is no regular file"),
        ({"a": "\0"}, "cannot be read"),
        ({"a": 5}, "give bytes or a path"),
        ({"a": bytearray(b"x")}, "give bytes or a path"),
        ({"/a": b""}, "relative to the working directory"),
        ({"../a": b""}, "relative to the working directory"),
        ({"": b""}, "relative to the working directory"),
        ({5: b""}, "relative to the working directory"),
        ({"a": b"12", "b": b"345"}, "5 bytes, more than Limits.files_bytes = 4"),
    ],
)
def test_files_that_cannot_be_copied_are_refused_at_once(files: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LocalREPLEnv(files=files, limits=Limits(files_bytes=4))


def test_a_file_that_went_away_fails_the_reset_and_leaves_nothing(tmp_path: Path, kind: Kind) -> None:
    source = tmp_path / "soon gone"
    source.write_text("x")
    with LocalREPLEnv(files={"a": source, "a/b": b""}, **kind.options) as env:
        with pytest.raises(KernelStartError, match=r"files\['a/b'\] could not be copied"):
            env.reset()
        os.unlink(source)
        with pytest.raises(KernelStartError, match=r"files\['a'\] could not be copied"):
            env.reset()
