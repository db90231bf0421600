"""A running kernel without an environment around it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kernel_env import ConfigError, KernelStartError, Limits
from kernel_env.episode import Context
from kernel_env.execution import Execution
from kernel_env.install import KernelSetup
from kernel_env.kernel import Kernel
from kernel_env.outputs import stdout_text

from .processes import wait_for_the_end


def setup(**options: Any) -> KernelSetup:
    defaults: dict[str, Any] = {
        "kernel_name": "python3",
        "limits": Limits(),
        "helpers": {},
        "context": Context.of(""),
        "seed": None,
    }
    return KernelSetup(**defaults | options)


def run(body: Callable[[Kernel], Awaitable[None]], **options: Any) -> None:
    async def with_kernel() -> None:
        kernel = await Kernel.start(setup(**options))
        try:
            await body(kernel)
        finally:
            await kernel.close()

    asyncio.run(with_kernel())


def test_a_kernel_has_its_own_folder_environment_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    code = """
import os
folder = os.path.dirname(os.getcwd())
print(oct(os.stat(folder).st_mode & 0o777), os.environ['HOME'] == folder + '/home')
print(os.getcwd() == folder + '/work', os.getpgid(0) == os.getpid(), 'SECRET_TOKEN' in os.environ)
print(open('/proc/self/environ').read().count('secret'))
"""

    async def body(kernel: Kernel) -> None:
        execution = await kernel.execute(code)
        assert stdout_text(execution.outputs) == "0o700 True\nTrue True False\n0\n"

    run(body)


def test_nothing_of_a_closed_kernel_is_left(temporary_folder: Path) -> None:
    async def body() -> None:
        for _ in range(2):
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(3):
                kernel = await Kernel.start(setup())
                pid = kernel._live.process.pid
                await kernel.execute("import subprocess; child = subprocess.Popen(['sleep', '600'])")
                child = (await kernel.text_of("child.pid", convert="str")).answer
                await kernel.execute(
                    "import os; os.mkdir('locked'); os.mkdir('locked/a'); os.chmod('locked', 0)"
                )
                await kernel.close()
                assert wait_for_the_end(pid, 0)
                assert wait_for_the_end(int(child or 0), 0)
        # The first round may open what stays for the process, zmq's own threads among it; one of those closes
        # what is left of a socket, some time later.
        async with asyncio.timeout(20):
            while len(os.listdir("/proc/self/fd")) > before:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)

    asyncio.run(body())
    assert not list(temporary_folder.glob("ke-*"))


def test_late_output_goes_to_the_next_cell() -> None:
    async def body(kernel: Kernel) -> None:
        printed = asyncio.Event()
        await kernel.execute("import asyncio\nasync def later():\n    await go.wait(); print('late')")
        await kernel.execute("go = asyncio.Event(); task = asyncio.create_task(later())")
        first = await kernel.execute("go.set()")
        second = await kernel.execute("await task", on_output=lambda _: printed.set())
        assert "late" in stdout_text(first.outputs) + stdout_text(second.outputs)

    run(body)


def test_a_start_may_take_longer_than_a_cell() -> None:
    async def body(kernel: Kernel) -> None:
        execution = await kernel.text_of("len(context)", convert="str", active=10, total=10)
        assert execution.answer == "30000000"

    limits = Limits(cell_active=0.001, cell_total=10)
    run(body, context=Context.of("é" * 30_000_000), limits=limits)


def test_a_report_that_is_missing_brings_the_hooks_back() -> None:
    async def body(kernel: Kernel) -> None:
        await kernel.execute("del get_ipython().kernel.do_execute")
        execution = await kernel.execute("x = 1")
        assert "hooks were gone" in execution.notes[0]
        assert (await kernel.execute("y = 2")).report is not None
        assert {"x", "y"} <= set(kernel.names)

    run(body)


def test_a_kernel_whose_hooks_cannot_be_brought_back_is_replaced() -> None:
    async def body(kernel: Kernel) -> None:
        code = "import sys; del get_ipython().kernel.do_execute, sys.modules['_kernel_env_helpers'].install"
        await kernel.execute(code)
        execution = await kernel.execute("x = 1")
        assert (execution.status, execution.restarted) == ("ok", True)
        assert "could not be installed again" in execution.notes[0]
        assert (await kernel.execute("x")).exception == "NameError: name 'x' is not defined"

    run(body)


def test_stop_ends_the_cell_that_runs() -> None:
    async def body(kernel: Kernel) -> None:
        running = asyncio.create_task(
            kernel.execute("print('on'); import time; time.sleep(600)", on_output=on)
        )
        await printed.wait()
        kernel.stop("somebody said so")
        execution: Execution = await running
        assert execution.exception == "KeyboardInterrupt: the cell was stopped because somebody said so"
        assert (await kernel.execute("1")).status == "ok"

    printed = asyncio.Event()

    def on(output: object) -> None:
        printed.set()

    run(body)


def test_an_unknown_kernelspec_lists_the_installed_ones() -> None:
    with pytest.raises(ConfigError, match=r"kernel_name='nosuch' is not installed; installed: .*python3"):
        asyncio.run(Kernel.start(setup(kernel_name="nosuch")))


@pytest.mark.parametrize(
    ("argv", "error", "words"),
    [
        (
            [sys.executable, "-c", "import sys; sys.exit('broken on purpose')"],
            KernelStartError,
            "broken on purpose",
        ),
        (["/no/such/program"], KernelStartError, "could not be launched"),
        ([sys.executable, "-c", "import time; time.sleep(600)"], KernelStartError, r"not ready after .* 1 s"),
    ],
    ids=["dies", "missing", "hangs"],
)
def test_a_kernel_that_does_not_start_says_why_and_leaves_nothing(
    install_kernelspec: Callable[..., None],
    temporary_folder: Path,
    argv: list[str],
    error: type[Exception],
    words: str,
) -> None:
    install_kernelspec("broken", argv)
    with pytest.raises(error, match=words):
        asyncio.run(Kernel.start(setup(kernel_name="broken", limits=Limits(kernel_start=1))))
    assert not list(temporary_folder.glob("ke-*"))


def test_a_kernel_for_another_language_is_refused(install_kernelspec: Callable[..., None]) -> None:
    install_kernelspec("other", ["r"], language="R")
    with pytest.raises(ConfigError, match="runs R; the helpers need an IPython kernel"):
        asyncio.run(Kernel.start(setup(kernel_name="other")))


def test_a_kernelspec_of_another_provisioner_is_refused(install_kernelspec: Callable[..., None]) -> None:
    install_kernelspec("far", ["python"], metadata={"kernel_provisioner": {"provisioner_name": "yarn"}})
    with pytest.raises(ConfigError, match="'far' needs a kernel provisioner that is not installed"):
        asyncio.run(Kernel.start(setup(kernel_name="far")))


def test_any_ipython_kernelspec_works(install_kernelspec: Callable[..., None]) -> None:
    argv = [sys.executable, "-P", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    install_kernelspec("mine", argv, interrupt_mode="message", env={"FROM_SPEC": "yes"})

    async def body(kernel: Kernel) -> None:
        execution = await kernel.execute("import os; print(os.environ['FROM_SPEC'])")
        assert stdout_text(execution.outputs) == "yes\n"
        assert (await kernel.execute("while True: pass", active=0.3)).status == "timeout"
        assert (await kernel.execute("1")).status == "ok"

    run(body, kernel_name="mine")


def test_a_user_s_own_startup_files_stay_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    startup = tmp_path / "startup.py"
    startup.write_text("leaked = 1")
    monkeypatch.setenv("PYTHONSTARTUP", str(startup))
    profile = tmp_path / "ipython" / "profile_default" / "startup"
    profile.mkdir(parents=True)
    (profile / "00.py").write_text("leaked = 1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    async def body(kernel: Kernel) -> None:
        assert (await kernel.execute("leaked")).exception == "NameError: name 'leaked' is not defined"

    run(body)
