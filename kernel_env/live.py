"""One kernel process in use: its helper channel, its guest, its meter, and the request that it works on."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from kernel_env.bridge import Bridge
from kernel_env.errors import ConfigError, KernelStartError
from kernel_env.execution import PAYLOAD, Execution, Report, Running
from kernel_env.folder import KernelFolder, give_to_owner
from kernel_env.install import RUN_BOOT, KernelSetup, install_request
from kernel_env.meter import Breach, Meter
from kernel_env.outputs import Outputs, plain_traceback
from kernel_env.process import KernelProcess
from kernel_env.types import Usage

__all__ = ["LiveKernel", "execute_content"]

_MESSAGE_BYTES = 2**24  # of a message besides the cell's text: code, names, tracebacks
_OTHERS = 100
_ID_CHARS = 1000
_OUT_OF_MEMORY = re.compile("MemoryError|bad_alloc|[Cc]annot allocate memory|[Oo]ut of memory")
_PRELOAD = "PreloadError: "
_ATTEMPTS = 100


class LiveKernel:
    """A kernel process with the guest in it; make one with `await LiveKernel.start(…)`.

    Whatever becomes of it, it is not replaced here: see `Kernel`.
    """

    process: KernelProcess
    _meter: Meter

    def __init__(self, setup: KernelSetup, folder: KernelFolder, served: int) -> None:
        self._setup = setup
        self._folder = folder
        self._running: Running | None = None
        self._late = Outputs(setup.limits.cell_output)
        self._is_subscribed = asyncio.Event()
        self._others: set[str] = set()  # requests of other clients that the kernel works on
        self._breach: Breach | None = None
        self._bytes_before = 0
        self._interrupting: asyncio.Future[None] | None = None
        self._bridge = Bridge(folder.path / "h", setup.helpers, setup.context, setup.limits, served=served)
        self.names: list[str] = []
        """The names in the namespace when it was last seen, sorted."""
        self.given: frozenset[str] = frozenset()
        """The names that were there before the first cell."""

    @classmethod
    async def start(
        cls, setup: KernelSetup, folder: KernelFolder, *, served: int = 0, keeps_work: bool = False
    ) -> LiveKernel:
        """Start a kernel in `folder` and install the guest in it.

        `served` helper calls of its episode were served to kernels before it. After an error the folder is
        removed or, with `keeps_work`, emptied but for its working directory.

        Raises:
            ConfigError: there is no such kernelspec.
            KernelStartError: no kernel became ready; nothing is left of it.
        """
        live = cls(setup, folder, served)
        try:
            await live._bridge.open()
            give_to_owner(folder.path, live._bridge.path)
            async with asyncio.timeout(setup.limits.kernel_start):
                live.process = await KernelProcess.launch(
                    setup.kernel_name,
                    folder,
                    live._on_message,
                    live._on_exit,
                    message_bytes=_message_bytes(setup),
                    preload=setup.preload,
                    isolation=setup.isolation,
                )
        except BaseException as error:
            live._bridge.close()
            await folder.clear(keeps_work=keeps_work)
            if isinstance(error, TimeoutError):
                raise live._late_start() from error
            if isinstance(error, OSError):
                raise KernelStartError(f"what the kernel needs could not be made: {error}") from error
            raise
        live._meter = Meter(live.process.roots, setup.limits, folder)
        await live._become_ready(live._connect(), keeps_work=keeps_work)
        return live

    async def begin(self, setup: KernelSetup) -> None:
        """Give a blank kernel its episode.

        Raises:
            KernelStartError: it could not take it; nothing is left of it.
        """
        self._setup = setup
        self._late = Outputs(setup.limits.cell_output)
        self._bridge.begin_episode(setup.helpers, setup.context, setup.limits)
        self.process.wire.limit = _message_bytes(setup)
        await self._become_ready(self.install(has_guest=True), keeps_work=False)

    async def _connect(self) -> Report:
        await self._wait_until_ready()
        return await self.install(has_guest=self.process.is_forked)

    async def _become_ready(self, work: Coroutine[Any, Any, Report], *, keeps_work: bool) -> None:
        try:
            async with asyncio.timeout(self._setup.limits.kernel_start):
                report = await work
        except BaseException as error:
            tail = self.process.stderr_tail
            await self.close(keeps_work=keeps_work)
            if isinstance(error, TimeoutError):
                raise self._late_start(tail) from error
            raise
        self.names = report.names or []
        self.given = frozenset(self.names)
        self._meter.rebase(self._setup.limits)

    def _late_start(self, stderr: str = "") -> KernelStartError:
        name, limit = self._setup.kernel_name, self._setup.limits.kernel_start
        return KernelStartError(
            f"kernel {name!r} was not ready after Limits.kernel_start = {limit:g} s; "
            f"its stderr ends:\n{stderr}"
        )

    async def _wait_until_ready(self) -> None:
        # ipykernel 7 says iopub_welcome once the subscription holds, and a forked kernel is ready before it
        # can; a spawned one, or an older ipykernel, is asked until a request's idle comes through.
        if self.process.is_forked:
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
                    f"kernel {self._setup.kernel_name!r} {self.process.end} before it was ready; "
                    f"its stderr ends:\n{self.process.stderr_tail}"
                )
            return

    async def install(self, *, has_guest: bool = False) -> Report:
        """Make it an episode's kernel, again if a cell has undone that.

        Raises:
            ConfigError: a module cannot be preloaded.
            KernelStartError: it does not take the guest.
        """
        setup, session = self._setup, self.process.wire.session
        try:
            request = install_request(setup, self._bridge, session, has_guest=has_guest)
        except OSError as error:
            raise KernelStartError(f"what the kernel needs could not be written: {error}") from error
        running = self._begin("execute_request", execute_content(RUN_BOOT, silent=True), request)
        running.is_stoppable = False
        # A large context takes its time: this is part of the start, whatever a cell may take.
        execution = await self._see_through(running, math.inf, setup.limits.kernel_start)
        if execution.exception is not None and execution.exception.startswith(_PRELOAD):
            raise ConfigError(execution.exception.removeprefix(_PRELOAD))
        if execution.report is None:
            raise KernelStartError(
                f"kernel {setup.kernel_name!r} did not take the helpers: {execution.exception}\n"
                + "\n".join(plain_traceback(o["traceback"]) for o in execution.outputs if "traceback" in o)
                + self.process.stderr_tail
            )
        return execution.report

    async def serve(
        self,
        content: dict[str, Any],
        metadata: dict[str, Any] | None,
        outputs: Outputs | None,
        active: float | None,
        total: float | None,
    ) -> Execution:
        """Send a request and see it through; again, where a failing cell of another client took it along.

        With `outputs` it is a cell: they get what it publishes, and what comes late from earlier ones.
        """
        sent = time.monotonic()
        self._meter.begin()
        self._bytes_before = self.process.bytes_out
        for _ in range(_ATTEMPTS):
            running = self._begin("execute_request", content, metadata, outputs)
            running.sent = sent
            execution = await self._see_through(running, *self._bounds(active, total))
            if not running.is_aborted:
                break
        return execution

    def _bounds(self, active: float | None, total: float | None) -> tuple[float, float]:
        limits = self._setup.limits
        return (
            limits.cell_active if active is None else active,
            limits.cell_total if total is None else min(limits.cell_total, total),
        )

    def late_outputs(self) -> Outputs:
        """What came since the last cell, to be shown with the next; from here on it is gathered anew."""
        outputs, self._late = self._late, Outputs(self._setup.limits.cell_output)
        return outputs

    def stop(self, reason: str) -> None:
        """End what the kernel does for its caller as if its time were up."""
        if self._running is not None and self._running.is_stoppable:
            self._running.stop(reason)

    def wake(self) -> None:
        """A request is to come."""
        self._meter.wake()

    def rest(self) -> None:
        """No request is under way: look now and then at what is left running."""
        if not self.process.exited.is_set():
            self._meter.rest(self._kill_for)

    def _kill_for(self, breach: Breach) -> None:
        """Nothing runs in the kernel, and what was left running has gone over a limit."""
        self._breach = breach
        self.process.kill_group()

    def _usage(self, running: Running) -> Usage:
        meter, wall = self._meter, (running.ended_at or time.monotonic()) - running.sent
        return Usage.model_construct(  # of our own numbers: nothing to check
            wall=wall,
            active=running.active_time,
            helper_wait=running.cell.waited,
            cpu=meter.measure_cpu(wall=wall),
            peak_memory=meter.peak_memory(wall=wall),
            bytes_out=self.process.bytes_out - self._bytes_before,
            processes=meter.processes,
        )

    async def close(self, *, keeps_work: bool = False) -> None:
        """End the process; remove its folder or, with `keeps_work`, all of it but the working directory."""
        self._bridge.close()
        self._meter.close()
        await self.process.kill(keeps_work=keeps_work)

    def close_now(self) -> None:
        """The same when the loop it lived on is closed."""
        self._meter.close()
        self.process.kill_now()

    @property
    def served(self) -> int:
        """Helper calls of the episode so far."""
        return self._bridge.served

    def _begin(
        self,
        kind: str,
        content: dict[str, Any],
        metadata: dict[str, Any] | None = None,
        outputs: Outputs | None = None,
    ) -> Running:
        message = self.process.wire.request(kind, content, {PAYLOAD: metadata} if metadata else None)
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
        if self.process.exited.is_set():
            running.breach = self._breach
            running.die()
        else:
            self.process.send(message)
        return running

    @property
    def _refused(self) -> int:
        return self.process.refusals.count + self._bridge.refusals.count

    def _finish(self, running: Running) -> None:
        self._bridge.end(running.cell)
        if self._running is running:
            self._running = None

    def _on_exit(self) -> None:
        self._is_subscribed.set()  # there is no more to wait for
        if self._running is not None:
            self._running.breach = self._running.breach or self._breach
            self._running.die()

    def _on_message(self, channel: str, message: dict[str, Any]) -> None:
        kind, content = message["msg_type"], message["content"]
        if self._running is not None:
            self._running.heard = time.monotonic()
        if kind == "iopub_welcome":
            self._is_subscribed.set()
            return
        parent, running = message["parent_header"], self._running
        if kind == "status" and parent.get("session") != self.process.wire.session:
            self._note_others(parent.get("msg_id"), content.get("execution_state"))
        if channel == "iopub" and kind != "status" and parent.get("session") == self.process.wire.session:
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
            if running.why is not None and running.busy_since is None:
                # It was to be stopped before the kernel had read of it, and the interrupt found nothing.
                self._interrupting = asyncio.ensure_future(self.process.interrupt())
            running.busy_since = time.monotonic()
        elif kind == "status" and content.get("execution_state") == "idle":
            running.is_idle = True
        running.check_end()

    def _note_others(self, request: object, state: object) -> None:
        had_others = bool(self._others)
        if state == "busy" and isinstance(request, str) and len(self._others) < _OTHERS:
            self._others.add(request[:_ID_CHARS])
        elif state == "idle":
            self._others.discard(str(request)[:_ID_CHARS])
        if had_others != bool(self._others):
            self._tell_of_others()

    def _tell_of_others(self) -> None:
        if self._running is not None:
            self._running.alone_since = None if self._others else time.monotonic()

    async def _see_through(self, running: Running, active: float, total: float) -> Execution:
        """Wait for the end of a request, or bring it about; `running.died` says whether the kernel did."""
        killed = False
        try:
            why = running.why = await running.until_end(active, total, self.process.drain, self._meter.look)
            if running.fault is not None:
                await self.process.settle()
                await self.process.terminate()
            elif why is not None:
                killed = await self._stop(running, why)
            usage = self._usage(running)
            if running.died:
                await self.process.settle()
            self._bridge.end(running.cell)
            if running.cell.in_flight:  # cancelled now: they are still to be recorded
                await asyncio.wait(set(running.cell.in_flight), timeout=1.0)
        finally:
            self._finish(running)
        execution = running.conclude(
            self.process.end,
            killed=killed,
            usage=usage,
            is_out_of_memory=running.died and _OUT_OF_MEMORY.search(self.process.stderr_tail) is not None,
        )
        if refused := self._refused - running.refused_before:
            note = f"{refused} malformed or unauthorised messages from the kernel were not taken."
            execution = replace(execution, notes=(*execution.notes, note))
        if running.is_cell and self._meter.note:
            execution = replace(execution, notes=(*execution.notes, self._meter.note))
            self._meter.note = ""
        if execution.report is not None and execution.report.names is not None:
            self.names = execution.report.names
        return execution

    async def _stop(self, running: Running, why: str) -> bool:
        """Interrupt the cell, and kill its kernel if that does not end it; True if it had to be killed."""
        running.cell.cancel(f"its cell was stopped because {why}")
        if running.breach is not None and running.breach.is_fatal:
            await self.process.terminate()
            return True
        await self.process.interrupt()
        # ipykernel's handler for a cell parked in `await` only schedules a callback, which nothing wakes
        # the loop for; any request on this channel does.
        self.process.send(self.process.wire.request("kernel_info_request", {}))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._setup.limits.interrupt_grace):
                await running.ended.wait()
        if running.ended_at is not None:
            return False
        await self.process.terminate()
        return True


def _message_bytes(setup: KernelSetup) -> int:
    return 8 * setup.limits.cell_output + _MESSAGE_BYTES


def execute_content(code: str, *, silent: bool) -> dict[str, Any]:
    """The content of an execute request."""
    return {
        "code": code,
        "silent": silent,
        "store_history": not silent,
        "user_expressions": {},
        "allow_stdin": False,
        "stop_on_error": False,
    }
