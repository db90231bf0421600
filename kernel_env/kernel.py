"""A running kernel that belongs to one episode: execute, interrupt, replace, close."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

from kernel_env.bridge import Bridge
from kernel_env.errors import ConfigError, KernelDied, KernelError, KernelStartError
from kernel_env.execution import PAYLOAD, Execution, Report, Running, refusal
from kernel_env.folder import KernelFolder, sweep
from kernel_env.install import RUN_BOOT, KernelSetup, install_request
from kernel_env.outputs import Output, Outputs, plain_traceback
from kernel_env.portal import run_in_thread
from kernel_env.process import KernelProcess

__all__ = ["Kernel"]

log = logging.getLogger("kernel_env.kernel")

_MESSAGE_BYTES = 2**24  # of a message besides the cell's text: code, names, tracebacks
_OTHERS = 100
_PRELOAD = "PreloadError: "
_ATTEMPTS = 100
# An expression, so that it leaves no name behind; what it works on comes in the request's metadata.
_RUN_SEND_TEXT = (
    "__import__('_kernel_env_helpers').send_text_of("
    "**get_ipython().kernel.get_parent()['metadata']['kernel_env'])"
)


class Kernel:
    """A ready kernel with the helpers in its namespace; make one with `await Kernel.start(setup)`."""

    def __init__(self, setup: KernelSetup, folder: KernelFolder) -> None:
        self.folder = folder
        """The folder with the working directory, which outlives the kernels that are lost."""
        self._setup = setup
        self._running: Running | None = None
        self._late = Outputs(setup.limits.cell_output)
        self._is_subscribed = asyncio.Event()
        self._restarts = 0
        self._is_occupied = False
        self._others: set[str] = set()  # requests of other clients that the kernel works on
        self._given: frozenset[str] = frozenset()
        self._names: list[str] = []
        self.on_closed: list[Callable[[], None]] = []
        """Called once, when the kernel is closed."""

    @classmethod
    async def start(cls, setup: KernelSetup) -> Kernel:
        """Start a kernel and install the guest in it.

        Raises:
            ConfigError: there is no such kernelspec.
            KernelStartError: no kernel became ready; nothing is left of it.
        """
        await run_in_thread(sweep)
        kernel = cls(setup, KernelFolder.make())
        await kernel._start()
        return kernel

    async def begin(self, setup: KernelSetup) -> None:
        """Give a blank kernel its episode.

        Raises:
            KernelStartError: it could not take it; nothing is left of it.
        """
        self._setup = setup
        self._late = Outputs(setup.limits.cell_output)
        self._bridge.begin_episode(setup.helpers, setup.context, setup.limits)
        self._process.wire.limit = _message_bytes(setup)
        await self._become_ready(self._install(has_guest=True))

    async def _start(self) -> None:
        setup, folder = self._setup, self.folder
        self._bridge = Bridge(folder.path / "h", setup.helpers, setup.context, setup.limits)
        self._is_subscribed.clear()
        self._others.clear()
        try:
            await self._bridge.open()
            async with asyncio.timeout(setup.limits.kernel_start):
                self._process = await KernelProcess.launch(
                    setup.kernel_name,
                    folder,
                    self._on_message,
                    self._on_exit,
                    message_bytes=_message_bytes(setup),
                    preload=setup.preload,
                )
        except BaseException as error:
            self._bridge.close()
            (folder.renew if self._is_a_successor else folder.remove)()
            if isinstance(error, TimeoutError):
                raise self._late_start() from error
            raise
        await self._become_ready(self._connect())

    async def _connect(self) -> Report:
        await self._wait_until_ready()
        return await self._install(has_guest=self._process.is_forked)

    async def _become_ready(self, work: Coroutine[Any, Any, Report]) -> None:
        try:
            async with asyncio.timeout(self._setup.limits.kernel_start):
                report = await work
        except BaseException as error:
            tail = self._process.stderr_tail
            await self._end(keeps_work=self._is_a_successor)
            if isinstance(error, TimeoutError):
                raise self._late_start(tail) from error
            raise
        self._names = report.names or []
        self._given = frozenset(self._names)

    def _late_start(self, stderr: str = "") -> KernelStartError:
        name, limit = self._setup.kernel_name, self._setup.limits.kernel_start
        return KernelStartError(
            f"kernel {name!r} was not ready after Limits.kernel_start = {limit:g} s; "
            f"its stderr ends:\n{stderr}"
        )

    async def _wait_until_ready(self) -> None:
        # ipykernel 7 says iopub_welcome once the subscription holds, and a forked kernel is ready before it
        # can; a spawned one, or an older ipykernel, is asked until a request's idle comes through.
        if self._process.is_forked:
            await self._is_subscribed.wait()
            return
        while True:
            running = self._begin("kernel_info_request", {})
            running.is_stoppable = False
            try:
                async with asyncio.timeout(1.0):
                    await running.ended.wait()
            except TimeoutError:
                if running.reply is None or not self._is_subscribed.is_set():
                    continue
            finally:
                self._finish(running)
            if running.died:
                raise KernelStartError(
                    f"kernel {self._setup.kernel_name!r} {self._process.end} before it was ready; "
                    f"its stderr ends:\n{self._process.stderr_tail}"
                )
            return

    async def _install(self, *, has_guest: bool = False) -> Report:
        setup, session = self._setup, self._process.wire.session
        request = install_request(setup, self._bridge, session, has_guest=has_guest)
        running = self._begin("execute_request", _execute_content(RUN_BOOT, silent=True), request)
        running.is_stoppable = False
        # A large context takes its time: this is part of the start, whatever a cell may take.
        execution = await self._see_through(running, math.inf, setup.limits.kernel_start)
        if execution.exception is not None and execution.exception.startswith(_PRELOAD):
            raise ConfigError(execution.exception.removeprefix(_PRELOAD))
        if execution.report is None:
            raise KernelStartError(
                f"kernel {setup.kernel_name!r} did not take the helpers: {execution.exception}\n"
                + "\n".join(plain_traceback(o["traceback"]) for o in execution.outputs if "traceback" in o)
                + self._process.stderr_tail
            )
        return execution.report

    async def execute(
        self,
        code: str,
        *,
        active: float | None = None,
        total: float | None = None,
        on_output: Callable[[Output], None] | None = None,
    ) -> Execution:
        """Run `code` as one cell and collect everything it publishes.

        A cell active for more than `active` seconds (helper waits excluded; default `Limits.cell_active`)
        or under way for more than `total` (default `Limits.cell_total`) is interrupted. A kernel that
        ignores the interrupt, or dies, is replaced, and its namespace is lost (`Execution.restarted`).
        """
        if (refused := refusal(code)) is not None:
            return refused
        outputs, self._late = self._late, Outputs(self._setup.limits.cell_output)
        outputs.listen(on_output)
        with self._occupied():
            content = _execute_content(code, silent=False)
            running, execution = await self._serve(content, None, outputs, active, total)
            if running.died:
                return await self._take_over(execution)
            if execution.report is None:
                return await self._repair(execution)
            return execution

    async def text_of(
        self, expression: str, *, convert: str, active: float | None = None, total: float | None = None
    ) -> Execution:
        """Evaluate an expression in the namespace; its `str` or `repr` is the execution's answer.

        Raises:
            KernelDied: the kernel is gone and none replaced it.
        """
        if self._process.exited.is_set() and not self._can_replace:
            raise KernelDied(
                "the kernel is gone and Limits.restarts is used up; call reset() for a new episode"
            )
        if (refused := refusal(expression)) is not None:
            return refused
        request = {"expression": expression, "convert": convert}
        with self._occupied():
            content = _execute_content(_RUN_SEND_TEXT, silent=True)
            running, execution = await self._serve(content, request, None, active, total)
            return await self._take_over(execution) if running.died else execution

    async def _serve(
        self,
        content: dict[str, Any],
        metadata: dict[str, Any] | None,
        outputs: Outputs | None,
        active: float | None,
        total: float | None,
    ) -> tuple[Running, Execution]:
        """Send a request and see it through; again, where a failing cell of another client took it along."""
        sent = time.monotonic()
        for _ in range(_ATTEMPTS):
            running = self._begin("execute_request", content, metadata, outputs)
            running.sent = sent
            execution = await self._see_through(running, *self._bounds(active, total))
            if not running.is_aborted:
                break
        return running, execution

    def _bounds(self, active: float | None, total: float | None) -> tuple[float, float]:
        limits = self._setup.limits
        return (
            limits.cell_active if active is None else active,
            limits.cell_total if total is None else min(limits.cell_total, total),
        )

    def stop(self, reason: str) -> bool:
        """End what the kernel does for its caller as if its time were up; False if it does nothing.

        What is under way still comes to its end: an interrupt, or a fresh kernel, takes its time.
        """
        if self._is_occupied and self._running is not None and self._running.is_stoppable:
            self._running.stop(reason)
        return self._is_occupied

    @contextlib.contextmanager
    def _occupied(self) -> Iterator[None]:
        self._is_occupied = True
        try:
            yield
        finally:
            self._is_occupied = False

    async def close(self) -> None:
        """End the kernel; nothing of it is left."""
        await self._end()
        if self.folder.is_held:  # kept for the next kernel, and there was none
            await run_in_thread(self.folder.remove, is_deserted=True)
        self._tell_closed()

    async def _end(self, *, keeps_work: bool = False) -> None:
        self._bridge.close()
        await self._process.kill(keeps_work=keeps_work)

    def close_now(self) -> None:
        """The same when the loop it lived on is closed."""
        self._process.kill_now()
        self._tell_closed()

    @property
    def _is_a_successor(self) -> bool:
        """Whether it was started in place of a kernel that was lost, whose working directory it has."""
        return self._restarts > 0

    def _tell_closed(self) -> None:
        while self.on_closed:
            self.on_closed.pop()()

    @property
    def names(self) -> list[str]:
        """The names in the namespace when it was last seen, sorted."""
        return self._names

    @property
    def _can_replace(self) -> bool:
        return self._restarts < self._setup.limits.restarts

    def _begin(
        self,
        kind: str,
        content: dict[str, Any],
        metadata: dict[str, Any] | None = None,
        outputs: Outputs | None = None,
    ) -> Running:
        message = self._process.wire.request(kind, content, {PAYLOAD: metadata} if metadata else None)
        identifier: str = message["header"]["msg_id"]
        running = Running(
            id=identifier,
            outputs=outputs or Outputs(self._setup.limits.cell_output),
            cell=self._bridge.begin(identifier),
            is_cell=outputs is not None,
            refused_before=self._refused,
        )
        running.cell.on_broken = running.break_down
        self._running = running
        self._tell_of_others()
        if self._process.exited.is_set():
            running.die()
        else:
            self._process.send(message)
        return running

    @property
    def _refused(self) -> int:
        return self._process.broken + self._bridge.refused

    def _finish(self, running: Running) -> None:
        self._bridge.end(running.cell)
        if self._running is running:
            self._running = None

    def _on_exit(self) -> None:
        self._is_subscribed.set()  # there is no more to wait for
        if self._running is not None:
            self._running.die()

    def _on_message(self, channel: str, message: dict[str, Any]) -> None:
        kind, content = message["msg_type"], message["content"]
        if self._running is not None:
            self._running.heard = time.monotonic()
        if kind == "iopub_welcome":
            self._is_subscribed.set()
            return
        parent, running = message["parent_header"], self._running
        if kind == "status" and parent.get("session") != self._process.wire.session:
            self._note_others(parent.get("msg_id"), content.get("execution_state"))
        if channel == "iopub" and kind != "status" and parent.get("session") == self._process.wire.session:
            # A thread or a task of an earlier cell may still print: it shows with this cell, or the next.
            if running is not None and (running.is_cell or parent.get("msg_id") == running.id):
                running.outputs.add(kind, content)
            else:
                self._late.add(kind, content)
        if running is None or parent.get("msg_id") != running.id:
            return
        if channel == "shell":
            running.reply = content
        elif kind == "execute_input":
            running.has_begun = True
        elif kind == "status" and content.get("execution_state") == "busy":
            running.busy_since = time.monotonic()
        elif kind == "status" and content.get("execution_state") == "idle":
            running.is_idle = True
        running.check_end()

    def _note_others(self, request: object, state: object) -> None:
        had_others = bool(self._others)
        if state == "busy" and isinstance(request, str) and len(self._others) < _OTHERS:
            self._others.add(request)
        elif state == "idle":
            self._others.discard(str(request))
        if had_others != bool(self._others):
            self._tell_of_others()

    def _tell_of_others(self) -> None:
        if self._running is not None:
            self._running.alone_since = None if self._others else time.monotonic()

    async def _see_through(self, running: Running, active: float, total: float) -> Execution:
        """Wait for the end of a request, or bring it about; `running.died` says whether the kernel did."""
        killed = False
        try:
            why = running.why = await running.until_end(active, total, self._process.drain)
            if running.fault is not None:
                await self._process.settle()
                await self._process.terminate()
            elif why is not None:
                killed = await self._stop(running, why)
            if running.died:
                await self._process.settle()
            self._bridge.end(running.cell)
            if running.cell.in_flight:  # cancelled now: they are still to be recorded
                await asyncio.wait(set(running.cell.in_flight), timeout=1.0)
        finally:
            self._finish(running)
        execution = running.conclude(self._process.end, killed=killed)
        if refused := self._refused - running.refused_before:
            note = f"{refused} malformed or unauthorised messages from the kernel were not taken."
            execution = replace(execution, notes=(*execution.notes, note))
        if execution.report is not None and execution.report.names is not None:
            self._names = execution.report.names
        return execution

    async def _take_over(self, execution: Execution) -> Execution:
        """Start a fresh kernel in place of the lost one, and say what went with it."""
        lost = tuple(name for name in self._names if name not in self._given)
        has_fresh = await self._replace()
        note = f"A fresh kernel took over; lost variables: {', '.join(lost) or 'none'}."
        if not has_fresh:
            note = f"No kernel took over (Limits.restarts = {self._setup.limits.restarts})."
        return replace(
            execution,
            notes=(*execution.notes, note),
            restarted=has_fresh,
            kernel_lost=not has_fresh,
            lost_variables=lost,
        )

    async def _stop(self, running: Running, why: str) -> bool:
        """Interrupt the cell, and kill its kernel if that does not end it; True if it had to be killed."""
        running.cell.cancel(f"its cell was stopped because {why}")
        await self._process.interrupt()
        # ipykernel's handler for a cell parked in `await` only schedules a callback, which nothing wakes
        # the loop for; any request on this channel does.
        self._process.send(self._process.wire.request("kernel_info_request", {}))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._setup.limits.interrupt_grace):
                await running.ended.wait()
        if running.ended_at is not None:
            return False
        await self._process.terminate()
        return True

    async def _replace(self) -> bool:
        await self._end(keeps_work=True)
        if not self._can_replace:
            return False
        self._restarts += 1
        self._late = Outputs(self._setup.limits.cell_output)
        try:
            await self._start()
        except KernelError:
            log.exception("no kernel could be started in place of the one that was lost")
            return False
        return True

    async def _repair(self, execution: Execution) -> Execution:
        # The report is missing: the cell has taken our hooks out, or worse.
        try:
            await self._install()
        except KernelError as error:
            log.warning("the guest could not be installed again: %s", error)
            note = "The environment's hooks were gone from the kernel and could not be installed again."
            return await self._take_over(replace(execution, notes=(*execution.notes, note)))
        note = "The environment's hooks were gone from the kernel; they are installed again."
        return replace(execution, notes=(*execution.notes, note))


def _message_bytes(setup: KernelSetup) -> int:
    return 8 * setup.limits.cell_output + _MESSAGE_BYTES


def _execute_content(code: str, *, silent: bool) -> dict[str, Any]:
    return {
        "code": code,
        "silent": silent,
        "store_history": not silent,
        "user_expressions": {},
        "allow_stdin": False,
        "stop_on_error": False,
    }
