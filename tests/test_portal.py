"""The sync edge and the threads of sync callables."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Coroutine
from functools import partial
from typing import Any

import pytest

from kernel_env import UsageError, portal


async def thread_name() -> str:
    return threading.current_thread().name


def test_coroutines_run_on_the_one_loop_thread_from_anywhere() -> None:
    async def from_a_running_loop() -> str:
        return portal.run(thread_name)

    names = {portal.run(thread_name), asyncio.run(from_a_running_loop())}
    assert names == {"kernel_env-loop"}


def test_waiting_on_the_loop_for_the_loop_is_refused() -> None:
    async def nested() -> str:
        return portal.run(thread_name)

    with pytest.raises(UsageError, match="await the async ones"):
        portal.run(nested)


@pytest.mark.parametrize("is_scheduled", [False, True])
def test_an_interrupt_on_the_way_into_the_loop_leaves_nothing_running(
    is_scheduled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Coroutine[Any, Any, None]] = []
    schedule = portal._get_loop().call_soon_threadsafe

    async def endless() -> None:
        await asyncio.get_running_loop().create_future()

    def work() -> Coroutine[Any, Any, None]:
        begun.append(endless())
        return begun[0]

    def interrupted(*args: Any) -> None:
        monkeypatch.undo()
        if is_scheduled:
            schedule(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(portal._get_loop(), "call_soon_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        portal.run(work)
    assert len(begun) <= is_scheduled  # cancelled in time, it is not even made
    assert all(inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED for coroutine in begun)


def test_a_hundred_sync_calls_run_at_once() -> None:
    barrier = threading.Barrier(100, timeout=30)

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*(portal.run_in_thread(barrier.wait) for _ in range(100)))

    assert sorted(asyncio.run(all_at_once())) == list(range(100))


@pytest.mark.parametrize("error", [ValueError("v"), StopIteration(1), SystemExit(2), KeyboardInterrupt()])
def test_what_a_thread_raises_reaches_the_caller_as_an_exception(error: BaseException) -> None:
    def raises() -> None:
        raise error

    with pytest.raises(Exception, match=r"v|raised StopIteration|raised SystemExit|raised KeyboardInterrupt"):
        asyncio.run(portal.run_in_thread(raises))


def test_a_cancelled_call_does_not_wait_for_its_thread() -> None:
    release = threading.Event()

    async def body() -> None:
        task = asyncio.create_task(portal.run_in_thread(release.wait))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())
    release.set()


def test_a_callable_is_called_once_whatever_its_form() -> None:
    class Callable_:
        async def __call__(self, x: int) -> int:
            return x + 1

    async def coroutine(x: int) -> int:
        return x + 1

    for function in (lambda x: x + 1, coroutine, Callable_(), partial(coroutine), lambda x: coroutine(x)):
        assert asyncio.run(_call(function)) == 2


async def _call(function: object) -> object:
    return await portal.as_async(function)(1)  # type: ignore[arg-type]
