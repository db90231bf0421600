"""The warm process that kernels are forked from: it imports and builds all that they share, then waits.

Started by path; on stdin it reads a JSON object: `control`, `lifeline` (file descriptors), `modules` (names
of the guest's), `arguments` (of the kernel, without its connection file), `preload`, and of a template whose
kernels are confined `sandbox` (see `confine.Sandbox`).

A datagram on `control` asks for a kernel: a JSON object with `connection_file`, `environ`, `folder` and
`argv` (and `own_folder` and `uid` of a confined one), and four descriptors: stdout, stderr, and two sockets.

One is the kernel's: on it comes `{"bound": true}` when clients can connect, `{"error": text}` or, of a system
that does not let it confine itself, `{"sandbox": text}`, and never more; when its other end is closed, Linux
kills the kernel. One is for this process to tell of the kernel, which does not hold it, a datagram each:
`{"forked": true}` with a pidfd, and that of the first process in its namespace if it is confined;
`{"status": n}` when it has ended and nothing is left of its processes; or `{"error": text}`. If no kernel can
come of this template at all, that is `{"preload": text}` of a module that cannot be imported,
`{"sandbox": text}`, or `{"fault": text}`.
"""

from __future__ import annotations

import array
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
REQUEST_BYTES = 2**20

prctl = ctypes.CDLL(None).prctl


def main() -> None:
    """Be the template until the host is gone; a kernel that it forks comes back from `serve`, too."""
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        sys.path.pop(0)  # its modules have names that others use
    options = json.load(sys.stdin)
    confine, sources = make(read(["confine"]))["confine"], read(options["modules"])
    lifeline = socket.socket(fileno=options["lifeline"])
    for fd in (options["lifeline"], options["control"]):
        os.set_inheritable(fd, False)
    fault, app, sandbox, modules = {}, None, None, {}
    try:
        if options["sandbox"] is not None:
            sandbox = confine.enter(**options["sandbox"], lifeline=lifeline, control=options["control"])
        modules = make(sources)
        if sandbox is None:
            modules["guard"].die_with(lifeline)
            # An orphan becomes a child of the nearest of these: of its kernel, and of this process when
            # that is gone.
            prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        app = build(modules, options)
    except confine.Refused as error:
        fault = {"sandbox": str(error)}
    except PreloadError as error:
        fault = {"preload": str(error)}
    except Exception as error:  # noqa: BLE001 - told to whoever asks for a kernel
        fault = {"fault": f"{type(error).__name__}: {error}"}
    control = socket.socket(fileno=options["control"])
    request, descriptors = Template(control, lifeline, sandbox, fault).serve(settle(modules, app))
    become_kernel(app, modules, sandbox, request, descriptors)


def read(names: list[str]) -> dict[str, str]:
    """The sources of the guest's modules."""
    folder = os.path.dirname(os.path.abspath(__file__))
    sources = {}
    for name in ("boot", *names):
        with open(os.path.join(folder, f"{name}.py"), encoding="utf-8") as file:
            sources[name] = file.read()
    return sources


def make(sources: dict[str, str]) -> Any:
    """The guest's modules, made as a kernel makes them."""
    boot = compile(sources.pop("boot"), "boot.py", "exec")
    namespace: dict[str, Any] = {"request": {"sources": sources, "options": None}}
    exec(boot, namespace)
    return namespace["_modules"]


