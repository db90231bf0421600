"""Output: nothing is lost to a slow reader, floods stay within the limits, and it lands where it belongs."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from kernel_env import Limits, REPLAction, REPLEnvironment, REPLObservation
from kernel_env.outputs import without_colours

from .conftest import Kind, LendEnv, StartEnv

MB = 2**20


class SlowReader:
    """An `on_output` that keeps the host from reading for two seconds at the first output."""

    def __init__(self) -> None:
        self.has_slept = False

    def __call__(self, output: dict[str, Any]) -> None:
        if not self.has_slept:
            self.has_slept = True
            time.sleep(2)


def size(output: dict[str, Any]) -> int:
    """Characters of an output's own."""
    values = [output.get(field, "") for field in ("text", "ename", "evalue")] + output.get("traceback", [])
    return sum(map(len, [*values, *map(str, output.get("data", {}).values())]))


def marks(observation: REPLObservation) -> str:
    """What the outputs of an observation say, without what is long of it."""
    return re.sub(r"(.)\1{20,}", r"\1", "\n".join(map(str, observation.outputs)))


@contextmanager
def memory_of_this_process() -> Iterator[list[int]]:
    """Megabytes that this process grew by, at most, while the block ran; read the list afterwards."""

    def size() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // MB

    base, ended, grown = size(), threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(0.01):
            grown[0] = max(grown[0], size() - base)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield grown
    finally:
        ended.set()
        watcher.join()


def test_twenty_thousand_displays_reach_a_slow_reader(start: StartEnv) -> None:
    env = start(on_output=SlowReader(), limits=Limits(cell_output=8 * MB))
    code = "from IPython.display import display\nfor n in range(20_000): display(n)"
    observation = env.execute(code).observation
    assert observation.status == "ok"
    assert [o["data"]["text/plain"] for o in observation.outputs] == [str(n) for n in range(20_000)]


def test_a_million_prints_reach_a_slow_reader(start: StartEnv) -> None:
    env = start(on_output=SlowReader(), limits=Limits(cell_output=32 * MB))
    observation = env.execute("for n in range(1_000_000): print(n)").observation
    assert observation.status == "ok"
    (output,) = observation.outputs
    assert output["text"] == "".join(f"{n}\n" for n in range(1_000_000))


