"""The sync edge and the threads of sync callables."""

from __future__ import annotations

import asyncio
import threading
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


@pytest.mark.parametrize("has_begun", [False, True])
def test_an_interrupt_on_the_way_into_the_loop_cancels_the_work(
    has_begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = threading.Event()
    loop = portal._get_loop()
    schedule = loop.call_soon_threadsafe

    async def work() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    def interrupted(*args: Any) -> None:
        monkeypatch.undo()
        if has_begun:
            schedule(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "call_soon_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        portal.run(work)
    assert cancelled.is_set() or not has_begun


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