def build(modules: Any, options: dict[str, Any]) -> Any:
    """The application that every kernel starts from, with all that is preloaded."""
    given = set(os.environ)
    # A library that starts its threads when it is imported could not be forked.
    single = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS") if name not in os.environ}
    os.environ.update(single)
    sys.modules["debugpy"] = None  # type: ignore[assignment] # a debugger starts threads, in a process to be forked
    app = modules["app"].ForkedApp.instance()
    app.parts = modules
    app.prepare(options["arguments"])
    del sys.modules["debugpy"]
    if (threads := extra_threads()) > 0:
        raise RuntimeError(f"the kernel's arguments start {threads} threads before it can be forked")
    for name in options["preload"]:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise PreloadError(f"preload: {name} cannot be imported: {error!r}") from error
        if (threads := extra_threads()) > 0:
            raise PreloadError(
                f"preload: importing {name} starts {threads} threads, and a process with threads cannot "
                "be forked safely; import it in a cell instead"
            )
    for name in single:
        del os.environ[name]
    app.variables = {name: os.environ[name] for name in set(os.environ) - given}  # MPLBACKEND is one
    return app


def extra_threads() -> int:
    """Threads of this process beside the one that forks."""
    return len(os.listdir("/proc/self/task")) - 1


def settle(modules: Any, app: Any) -> Iterator[None]:
    """Spare kernels time and memory: what each would do first is done, what they share stays in place."""
    for cell in modules["app"].WARM_CELLS:
        yield app.warm_up(cell)
    gc.collect()
    gc.freeze()  # or the first collection in a kernel would copy every page
    yield
    # Fill the holes in the heap, 128 KiB of each size: else what a kernel makes would go into pages that it
    # shares, and copy them; 0.4 MB of each.
    empty = sys.getsizeof(b"")
    app.filling = [bytes(size - empty) for size in range(48, 513, 16) for _ in range(2**17 // size)]


class PreloadError(Exception):
    """A module of the user's cannot be shared by forked kernels."""


class Template:
    """The loop that forks: takes requests, tells of ends."""

    def __init__(
        self, control: socket.socket, lifeline: socket.socket, sandbox: Any, fault: dict[str, str]
    ) -> None:
        self._control = control
        control.setblocking(False)
        self._sandbox = sandbox
        self._fault = fault
        self._kernels: dict[int, socket.socket] = {}
        self._firsts: dict[int, int] = {}  # confined kernels → the first process of their process namespace
        self._ended: dict[int, int] = {}  # of the kernels, those whose processes may not all be gone
        self._wake, wake = socket.socketpair()
        self._wake.setblocking(False)
        wake.setblocking(False)
        self._own = (control, lifeline, self._wake, wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (self._limit[1], self._limit[1]))

    def serve(self, chores: Iterator[None]) -> tuple[dict[str, Any], list[int]]:
        """Fork what is asked for; returns in the kernel, with its request and its descriptors.

        The chores are done while nobody waits: the first kernel of a host is wanted now.
        """
        ready = select.poll()
        ready.register(self._control, select.POLLIN)
        ready.register(self._wake, select.POLLIN)
        while True:
            while not self._fault and not ready.poll(0) and next(chores, self) is not self:
                pass
            ready.poll()
            self._reap()
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, REQUEST_BYTES, 4)
            except BlockingIOError:
                continue
            if not data:
                os._exit(0)
            request = json.loads(data)
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            if self._fork(socket.socket(fileno=descriptors.pop())):
                return request, descriptors
            for descriptor in descriptors:
                os.close(descriptor)

    def _fork(self, channel: socket.socket) -> bool:
        """Fork, tell the host of it, and say whether this is the new process."""
        if self._fault:
            return self._refuse(channel, self._fault)
        first = 0
        try:
            if self._sandbox is not None:
                first = self._sandbox.begin_namespace()
            pid = os.fork()
        except OSError as error:
            if first:
                os.kill(first, signal.SIGKILL)
                self._sandbox.end_namespace()
            return self._refuse(channel, {"error": f"no process could be forked: {error.strerror}"})
        if pid == 0:
            self._leave()
            channel.close()
            return True
        if first:
            self._sandbox.end_namespace()
            self._firsts[pid] = first
        self._kernels[pid] = channel
        pidfds = [os.pidfd_open(process) for process in (pid, first) if process]
        tell(channel, {"forked": True}, *pidfds)
        for pidfd in pidfds:
            os.close(pidfd)
        return False

    @staticmethod
    def _refuse(channel: socket.socket, fault: dict[str, str]) -> bool:
        tell(channel, fault)
        channel.close()
        return False

    def _leave(self) -> None:
        # In the new kernel: what the template holds of itself and of the others must not be within its reach.
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for held in (*self._own, *self._kernels.values()):
            held.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limit)

    def _reap(self) -> None:
        try:
            self._wake.recv(4096)
        except BlockingIOError:
            return
        while (found := next_end()) is not None:
            if found[0] in self._kernels:
                self._ended.update([found])
                if found[0] in self._firsts:
                    os.kill(self._firsts[found[0]], signal.SIGKILL)  # and Linux all that is in its namespace
            self._firsts = {kernel: first for kernel, first in self._firsts.items() if first != found[0]}
        if self._ended and (self._sandbox is not None or not self._kill_orphans()):
            for pid in self._ended.keys() - self._firsts.keys():
                channel, status = self._kernels.pop(pid), self._ended.pop(pid)
                tell(channel, {"status": os.waitstatus_to_exitcode(status)})
                channel.close()

    def _kill_orphans(self) -> bool:
        """Kill what ended kernels left behind; True if there was any: their ends come here, too."""
        try:
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
                left = [pid for pid in map(int, file.read().split()) if pid not in self._kernels]
        except FileNotFoundError:  # a kernel built without it: what left its group is found by its folder
            return False
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return bool(left)