FLOODS = {
    "200 MB in one print": ("print('x' * 200_000_000)", 200_000_001),
    "1 GB on a descriptor": ("import os\nfor _ in range(1000): os.write(1, b'y' * 1_000_000)", 1_000_000_000),
    "a child's 300 MB": (
        "import subprocess\n_ = subprocess.run('yes | head -c 300000000', shell=True)",
        300_000_000,
    ),
    "many prints": ("for n in range(300_000): print('z' * 99)", 30_000_000),
    "stderr": ("import sys; _ = sys.stderr.write('e' * 100_000_000)", 100_000_000),
    "a result behind 100 MB": ("print('r' * 100_000_000, end='')\n5", 100_000_000 + 3),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_stays_within_the_limits_and_is_marked(lend: LendEnv, name: str) -> None:
    code, total = FLOODS[name]
    env = lend()
    with memory_of_this_process() as grown:
        observation = env.execute(code).observation
    assert observation.status == "ok"
    assert grown[0] < 100
    text = observation.result.stdout + observation.result.stderr
    assert f"(truncated, total {total} chars)" in text
    assert sum(len(o.get("text", "")) for o in observation.outputs) <= 4 * MB + 200
    assert env.execute("print('w' * 5000)").observation.result.stdout == "w" * 5000 + "\n"


TOO_LARGE = {
    "raise ValueError('x' * 50_000_000)": "total 500[0-9]{5} chars",
    "'r' * 50_000_000": "total 50000002 chars",
    "from IPython.display import display\ndisplay({'image/png': 'x' * 50_000_000}, raw=True)": (
        "<image/png of 50000000 chars, over Limits.cell_output, not kept>"
    ),
    "from IPython.display import HTML\nHTML('é' * 50_000_000)": (
        "object>.n<text/html of 50000000 chars, over Limits.cell_output, not kept>"
    ),
    "for _ in range(60): display({'image/png': 'x' * 10**6}, raw=True)": "truncated, total 600[0-9]{5} chars",
    "raise ExceptionGroup('e' * 10**7, [ValueError('f' * 10**7)] * 3)": "truncated, total 400[0-9]{5} chars",
    "{n: 'v' * 10**6 for n in range(100)}": "truncated, total 100000889 chars",
    "from IPython.display import JSON\nJSON(['x' * 10**7])": "application/json of 100000[0-9]{2} chars, over",
}


@pytest.mark.parametrize("code", TOO_LARGE)
def test_an_output_that_is_too_large_is_cut_and_says_so(lend: LendEnv, code: str) -> None:
    env = lend()
    with memory_of_this_process() as grown:
        observation = env.execute(code).observation
    assert observation.status in ("ok", "error")
    assert grown[0] < 150
    assert sum(map(size, observation.outputs)) <= 4 * MB + 1000  # the marks come on top
    assert re.search(TOO_LARGE[code], marks(observation))
    assert env.execute("print('w' * 5000)").observation.result.stdout == "w" * 5000 + "\n"


@pytest.mark.parametrize(
    "code",
    [
        "h = display(0, display_id=True)\nwhile True: h.update('u' * 1000)",
        "while True: display('d' * 1000)",
        "while True: print('p' * 1000)",
        "import os\nwhile True: os.write(1, b'w' * 1000)",
        "n = 0\nwhile True:\n    n += 1\n    display(n, display_id=str(n))",
        "while True: clear_output(); print('c' * 1000)",
        "!yes",
    ],
)
def test_endless_output_stays_within_the_limits(lend: LendEnv, code: str) -> None:
    limit = 200_000
    env = lend(limits=Limits(cell_output=limit))
    env.execute("from IPython.display import display, clear_output")
    with memory_of_this_process() as grown:
        observation = env.execute(code, timeout_s=1).observation
    assert observation.status == "timeout"
    assert grown[0] < 100
    assert sum(map(size, observation.outputs)) <= limit + 1000
    if code == "!yes" or ("* 1000" in code and "h.update" not in code and "clear_output" not in code):
        assert re.search("over Limits.cell_output|truncated, ", marks(observation))
    assert env.execute("print('w' * 5000)").observation.result.stdout == "w" * 5000 + "\n"


def test_a_display_of_all_sizes_keeps_its_updates_within_the_limit(lend: LendEnv) -> None:
    env = lend(limits=Limits(cell_output=MB))
    code = """
from IPython.display import display
hs = [display(0, display_id=True) for _ in range(50)]
for h in hs: h.update({'text/plain': 'u' * 300_000}, raw=True)
"""
    observation = env.execute(code).observation
    assert sum(len(str(o)) for o in observation.outputs) < 2 * MB


def test_streams_come_in_messages_of_at_most_a_megabyte(start: StartEnv) -> None:
    sizes: list[int] = []
    env = start(
        on_output=lambda output: sizes.append(len(output["text"].encode())),
        limits=Limits(cell_output=32 * MB),
    )
    for code in (
        "print('\\U0001f600' * 2_000_000, end='')",
        "import sys; _ = sys.stderr.write('\\U0001f600' * 2_000_000)",
        "import os\nfor _ in range(8): os.write(1, b'x' * 1_000_000)",
        "import subprocess\n_ = subprocess.run('yes | head -c 8000000', shell=True)",
    ):
        sizes.clear()
        env.execute(code)
        assert sum(sizes) == 8_000_000, code
        assert max(sizes) <= MB, code


def test_what_a_killed_kernel_held_back_is_said_to_be_missing(start: StartEnv) -> None:
    arrived, sizes = threading.Event(), []

    def take(output: dict[str, Any]) -> None:
        sizes.append(len(output["text"]))
        if sum(sizes) >= MB // 2:  # all that it does not hold back
            arrived.set()

    env = start(
        limits=Limits(cell_output=MB),
        max_output_length=2 * MB,
        on_output=take,
        tools={"arrived": lambda: arrived.wait(20)},
    )
    code = "print('x' * (3 * 2**20), flush=True)\nimport os; arrived(); arrived(); os._exit(1)"
    observation = env.execute(code).observation
    assert observation.status == "died"
    assert observation.result.stdout.endswith("(truncated, the rest went with the kernel) ...\n")


def test_a_killed_kernel_s_loss_is_said_beside_displays_too(start: StartEnv) -> None:
    env = start(limits=Limits(cell_output=MB, interrupt_grace=0.5), max_output_length=2 * MB)
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\ndisplay('d')\nprint('x' * (3 * 2**20))"
    )
    observation = env.execute(f"{code}\nwhile True: pass", timeout_s=1).observation
    assert observation.restarted
    assert "(truncated, the rest went with the kernel)" in observation.result.stdout


