"""The kernel's stdout and stderr: ipykernel's streams, bounded, and in order with what C code writes.

Runs inside the kernel, on the standard library and ipykernel alone.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import select
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from time import monotonic as clock
from typing import Any, ClassVar

from ipykernel.iostream import OutStream

PIECE = 2**18  # characters of one message: at most 1 MiB of UTF-8
RELEASES = 4  # of held text before a display; from then on it waits for the end, or it would be no bound
READ = 2**16  # what a pipe holds
ROOM = 2**18  # bytes that writes may take before they are sorted
ENTRY = 100  # of them for each beside its text
ASK_AGAIN_SECONDS = 0.001
QUIET_TURNS = 5  # of the flush interval: then the timer rests until something is written again


class Allowance:
    """What one cell has written to one stream: the first characters go out, the latest are held back."""

    def __init__(self, header: Any, size: int | None) -> None:
        self.header = header
        self.pending: list[str] = []
        self.head_left = sys.maxsize if size is None else size
        # The host has room for as much and the cell's displays beside it.
        self.tail_room = 0 if size is None else size - size // 8
        self.tail: deque[str] = deque()
        self.tail_size = 0
        self.dropped = 0
        self.releases_left = RELEASES

    def take(self, text: str) -> str:
        """The part of `text` that may go out at once; the rest is held, or dropped."""
        if len(text) <= self.head_left:
            self.head_left -= len(text)
            return text
        head, rest = text[: self.head_left], text[self.head_left :]
        self.head_left = 0
        if len(rest) > self.tail_room:
            self.dropped += len(rest) - self.tail_room
            rest = rest[-self.tail_room :]
        self.tail.append(rest)
        self.tail_size += len(rest)
        while self.tail_size > self.tail_room:
            over, oldest = self.tail_size - self.tail_room, self.tail.popleft()
            gone = min(over, len(oldest))
            if gone < len(oldest):
                self.tail.appendleft(oldest[gone:])
            self.tail_size -= gone
            self.dropped += gone
        return head

    def release(self) -> tuple[int, str]:
        """What was dropped, and the latest text behind it; later text is held anew."""
        released = self.dropped, "".join(self.tail)
        self.tail.clear()
        self.tail_size = self.dropped = 0
        return released


class CellStream(OutStream):
    """ipykernel's stream with a bound for each cell, messages of at most 1 MiB, and no flush of nothing.

    A cell's first characters are published as they come. Past its allowance the latest are kept and follow
    when the cell ends, behind a message that says how many are missing (`dropped` in its content).
    """

    flush_timeout = 2  # a cell may have stopped the thread that publishes

    _fid: int
    _allowance_size: int | None
    _allowances: dict[str, Allowance]
    _pending: dict[str, Allowance]
    """Those of `_allowances` with text that is not published yet."""
    _muted_thread: int | None
    _has_timer: bool
    interrupts: ClassVar[deque[bool]] = deque(maxlen=1)
    """The interrupt that waits for a stream of this process to have done its work, if one does."""

    def __init__(self, session: Any, pub_thread: Any, name: str) -> None:
        super().__init__(session, pub_thread, name, watchfd=False)  # type: ignore[no-untyped-call]
        self._original_stdstream_fd = getattr(sys, name).fileno()
        self.begin(None)

    def begin(self, allowance: int | None) -> None:
        """Give every cell from here on `allowance` characters at once and as many at its end; or any."""
        self._allowance_size = allowance
        self._allowances = {}
        self._pending = {}
        self._written: deque[tuple[Any, str]] = deque()
        self._room = ROOM
        self._is_pumping = False
        self._muted_thread = None
        self._has_timer = False
        self._quiet_turns = 0
        self._asked = 0.0
        self._is_sent_by_a_thread = not getattr(self.pub_thread, "sends_at_once", False)
        self._at_work = _AT_WORK | getattr(self.pub_thread, "at_work", frozenset())
        if not self._is_sent_by_a_thread:
            self._buffer_lock = self.pub_thread.lock
            self.pub_thread.after_send = self._after_send
        self._capture()
        os.register_at_fork(after_in_child=self._after_fork)

    def limit(self, allowance: int) -> None:
        """Change it, for cells that have not written yet."""
        self._allowance_size = allowance

    def write(self, string: str) -> int:
        """Take text of the cell that this thread or task belongs to."""
        if not isinstance(string, str):
            raise TypeError(f"write() argument must be str, not {type(string).__name__}")
        size = len(string)
        if self._muted_thread is not None and self._muted_thread == threading.get_ident():
            return size
        # Most prints do no more than this, without a lock: it is half of what they cost.
        try:
            if self._readable.poll(0) or self._is_pumping:  # in this order
                self.pump()  # C code wrote first
        except RuntimeError:  # another thread looks
            self.pump()
        self._written.append((self._parent_header.get(None) or self._parent_header_global, string))
        self._room -= size + ENTRY
        if self._room < 0 or not self._has_timer:
            self._sort()
        if self.interrupts:
            self._deliver_interrupt()
        return size

    def _sort(self) -> None:
        """Give what was written to the cells that wrote it."""
        if not self._written:
            return
        with self._buffer_lock:
            self._room = ROOM
            entries: list[tuple[Any, str]] = []
            try:
                while self._written:
                    entry = self._written[0]
                    if entries and entry[0] is not entries[0][0]:
                        entries = self._put(entries)
                    entries.append(entry)
                    self._written.popleft()
                entries = self._put(entries)
            except BaseException:  # a signal handler of the cell's: nothing may go with it
                if entries and self._written and self._written[0] is entries[-1]:
                    entries.pop()
                self._written.extendleft(reversed(entries))
                raise

    def _put(self, entries: list[tuple[Any, str]]) -> list[tuple[Any, str]]:
        """Under the lock: add what one cell wrote; the entries that are left to add, none."""
        if not entries:
            return entries
        header = entries[0][0]
        identifier = header.get("msg_id", "")
        allowance = self._allowances.get(identifier) or self._pending.get(identifier)
        if allowance is None:
            allowance = Allowance(header, self._allowance_size)
            if self._allowance_size is not None:
                self._allowances[identifier] = allowance
        self._ask_for_timer()
        text = "".join([string for _, string in entries])
        if text:
            self._pending[identifier] = allowance
        size = len(text)
        if size <= allowance.head_left:
            # Without a call, and so without a handler, from here to the end.
            allowance.head_left -= size
            allowance.pending += [text]
            return []
        allowance.pending.append(allowance.take(text))
        return []

    def _ask_for_timer(self) -> None:
        # Asked for again, for the loop does not tell when it could not take the call (RecursionError).
        if not self._has_timer and clock() - self._asked > ASK_AGAIN_SECONDS:
            self._asked = clock()
            self.pub_thread.schedule(self._wait)

    def _wait(self) -> None:
        if not self._has_timer:
            self._has_timer = True
            self.pub_thread.io_loop.call_later(self.flush_interval, self._flush_in_time)

    def _flush_in_time(self) -> None:
        """In the publishing loop, again and again while cells write: to start a timer wakes a thread."""
        self._has_timer = False
        with self._buffer_lock:
            self._sort()
            self._quiet_turns = 0 if self._pending else self._quiet_turns + 1
            if self._pending:
                self._flush()
            if self._quiet_turns < QUIET_TURNS or self._written:
                self._wait()

    def flush(self) -> None:
        """Publish what was written so far, also to the file descriptor; costs nothing if nothing was."""
        self.pump()
        with self._buffer_lock:
            has_text = bool(self._pending)
            if has_text:
                self._flush()
        if self.interrupts:
            self._deliver_interrupt()
        if not has_text:
            return
        if self._is_sent_by_a_thread and threading.current_thread() is not self.pub_thread.thread:
            sent = threading.Event()
            self.pub_thread.schedule(sent.set)
            sent.wait(self.flush_timeout)

    def _flush(self) -> None:
        # Under the lock until all is handed over: who finds nothing pending may rely on the order.
        with self._buffer_lock:
            super()._flush()  # type: ignore[no-untyped-call]

    def _flush_buffers(self) -> Iterator[tuple[Any, str]]:
        pending, self._pending = self._pending, {}
        for allowance in pending.values():
            text = "".join(allowance.pending)
            allowance.pending.clear()
            for at in range(0, len(text), PIECE):
                yield allowance.header, text[at : at + PIECE]

    def end_cell(self) -> None:
        """Publish all that the cells wrote so far, what was held back included."""
        self._release(is_end=True)
        self._asked = 0.0
        self.interrupts.clear()

    def before_display(self) -> None:
        """The same for what a display or a result is to come after, as long as that happens rarely."""
        self._release(is_end=False)
        if self.interrupts:
            self._deliver_interrupt()

    def _release(self, *, is_end: bool) -> None:
        self.pump()
        with self._buffer_lock:
            if self._pending:
                self._flush()
            current = self._parent_header_global
            for identifier, allowance in list(self._allowances.items()):
                if is_end or (allowance.tail and allowance.releases_left):
                    allowance.releases_left -= 1
                    self._publish_held({**current, "msg_id": identifier}, *allowance.release())
                if is_end and identifier != current.get("msg_id"):
                    del self._allowances[identifier]

    def _publish_held(self, header: Any, dropped: int, tail: str) -> None:
        if dropped:
            text = f"\n... ({dropped} characters are not shown) ...\n"
            self._send(header, {"name": self.name, "text": text, "dropped": dropped})
        for at in range(0, len(tail), PIECE):
            self._send(header, {"name": self.name, "text": tail[at : at + PIECE]})

    def _send(self, header: Any, content: dict[str, Any]) -> None:
        self.session.send(self.pub_thread, "stream", content, parent=header, ident=self.topic)

    def postpones_interrupt(self, frame: Any) -> bool:
        """Whether an interrupt found its thread at work in here, where it would cost text; it comes again."""
        while frame is not None and frame.f_code is not _DELIVERY:
            if frame.f_code in self._at_work:
                self.interrupts.append(True)
                return True
            frame = frame.f_back
        return False

    def _after_send(self) -> None:
        """A message is out; within a stream's own work its end is still to come."""
        if self.interrupts and not self._buffer_lock._is_owned():  # type: ignore[attr-defined]
            self._deliver_interrupt()

    def _deliver_interrupt(self) -> None:
        try:
            self.interrupts.pop()
        except IndexError:  # another thread was faster
            return
        signal.raise_signal(signal.SIGINT)

    def mute(self, muted: bool) -> None:
        """Swallow what this thread writes: an object's `__repr__` is not the cell."""
        self._muted_thread = threading.get_ident() if muted else None

    def close(self) -> None:
        """Only flush: a kernel without its streams could not go on."""
        self.flush()

    def fileno(self) -> int:
        """The descriptor that is captured; ipykernel's own answer leads past the capture."""
        return self._fd

    # What is written to the file descriptor, by C code and by child processes.

    def _capture(self) -> None:
        """Read the descriptor in the publishing thread, in place of a thread of ipykernel's.

        That one reads 1,000 bytes at a time and cuts characters in two.
        """
        self._fd: int = self._original_stdstream_fd
        self._should_watch = False
        if self._fid is not None:
            os.write(self._fd, b"\0")
            self.watch_fd_thread.join(1)
            os.close(self._fid)
        self._fid, self._write_end = os.pipe()
        os.set_blocking(self._fid, False)
        os.dup2(self._write_end, self._fd)
        self._writing = tempfile.TemporaryFile(buffering=0, dir=os.environ.get("TMPDIR"))  # noqa: SIM115 - as long as this lives
        self._readable = select.poll()
        self._readable.register(self._fid, select.POLLIN)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.pub_thread.schedule(self._watch)

    def _watch(self) -> None:
        loop = self.pub_thread.io_loop
        loop.add_handler(self._fid, lambda *_: self.pump(), loop.READ)

    def _has_more(self) -> bool:
        try:
            return bool(self._readable.poll(0))
        except RuntimeError:  # another thread looks: then only a read can tell
            return True

    def pump(self) -> None:
        """Take what stands in the pipe; all that was written before this call is then with its cell."""
        with self._buffer_lock:
            # Who writes while this is set waits for the lock, also if the pipe is empty by then: so all that
            # is in `_written` after the read came before what was read.
            self._is_pumping = True
            try:
                self._read()
                self._sort()
            finally:
                self._is_pumping = False

    def _read(self) -> None:
        for _ in range(2):  # a pipe holds one; somebody who writes on and on must not keep us
            if not self._has_more():  # cheaper than an error
                return
            try:
                data = os.read(self._fid, READ)
            except BlockingIOError:
                return
            self._sort()
            self._put([(self._parent_header_global, self._decoder.decode(data))])

    def restore_fd(self) -> bool:
        """Open the captured descriptor again if a cell closed it; one that was redirected stays so."""
        try:
            os.fstat(self._fd)
        except OSError:
            os.dup2(self._write_end, self._fd)
            return True
        return False

    def _after_fork(self) -> None:
        # Another thread of the parent may have held the lock; and what it has not sent yet is the parent's.
        self._buffer_lock = getattr(self.pub_thread, "lock", None) or threading.RLock()
        vars(self).pop("write", None)  # IPython's, for its record of what was printed
        self._pending = {}
        self._written.clear()
        self._is_pumping = False
        self.__class__ = ForkedStream
        self._line: list[str] = []


