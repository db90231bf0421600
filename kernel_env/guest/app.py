"""An ordinary IPython kernel whose construction is cut in two: before the fork, and after it.

Runs in the template and in the kernels forked from it, on ipykernel 7 alone.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import uuid
from typing import Any

import pexpect  # type: ignore[import-untyped]  # noqa: F401 - from here on: what IPython, tornado and ipykernel import on first use
import tornado.platform.asyncio  # noqa: F401
import zmq
from ipykernel.control import ControlThread
from ipykernel.kernelapp import IPKernelApp
from zmq.eventloop.zmqstream import ZMQStream

# What a first cell imports and caches is there before the fork then: 8 ms of every kernel.
WARM_CELLS = ("warm = 1\nprint(end='')\nwarm", "1 / 0", "await __import__('asyncio').sleep(0)")


class ForkedApp(IPKernelApp):
    """IPKernelApp in two halves: `prepare` makes no socket, thread or loop, `open` makes them."""

    context: Any
    profile_dir: Any
    outstream_class: Any

    parts: Any
    """The guest's modules, set by the template: this one cannot import the others."""

    def _session_default(self) -> Any:
        return self.parts["channels"].ForkedSession(parent=self)

    def prepare(self, argv: list[str]) -> None:
        """Build the kernel and its shell."""
        super(IPKernelApp, self).initialize(argv)  # type: ignore[no-untyped-call]
        # traitlets leaves the logger itself at DEBUG, so every message formats lines that nobody reads.
        self.log.setLevel(self.log_level)
        self.init_pdb()  # type: ignore[no-untyped-call]
        self.init_blackhole()  # type: ignore[no-untyped-call]
        self.configure_tornado_logger()  # type: ignore[no-untyped-call]
        self.iopub_thread = self.parts["channels"].Publisher()
        self.iopub_socket = self.iopub_thread.background_socket
        streams, self.outstream_class = self.outstream_class, None
        self.init_io()  # type: ignore[no-untyped-call]
        self.outstream_class = streams
        self.init_kernel()
        self.init_path()  # type: ignore[no-untyped-call]
        self.init_shell()  # type: ignore[no-untyped-call]
        self.init_gui_pylab()  # type: ignore[no-untyped-call]
        self.init_extensions()  # type: ignore[no-untyped-call]
        self.init_code()  # type: ignore[no-untyped-call]

    def init_kernel(self) -> None:
        serving = self.parts["serving"]
        kernel = serving.ForkedKernel.instance(
            parent=self,
            session=self.session,
            iopub_thread=self.iopub_thread,
            iopub_socket=self.iopub_socket,
            shell_channel_thread=serving.NoSubshells(),
            log=self.log,
            profile_dir=self.profile_dir,
            user_ns=self.user_ns,
        )
        self.kernel = kernel
        self.displayhook.get_execution_count = lambda: kernel.execution_count

    def warm_up(self, cell: str) -> None:
        """Run a cell that nobody sees."""
        session, kernel = self.session, self.kernel
        shell, names = kernel.shell, set(kernel.shell.user_ns)
        content = {"code": cell, "silent": False, "store_history": False, "stop_on_error": False}
        request = session.msg("execute_request", {**content, "allow_stdin": False, "user_expressions": {}})
        asyncio.run(kernel.shell_main(None, session.serialize(request)))
        session.digest_history.clear()
        kernel._shell_context = contextvars.copy_context()
        for name in set(shell.user_ns) - names:
            del shell.user_ns[name]
        shell.execution_count = 1
        shell._last_traceback = None
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            vars(sys).pop(name, None)

    def open(self, connection_file: str) -> None:
        """Become the kernel of `connection_file`: the sockets are bound when this returns."""
        self.session.session = str(uuid.uuid4())
        self.session.pid = os.getpid()
        self.kernel.ident = str(uuid.uuid4())
        self.kernel.shell.displayhook.topic = self.kernel._topic("execute_result")
        self.connection_file = connection_file
        self.init_connection_file()  # type: ignore[no-untyped-call]
        self.init_sockets()  # type: ignore[no-untyped-call]
        self.init_heartbeat()
        self.write_connection_file()
        self.log_connection_info()  # type: ignore[no-untyped-call]
        self._open_streams()
        self._move_profile()
        self.init_signal()  # type: ignore[no-untyped-call]
        kernel = self.kernel
        kernel.shell_stream = self.parts["channels"].ShellStream(self.shell_socket)
        kernel.control_stream = ZMQStream(self.control_socket, self.control_thread.io_loop)
        kernel.control_thread = self.control_thread
        kernel.stdin_socket = self.stdin_socket
        kernel.record_ports({f"{name}_port": port for name, port in self._ports.items()})
        if name := os.environ.get("JPY_SESSION_NAME"):
            kernel.shell.user_ns["__session__"] = name
        self.control_thread.start()

    def _move_profile(self) -> None:
        """Let IPython's files be those of the kernel's own environment, not of the template's."""
        folder = os.environ.get("IPYTHONDIR") or os.path.join(os.path.expanduser("~"), ".ipython")
        profile, shell = self.profile_dir, self.kernel.shell
        profile.unobserve_all()  # they make folders that nobody uses: 3 ms
        shell.ipython_dir = folder
        profile.location = os.path.join(shell.ipython_dir, f"profile_{self.profile}")
        for name in ("security", "log", "startup", "pid", "static"):
            setattr(profile, f"{name}_dir", os.path.join(profile.location, name))
        if "db" in vars(shell):  # IPython before 9, which does not wait for its first use
            shell.db = type(shell.db)(os.path.join(profile.location, "db"))
        if os.path.isdir(profile.startup_dir):
            self._run_startup_files()  # type: ignore[no-untyped-call]

    def init_control(self, context: Any) -> None:
        self.control_socket = context.socket(zmq.ROUTER)
        self.control_socket.linger = 1000
        self._apply_curve_server_options(self.control_socket)
        self.control_port = self._bind_socket(self.control_socket, self.control_port)  # type: ignore[no-untyped-call]
        self.control_socket.router_handover = 1
        self.control_thread = ControlThread(daemon=True)  # type: ignore[no-untyped-call]

    def init_iopub(self, context: Any) -> None:
        socket = context.socket(zmq.XPUB)
        socket.linger = 1000
        socket.sndhwm = 0  # else zmq drops output, `idle` included, while a client reads slowly
        self._apply_curve_server_options(socket)
        self.iopub_port = self._bind_socket(socket, self.iopub_port)  # type: ignore[no-untyped-call]
        self.iopub_thread.open(socket, self.session, self.control_thread)

    def init_heartbeat(self) -> None:
        # ipykernel's own has a context of its own: three threads for an echo.
        self.hb_socket = self.context.socket(zmq.ROUTER)
        self.hb_socket.linger = 0
        self._apply_curve_server_options(self.hb_socket)
        self.hb_port = self._bind_socket(self.hb_socket, self.hb_port)  # type: ignore[no-untyped-call]
        echo = ZMQStream(self.hb_socket, self.control_thread.io_loop)
        echo.on_recv(echo.send_multipart)

    def _open_streams(self) -> None:
        for name in ("stdout", "stderr"):
            setattr(sys, name, self.parts["streams"].CellStream(self.session, self.iopub_thread, name))
        self.kernel._stdout, self.kernel._stderr = sys.stdout, sys.stderr

    def close(self) -> None:
        """Stop what uses the heartbeat's socket before the context waits for it."""
        self.control_thread.stop()
        self.control_thread.join()
        self.hb_socket.close()
        super().close()  # type: ignore[no-untyped-call]