def test_a_result_behind_a_flood_is_the_last_thing_shown(lend: LendEnv) -> None:
    env = lend()
    stdout = env.execute("print('x' * 3_000_000); print('last line')\n42").observation.result.stdout
    assert stdout.endswith("last line\n42\n")


def test_what_was_cleared_does_not_come_back(lend: LendEnv) -> None:
    env = lend(limits=Limits(cell_output=MB))
    env.execute("from IPython.display import clear_output")
    observation = env.execute("print('x' * 3_000_000); clear_output(); print('kept')").observation
    assert observation.result.stdout == "kept\n"


def test_a_forked_child_s_flood_is_all_there_or_marked(lend: LendEnv) -> None:
    env = lend(limits=Limits(cell_output=MB))
    code = "for n in range(30): print('y' * 99_999)\nprint('END', flush=True)"
    run = f"import os\nif os.fork() == 0:\n    exec({code!r}); os._exit(0)\n_ = os.wait()"
    stdout = env.execute(run).observation.result.stdout
    assert stdout.endswith("END\n")
    assert "truncated, total" in stdout


def test_many_displays_of_one_id_take_no_longer_than_others(start: StartEnv) -> None:
    env = start(limits=Limits(cell_output=MB))
    seconds = []
    for id in ("str(n)", "'one'"):
        code = f"for n in range(5_000): display('', display_id={id})"
        seconds.append(env.execute(code, timeout_s=60).observation.result.execution_time)
    assert seconds[1] < 4 * seconds[0]


SEQUENCE = """
import ctypes, os, subprocess, sys
libc = ctypes.CDLL(None)
for n in range(20):
    print(f"{n} print")
    _ = os.write(1, f"{n} os.write\\n".encode())
    _ = sys.stdout.write(f"{n} write\\n")
    _ = libc.puts(f"{n} puts".encode()); _ = libc.fflush(None)
    if n < 3: _ = subprocess.run(["echo", f"{n} child"])
"""


def test_one_stream_keeps_its_order_whoever_writes(lend: LendEnv) -> None:
    env = lend()
    # print and the descriptor meet when either is flushed: `flush` is what Python asks of a program, too.
    code = SEQUENCE.replace('print(f"{n} print")', 'print(f"{n} print", flush=True)').replace(
        'write(f"{n} write\\n")', 'write(f"{n} write\\n"); sys.stdout.flush()'
    )
    expected = []
    for n in range(20):
        expected += [f"{n} print", f"{n} os.write", f"{n} write", f"{n} puts"] + (
            [f"{n} child"] if n < 3 else []
        )
    stdout = env.execute(code).observation.result.stdout
    assert stdout.splitlines() == expected


def test_characters_are_not_cut_in_two(start: StartEnv) -> None:
    env = start(max_output_length=10**6)
    code = "import os, time\nfor b in ('é漢\\U0001f600' * 3000).encode(): _ = os.write(1, bytes([b]))"
    assert env.execute(code).observation.result.stdout == "é漢\U0001f600" * 3000


def test_all_of_a_cell_s_output_of_c_code_is_in_its_own_observation(lend: LendEnv) -> None:
    env = lend()
    env.execute("import os")
    for n in range(100):
        assert env.execute(f"_ = os.write(1, b'{n}')").observation.result.stdout == f"{n}"


