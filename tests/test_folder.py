"""A kernel's folder without a kernel: held, swept, removed."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from kernel_env import KernelStartError
from kernel_env.folder import KernelFolder, sweep

from .conftest import MakeEnv


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A temporary folder of this test alone, short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_folder_is_private_and_goes_whatever_was_done_to_it(parent: Path) -> None:
    folder = KernelFolder.make()
    assert folder.path.parent == parent
    assert folder.path.stat().st_mode & 0o777 == 0o700
    locked = folder.path / "work" / "locked"
    (locked / "inner").mkdir(parents=True)
    locked.chmod(0)
    folder.remove()
    parent.rmdir()


def test_a_deep_folder_goes_with_few_descriptors_and_leaves_links_targets_alone(parent: Path) -> None:
    """By one, close() took minutes, left the folder behind, and closed the folder around it to all others."""
    parent.chmod(0o711)
    kept = parent / "kept"
    kept.mkdir(0o500)
    folder = KernelFolder.make()
    (folder.path / "work" / "link").symlink_to(kept)
    descriptor = os.open(folder.path / "work", os.O_RDONLY)
    for _ in range(2000):
        os.mkdir("d", dir_fd=descriptor)
        above, descriptor = descriptor, os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(above)
    os.symlink(kept, "link", dir_fd=descriptor)
    os.close(descriptor)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 50, limits[1]))
    try:
        folder.remove()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert list(parent.iterdir()) == [kept]
    assert parent.stat().st_mode & 0o777 == 0o711
    assert kept.stat().st_mode & 0o777 == 0o500
    kept.rmdir()
    parent.rmdir()


def test_links_and_hard_links_of_locked_folders_change_nothing_outside(parent: Path) -> None:
    """`chmod` follows both; root needs none, so an ordinary user's process it is."""
    parent.chmod(0o777)
    outside = parent / "outside"
    if (child := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            outside.mkdir()
            (outside / "file").write_text("x")
            (outside / "file").chmod(0o444)
            outside.chmod(0o555)
            folder = KernelFolder.make()
            descriptor = os.open(folder.path / "work", os.O_RDONLY)
            for _ in range(40):
                os.mkdir("d", dir_fd=descriptor)
                os.link(outside / "file", "hard", dst_dir_fd=descriptor)
                os.symlink(outside, "soft", dir_fd=descriptor)
                above, descriptor = descriptor, os.open("d", os.O_RDONLY, dir_fd=descriptor)
                os.fchmod(above, 0)
            folder.path.chmod(0)
            folder.remove()
            os._exit(0 if [path.name for path in parent.iterdir()] == ["outside"] else 3)
        finally:
            os._exit(4)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (outside / "file").stat().st_mode & 0o777 == 0o444
    assert outside.stat().st_mode & 0o777 == 0o555
    outside.chmod(0o755)
    shutil.rmtree(parent)


@pytest.mark.parametrize("left", ["work/inner/", "home/", "guest/", "connection.json", "h", "stderr"])
def test_what_a_killed_host_had_half_removed_is_swept(parent: Path, left: str) -> None:
    half = parent / "ke-abcdefg1"
    half.mkdir(0o700)
    if left.endswith("/"):
        (half / left).mkdir(parents=True)
    else:
        (half / left).write_text("{}")
    sweep()
    assert not half.exists()
    parent.rmdir()


def test_an_empty_folder_is_swept_when_it_is_old(parent: Path) -> None:
    """A killed host can have removed all but it; a new one may be another program's, at work."""
    empty = parent / "ke-abcdefg1"
    empty.mkdir(0o700)
    sweep()
    assert empty.exists()
    os.utime(empty, (time.time() - 100, time.time() - 100))
    sweep()
    assert not empty.exists()
    parent.rmdir()


def test_an_exit_waits_for_a_thread_that_removes(parent: Path) -> None:
    """Python ends a daemon thread where it is: half a folder was left, for good."""
    code = """
import threading
from kernel_env import folder
made = folder.KernelFolder.make()
for number in range(3000):
    (made.path / "work" / str(number)).mkdir()
begun, remove = threading.Event(), folder.remove
def removes(path):
    begun.set()
    threading.main_thread().join()  # it has ended when the exit begins
    remove(path)
folder.remove = removes
threading.Thread(target=made.remove, daemon=True).start()
begun.wait()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TMPDIR": str(parent)})
    parent.rmdir()


def test_folders_that_are_not_ours_are_not_swept(parent: Path) -> None:
    names = {"ke-mydata": 0o700, "ke-abcdefgh": 0o755, "ke-abcdefgH": 0o700, "kt-abcdefgh-moved": 0o700}
    for name, mode in names.items():
        (parent / name / "work").mkdir(parents=True)
        (parent / name).chmod(mode)
    (parent / "ke-abcdefg2").mkdir(0o700)
    (parent / "ke-abcdefg2" / "guest").symlink_to("/usr")
    before = sorted(parent.rglob("*"))
    sweep()
    assert sorted(parent.rglob("*")) == before
    shutil.rmtree(parent)


def test_what_is_mounted_in_a_folder_is_not_emptied(parent: Path) -> None:
    code = """
import subprocess, sys, tempfile
from pathlib import Path
from kernel_env.folder import KernelFolder
kept = Path(sys.argv[1], "kept")
kept.mkdir()
(kept / "precious").write_text("x")
folder = KernelFolder.make()
(folder.path / "work" / "a b").mkdir()
subprocess.run(["mount", "--bind", kept, folder.path / "work" / "a b"], check=True)
(folder.path / "work" / "a b" / "more").write_text("y")
folder.remove()
print(folder.path.exists(), sorted(path.name for path in kept.iterdir()))
"""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here, so there is nothing to mount")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", code, str(parent)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TMPDIR": str(parent)},
    )
    assert done.stdout == "False ['more', 'precious']\n", done.stderr
    shutil.rmtree(parent)


def test_a_removal_that_fails_is_logged_and_lets_go(
    parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = KernelFolder.make()
    before = len(os.listdir("/proc/self/fd"))

    def fails(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "no more processes")

    monkeypatch.setattr(shutil, "rmtree", fails)
    monkeypatch.setattr(subprocess, "run", fails)
    folder.remove()
    monkeypatch.undo()
    assert "could not be removed: [Errno 11] no more processes" in caplog.text
    assert len(os.listdir("/proc/self/fd")) == before - 1
    shutil.rmtree(parent)


HOLD = """
import sys
from kernel_env.folder import KernelFolder
print(KernelFolder.make().path, flush=True)
sys.stdin.read()
"""


def test_a_folder_is_swept_when_its_holder_is_gone_and_not_before(parent: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(parent)},
    )
    with holder:
        assert holder.stdout is not None
        path = Path(holder.stdout.readline().strip())
        sweep()
        assert path.is_dir()
        holder.kill()
    sweep()
    assert not path.exists()
    parent.rmdir()


def test_what_cannot_be_swept_is_tried_now_and_then(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []
    left = parent / "ke-abcdefg3"
    (left / "work").mkdir(parents=True)
    left.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr("kernel_env.folder.remove", tried.append)
        sweep()
        sweep()
        assert tried == [left]
        patch.setattr("kernel_env.folder._AGAIN_AFTER", 0)
        patch.setattr("kernel_env.folder._stuck", {})
        sweep()
        sweep()
    assert tried == [left] * 3
    shutil.rmtree(parent)


def test_a_sweep_that_takes_long_does_not_keep_a_kernel_from_starting(
    make_env: MakeEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, swept = threading.Event(), threading.Event()

    def sweeps() -> None:
        over.wait(100)
        swept.set()

    monkeypatch.setattr("kernel_env.kernel.sweep", sweeps)
    monkeypatch.setattr("kernel_env.kernel._SWEEPS_FOR", 0.1)
    env = make_env()
    try:
        env.reset()
        assert env.execute("print('on')").observation.result.stdout == "on\n"
        assert not swept.is_set()
    finally:
        over.set()
    assert swept.wait(20)


def test_sweeping_leaves_other_things_alone(parent: Path) -> None:
    (parent / "ke-file").write_text("x")
    (parent / "other").mkdir()
    (parent / "ke-link").symlink_to(parent / "other")
    sweep()
    assert {path.name for path in parent.iterdir()} == {"ke-file", "other", "ke-link"}
    for path in (parent / "ke-file", parent / "ke-link"):
        path.unlink()
    (parent / "other").rmdir()
    parent.rmdir()


def test_where_no_folder_can_be_made_the_error_names_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(KernelStartError, match=r"could be made in /proc/nowhere: .*set TMPDIR"):
        KernelFolder.make()
