"""One request to a kernel: while it is under way, and what came of it."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from kernel_env.calls import Cell
from kernel_env.episode import HelperCall
from kernel_env.fitting import valid_count
from kernel_env.meter import LOOK_EVERY, Breach
from kernel_env.outputs import Output, Outputs, without_colours
from kernel_env.types import Status, Usage

__all__ = ["PAYLOAD", "Execution", "Report", "Running", "refusal"]

log = logging.getLogger("kernel_env.execution")

_UNHEARD = 1.0  # seconds after which a request that the kernel does not mention counts as begun
_HALF_ENDED = 3.0  # seconds of silence after which a request that has only half ended has broken down
_KINDS = {"out_of_memory": "MemoryError", "timeout": "TimeoutError", "error": "LimitExceeded"}
_NO_SOURCE = re.compile("[\\0\ud800-\udfff]")

PAYLOAD = "kernel_env"
"""The `source` of the guest's payload in an execute reply, and our key in a request's metadata."""


class Report(BaseModel):
    """What the guest says of the namespace after a cell."""

    names: list[Annotated[str, Field(max_length=1_000)]] | None = Field(max_length=10_000)
    """None if they are those of the last report."""
    changed: dict[str, Annotated[str, Field(max_length=1_000)]] = Field(max_length=1_000)
    restored: list[str] = Field(max_length=1_000)
    notes: list[str] = Field(max_length=100)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How one cell went: everything it published, and what became of its kernel."""

    status: Status
    outputs: list[Output]
    execution_count: int | None
    exception: str | None
    """`Type: message` of what ended the cell early."""
    notes: tuple[str, ...]
    """What the environment did about it, a sentence each."""
    report: Report | None
    answer: str | None
    """The text the cell submitted last."""
    calls: tuple[HelperCall, ...]
    started: float
    duration: float
    active_time: float
    lost_variables: tuple[str, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Stream → characters that `Limits.cell_output` left no room for; empty if everything is there."""
    restarted: bool = False
    process_died: bool = False
    """The process that ran it is gone."""
    kernel_lost: bool = False
    """The kernel is gone and no other took over."""
    usage: Usage | None = None
    """None of code that was not run."""


@dataclass
class Running:
    """A request under way: what has come of it so far."""

    id: str
    outputs: Outputs
    cell: Cell
    sent: float = field(default_factory=time.monotonic)
    heard: float = 0.0
    """When a message of the kernel was read last."""
    started: float = field(default_factory=time.time)
    busy_since: float | None = None
    is_idle: bool = False
    reply: dict[str, Any] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """The request has ended, or was told to stop."""
    stop_reason: str | None = None
    why: str | None = None
    """Why it had to be ended; None if it ended by itself, or with its kernel."""
    is_stoppable: bool = True
    is_cell: bool = False
    """A cell of the policy: output that comes late from earlier ones shows here."""
    alone_since: float | None = field(default_factory=time.monotonic)
    """When the kernel was last free of other clients' requests; None while it works on one."""
    has_begun: bool = False
    """The kernel has told that it runs the code."""
    refused_before: int = 0
    """Messages of the kernel that were not taken before this request was sent."""
    breach: Breach | None = None
    """The limit that it was ended for."""
    fault: str | None = None
    """Why the kernel, though it lives, cannot end this request."""
    died: bool = False
    ended_at: float | None = None

    @property
    def active_time(self) -> float:
        since = self.busy_since
        if since is None and self.alone_since is not None:
            # Code that holds the GIL from the start keeps even `busy` from going out.
            since = self.alone_since + _UNHEARD
        if since is None:
            return 0.0
        return max((self.ended_at or time.monotonic()) - since - self.cell.waited, 0.0)

    @property
    def is_aborted(self) -> bool:
        """Not run, because a cell of another client failed before it."""
        is_so = self.reply is not None and self.reply.get("status") == "aborted"
        return is_so and self.why is None and not self.has_begun

    @property
    def is_half_ended(self) -> bool:
        """The reply or `idle` is in, but not both, which come within milliseconds of each other."""
        return self.ended_at is None and (self.is_idle or self.reply is not None)

    def break_down(self, fault: str) -> None:
        self.fault = self.fault or fault
        self.changed.set()

    async def until_end(
        self, active: float, total: float, drain: Callable[[], None], look: Callable[[], Breach | None]
    ) -> str | None:
        """Wait until the request has ended or broken down (None), or must be ended (why).

        `drain` takes in what has arrived and was not read yet; `look` is asked now and then whether a limit
        was gone over.
        """
        while True:
            if self.ended_at is not None or self.fault is not None:
                return None
            if self.stop_reason is not None:
                return self.stop_reason
            left_active = active - self.active_time
            left_total = total - (time.monotonic() - self.sent)
            if left_total <= 0:
                return f"it took more than {total:g} s in all"
            if left_active <= 0:
                return f"it was active for more than {active:g} s"
            if self.breach is not None:
                return str(self.breach)
            if self.is_half_ended and time.monotonic() - self.heard > _HALF_ENDED:
                drain()  # this host may have been the one that was late
                if self.is_half_ended and time.monotonic() - self.heard > _HALF_ENDED:
                    self.break_down(
                        "its reply did not come" if self.is_idle else "its output channel is gone"
                    )
                continue
            # Some of this stands still or starts late: look again, but not in a spin.
            try:
                async with asyncio.timeout(min(max(left_active, 0.05), left_total, LOOK_EVERY)):
                    await self.changed.wait()
            except TimeoutError:
                if self.is_stoppable:
                    self.breach = look()

    def stop(self, reason: str) -> None:
        self.stop_reason = self.stop_reason or reason
        self.changed.set()

    def die(self) -> None:
        self.died = True
        self.end()

    def check_end(self) -> None:
        # The reply can overtake iopub: the cell is over when both the reply and this request's idle are in.
        if self.is_idle and self.reply is not None:
            self.end()

    def end(self) -> None:
        if self.ended_at is None:
            self.ended_at = time.monotonic()
        self.ended.set()
        self.changed.set()

    def _show_pages(self, reply: dict[str, Any]) -> None:
        # What `name?` shows comes in the reply, for a pager.
        for payload in _payloads(reply):
            if payload.get("source") == "page":
                data = payload.get("data")
                if isinstance(data, dict) and isinstance(data.get("text/plain"), str):
                    text = without_colours(data["text/plain"])
                    self.outputs.add("display_data", {"data": {"text/plain": text}})

    def conclude(self, process_end: str, *, killed: bool, usage: Usage, is_out_of_memory: bool) -> Execution:
        """What came of the request, and how the process ended, if it did."""
        reply, why = self.reply or {}, self.why
        status: Status = "ok" if reply.get("status") == "ok" else "error"
        exception = None if status == "ok" else self.outputs.exception_of(reply)
        report = _report(reply)
        notes = [f"Restored: {', '.join(report.restored)}."] if report and report.restored else []
        notes += report.notes if report else []
        notes += self.cell.notes
        self._show_pages(reply)
        if why is not None:
            told_to = self.stop_reason is not None
            status, kind = ("error", "KeyboardInterrupt") if told_to else ("timeout", "TimeoutError")
            if self.breach is not None and not told_to:
                status, kind = self.breach.status, _KINDS[self.breach.status]
            exception = f"{kind}: the cell was stopped because {why}"
            is_fatal = self.breach is not None and self.breach.is_fatal
            kept = (
                ("" if is_fatal else "it ignored the interrupt and ") + "its kernel was killed"
                if killed
                else "it was interrupted and its variables are kept"
            )
            notes.append(f"The cell was stopped because {why}; {kept}.")
        if self.died and not killed:
            end = process_end if self.fault is None else f"could not go on and was killed: {self.fault}"
            if self.breach is not None:
                end = f"was killed because {self.breach}"
                is_out_of_memory = self.breach.status == "out_of_memory"
            status = "out_of_memory" if is_out_of_memory else "died"
            exception = f"KernelDied: the kernel {end}"
            notes.append(f"The kernel {end}.")
        return Execution(
            status=status,
            outputs=self.outputs.finish(kernel_died=self.died),
            execution_count=valid_count(reply.get("execution_count")),
            exception=exception,
            notes=tuple(notes),
            report=report,
            answer=self.cell.answer,
            calls=tuple(self.cell.calls),
            started=self.started,
            duration=(self.ended_at or time.monotonic()) - self.sent,
            active_time=self.active_time,
            dropped=self.outputs.dropped,
            usage=usage,
            process_died=self.died,
        )


def refusal(code: str) -> Execution | None:
    """The failed execution of code that no Python compiles: with a NUL in it, or a lone surrogate.

    A surrogate cannot even be sent, and of a NUL Pythons of one minor version say different things.
    """
    found = _NO_SOURCE.search(code)
    if found is None:
        return None
    exception = (
        f"SyntaxError: the code has {found.group()!a} at character {found.start()}, which Python source "
        "cannot hold; write it as an escape inside a string literal"
    )
    return Execution(
        status="error",
        outputs=[],
        execution_count=None,
        exception=exception,
        notes=(),
        report=None,
        answer=None,
        calls=(),
        started=time.time(),
        duration=0.0,
        active_time=0.0,
    )


def _payloads(reply: dict[str, Any]) -> list[dict[str, Any]]:
    payloads = reply.get("payload")
    return [p for p in payloads if isinstance(p, dict)] if isinstance(payloads, list) else []


def _report(reply: dict[str, Any]) -> Report | None:
    payloads = [payload for payload in _payloads(reply) if payload.get("source") == PAYLOAD]
    if not payloads:
        return None
    try:
        return Report.model_validate(payloads[-1])
    except ValidationError as error:
        log.warning("the kernel's report is malformed: %s", error)
        return None