def test_late_output_of_threads_and_tasks_is_not_lost(lend: LendEnv) -> None:
    env = lend()
    env.execute(
        "import asyncio, threading\ngo, gone = threading.Event(), asyncio.Event()\n"
        "def late(): go.wait(); print('from a thread')\n"
        "async def task(): await gone.wait(); print('from a task')\n"
        "thread = threading.Thread(target=late); thread.start(); later = asyncio.create_task(task())"
    )
    first = env.execute("go.set(); thread.join(); print('own')").observation
    assert sorted(first.result.stdout.splitlines()) == ["from a thread", "own"]
    second = env.execute("gone.set(); await later; print('own')").observation
    assert sorted(second.result.stdout.splitlines()) == ["from a task", "own"]


LATER = {
    "a thread": (
        """
import threading
def later():
    try:
        while True: ping()
    except HelperError: print('after the end of my cell')
thread = threading.Thread(target=later); thread.start()
""",
        "thread.join()",
    ),
    "a task": (
        """
import asyncio
async def later():
    try:
        while True: await asyncio.to_thread(ping)
    except HelperError: print('after the end of my cell')
task = asyncio.create_task(later())
""",
        "await task",
    ),
    "a process": (
        """
import subprocess
waits = "while [ ! -e go ]; do sleep 0.02; done; echo after the end of my cell"
process = subprocess.Popen(["sh", "-c", waits])
""",
        "open('go', 'w').close(); _ = process.wait()",
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_what_is_printed_after_a_cell_shows_with_the_next(start: StartEnv, name: str) -> None:
    env = start(tools={"ping": lambda: None})
    code, wait = LATER[name]
    assert env.execute(code).observation.result.stdout == ""
    assert env.execute(wait).observation.result.stdout == "after the end of my cell\n"


def test_an_update_of_an_earlier_cell_s_display_shows_where_it_is_made(
    start: StartEnv, tmp_path: Path
) -> None:
    env = start()
    env.execute("h = display('first', display_id='h')")
    updated = env.execute("print('a'); h.update('second'); h.update('third'); print('b')").observation
    assert updated.result.stdout == "a\n'third'\nb\n"
    shown = [output["data"]["text/plain"] for output in updated.outputs if "data" in output]
    assert shown == ["'third'"]
    notebook = nbformat.read(env.export(tmp_path / "e.ipynb"), as_version=4)  # type: ignore[no-untyped-call]
    recorded = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"][-2:]
    assert [[o.output_type for o in outputs] for outputs in recorded] == [
        ["display_data"],
        ["stream", "display_data", "stream"],
    ]
    assert recorded[0][0].data == {"text/plain": "'first'"}


def test_children_print_whole_lines_on_their_cell_and_in_order(lend: LendEnv) -> None:
    env = lend()
    code = """
import multiprocessing
def child(n):
    for size in (1, 5_000, 70_000): print(n, str(n) * size)
    print(n, 'unfinished', end='')
context = multiprocessing.get_context('fork')
print('parent', end=' ')
children = [context.Process(target=child, args=(n,)) for n in range(4)]
for c in children: c.start()
for c in children: c.join()
print('end')
"""
    [output] = env.execute(code).observation.outputs
    parent, rest = output["text"].split(" ", 1)
    assert (parent, rest[-4:]) == ("parent", "end\n")
    for n in range(4):
        for size in (1, 5_000, 70_000):
            assert rest.count(f"{n} {str(n) * size}\n") == 1
        assert rest.count(f"{n} unfinished") == 1
        assert [rest.index(f"{n} {str(n) * size}\n") for size in (1, 5_000, 70_000)] == sorted(
            rest.index(f"{n} {str(n) * size}\n") for size in (1, 5_000, 70_000)
        )


def test_an_interrupted_print_loop_loses_nothing(start: StartEnv) -> None:
    env = start(max_output_length=10**8)
    for head in ("", "await asyncio.sleep(0)\n"):
        for n in range(20):
            env.execute("import asyncio; n = 0")
            code = f"{head}while True: n += 1; print(n, end=' ')"
            observation = env.execute(code, timeout_s=0.05 + n / 1000).observation
            assert (observation.status, observation.restarted) == ("timeout", False)
            printed = int(env.get_variable("n").observation.result.stdout)
            numbers = [int(number) for number in observation.result.stdout.split()]
            assert numbers == list(range(1, len(numbers) + 1))
            assert len(numbers) in (printed - 1, printed)


def test_a_host_that_does_not_read_holds_little_of_a_flood(kind: Kind) -> None:
    code = """
import pathlib, threading
from IPython.display import display
def flood():
    for _ in range(300): display({'text/plain': 'x' * 10**6}, raw=True)
    pathlib.Path('done').touch()
threading.Thread(target=flood).start()
"""

    async def run() -> None:
        env = REPLEnvironment(**kind.options)
        await env.reset_async()
        with memory_of_this_process() as grown:
            await env.step_async(REPLAction(code=code))
            while "done" not in [artifact.name for artifact in env.artifacts()]:
                time.sleep(0.01)  # noqa: ASYNC251 - the caller keeps the loop
        observation = await env.step_async(REPLAction(code="print('the end')"))
        await env.close_async()
        assert observation.result.stdout.endswith("the end\n")
        assert grown[0] < 150

    asyncio.run(run())


GOLDEN = [
    "print('a'); print('b')",
    "import sys\nprint('out'); sys.stdout.flush(); print('err', file=sys.stderr)",
    "1 + 1",
    "'text\\n'",
    "from IPython.display import HTML, JSON, Markdown, clear_output, display\ndisplay(HTML('<b>b</b>'))",
    "display({'application/json': {'a': [1, None]}}, raw=True)",
    "print('gone'); clear_output(); print('kept')",
    "print('gone'); clear_output(wait=True); print('kept')",
    "print('kept'); clear_output(wait=True)",
    "h = display('first', display_id='one'); print('between'); h.update('second')",
    "a = display('x', display_id='two'); b = display('y', display_id='two'); a.update('z')",
    "1 / 0",
    "%%capture c\nprint('captured')",
    "c.show()",
    "!echo shell",
    "print('before'); raise ValueError('after')",
    "for n in range(3): display(n); print(n)",
    "class Rich:\n    def _repr_html_(self): return '<i>r</i>'\n    def __repr__(self): return 'r'\nRich()",
    "import matplotlib.pyplot as plt\nlines = plt.plot([1, 2]); plt.show()",
    "%%html\n<p>p</p>",
    "_",
    "display(1, 2, metadata={'text/plain': {'m': 1}})",
    "print('no newline', end='')",
]


def plain(outputs: list[Any]) -> list[Any]:
    """Outputs without what differs between any two runs."""
    told = []
    for output in outputs:
        copy = {key: value for key, value in dict(output).items() if key != "execution_count"}
        if copy["output_type"] == "error":
            copy["traceback"] = re.sub(
                r"In\[\d+\]|\d+\x1b|0x\w+", "", without_colours("\n".join(copy["traceback"]))
            )
        if "image/png" in copy.get("data", {}):
            copy["data"] = {**copy["data"], "image/png": len(copy["data"]["image/png"]) > 1000}
        told.append(copy)
    return told


@pytest.fixture(scope="module")
def golden() -> Any:
    """The notebook of `GOLDEN`, run by nbclient."""
    cells = [nbformat.v4.new_code_cell(code) for code in GOLDEN]  # type: ignore[no-untyped-call]
    notebook = nbformat.v4.new_notebook(cells=cells)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, kernel_name="python3", allow_errors=True).execute()
    return notebook


@pytest.mark.timeout(180)
def test_outputs_are_those_that_nbclient_collects(start: StartEnv, golden: Any) -> None:
    env = start()
    for code, cell in zip(GOLDEN, golden.cells, strict=True):
        got = env.execute(code).observation.outputs
        # nbclient does not join neighbouring pieces of a stream; where it is asked to, it loses their order.
        expected: list[Any] = []
        for output in cell.outputs:
            last = expected[-1] if expected else {}
            if output.output_type == "stream" and last.get("name") == output.name:
                last["text"] += output.text
            else:
                expected.append(dict(output))
        if code == "print('kept'); clear_output(wait=True)":
            expected = [
                {"output_type": "stream", "name": "stdout", "text": "kept\n"}
            ]  # nothing came after it
        assert plain(got) == plain(expected), code
