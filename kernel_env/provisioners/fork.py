"""ForkProvisioner: kernels that are forks of a warm process, for any Jupyter client.

A kernelspec asks for it with the metadata
`{"kernel_provisioner": {"provisioner_name": "kernel-env-fork", "config": {"preload": []}}}`. One template
process (`guest/template.py`) serves all kernels of one host with the same interpreter, arguments, environment
and preloads; it holds neither keys nor contexts, and ends with its host. What each kernel is told, and what
it tells, is described there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from traitlets import Enum, List, Unicode

from kernel_env.errors import ConfigError
from kernel_env.provisioners.templates import Key, environment_of_folder, launch

__all__ = ["NAME", "ForkProvisioner", "forkable_command", "is_available"]

NAME = "kernel-env-fork"
"""Its entry point in the group `jupyter_client.kernel_provisioners`."""


def is_available() -> bool:
    """Whether this system can fork kernels: Linux, with pidfd."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


def forkable_command(command: list[str]) -> tuple[list[str], list[str], str] | None:
    """Interpreter, arguments and file of `python -m ipykernel_launcher -f FILE`; None if it is not that."""
    if "-m" not in command:
        return None
    at = command.index("-m")
    interpreter, module, arguments = command[:at], command[at + 1 : at + 2], command[at + 2 :]
    if module not in (["ipykernel_launcher"], ["ipykernel"]) or "-f" not in arguments[:-1]:
        return None
    file_at = arguments.index("-f")
    return interpreter, arguments[:file_at] + arguments[file_at + 2 :], arguments[file_at + 1]


_OWN_VARIABLES = frozenset(environment_of_folder(Path()))


class ForkProvisioner(LocalProvisioner):
    """A local kernel, forked instead of spawned: ready in a fraction of the time and the memory.

    It is an ordinary IPython kernel but for the debugger, subshells and the history database, which are
    absent. Its IPython configuration is the kernelspec's command line; of a profile it reads the startup
    files alone.
    """

    process: Any = None

    preload = List(
        Unicode(),
        help="Modules that are imported once, in the template; one that starts threads is refused.",
    ).tag(config=True)
    isolation = Enum(
        ("process", "sandbox"),
        "process",
        help="`sandbox`: kernels reach the folder of their connection file alone, one of kernel_env's.",
    ).tag(config=True)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Fork a kernel; when this returns clients can connect.

        Raises:
            ConfigError: the kernelspec's command is not ipykernel's, or a module cannot be preloaded.
            SandboxUnavailable: this system cannot confine kernels.
            KernelStartError: no process could be forked, or it ended before it was ready.
        """
        parts = forkable_command(cmd)
        if parts is None:
            raise ConfigError(f"{NAME} forks `python -m ipykernel_launcher -f FILE`, not {cmd!r}")
        interpreter, arguments, connection_file = parts
        environment = dict(kwargs.get("env") or os.environ)
        folder = str(kwargs.get("cwd") or Path.cwd())
        request: dict[str, Any] = {
            "connection_file": connection_file,
            "environ": environment,
            "folder": folder,
            "argv": ["ipykernel_launcher", "-f", connection_file, *arguments],
        }
        parent = None
        if self.isolation == "sandbox":
            own = Path(connection_file).parent
            uid = own.stat().st_uid
            parent, as_root = str(own.parent), uid != os.geteuid()
            request |= {"own_folder": str(own), "uid": uid if as_root else None}
        key = Key(tuple(interpreter), tuple(arguments), tuple(self.preload), _shared(environment), parent)
        nothing = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            stdout = _descriptor(kwargs.get("stdout"), 1, nothing)
            stderr = _descriptor(kwargs.get("stderr"), 2, nothing, stdout)
            self.process = await launch(key, request, [stdout, stderr])
        finally:
            os.close(nothing)
        self.pid = self.pgid = self.process.pid
        self.cwd = folder
        return self.connection_info


def _shared(environment: dict[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(
        item
        for item in environment.items()
        if item[0] not in _OWN_VARIABLES and not item[0].startswith("JPY_")
    )


def _descriptor(given: Any, default: int, nothing: int, stdout: int | None = None) -> int:
    """The descriptor that `subprocess.Popen` would take this argument for."""
    if given is None:
        return default
    if given == subprocess.STDOUT and stdout is not None:
        return stdout
    if given == subprocess.PIPE:
        raise ConfigError(
            "a forked kernel writes to a file descriptor of yours; make the pipe with os.pipe()"
        )
    if given == subprocess.DEVNULL:
        return nothing
    return given if isinstance(given, int) else int(given.fileno())
