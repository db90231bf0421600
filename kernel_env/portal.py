"""Where sync meets async: the one loop thread for callers without a loop, and threads for sync callables.

Everything else in the package is written once, as coroutines.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from kernel_env.errors import UsageError

__all__ = ["Outcome", "as_async", "run", "run_in_thread"]

T = TypeVar("T")


_loop: asyncio.AbstractEventLoop | None = None
_starting = threading.Lock()
_idle: list[_Worker] = []


def _get_loop() -> asyncio.AbstractEventLoop:
    # Not anyio's portal: its cancellation strikes again at every await until the call has unwound, and an
    # interrupted step must still await the end of its cell. The thread is a daemon, so an environment that
    # nobody closed does not keep the interpreter alive; its kernel is ended by the exit hook in process.py.
    global _loop
    with _starting:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, daemon=True, name="kernel_env-loop").start()
        return _loop


def _after_fork() -> None:
    # The child has neither the loop thread nor the workers; it gets its own on first use.
    global _loop, _starting
    _loop, _starting = None, threading.Lock()
    _idle.clear()


os.register_at_fork(after_in_child=_after_fork)


def run(function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
    """Run a coroutine function on the loop thread and wait for its result.

    Works with or without a running loop in the calling thread. On KeyboardInterrupt the coroutine is
    cancelled, once, and waited for before the interrupt goes on; a second one does not wait.

    Raises:
        UsageError: called on the loop thread itself, from a callback, where waiting would never end.
    """
    loop = _get_loop()
    with contextlib.suppress(RuntimeError):
        if asyncio.get_running_loop() is loop:
            raise UsageError(
                "sync methods cannot be called from a callback on the loop; await the async ones"
            )
    work: list[asyncio.Task[None]] = []
    outcome: list[tuple[T, None] | tuple[None, BaseException]] = []
    running = threading.Lock()  # an Event, and the turn of the loop that a done callback takes, cost 30 µs
    running.acquire()

    async def body() -> None:
        try:
            outcome.append((await function(*args), None))
        except BaseException as error:  # noqa: BLE001 - the caller's, whatever it is
            outcome.append((None, error))
        finally:
            running.release()

    def begin() -> None:
        work.append(loop.create_task(body()))

    def end(*_: Any) -> None:
        if running.locked():  # the task had not begun, so that its `finally` did not run
            running.release()

    def cancel() -> None:
        if work:
            work[0].add_done_callback(end)
            work[0].cancel()
        else:
            end()

    try:
        loop.call_soon_threadsafe(begin)
        running.acquire()
    except KeyboardInterrupt:  # it may strike on the way into the loop, too
        loop.call_soon_threadsafe(cancel)
        if not outcome:  # it may strike just after the wait, too
            running.acquire()
        raise
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


class Outcome(asyncio.Future[T]):
    """What comes of work that goes on to its end, told to hurry, when its waiter is cancelled."""

    def __init__(self, work: Coroutine[Any, Any, T], hurry: Callable[[], bool]) -> None:
        super().__init__()
        self.was_cancelled = False
        self._hurry = hurry
        self._work = work
        self._task = asyncio.ensure_future(self._settle(work))
        self._task.add_done_callback(self._end)

    async def _settle(self, work: Coroutine[Any, Any, T]) -> None:
        try:
            result = await work
        except asyncio.CancelledError:
            super().cancel()
        except Exception as error:  # noqa: BLE001 - carried to who waits
            self.set_exception(error)
        else:
            self.set_result(result)

    def _end(self, _: asyncio.Task[None]) -> None:
        if not self.done():  # it was cancelled before it began
            self._work.close()
            super().cancel()

    def cancel(self, msg: Any = None) -> bool:
        """A task that waits for a future passes its own cancellation on to it, by this method."""
        self.was_cancelled = True
        if not self._hurry():
            self._task.cancel()
        return True


def as_async(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """Adapt a user's callable: a coroutine function runs on the loop, any other in a thread."""
    call = getattr(function, "__call__", None)  # noqa: B004 - an instance's own type may have an async __call__
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call):
        return function

    async def adapted(*args: Any, **kwargs: Any) -> Any:
        result = await run_in_thread(function, *args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    return adapted


async def run_in_thread(function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Run `function` in a thread of its own; cancelled, the thread is left to finish unheard.

    asyncio's worker threads are joined at exit, so one hanging call would keep the interpreter
    alive; its executor also has six workers on two cores (measured: 32 calls of
    100 ms took 606 ms), and a shared pool deadlocks sync subcalls that open environments.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
    worker.jobs.put((partial(contextvars.copy_context().run, function, *args, **kwargs), loop, future))
    return await future


class _Worker(threading.Thread):
    """A daemon thread that runs one job at a time and ends after ten idle seconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="kernel_env-worker")
        self.jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            try:
                function, loop, future = self.jobs.get(timeout=10)
            except queue.Empty:
                try:
                    _idle.remove(self)
                except ValueError:
                    continue  # somebody has just taken this worker: its job is on the way
                return
            result, error = _outcome(function)
            _idle.append(self)
            try:
                loop.call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:
                continue  # the loop was closed: nobody waits for this result
            finally:
                del function, loop, future, result, error


def _outcome(function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return function(), None
    except BaseException as error:  # noqa: BLE001 - carried to the caller, whatever it is
        if isinstance(error, StopIteration) or not isinstance(error, Exception):
            # asyncio lets these three through a task into the loop itself, and would end it.
            wrapped = RuntimeError(f"the function raised {type(error).__name__}")
            wrapped.__cause__ = error
            return None, wrapped
        return None, error


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
