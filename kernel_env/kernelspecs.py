"""Which kernelspec a name means, how its kernels come to exist, and with which command."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel

from kernel_env.errors import ConfigError, SandboxUnavailable
from kernel_env.provisioners import fork
from kernel_env.types import Isolation

__all__ = ["LOCAL", "command_of", "find_kernelspec", "is_forked_kind", "with_provisioner"]

LOCAL = "local-provisioner"
"""jupyter_client's own."""

_PYTHON = ("python", f"python{sys.version_info[0]}", f"python{sys.version_info[0]}.{sys.version_info[1]}")


def find_kernelspec(name: str) -> KernelSpec:
    """Look up an installed kernelspec.

    Raises:
        ConfigError: there is none of that name, with the names there are; or it is not for Python, or
            its kernels are not processes of this machine.
    """
    manager = KernelSpecManager()
    try:
        spec: KernelSpec = manager.get_kernel_spec(name)
    except (NoSuchKernel, ValueError) as error:
        found = manager.find_kernel_specs()
        if name in found:
            raise ConfigError(
                f"kernel_name={name!r} needs a kernel provisioner that is not installed"
            ) from error
        installed = ", ".join(sorted(found)) or "none (pip install ipykernel)"
        raise ConfigError(f"kernel_name={name!r} is not installed; installed: {installed}") from error
    if spec.language.lower() != "python":
        raise ConfigError(f"kernel_name={name!r} runs {spec.language}; the helpers need an IPython kernel")
    return spec


def with_provisioner(
    spec: KernelSpec, preload: Sequence[str], isolation: Isolation = "process"
) -> tuple[KernelSpec, str]:
    """The kernelspec with the provisioner that starts it, and why it is that one.

    Raises:
        ConfigError: it names one whose kernels are not processes of this machine.
        SandboxUnavailable: its kernels cannot be confined.
    """
    asked = spec.metadata.get("kernel_provisioner", {}).get("provisioner_name")
    if asked not in (None, LOCAL, fork.NAME):
        raise ConfigError(f"the kernelspec asks for {asked!r}; kernel_env starts local kernels alone")
    reason = "its kernelspec asks for it" if asked else _why_not_forked(spec)
    chosen = asked or (LOCAL if reason else fork.NAME)
    config = dict(spec.metadata.get("kernel_provisioner", {}).get("config", {}))
    if isolation == "sandbox" and chosen != fork.NAME:
        raise SandboxUnavailable("its kernels are started, not forked, and only forked ones are confined")
    if chosen == fork.NAME:
        config |= {"preload": [*config.get("preload", []), *preload], "isolation": isolation}
    spec.metadata = spec.metadata | {"kernel_provisioner": {"provisioner_name": chosen, "config": config}}
    return spec, reason or "it is ipykernel in this Python"


def _why_not_forked(spec: KernelSpec) -> str:
    parts = fork.forkable_command(list(spec.argv))
    if not fork.is_available():
        return f"{sys.platform} cannot fork kernels safely"
    if parts is None:
        return "its command is not ipykernel's"
    python = parts[0][0]
    if python not in (*_PYTHON, sys.executable):
        return f"{python} is another Python than this one"
    return ""


def is_forked_kind(name: str) -> bool:
    """Whether kernels of this name are forked.

    Raises:
        ConfigError: as `find_kernelspec`.
    """
    spec, _ = with_provisioner(find_kernelspec(name), ())
    return bool(spec.metadata["kernel_provisioner"]["provisioner_name"] == fork.NAME)


def command_of(command: list[str], connection_file: str, resource_dir: str) -> list[str]:
    """A kernelspec's command with its placeholders filled in, as jupyter_client does it."""
    values = {"connection_file": connection_file, "prefix": sys.prefix, "resource_dir": resource_dir}
    if command[0] in _PYTHON:
        command = [sys.executable, *command[1:]]
    return [re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), part) for part in command]
