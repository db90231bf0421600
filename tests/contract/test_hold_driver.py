"""A seeded random driver mixes everything that attacks a kernel over many short episodes.

The short run is part of every test run; `python -m pytest -m long tests/contract/test_hold_driver.py` is the
long one, and prints its seed and how often each thing happened. `SEED` and `EPISODES` are its variables.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kernel_env import Limits, LocalREPLEnv, REPLAction, REPLObservation, portal
from tests.processes import pid_of, wait_for_the_end

from .conftest import Kind
from .hostile import KEPT, LOST, cell
from .test_hold_channel import ATTACKS, CHANNEL
from .test_hold_deaths import DEATHS
from .test_hold_forgeries import FORGE, MALFORMED, REPLIES, STRANGE, second_client
from .test_hold_interrupts import INTERRUPTED, KILLED, ON
from .test_hold_text import TEXTS

ACTIVE, GRACE = 2.0, 1.0
BOUND = 60.0  # of any step, on a loaded machine: its time, the grace, a fresh kernel
happened: Counter[str] = Counter()

FLOODS = [
    "for n in range(20_000): print(n)",
    "print('x' * 10_000_000)",
    "import os\nfor _ in range(100): os.write(1, b'y' * 65_536)",
    "from IPython.display import display\nfor n in range(300): display(n)",
    "from IPython.display import display\nh = display(0, display_id=True)\nfor n in range(300): h.update(n)",
    "'z' * 20_000_000",
    "raise ValueError('e' * 5_000_000)",
    "!seq 5000",
    "import threading\nts = [threading.Thread(target=print, args=('t' * 1000,)) for _ in range(50)]\n"
    "for t in ts: t.start()",
]
FORGERIES = {**MALFORMED, **STRANGE, **REPLIES}
HELPERS = [
    "llm_query('a')",
    "llm_query_batched(['a', 'b'] * 20)",
    "llm_query('fail')",
    "import threading; threading.Thread(target=llm_query, args=('a',), daemon=True).start()",
    "import threading\nts = [threading.Thread(target=llm_query, args=('a',)) for _ in range(16)]\n"
    "for t in ts: t.start()\nfor t in ts: t.join()",
    "import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p: print(p.map(llm_query, 'ab'))",
    "import asyncio\nprint(await asyncio.gather(*(asyncio.to_thread(llm_query, c) for c in 'abc')))",
    "FINAL_VAR('nothing')",
    "del FINAL, llm_query, context, answer",
    "FINAL = llm_query = answer = context = 5",
]


class Driver(RuleBasedStateMachine):
    """One episode, whatever is done to it."""

    kind: ClassVar[Kind]
    levels: ClassVar[list[tuple[int, int]]]
    """Descriptors and threads of this process after each episode."""

    def __init__(self) -> None:
        super().__init__()
        self.has_output = threading.Event()
        self.env = LocalREPLEnv(
            **self.kind.options,
            on_output=lambda output: self.has_output.set(),
            llm_query_fn=self.model,
            limits=Limits(interrupt_grace=GRACE, restarts=100, cell_active=ACTIVE, cell_output=2**20),
        )
        self.turns = 0
        self.is_marked = False

    @staticmethod
    async def model(prompt: str) -> str:
        if prompt == "fail":
            raise RuntimeError(prompt)
        if prompt == "slow":
            await asyncio.sleep(60)
        return prompt.upper()

    @initialize(text=st.sampled_from(sorted(TEXTS)), seed=st.none() | st.integers(0, 2**32))
    def reset(self, text: str, seed: int | None) -> None:
        self.env.reset(context=TEXTS[text], seed=seed, max_iterations=10**6)
        self.turns, self.is_marked = 0, False

    @rule(name=st.sampled_from(sorted(KEPT)))
    def break_the_kernel(self, name: str) -> None:
        self.step(name, cell(KEPT[name]))

    @rule(name=st.sampled_from(sorted(LOST)))
    def end_the_kernel(self, name: str) -> None:
        observation = self.step(name, cell(LOST[name]))
        if not observation.restarted:  # what it broke shows with the next cell
            observation = self.step(name, "pass")
        assert observation.restarted
        assert not self.is_marked or "mark" in observation.lost_variables
        self.is_marked = False

    @rule(name=st.sampled_from(sorted({**INTERRUPTED, **KILLED})))
    def run_out_of_time(self, name: str) -> None:
        code = textwrap.dedent({**INTERRUPTED, **KILLED}[name]).strip()
        self.step(name, code)

    @rule(code=st.sampled_from(FLOODS))
    def flood(self, code: str) -> None:
        self.step("flood", code)

    @rule(name=st.sampled_from(sorted(FORGERIES)))
    def forge(self, name: str) -> None:
        self.step(f"forged: {name}", FORGE + textwrap.dedent(FORGERIES[name]))

    @rule(name=st.sampled_from(sorted(ATTACKS)))
    def attack_the_helper_channel(self, name: str) -> None:
        self.step(f"helper channel: {name}", f"{CHANNEL}\nprint({ATTACKS[name]})")

    @rule(name=st.sampled_from(sorted(DEATHS)))
    def die(self, name: str) -> None:
        self.step(f"death: {name}", DEATHS[name][0])

    @rule(code=st.sampled_from(["mark_of_theirs = 1", "1 / 0", "import time; time.sleep(0.3)"]))
    def let_a_second_client_run(self, code: str) -> None:
        if self.step("before a stranger", "pass").status != "ok":
            return  # it could not be waited for either
        with second_client(self.env) as client:
            client.execute(code)
            self.step("beside a stranger", "print('beside')")

    @rule(code=st.sampled_from(["while True: pass", "import time; time.sleep(60)", "llm_query('slow')"]))
    def cancel(self, code: str) -> None:
        async def cancelled() -> None:
            step = asyncio.create_task(self.env._env.step_async(REPLAction(code=f"{ON}{code}")))
            await asyncio.to_thread(self.has_output.wait, 10)  # a broken kernel may print nothing
            step.cancel()
            await asyncio.wait([step])
            happened[f"cancelled: {'stopped' if step.cancelled() else step.result().status}"] += 1

        self.has_output.clear()
        begin = time.monotonic()
        portal.run(cancelled)
        assert time.monotonic() - begin < BOUND
        self.turns += 1
        self.is_marked = self.is_marked and not self.env.episode.turns[-1].observation.restarted

    @rule(code=st.sampled_from(HELPERS))
    def call_helpers(self, code: str) -> None:
        self.step("helpers", code)

    @rule(code=st.text(max_size=40) | st.sampled_from(sorted(TEXTS.values())))
    def run_text(self, code: str) -> None:
        self.step("text", code)

    @rule(text=st.sampled_from(sorted(TEXTS)))
    def print_text(self, text: str) -> None:
        self.step("print", f"print({TEXTS[text]!a})")

    @rule()
    def mark(self) -> None:
        if not self.step("mark", "mark = 1").restarted:
            self.is_marked = True

    @rule(delay=st.sampled_from([0.0, 0.05, 0.3]), number=st.sampled_from([2, 9, 15]))
    def shoot(self, delay: float, number: int) -> None:
        shooter = threading.Timer(delay, self.kill, args=(pid_of(self.env), number))
        shooter.start()
        self.step("shot", "import time\nfor _ in range(20): time.sleep(0.01)")
        shooter.join()

    @staticmethod
    def kill(pid: int, number: int) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    @precondition(lambda self: self.turns > 0)
    @rule()
    def read(self) -> None:
        begin = time.monotonic()
        observation = self.env.get_variable("1 + 1").observation
        assert time.monotonic() - begin < BOUND
        assert observation.restarted or observation.result.stdout in ("2\n", ""), observation

    def step(self, name: str, code: str) -> REPLObservation:
        begin = time.monotonic()
        observation = self.env.execute(code).observation
        took = time.monotonic() - begin
        happened[f"{name}: {observation.status}{', fresh kernel' if observation.restarted else ''}"] += 1
        assert took < BOUND, (name, took)
        assert observation.status in ("ok", "error", "timeout", "died")
        assert not observation.done, (name, observation)
        assert REPLObservation.model_validate(observation.model_dump()) == observation
        assert sum(len(str(o)) for o in observation.outputs) < 2**22
        self.turns += 1
        if observation.restarted:
            self.is_marked = False
        return observation

    @invariant()
    def the_record_is_complete(self) -> None:
        if self.turns:
            assert len(self.env.episode.turns) == self.turns

    def teardown(self) -> None:
        if self.turns:
            # Whatever was done: at most one more kernel is lost over it, and then all is well.
            self.step("last", "pass")
            observation = self.step("last", "print(llm_query('w'), type(context).__name__)")
            if not observation.restarted and observation.status == "ok":
                assert observation.result.stdout.startswith("W ")
            self.env.export(Path(tempfile.gettempdir()) / "driver.ipynb").unlink()
            pid = pid_of(self.env)
            self.env.close()
            assert wait_for_the_end(pid, 10)
        self.env.close()
        assert not list(Path(tempfile.gettempdir()).glob("ke-*"))
        self.levels.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))


def drive(kind: Kind, episodes: int, steps: int, *, number: int | None = None) -> None:
    """Play episodes, the same ones in every run or those of a seed."""

    class OfKind(Driver):
        pass

    OfKind.kind, OfKind.levels = kind, []
    options = settings(
        max_examples=episodes,
        stateful_step_count=steps,
        deadline=None,
        derandomize=number is None,
        database=None,
        phases=[Phase.generate],  # a failing episode is short enough to read, and minutes long to shrink
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(OfKind if number is None else seed(number)(OfKind), settings=options)
    # The first episodes start what all share; a leak would be one in each of the others.
    (descriptors, threads), last = OfKind.levels[:3][-1], OfKind.levels[-1]
    assert last[0] < descriptors + max(episodes - 3, 5), OfKind.levels
    assert last[1] < threads + max(episodes - 3, 5), OfKind.levels


@pytest.mark.timeout(300)
def test_any_mixture_is_survived(kind: Kind) -> None:
    drive(kind, episodes=4, steps=10)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_long_mixture_is_survived(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    number = int(os.environ.get("SEED", random.SystemRandom().randrange(2**32)))
    with capsys.disabled():
        print(f"SEED={number}")  # noqa: T201 - what it takes to play the same again
    drive(kind, episodes=int(os.environ.get("EPISODES", "50")), steps=20, number=number)
    with capsys.disabled():
        for what, count in sorted(happened.items()):
            print(f"{count:5} {what}")  # noqa: T201 - the report of the long run
