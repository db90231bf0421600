"""Many cells of every kind of output, against a model of what must arrive: byte for byte, in order, complete.

The short run is part of every test run; `python -m pytest -m long tests/contract/test_stress.py` is the long
one, of 10,000 cells.
"""

from __future__ import annotations

import json
import random
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import zmq

from kernel_env import Limits, LocalREPLEnv

from .conftest import StartEnv

HEADER = """
import os, sys, threading
from IPython.display import display
def show(text, **options): return display({'text/plain': text}, raw=True, **options)
def run(*threads):
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""
ALPHABET = "abc XYZ 019 äß€ 日本 🙂 \\'\"%{}[]\t\x00\x1b\x7f\u2028"


@dataclass
class Stretch:
    """What a cell writes up to its next display, result or error, and that; None at the cell's end."""

    stdout: str = ""
    stderr: str = ""
    mark: tuple[str, str] | None = None


@dataclass
class Cell:
    """A cell, and what must come of it."""

    lines: list[str] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=lambda: [Stretch()])
    threads: dict[str, list[str]] = field(default_factory=dict)
    """Marker → lines of one of several threads that print at once: only each thread's own order is given."""
    exception: str | None = None

    @property
    def now(self) -> Stretch:
        return self.stretches[-1]

    def mark(self, kind: str, text: str) -> None:
        self.now.mark = (kind, text)
        self.stretches.append(Stretch())


