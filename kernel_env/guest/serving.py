"""How a forked kernel serves requests: as ipykernel's, without what that does twice or by another task.

Runs in the template and in the kernels forked from it, on ipykernel 7 alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import linecache
import os
import signal
import sys
import threading
import types
import zlib
from collections.abc import Coroutine, Generator
from typing import Any

from ipykernel.compiler import get_tmp_directory
from ipykernel.ipkernel import IPythonKernel
from ipykernel.jsonutil import json_clean
from IPython.core.async_helpers import _pseudo_sync_runner

SOURCES = 1000  # of cells, for tracebacks into functions that they defined; IPython keeps all


class NoSubshells:
    """What ipykernel calls its shell channel thread: false, and yet asked for the thread that runs cells."""

    parent_thread = threading.main_thread()

    def __bool__(self) -> bool:
        return False


class ForkedKernel(IPythonKernel):
    """ipykernel's kernel without subshells, which cost a thread and two hops of every message."""

    session: Any
    shell: Any
    shell_stream: Any
    _is_serving = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._sources: dict[str, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        known = inspect.signature(self.shell.run_cell_async).parameters
        self._cell_options = [name for name in ("cell_meta", "cell_id") if name in known]
        self.shell.compile.get_code_name = self._name_of_cell
        _look_before_tokenizing(self.shell.input_transformer_manager)

    @property
    def _supports_kernel_subshells(self) -> bool:
        return False

    def _name_of_cell(self, raw_code: str, code: str, number: int) -> str:
        """A file name like ipykernel's, whose hash, for debuggers, takes 0.1 ms for 1,000 characters."""
        folder = get_tmp_directory()  # type: ignore[no-untyped-call]
        number = zlib.crc32(raw_code.encode("utf-8", "replace"))
        name = os.environ.get("IPYKERNEL_CELL_NAME") or f"{folder}{os.sep}{number}.py"
        self._sources.pop(name, None)
        self._sources[name] = None
        if len(self._sources) > SOURCES:
            oldest = next(iter(self._sources))
            del self._sources[oldest]
            linecache.cache.pop(oldest, None)
        return name

    def _publish_status(self, status: str, channel: str, parent: Any = None) -> None:
        parent = parent or self.get_parent(channel)  # type: ignore[no-untyped-call]
        message = self.session.msg("status", b'{"execution_state": "%s"}' % status.encode(), parent)
        self.iopub_thread.send_multipart(self.session.serialize(message, self._topic("status")))  # type: ignore[no-untyped-call]

    def start(self) -> None:
        super().start()  # type: ignore[no-untyped-call]
        self._context = contextvars.copy_context()
        self.shell_stream.on_recv(self._serve)

    def _serve(self, message: list[bytes]) -> None:
        """Serve a request, up to where it waits for something; only the rest becomes a task."""
        work = self.shell_main(None, message)
        if self._is_serving or self.shell_stream.is_flushing:  # an error of a cell aborts what has come in
            self._go_on(work)
            return
        self._is_serving = True
        try:
            waits_for = self._context.run(work.send, None)
        except StopIteration:
            return
        except BaseException:
            self.log.exception("a request could not be served")
            return
        finally:
            self._is_serving = False
        self._go_on(_rest(work, waits_for))

    def _go_on(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work, context=self._context)
        self._tasks.add(task)  # the loop itself holds none
        task.add_done_callback(self._tasks.discard)

    def pre_handler_hook(self) -> None:
        self.saved_sigint_handler = signal.signal(signal.SIGINT, _interrupt)

    def _abort_queues(self, subshell_id: str | None = None) -> None:
        self._aborting = True
        self.shell_stream.flush()

        async def stop() -> None:
            await asyncio.sleep(self.stop_on_error_timeout)
            async with self._main_asyncio_lock:  # behind all that wait for it now
                self._aborting = False

        self._go_on(stop())

    async def execute_request(self, stream: Any, ident: Any, parent: Any) -> None:
        """As ipykernel's, which also pauses, for clients that stop reading at the reply."""
        try:
            content, metadata = parent["content"], self.init_metadata(parent)  # type: ignore[no-untyped-call]
            code, silent = content["code"], content.get("silent", False)
            cell_meta = parent["metadata"]
            cell_id = cell_meta.get("cellId")
        except (AttributeError, KeyError, TypeError):
            self.log.exception("an execute request without code: %s", parent)
            return
        if not silent:
            self._publish_execute_input(code, parent, self.execution_count)  # type: ignore[no-untyped-call]
        reply = await self.do_execute(
            code,
            silent,
            content.get("store_history", not silent),
            content.get("user_expressions", {}),
            content.get("allow_stdin", False),
            cell_meta=cell_meta,
            cell_id=cell_id,
        )
        for stream_of_cell in (sys.stdout, sys.stderr):
            if stream_of_cell is not None:
                stream_of_cell.flush()
        reply = json_clean(reply)  # type: ignore[no-untyped-call]
        metadata = self.finish_metadata(parent, metadata, reply)  # type: ignore[no-untyped-call]
        self.session.send(stream, "execute_reply", reply, parent, ident, metadata=metadata)
        if not silent and reply["status"] == "error" and content.get("stop_on_error", True):
            self._abort_queues(None)

    async def do_execute(
        self,
        code: str,
        silent: bool,
        store_history: bool = True,
        user_expressions: Any = None,
        allow_stdin: bool = False,
        *,
        cell_meta: Any = None,
        cell_id: Any = None,
    ) -> Any:
        """As ipykernel's, which transforms a cell twice, compiles it three times and looks at signatures."""
        shell: Any = self.shell
        shell._last_traceback, shell._last_traceback_during_displayhook = None, False
        fault = None
        try:
            transformed = shell.transform_cell(code)
        except Exception:  # noqa: BLE001 - of the input transformers; IPython shows it
            transformed, fault = code, sys.exc_info()
        given = {"cell_meta": cell_meta, "cell_id": cell_id}
        options = {"silent": silent, "store_history": store_history}
        if "await" in transformed or "async" in transformed:
            return await super().do_execute(  # type: ignore[no-untyped-call]
                code, user_expressions=user_expressions, allow_stdin=allow_stdin, **options, **given
            )
        options |= {name: given[name] for name in self._cell_options}
        self._forward_input(allow_stdin)  # type: ignore[no-untyped-call]
        result = None
        try:
            result = self.run_plain_cell(
                code, transformed_cell=transformed, preprocessing_exc_tuple=fault, **options
            )
            error = result.error_in_exec if result.error_before_exec is None else result.error_before_exec
        except BaseException as caught:  # noqa: BLE001 - an interrupt outside of the cell's own code
            error = caught
            with contextlib.suppress(BaseException):
                shell.showtraceback(running_compiled_code=True)
        finally:
            shell.events.trigger("post_execute")
            if not silent:
                shell.events.trigger("post_run_cell", result)
            self._restore_input()  # type: ignore[no-untyped-call]
        return self._reply(error, user_expressions or {})

    def run_plain_cell(self, code: str, transformed_cell: str | None = None, **options: Any) -> Any:
        """Run a cell that awaits nothing."""
        transformed = self.shell.transform_cell(code) if transformed_cell is None else transformed_cell
        cell = self.shell.run_cell_async(code, transformed_cell=transformed, **options)
        return _pseudo_sync_runner(cell)  # type: ignore[no-untyped-call]

    def _reply(self, error: BaseException | None, user_expressions: dict[str, str]) -> dict[str, Any]:
        shell: Any = self.shell
        reply: dict[str, Any] = {"status": "ok", "execution_count": shell.execution_count - 1}
        if error is None and not getattr(shell, "_last_traceback_during_displayhook", False):
            reply["user_expressions"] = shell.user_expressions(user_expressions) if user_expressions else {}
        else:
            reply |= {
                "status": "error",
                "traceback": shell._last_traceback or [],
                "ename": type(error).__name__,
                "evalue": str(error),
                "user_expressions": {},
            }
        reply["payload"] = shell.payload_manager.read_payload()
        shell.payload_manager.clear_payload()
        return reply


def _interrupt(_: int, frame: Any) -> None:
    """Like Python's own handler, but not in the middle of a print."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "postpones_interrupt") and stream.postpones_interrupt(frame):
            return
    raise KeyboardInterrupt


def _look_before_tokenizing(manager: Any) -> None:
    """Spare cells in plain Python IPython's search for its own syntax: 0.35 ms of 1,000 characters.

    What its transformers look for begins with, or contains, one of a few characters.
    """
    known, search = list(manager.token_transformers), manager.do_one_token_transform

    def do_one_token_transform(lines: list[str]) -> tuple[bool, list[str]]:
        is_plain = manager.token_transformers == known and not any(map(_has_special_syntax, lines))
        return (False, lines) if is_plain else search(lines)

    manager.do_one_token_transform = do_one_token_transform


def _has_special_syntax(line: str) -> bool:
    return "%" in line or "!" in line or "?" in line or line.lstrip().startswith((",", ";", "/"))


@types.coroutine
def _rest(work: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """What is left of a coroutine that was begun outside a task and waits for a future."""
    while True:
        try:
            sent = yield waits_for
        except BaseException as error:  # noqa: BLE001 - a cancellation is the coroutine's
            step = functools.partial(work.throw, error)
        else:
            step = functools.partial(work.send, sent)
        try:
            waits_for = step()
        except StopIteration:
            return
