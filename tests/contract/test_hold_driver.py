"""A seeded random driver mixes everything that attacks a kernel over many short episodes.

The short run is part of every test run; `python -m pytest -m long tests/contract/test_hold_driver.py` is the
long one, and prints how often each thing happened.
"""

from __future__ import annotations

import os
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kernel_env import Limits, LocalREPLEnv, REPLObservation
from tests.processes import pid_of

from .hostile import KEPT, LOST, cell
from .test_hold_interrupts import INTERRUPTED, KILLED
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
SEND = "k = get_ipython().kernel; send = k.session.send\n"
FORGERIES = [
    "k = get_ipython().kernel; k.iopub_thread.send_multipart([b'garbage'])",
    f"{SEND}send(k.iopub_socket, 'status', {{'execution_state': 'idle'}}, k.get_parent())",
    f"{SEND}send(k.iopub_socket, 'comm_open', {{'comm_id': 'a', 'target_name': 'b'}})",
    f"{SEND}send(k.iopub_socket, 'stream', {{'name': 5, 'text': {{}}}}, k.get_parent())",
    "import socket, os\ns = socket.socket(socket.AF_UNIX); s.connect(os.path.dirname(os.getcwd()) + '/h')\n"
    "s.sendall(b'\\xff' * 100)",
]
HELPERS = [
    "llm_query('a')",
    "llm_query_batched(['a', 'b'] * 20)",
    "llm_query('fail')",
    "import threading; threading.Thread(target=llm_query, args=('a',), daemon=True).start()",
    "FINAL_VAR('nothing')",
    "del FINAL, llm_query, context, answer",
    "FINAL = llm_query = answer = context = 5",
]


class Driver(RuleBasedStateMachine):
    """One episode, whatever is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.env = LocalREPLEnv(
            llm_query_fn=self.model,
            limits=Limits(interrupt_grace=GRACE, restarts=100, cell_active=ACTIVE, cell_output=2**20),
        )
        self.turns = 0
        self.is_marked = False

    @staticmethod
    def model(prompt: str) -> str:
        if prompt == "fail":
            raise RuntimeError(prompt)
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

    @rule(code=st.sampled_from(FORGERIES))
    def forge(self, code: str) -> None:
        self.step("forgery", code)

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
            self.env.export(Path(os.environ.get("TMPDIR", "/tmp")) / f"driver-{os.getpid()}.ipynb").unlink()
        self.env.close()


def drive(temporary_folder: Path, episodes: int, steps: int, *, seeded: bool) -> None:
    driver = settings(
        max_examples=episodes,
        stateful_step_count=steps,
        deadline=None,
        derandomize=seeded,
        database=None,
        phases=[Phase.generate],  # a failing episode is short enough to read, and minutes long to shrink
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(Driver, settings=driver)
    assert not list(temporary_folder.glob("ke-*"))


@pytest.mark.timeout(300)
def test_any_mixture_is_survived(temporary_folder: Path) -> None:
    drive(temporary_folder, episodes=5, steps=10, seeded=True)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_long_mixture_is_survived(temporary_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drive(temporary_folder, episodes=int(os.environ.get("EPISODES", "150")), steps=20, seeded=False)
    with capsys.disabled():
        for what, count in sorted(happened.items()):
            print(f"{count:5} {what}")  # noqa: T201 - the report of the long run
