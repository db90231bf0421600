"""A kernel's folder without a kernel: held, swept, removed."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kernel_env import KernelStartError
from kernel_env.folder import KernelFolder, sweep


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
