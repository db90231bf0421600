"""The kernel of one episode: execute, read, stop, close; a process that is lost is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

from kernel_env.errors import KernelDied, KernelError
from kernel_env.execution import Execution, refusal
from kernel_env.folder import KernelFolder, sweep
from kernel_env.install import KernelSetup
from kernel_env.isolation import kernel_user
from kernel_env.live import LiveKernel, execute_content
from kernel_env.outputs import Output
from kernel_env.portal import run_in_thread
from kernel_env.types import Isolation

__all__ = ["Kernel"]

log = logging.getLogger("kernel_env.kernel")

_SWEEPS_FOR = 5.0  # seconds that a start waits for what killed hosts left to go

# An expression, so that it leaves no name behind; what it works on comes in the request's metadata.
_RUN_SEND_TEXT = (
    "__import__('_kernel_env_helpers').send_text_of("
    "**get_ipython().kernel.get_parent()['metadata']['kernel_env'])"
)


class Kernel:
    """A ready kernel with the helpers in its namespace; make one with `await Kernel.start(setup)`."""

    def __init__(self, setup: KernelSetup, folder: KernelFolder, live: LiveKernel) -> None:
        self.folder = folder
        """The folder with the working directory, which outlives the processes that are lost."""
        self._setup = setup
        self._live = live
        self._restarts = 0
        self._is_occupied = False
        self.on_closed: list[Callable[[], None]] = []
        """Called once, when the kernel is closed."""

    @classmethod
    async def start(cls, setup: KernelSetup) -> Kernel:
        """Start a kernel and install the guest in it.

        Raises:
            ConfigError: there is no such kernelspec.
            KernelStartError: no kernel became ready; nothing is left of it.
        """
        with contextlib.suppress(TimeoutError):  # its thread goes on
            async with asyncio.timeout(_SWEEPS_FOR):
                await run_in_thread(sweep)
        folder = KernelFolder.make(owner=kernel_user() if setup.isolation == "sandbox" else None)
        return cls(setup, folder, await LiveKernel.start(setup, folder))

    async def begin(self, setup: KernelSetup) -> None:
        """Give a blank kernel its episode.

        Raises:
            KernelStartError: it could not take it; nothing is left of it.
        """
        self._setup = setup
        await self._live.begin(setup)

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
        outputs = self._live.late_outputs()
        outputs.listen(on_output)
        with self._occupied():
            execution = await self._live.serve(
                execute_content(code, silent=False), None, outputs, active, total
            )
            if execution.process_died:
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
        if self._live.process.exited.is_set() and not self._can_replace:
            raise KernelDied(
                "the kernel is gone and Limits.restarts is used up; call reset() for a new episode"
            )
        if (refused := refusal(expression)) is not None:
            return refused
        request = {"expression": expression, "convert": convert}
        with self._occupied():
            content = execute_content(_RUN_SEND_TEXT, silent=True)
            execution = await self._live.serve(content, request, None, active, total)
            return await self._take_over(execution) if execution.process_died else execution

    def stop(self, reason: str) -> bool:
        """End what the kernel does for its caller as if its time were up; False if it does nothing.

        What is under way still comes to its end: an interrupt, or a fresh kernel, takes its time.
        """
        if self._is_occupied:
            self._live.stop(reason)
        return self._is_occupied

    @contextlib.contextmanager
    def _occupied(self) -> Iterator[None]:
        self._is_occupied = True
        self._live.wake()
        try:
            yield
        finally:
            self._is_occupied = False
            self._live.rest()

    async def close(self) -> None:
        """End the kernel; nothing of it is left."""
        try:
            await self._live.close()
            if self.folder.is_held:  # kept for the next process, and there was none
                await self.folder.clear(keeps_work=False, is_deserted=True)
        finally:
            self._tell_closed()

    def close_now(self) -> None:
        """The same when the loop it lived on is closed."""
        self._live.close_now()
        self._tell_closed()

    def _tell_closed(self) -> None:
        while self.on_closed:
            self.on_closed.pop()()

    @property
    def isolation(self) -> Isolation:
        """What keeps it from the rest of the system."""
        return self._setup.isolation

    @property
    def names(self) -> list[str]:
        """The names in the namespace when it was last seen, sorted."""
        return self._live.names

    @property
    def _can_replace(self) -> bool:
        return self._restarts < self._setup.limits.restarts

    async def _take_over(self, execution: Execution) -> Execution:
        """Start a fresh kernel in place of the lost one, and say what went with it."""
        lost = tuple(name for name in self._live.names if name not in self._live.given)
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

    async def _replace(self) -> bool:
        await self._live.close(keeps_work=True)
        if not self._can_replace:
            return False
        self._restarts += 1
        try:
            await run_in_thread(self.folder.furnish)
            self._live = await LiveKernel.start(
                self._setup, self.folder, served=self._live.served, keeps_work=True
            )
        except KernelError:
            log.exception("no kernel could be started in place of the one that was lost")
            return False
        return True

    async def _repair(self, execution: Execution) -> Execution:
        # The report is missing: the cell has taken our hooks out, or worse.
        try:
            await self._live.install()
        except KernelError as error:
            log.warning("the guest could not be installed again: %s", error)
            note = "The environment's hooks were gone from the kernel and could not be installed again."
            return await self._take_over(replace(execution, notes=(*execution.notes, note)))
        note = "The environment's hooks were gone from the kernel; they are installed again."
        return replace(execution, notes=(*execution.notes, note))