def next_end() -> tuple[int, int] | None:
    """A child that has ended, and how."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def tell(channel: socket.socket, message: dict[str, Any], *descriptors: int) -> None:
    """Send a datagram, unless nobody reads there any more."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    try:
        # Not `socket.send_fds`, which forgets its flags (Python 3.11): a kernel may have filled its socket.
        channel.sendmsg([json.dumps(message).encode()], rights, socket.MSG_DONTWAIT)
    except OSError:
        return


def become_kernel(
    app: Any, modules: Any, sandbox: Any, request: dict[str, Any], descriptors: list[int]
) -> None:
    """In the forked process: forget what siblings share, bind, and serve until the kernel ends."""
    os.setsid()
    if sandbox is None:  # there its namespace has somebody who adopts orphans, and reaps them
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stdout, stderr, own = descriptors
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, place in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(fd, place)
        os.close(fd)
    told = socket.socket(fileno=own)
    modules["guard"].die_with(told)
    try:
        set_environment(app.variables | request["environ"])
        if sandbox is not None:
            sandbox.confine(request["own_folder"], request["uid"])
        os.chdir(request["folder"])
        sys.argv = request["argv"]
        forget_what_is_shared()
        app.open(request["connection_file"])
    except Exception as error:
        is_refused = sandbox is not None and type(error).__name__ == "Refused"
        told_of = {"sandbox": str(error)} if is_refused else {"error": f"{type(error).__name__}: {error}"}
        tell(told, told_of)
        raise
    tell(told, {"bound": True})
    app.start()


def set_environment(wanted: dict[str, str]) -> None:
    """Make `os.environ` what is wanted, without writing what it is already."""
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def forget_what_is_shared() -> None:
    """Let no two kernels draw the same random numbers or use the same folders."""
    shared = sys.modules
    shared["tempfile"].tempdir = None  # type: ignore[attr-defined]
    # `random` and OpenSSL see to it themselves; `uuid` and `secrets` ask the system.
    if "numpy" in shared:
        shared["numpy"].random.seed()
    if "torch" in shared:
        shared["torch"].seed()
    if "multiprocessing.process" in shared:
        process = shared["multiprocessing.process"].current_process()
        process.authkey = os.urandom(32)
    if "matplotlib" in shared:
        for name in ("get_cachedir", "get_configdir"):
            getattr(shared["matplotlib"], name).cache_clear()


if __name__ == "__main__":
    main()
