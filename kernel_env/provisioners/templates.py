"""The processes that kernels are forked from, as the host sees them.

`guest/template.py` describes what goes over the sockets between them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import threading
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple

from kernel_env import seccomp
from kernel_env.errors import KernelStartError, SandboxUnavailable
from kernel_env.folder import TEMPLATE_PREFIX, WRITABLE, KernelFolder
from kernel_env.install import GUEST_MODULES
from kernel_env.isolation import can_change_user
from kernel_env.portal import run_in_thread
from kernel_env.provisioners.forked import ForkedProcess, NoKernels, TemplateGone

__all__ = ["Key", "close_templates", "environment_of_folder", "launch"]

log = logging.getLogger("kernel_env.provisioners.templates")

_TEMPLATE = Path(__file__).parents[1] / "guest" / "template.py"
_MOST_TEMPLATES = 4
_IDLE = 5.0  # seconds
_STDERR_TAIL = 8192


class Key(NamedTuple):
    """What the kernels of one template have in common."""

    interpreter: tuple[str, ...]
    arguments: tuple[str, ...]
    preload: tuple[str, ...]
    environment: frozenset[tuple[str, str]]
    sandboxed_in: str | None
    """The folder with the folders of kernels that are confined; None if they are not."""


def environment_of_folder(folder: Path) -> dict[str, str]:
    """The variables that are a kernel's own, whatever else its environment holds."""
    return {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "IPYTHONDIR": str(folder / "home" / ".ipython"),
    }


async def launch(key: Key, request: dict[str, Any], streams: list[int]) -> ForkedProcess:
    """Fork a kernel; clients can connect when this returns.

    Raises:
        ConfigError: a module cannot be preloaded.
        SandboxUnavailable: this system does not let it be confined.
        KernelStartError: no process could be forked, or it ended before it was ready.
    """
    for attempt in (1, 2):
        template = _templates.get(key)
        if template is None or not template.is_alive():
            template = await run_in_thread(_start_template, key)
        template.used = time.monotonic()
        try:
            return await template.fork(request, streams)
        except TemplateGone:
            await run_in_thread(template.end)  # it may still look alive for a moment
            if attempt == 2:
                raise KernelStartError(
                    "the process that kernels are forked from ended; "
                    f"its stderr ends:\n{template.stderr_tail}"
                ) from None
        except NoKernels as fault:
            if _templates.get(key) is template:  # the next one may find what this one lacked
                del _templates[key]
                await run_in_thread(template.close)
            raise fault.error from None
    raise AssertionError("unreachable")


class _Template:
    """A warm process, held by its two sockets."""

    def __init__(self, key: Key) -> None:
        sandbox: dict[str, Any] | None = None
        if key.sandboxed_in is not None:
            try:
                program = base64.b64encode(seccomp.program()).decode()
            except OSError as error:
                raise SandboxUnavailable(str(error)) from error
            sandbox = {"program": program, "writable": WRITABLE, "as_root": can_change_user()}
        self._folder = KernelFolder.make(TEMPLATE_PREFIX, parent=key.sandboxed_in)
        if sandbox is not None:
            sandbox["folder"] = str(self._folder.path)
        self._stderr = self._folder.path / "stderr"
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lifeline, lifeline = socket.socketpair()
        self._control.setblocking(False)
        self.used = time.monotonic()
        self.processes: weakref.WeakSet[ForkedProcess] = weakref.WeakSet()
        options = {
            "control": control.fileno(),
            "lifeline": lifeline.fileno(),
            "modules": [*GUEST_MODULES, "channels", "serving", "app"],
            "arguments": key.arguments,
            "preload": key.preload,
            "sandbox": sandbox,
        }
        with control, lifeline, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*key.interpreter, str(_TEMPLATE)],
                env=dict(key.environment) | environment_of_folder(self._folder.path),
                cwd=self._folder.path / "work",
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(control.fileno(), lifeline.fileno()),
                start_new_session=True,
            )
            assert self._process.stdin is not None
            with self._process.stdin as stdin:  # no argument: those can be seen from outside, and in kernels
                stdin.write(json.dumps(options).encode())

    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def is_idle(self) -> bool:
        """Whether it has no kernels, and has had none for a while: it may just have been chosen for one."""
        return not self.processes and time.monotonic() - self.used > _IDLE

    @property
    def stderr_tail(self) -> str:
        """The last that the process wrote to its stderr."""
        with contextlib.suppress(OSError):
            return self._stderr.read_bytes()[-_STDERR_TAIL:].decode("utf-8", "replace").strip()
        return ""

    async def fork(self, request: dict[str, Any], streams: list[int]) -> ForkedProcess:
        """Ask for a process, which waits its turn behind those asked for before, until clients can connect.

        Raises:
            ConfigError, KernelStartError, TemplateGone: as `ForkedProcess.until_bound`.
        """
        self._wake()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lifeline, kernel_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        lifeline.setblocking(False)
        process = ForkedProcess(ours, lifeline, self._wake)
        self.processes.add(process)  # from now on, or the template would seem to have nothing to do
        try:
            with theirs, kernel_end:
                await self._ask(
                    json.dumps(request).encode("utf-8", "surrogateescape"),
                    [*streams, kernel_end.fileno(), theirs.fileno()],
                )
            await process.until_bound()
        except BaseException:
            self.processes.discard(process)
            process.release()
            raise
        return process

    async def _ask(self, request: bytes, descriptors: list[int]) -> None:
        while True:
            try:
                socket.send_fds(self._control, [request], descriptors)
            except OSError as error:
                # It has more to do than its queue holds, or other sockets of this user's hold as many
                # descriptors as the limit on open files allows, which is then raised.
                if error.errno not in (errno.EAGAIN, errno.ETOOMANYREFS):
                    raise TemplateGone from None  # it is gone, or was closed for another one
                if error.errno == errno.ETOOMANYREFS:
                    _raise_limit_on_files()
                await asyncio.sleep(0.005)
            else:
                return

    def _wake(self) -> None:
        self._process.send_signal(signal.SIGCONT)  # a cell of a kernel that is not confined can stop it

    def end(self) -> None:
        """End the process; of its kernels, those that are confined end with it."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process and remove what is left of it."""
        self.end()
        self.let_go()
        self._folder.remove(is_deserted=True)  # its kernels began with its environment, and are not to go

    def let_go(self) -> None:
        """Close this process's ends of the sockets."""
        self._control.close()
        self._lifeline.close()


_templates: dict[Key, _Template] = {}
_starting = threading.Lock()


def _start_template(key: Key) -> _Template:
    with _starting:
        known = _templates.get(key)
        if known is not None and known.is_alive():
            return known
        if known is not None:
            log.warning("a template process was killed; another one takes its place")
            known.close()
        idle = [k for k, template in _templates.items() if template.is_idle]
        for old in idle[: max(len(_templates) - _MOST_TEMPLATES + 1, 0)]:
            _templates.pop(old).close()
        _templates[key] = _Template(key)
        return _templates[key]


def close_templates() -> None:
    """End every template of this process; called at exit, when no kernel is left."""
    while _templates:
        _templates.popitem()[1].close()


def _after_fork() -> None:
    # A forked child of the host must not keep the kernels alive when the host is gone.
    global _starting
    _starting = threading.Lock()
    for template in _templates.values():
        template.let_go()
    _templates.clear()


os.register_at_fork(after_in_child=_after_fork)


def _raise_limit_on_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