class Author:
    """Writes cells and their outcome, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._count = 0

    def cell(self) -> Cell:
        cell = Cell()
        parts = [self._print, self._write, self._descriptor, self._display, self._update, self._thread]
        weights = [8, 4, 3, 3, 1, 2]
        for part in self._random.choices(parts, weights, k=self._random.randrange(1, 7)):
            part(cell)
        end = self._random.random()
        if end < 0.1:
            self._threads(cell)
        elif end < 0.3:
            text = self._text()
            cell.lines.append(f"{text!a}")
            cell.mark("execute_result", repr(text))
        elif end < 0.45:
            text = self._word()
            cell.lines.append(f"raise ValueError({text!r})")
            cell.exception = f"ValueError: {text}"
            cell.mark("error", cell.exception)
        return cell

    def _word(self) -> str:
        self._count += 1
        return f"w{self._count}"

    def _text(self) -> str:
        size = self._random.choice([0, 1, 5, 20, 80]) if self._random.random() < 0.99 else 300_000
        return self._word() + "".join(self._random.choices(ALPHABET, k=size))

    def _print(self, cell: Cell) -> None:
        if self._random.random() < 0.1:
            count = self._random.randrange(2000)
            cell.lines.append(f"for i in range({count}): print(i)")
            cell.now.stdout += "".join(f"{n}\n" for n in range(count))
            return
        text, end = self._text(), self._random.choice(["\n", "", "\r\n"])
        cell.lines.append(f"print({text!a}, end={end!r}, flush={self._random.random() < 0.2})")
        cell.now.stdout += text + end

    def _write(self, cell: Cell) -> None:
        text = self._text()
        cell.lines.append(f"_ = sys.stderr.write({text!a})")
        cell.now.stderr += text

    def _descriptor(self, cell: Cell) -> None:
        text, fd = self._text(), self._random.choice([1, 2])
        cell.lines += [
            f"left = {text!a}.encode()",
            f"while left: left = left[os.write({fd}, left[:4096]):]",
        ]
        if fd == 1:
            cell.now.stdout += text
        else:
            cell.now.stderr += text

    def _display(self, cell: Cell) -> None:
        text = self._text()
        cell.lines.append(f"_ = show({text!a})")
        cell.mark("display_data", text)

    def _update(self, cell: Cell) -> None:
        first, second = self._text(), self._text()
        cell.lines += [
            f"shown = show({first!a}, display_id=True)",
            f"shown.update({{'text/plain': {second!a}}}, raw=True)",
        ]
        cell.mark("display_data", second)

    def _thread(self, cell: Cell) -> None:
        text = self._text()
        cell.lines.append(f"run(threading.Thread(target=print, args=({text!a},)))")
        cell.now.stdout += text + "\n"

    def _threads(self, cell: Cell) -> None:
        cell.mark("display_data", "threads")
        cell.lines.append("_ = show('threads')")
        names = [self._word() for _ in range(self._random.randrange(2, 5))]
        count = self._random.randrange(1, 60)
        cell.lines += [
            f"def work(name): [sys.stdout.write(f'{{name}} {{n}}\\n') for n in range({count})]",
            f"run(*(threading.Thread(target=work, args=(name,)) for name in {names}))",
        ]
        cell.threads = {name: [f"{name} {n}" for n in range(count)] for name in names}


def stretches_of(outputs: list[dict[str, Any]]) -> list[Stretch]:
    """Outputs of a cell, read the way the model writes them."""
    found = [Stretch()]
    for output in outputs:
        if output["output_type"] == "stream":
            now = found[-1]
            setattr(now, output["name"], getattr(now, output["name"]) + output["text"])
            continue
        if output["output_type"] == "error":
            text = f"{output['ename']}: {output['evalue']}"
        else:
            text = output["data"]["text/plain"]
        found[-1].mark = (output["output_type"], text)
        found.append(Stretch())
    return found


def assert_is(outputs: list[dict[str, Any]], cell: Cell) -> None:
    found = stretches_of(outputs)
    if cell.threads:
        of_threads = defaultdict(list)
        for line in found[-1].stdout.splitlines():
            of_threads[line.split(" ")[0]].append(line)
        assert of_threads == cell.threads
        found[-1].stdout = ""
    assert [stretch.mark for stretch in found] == [stretch.mark for stretch in cell.stretches]
    for is_so, should_be in zip(found, cell.stretches, strict=True):
        assert_same(is_so.stdout, should_be.stdout)
        assert_same(is_so.stderr, should_be.stderr)


def assert_same(found: str, wanted: str) -> None:
    if found != wanted:
        pairs = zip(found, wanted, strict=False)
        at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))
        window = slice(max(at - 30, 0), at + 30)
        pytest.fail(f"at {at} of {len(wanted)}: {found[window]!r} instead of {wanted[window]!r}")


class Listener:
    """Another client of the kernel: everything on its output channel, as it came."""

    def __init__(self, env: LocalREPLEnv) -> None:
        process = env._env._rollout._kernel._live.process  # type: ignore[union-attr]
        info = json.loads((process.folder.path / "connection.json").read_text())
        self.by_request: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.requests: list[str] = []
        self._end = threading.Event()
        self.has_heard = threading.Event()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.subscribe(b"")
        self._socket.connect(f"{info['transport']}://{info['ip']}-{info['iopub_port']}")
        self._ended: set[str] = set()

    def listen(self) -> None:
        while not self._end.is_set() or self._socket.poll(500):
            if self._socket.poll(100):
                self._take(self._socket.recv_multipart())

    def _take(self, frames: list[bytes]) -> None:
        header, parent, _, content = map(json.loads, frames[frames.index(b"<IDS|MSG>") + 2 :][:4])
        request, kind = parent.get("msg_id"), header["msg_type"]
        self.has_heard.set()  # only a kernel's first client is welcomed
        assert request not in self._ended, f"{kind} after the idle of its request: {content}"
        if kind == "execute_input":
            self.requests.append(request)
        elif kind == "status" and content["execution_state"] == "idle":
            self._ended.add(request)
        elif kind == "update_display_data":
            shown = content["transient"]["display_id"]
            for output in self.by_request[request]:
                if output.get("transient", {}).get("display_id") == shown:
                    output["data"] = content["data"]
        elif kind != "status":
            self.by_request[request].append({"output_type": kind, **content})

    @contextmanager
    def __call__(self) -> Iterator[None]:
        failures: list[BaseException] = []

        def guarded() -> None:
            try:
                self.listen()
            except BaseException as error:  # noqa: BLE001 - carried to the test
                failures.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()
            self._socket.close()
        if failures:
            raise failures[0]


def check(start: StartEnv, seed: int, count: int) -> None:
    author = Author(seed)
    cells = [author.cell() for _ in range(count)]
    env = start(max_output_length=10**7, limits=Limits(cell_output=2**24))
    env.execute(HEADER)
    listener = Listener(env)
    with listener():
        while not listener.has_heard.wait(0.1):
            env.execute("pass")
        for cell in cells:
            observation = env.execute("\n".join(cell.lines)).observation
            assert observation.result.exception == cell.exception, "\n".join(cell.lines)
            assert_is(observation.outputs, cell)
    heard = [listener.by_request[request] for request in listener.requests]
    for outputs, cell in zip(heard[-count:], cells, strict=True):
        assert_is(outputs, cell)


def test_what_three_hundred_cells_publish_arrives(start: StartEnv) -> None:
    check(start, seed=1, count=300)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_what_ten_thousand_cells_publish_arrives(start: StartEnv) -> None:
    check(start, seed=2, count=10_000)
