"""Processes of kernels as this process sees them: a confined kernel's cells see other numbers."""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Any

PID_OF_ENV = "env._env._rollout._kernel._live.process.pid"
"""The expression for scripts."""


def pid_of(env: Any) -> int:
    """Of the kernel of an environment, local or not, or of a facade of the contract tests."""
    while hasattr(env, "_env"):
        env = env._env
    return int(env._rollout._kernel._live.process.pid)


def folder_of(env: Any) -> Path:
    """Of the kernel of an environment."""
    while hasattr(env, "_env"):
        env = env._env
    return Path(env._rollout._kernel.folder.path)


def template_of(env: Any) -> int:
    """Of the process that the kernel was forked from."""
    return int(Path(f"/proc/{pid_of(env)}/stat").read_text().rsplit(")", 1)[1].split()[1])


def pid_outside(kernel: int, inner: int) -> int:
    """Of the process that cells of the kernel with the id `kernel` know as `inner`."""
    namespace = os.stat(f"/proc/{kernel}/ns/pid").st_ino
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            status = Path(f"/proc/{entry}/status").read_text().splitlines()
            if os.stat(f"/proc/{entry}/ns/pid").st_ino != namespace:
                continue
        except OSError:
            continue
        if any(line.startswith("NSpid:") and int(line.split()[-1]) == inner for line in status):
            return int(entry)
    raise ProcessLookupError(inner)


def wait_for_the_end(pid: int, seconds: float) -> bool:
    """Whether a process ends in time, one that is no child of ours; nobody may have reaped it."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)