class ForkedStream(CellStream):
    """The stream in a process that the cell forked: lines go to the captured descriptor, in order.

    So the parent counts them as its cell's, and none overtakes what was written before it.
    """

    def write(self, string: str) -> int:
        if not isinstance(string, str):
            raise TypeError(f"write() argument must be str, not {type(string).__name__}")
        with self._buffer_lock:
            self._line.append(string)
            if "\n" in string:  # by lines, because nobody promises that it will flush
                self.flush()
        return len(string)

    def flush(self) -> None:
        with self._buffer_lock:
            data = "".join(self._line).encode("utf-8", "replace")
            self._line.clear()
            if not data:
                return
            # A pipe takes 4,096 bytes at once; behind a record lock, which is a process's own, any number.
            fcntl.lockf(self._writing, fcntl.LOCK_EX)
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            finally:
                fcntl.lockf(self._writing, fcntl.LOCK_UN)

    def before_display(self) -> None:
        self.flush()

    def end_cell(self) -> None:
        self.flush()

    def pump(self) -> None:
        """Leave the pipe to the parent."""


_AT_WORK = frozenset(
    getattr(CellStream, name).__code__ for name in ("write", "_sort", "_put", "_flush", "_release", "pump")
)
_DELIVERY = CellStream._deliver_interrupt.__code__


def adopt(stream: Any, allowance: int) -> Any:
    """Make `stream` a CellStream in place, for threads and loggers hold on to the object.

    A stream of an ipykernel that is built otherwise (before 6.29) stays what it is.
    """
    if isinstance(stream, CellStream):
        stream.limit(allowance)
    elif (
        isinstance(stream, OutStream) and hasattr(stream, "_parent_header_global") and stream._fid is not None
    ):
        stream.__class__ = CellStream
        CellStream.begin(stream, allowance)  # type: ignore[arg-type]
    return stream
