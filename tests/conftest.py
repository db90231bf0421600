"""Fixtures: environments over real kernels, in a temporary folder that must be empty at the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kernel_env import LocalREPLEnv
from kernel_env.folder import sweep

from .chat_server import Server

# nbformat imports it by way of jsonschema where JupyterLab is, for formats that it does not check: 3 s.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]


def _try_sandbox() -> str:
    """Why there is no sandbox here; empty if there is one."""
    code = "from kernel_env import LocalREPLEnv\nwith LocalREPLEnv(isolation='sandbox') as env: env.reset()"
    trial = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    if trial.returncode and "SandboxUnavailable" not in trial.stderr:
        raise RuntimeError(f"the sandbox is broken, not missing: {trial.stderr}")
    return trial.stderr.strip().splitlines()[-1] if trial.returncode else ""


if "TESTS_WITHOUT_SANDBOX" not in os.environ:  # else xdist's workers have it from the process that began them
    os.environ["TESTS_WITHOUT_SANDBOX"] = _try_sandbox()
HAS_SANDBOX = not os.environ["TESTS_WITHOUT_SANDBOX"]
NEEDS_SANDBOX = pytest.mark.skipif(
    not HAS_SANDBOX, reason=f"no sandbox here: {os.environ['TESTS_WITHOUT_SANDBOX']}"
)

MakeEnv = Callable[..., LocalREPLEnv]
InstallKernelspec = Callable[..., None]


@pytest.fixture(scope="session", autouse=True)
def temporary_folder() -> Iterator[Path]:
    """A short temporary folder of this process and its children; a kernel folder left in it fails the run."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("TMPDIR", str(folder))
        yield folder
        sweep()  # for hosts that tests killed, as the next start would
    left = [path.name for path in folder.glob("ke-*")]
    shutil.rmtree(folder)
    assert not left, f"kernel folders left behind: {left}"


@pytest.fixture(scope="session", autouse=True)
def stock_kernelspec(temporary_folder: Path) -> Iterator[None]:
    """A kernelspec "stock" like "python3", whose kernels are started, not forked."""
    folder = temporary_folder / "jupyter" / "kernels" / "stock"
    folder.mkdir(parents=True)
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "stock",
        "language": "python",
        "metadata": {"kernel_provisioner": {"provisioner_name": "local-provisioner"}},
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder.parents[1]))
        yield


@pytest.fixture(autouse=True)
def clean_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own settings must not reach the tests."""
    monkeypatch.delenv("REPL_CONTEXT", raising=False)
    monkeypatch.delenv("REPL_TASK_PROMPT", raising=False)
    monkeypatch.delenv("KERNEL_ENV_MAX_KERNELS", raising=False)
    # What a test counts is its own; `test_pool.py` asks for spares.
    monkeypatch.setenv("KERNEL_ENV_SPARES", "0")


@pytest.fixture
def install_kernelspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InstallKernelspec:
    """Install a kernelspec in a folder of this test."""
    monkeypatch.setenv("JUPYTER_PATH", f"{tmp_path}{os.pathsep}{os.environ['JUPYTER_PATH']}")

    def install(name: str, argv: list[str], **fields: Any) -> None:
        folder = tmp_path / "kernels" / name
        folder.mkdir(parents=True)
        spec = {"argv": argv, "display_name": name, "language": "python", **fields}
        (folder / "kernel.json").write_text(json.dumps(spec))

    return install


@pytest.fixture
def make_env() -> Iterator[MakeEnv]:
    """Make environments that are closed at the end of the test."""
    made: list[LocalREPLEnv] = []

    def make(**options: Any) -> LocalREPLEnv:
        made.append(LocalREPLEnv(**options))
        return made[-1]

    yield make
    for env in made:
        env.close()


@pytest.fixture
def env(make_env: MakeEnv) -> LocalREPLEnv:
    """A local environment after a plain reset."""
    env = make_env()
    env.reset()
    return env


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
