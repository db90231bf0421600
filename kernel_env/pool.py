"""Kernels that are ready before they are asked for, and how many there may be.

A kernel of a kind that can be forked comes from the pool of its event loop: a ready one if there is, else a
fresh fork. Each is handed out once. From the second start on the pool keeps as many ready as were in use at
once, up to `KERNEL_ENV_SPARES`; it makes them one at a time, after a pause, and sleeps in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace

from kernel_env.config import from_env
from kernel_env.errors import KernelEnvError, KernelStartError, SandboxUnavailable
from kernel_env.install import KernelSetup
from kernel_env.isolation import Support
from kernel_env.kernel import Kernel
from kernel_env.kernelspecs import is_forked_kind
from kernel_env.types import Isolation

__all__ = ["KernelPool", "start_kernel"]

log = logging.getLogger("kernel_env.pool")

_PAUSE = 0.03  # seconds after a hand-out, for the episode's own first steps
_PATIENCE = 10.0  # seconds after which a start that waits for its turn says so

_Kind = tuple[str, tuple[str, ...], Isolation]


async def start_kernel(setup: KernelSetup, isolation: str) -> Kernel:
    """A kernel for an episode: a ready one, or a fresh one; it waits while there are as many as there may be.

    `isolation` "auto" is the strongest that can be had here.

    Raises:
        SandboxUnavailable: a sandbox is asked for, and cannot be had.
        ConfigError, KernelStartError: as `Kernel.start`.
    """
    if isolation == "process":
        return await _start_kernel(setup)
    support = _support_of(setup.kernel_name)
    # Kernelspecs are files, looked for in many folders: not at every start.
    is_forked = support.is_proven or is_forked_kind(setup.kernel_name)
    if isolation == "auto" and (not is_forked or support.refusal is not None):
        return await _start_kernel(setup)
    if not is_forked:
        raise SandboxUnavailable(
            f"isolation='sandbox' cannot be had: kernels of {setup.kernel_name!r} are started, not forked, "
            "and only forked ones are confined"
        )
    try:
        kernel = await _start_kernel(replace(setup, isolation="sandbox"))
    except SandboxUnavailable as error:
        if support.is_proven:  # it is that start that failed
            raise KernelStartError(f"a kernel could not be confined: {error}") from error
        explained = support.explain(error)
        if isolation == "sandbox":
            raise explained from None
        log.warning("kernels are not confined: %s", explained)
        return await _start_kernel(setup)
    support.is_proven = True
    return kernel


_support: dict[tuple[str, str], Support] = {}


def _support_of(kernel_name: str) -> Support:
    """Of kernels of this name whose folders are where they would be now."""
    return _support.setdefault((kernel_name, tempfile.gettempdir()), Support())


async def _start_kernel(setup: KernelSetup) -> Kernel:
    kind = setup.kernel_name, setup.preload, setup.isolation
    pool = _pools.get(asyncio.get_running_loop(), {}).get(kind)
    if pool is None and is_forked_kind(setup.kernel_name):
        pool = KernelPool.of_loop(*kind)
    if pool is not None:
        return await pool.start(setup)
    await _slots.take()
    return await _started(setup)


async def _started(setup: KernelSetup) -> Kernel:
    try:
        kernel = await Kernel.start(setup)
    except BaseException:
        _slots.give_back()
        raise
    kernel.on_closed.append(_slots.give_back)
    return kernel


class KernelPool:
    """The ready kernels of one kind on one event loop."""

    def __init__(
        self, kernel_name: str, preload: tuple[str, ...], isolation: Isolation, most_spares: int
    ) -> None:
        self._blank = KernelSetup.blank(kernel_name, preload, isolation)
        self._most_spares = most_spares
        self._loop = asyncio.get_running_loop()
        self._spares: deque[Kernel] = deque()
        self._making: asyncio.Task[Kernel | None] | None = None
        self._filling: asyncio.Task[None] | None = None
        self._starts = 0
        self._in_use = 0
        self._most_in_use = 0
        self._is_closed = False

    @classmethod
    def of_loop(
        cls, kernel_name: str, preload: tuple[str, ...], isolation: Isolation = "process"
    ) -> KernelPool:
        """The pool of this kind on the running loop; it ends with the loop."""
        loop, kind = asyncio.get_running_loop(), (kernel_name, preload, isolation)
        pools = _pools.setdefault(loop, {})
        if kind not in pools:
            pools[kind] = cls(*kind, from_env().spare_kernels)
            if len(pools) == 1:
                loop.create_task(_end_with_loop(loop)).add_done_callback(asyncio.Task.result)
        return pools[kind]

    @property
    def spares(self) -> int:
        """Kernels that are ready."""
        return len(self._spares)

    async def start(self, setup: KernelSetup) -> Kernel:
        """A kernel for `setup`, ready or fresh.

        Raises:
            ConfigError, KernelStartError: as `Kernel.start`.
        """
        self._starts += 1
        kernel = await self._take_spare(setup)
        if kernel is None:
            await _slots.take()
            kernel = await _started(setup)
        self._in_use += 1
        self._most_in_use = max(self._most_in_use, self._in_use)
        kernel.on_closed.append(self._take_back)
        if _slots.is_wanted:
            self.drop_spares_soon()
        elif self._starts > 1:
            self._fill_soon()
        return kernel

    def _take_back(self) -> None:
        self._in_use -= 1

    async def _take_spare(self, setup: KernelSetup) -> Kernel | None:
        making, self._making = self._making, None
        if not self._spares and making is not None:
            # Nearly there: nobody else waits for it, and it is ready before a fresh one would be.
            await asyncio.wait({making})
        else:
            self._making = making
        while self._spares:
            kernel = self._spares.popleft()
            try:
                await kernel.begin(setup)
            except BaseException as error:
                await kernel.close()
                if not isinstance(error, KernelStartError):
                    raise
                log.warning("a ready kernel could not be used: %s", error)
            else:
                return kernel
        return None

    def _fill_soon(self) -> None:
        if self._filling is None and not self._is_closed:
            self._filling = self._loop.create_task(self._fill())

    async def _fill(self) -> None:
        try:
            await asyncio.sleep(_PAUSE)
            filled = -1
            while filled < (wanted := min(self._most_in_use, self._most_spares)):  # more are in use meanwhile
                filled = wanted
                await self.fill(filled)
        finally:
            self._filling = None

    async def fill(self, spares: int) -> None:
        """Make kernels until so many are ready, as far as there may be more."""
        while len(self._spares) < spares and not self._is_closed and _slots.try_take():
            self._making = self._loop.create_task(self._make_spare())
            if await asyncio.shield(self._making) is None:
                return

    async def _make_spare(self) -> Kernel | None:
        try:
            kernel = await _started(self._blank)
        except KernelEnvError as error:
            log.warning("no kernel could be made ready: %s", error)
            return None
        is_promised = self._making is None
        if self._is_closed or (_slots.is_wanted and not is_promised):
            await kernel.close()
            return None
        self._spares.append(kernel)
        return kernel

    async def drop_spares(self) -> None:
        """Close the ready kernels."""
        while self._spares:
            await self._spares.popleft().close()

    def drop_spares_soon(self) -> None:
        """The same, from the loop."""
        self._dropping = self._loop.create_task(self.drop_spares())

    async def close(self) -> None:
        """Close the ready kernels, and make no more."""
        self._is_closed = True
        if self._filling is not None:
            self._filling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._filling
        if self._making is not None:
            await asyncio.wait({self._making})
        await self.drop_spares()


_pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Kind, KernelPool]] = (
    weakref.WeakKeyDictionary()
)


async def _end_with_loop(loop: asyncio.AbstractEventLoop) -> None:
    # asyncio closes open generators before it closes a loop: the one chance to close what lives on it.
    ending = _until_the_end(loop)
    _endings[loop] = ending
    await anext(ending)


_endings: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncIterator[None]] = (
    weakref.WeakKeyDictionary()
)


async def _until_the_end(loop: asyncio.AbstractEventLoop) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for pool in _pools.pop(loop, {}).values():
            await pool.close()


class _Slots:
    """How many kernels this process may have at once, spares included, on whatever loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used = 0
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    def try_take(self) -> bool:
        """Take one if there is one that nobody waits for."""
        with self._lock:
            if self._waiting or self._used >= from_env().max_kernels:
                return False
            self._used += 1
            return True

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for one."""
        return bool(self._waiting)

    async def take(self) -> None:
        """Take one, in the order of asking."""
        if self.try_take():
            return
        loop = asyncio.get_running_loop()
        entry = loop, loop.create_future()
        with self._lock:
            self._waiting.append(entry)
        _shed()
        told = loop.call_later(_PATIENCE, self._say_so)
        try:
            await entry[1]
        except asyncio.CancelledError:
            with self._lock:
                was_waiting = entry in self._waiting
                if was_waiting:
                    self._waiting.remove(entry)
            if not was_waiting:
                self.give_back()
            raise
        finally:
            told.cancel()

    def _say_so(self) -> None:
        log.warning(
            "a kernel start waits: %d are in use, KERNEL_ENV_MAX_KERNELS is %d; close an environment",
            self._used,
            from_env().max_kernels,
        )

    def give_back(self) -> None:
        """Free one, for who waits longest."""
        with self._lock:
            while self._waiting:
                loop, future = self._waiting.popleft()
                with contextlib.suppress(RuntimeError):  # its loop is closed
                    loop.call_soon_threadsafe(_grant, future)
                    return
            self._used -= 1


def _grant(future: asyncio.Future[None]) -> None:
    if not future.done():  # cancelled meanwhile, `take` gives it back
        future.set_result(None)


def _shed() -> None:
    """Have every pool give up its spares, for somebody waits for the room that they take."""
    for loop, pools in list(_pools.items()):
        for pool in pools.values():
            with contextlib.suppress(RuntimeError):  # its loop is closed
                loop.call_soon_threadsafe(pool.drop_spares_soon)


_slots = _Slots()


def _after_fork() -> None:
    # The child has none of these kernels.
    global _slots
    _slots = _Slots()
    _pools.clear()
    _endings.clear()


os.register_at_fork(after_in_child=_after_fork)
