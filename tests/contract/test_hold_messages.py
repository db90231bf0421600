"""Forged and broken messages, a second client, an attacked helper channel: counted, logged, survived."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from kernel_env import LocalREPLEnv

from .conftest import StartEnv

PREPARE = """
import json
kernel = get_ipython().kernel
session, thread = kernel.session, kernel.iopub_thread
def send(*frames): thread.send_multipart(list(frames))
def signed(header=None, parent=None, content=None):
    own = json.dumps(kernel.get_parent()['header'], default=str).encode()
    parts = [header, own if parent is None else parent, b'{}', content]
    send(b'<IDS|MSG>', session.sign(parts), *parts)
STREAM = json.dumps({'msg_type': 'stream', 'msg_id': 'f'}).encode()
STATUS = json.dumps({'msg_type': 'status', 'msg_id': 'f'}).encode()
DISPLAY = json.dumps({'msg_type': 'display_data', 'msg_id': 'f'}).encode()
THEIRS = json.dumps({'session': 'x', 'msg_id': 'y'}).encode()
def state(name): return json.dumps({'execution_state': name}).encode()
def text(value): return json.dumps({'text': value}).encode()
"""

BROKEN = {
    "no delimiter": "send(b'a', b'b')",
    "one frame": "send(b'<IDS|MSG>')",
    "unsigned": "send(b'<IDS|MSG>', b'', STREAM, b'{}', b'{}', b'{}')",
    "a wrong signature": "send(b'<IDS|MSG>', b'0' * 64, STREAM, b'{}', b'{}', b'{}')",
    "deep JSON": "signed(STREAM, content=b'[' * 200_000 + b']' * 200_000)",
    "a giant integer": "signed(STREAM, content=b'{\"name\": ' + b'9' * 100_000 + b'}')",
    "no JSON": "signed(STREAM, content=b'\\xff{')",
    "content that is a list": "signed(STREAM, content=b'[]')",
    "a header without a type": "signed(b'{}', content=b'{}')",
    "a parent that is a number": "signed(STREAM, parent=b'5', content=b'{}')",
    "an output of odd types": "signed(DISPLAY, content=b'{\"data\": 5}')",
    "a message of 60 MB": "signed(STREAM, content=text('x' * 60_000_000))",
}

HARMLESS = {
    "another request's output": "signed(STREAM, THEIRS, text('not ours'))",
    "an early idle": "signed(STATUS, content=state('idle'))",
    "a busy of nobody": "signed(STATUS, THEIRS, state('busy'))",
    "an unknown type": "signed(b'{\"msg_type\": \"weather\"}', content=b'{}')",
    "a comm that nobody knows": "session.send(kernel.iopub_socket, 'comm_open', {'comm_id': 'a'})",
    "a reply of its own": "session.send(kernel.shell_stream, 'execute_reply', {}, kernel.get_parent())",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_message_is_counted_logged_and_survived(
    start: StartEnv, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    env = start()
    env.execute(PREPARE)
    with caplog.at_level(logging.WARNING, "kernel_env"):
        observation = env.execute(f"{BROKEN[name]}\nprint('whole')").observation
    assert (observation.status, observation.result.stdout) == ("ok", "whole\n")
    assert "1 malformed or unauthorised messages from the kernel were not taken." in observation.result.stderr
    assert "sent a broken message on iopub" in caplog.text
    assert env.execute("print('next')").observation.result.stdout == "next\n"


@pytest.mark.parametrize("name", HARMLESS)
def test_a_forged_message_changes_no_other_cell(start: StartEnv, name: str) -> None:
    env = start()
    env.execute(PREPARE)
    observation = env.execute(f"{HARMLESS[name]}\nprint('whole')").observation
    assert observation.status == "ok"
    assert "not ours" not in observation.result.stdout
    for n in range(3):
        assert env.execute(f"print('next', {n})").observation.result.stdout.endswith(f"next {n}\n")


@pytest.fixture
def client_of() -> Iterator[object]:
    """Make a second client with the key of an environment's kernel."""
    made: list[BlockingKernelClient] = []

    def attach(env: LocalREPLEnv) -> BlockingKernelClient:
        folder = Path(
            env.get_variable("__import__('os').environ['HOME']").observation.result.stdout[1:-2]
        ).parent
        client = BlockingKernelClient()
        client.load_connection_file(str(folder / "connection.json"))
        client.start_channels()
        client.wait_for_ready(timeout=60)
        made.append(client)
        return client

    yield attach
    for client in made:
        client.stop_channels()


def test_another_client_s_cells_share_the_namespace_and_nothing_else(
    start: StartEnv, client_of: object
) -> None:
    env = start(llm_query_fn=str.upper)
    client: BlockingKernelClient = client_of(env)  # type: ignore[operator]
    client.execute_interactive(
        "theirs = 5; print('their output'); llm_query('x')", output_hook=id, timeout=60
    )
    observation = env.execute("theirs").observation
    assert observation.result.stdout == "5\n"
    assert len(env.episode.turns) == 1
    assert env.episode.turns[0].helper_calls == ()


def test_a_cell_that_another_client_s_failure_took_along_runs_once(
    start: StartEnv, client_of: object
) -> None:
    env = start()
    env.execute("n = 0")
    client: BlockingKernelClient = client_of(env)  # type: ignore[operator]
    # The kernel is busy with their cell, and ours is in its queue, when theirs fails.
    folder = env.get_variable("__import__('os').getcwd()").observation.result.stdout[1:-2]
    waiting = f"while not os.path.exists('{folder}/go'): time.sleep(0.01)"
    client.execute(f"import os, time\nopen('began', 'w')\n{waiting}\n1 / 0")
    while not (Path(folder) / "began").exists():
        threading.Event().wait(0.01)
    releasing = threading.Timer(0.5, (Path(folder) / "go").touch)
    releasing.start()
    observation = env.execute("n += 1; print('ours', n)", timeout_s=30).observation
    releasing.join()
    assert (observation.status, observation.result.stdout) == ("ok", "ours 1\n")
    assert observation.iteration == 2


def test_time_behind_another_client_is_not_active_time(start: StartEnv, client_of: object) -> None:
    env = start()
    client: BlockingKernelClient = client_of(env)  # type: ignore[operator]
    folder = env.get_variable("__import__('os').getcwd()").observation.result.stdout[1:-2]
    client.execute("open('began', 'w'); import time; time.sleep(3)")
    while not (Path(folder) / "began").exists():
        threading.Event().wait(0.01)
    observation = env.execute("print('ours')", timeout_s=1.0).observation
    assert (observation.status, observation.result.stdout) == ("ok", "ours\n")


CHANNEL = """
import json, os, socket, struct, sys
guest = sys.modules['_kernel_env_helpers']._guest
path, token = guest.channel._path, guest.channel._token
def frame(data): return struct.pack('>Q', len(data)) + data
HELLO = frame(json.dumps({'token': token}).encode())
def talk(*data):
    s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect(path)
    for d in data: s.sendall(d)
    try: return s.recv(2**16)[8:]
    except OSError as error: return type(error).__name__.encode()
cell = guest.bridge.current_cell()
def request(op, **fields): return frame(json.dumps({'op': op, 'cell': cell} | fields).encode())
def call(**fields): return request('call', name='llm_query', **fields)
"""

ATTACKS = {
    "a wrong token": "talk(frame(json.dumps({'token': 'x' * 64}).encode()))",
    "no token": "talk(frame(b'{}'))",
    "a token that is a number": "talk(frame(b'{\"token\": 5}'))",
    "no JSON": "talk(HELLO, frame(b'nonsense'))",
    "no UTF-8": "talk(HELLO, frame(b'\\xff\\xfe'))",
    "NaN": "talk(HELLO, call(arguments={'prompt': 'x', 'n': float('nan')}))",
    "deep JSON": "talk(HELLO, frame(b'[' * 100_000))",
    "a list": "talk(HELLO, frame(b'[]'))",
    "a giant frame": "talk(HELLO, struct.pack('>Q', 2**62))",
    "a giant hello": "talk(struct.pack('>Q', 2**20))",
    "another cell's id": "talk(HELLO, request('submit', cell='x', text='forged'))",
    "an unknown op": "talk(HELLO, request('eval'))",
    "a place outside the context": "talk(HELLO, request('context', start=10**9))",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_the_helper_channel_is_counted_and_survived(start: StartEnv, name: str) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(CHANNEL)
    observation = env.execute(f"cell = guest.bridge.current_cell()\nprint({ATTACKS[name]})").observation
    assert observation.status == "ok"
    assert not observation.done
    reply = observation.result.stdout
    assert reply.startswith(("b''", "b'ConnectionResetError", "b'BrokenPipeError")) or "refused" in reply
    assert "1 malformed or unauthorised messages from the kernel were not taken." in observation.result.stderr
    assert env.execute("llm_query('on')").observation.result.stdout == "'ON'\n"


def test_a_truncated_frame_costs_nothing(start: StartEnv) -> None:
    env = start(llm_query_fn=str.upper)
    code = "s = socket.socket(socket.AF_UNIX); s.connect(path); s.sendall(HELLO + call()[:-3]); s.close()"
    env.execute(CHANNEL)
    assert env.execute(code).observation.status == "ok"
    assert env.execute("llm_query('on')").observation.result.stdout == "'ON'\n"


def test_ten_thousand_connections_cost_the_host_no_descriptors(start: StartEnv) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(CHANNEL)
    before = len(os.listdir("/proc/self/fd"))
    code = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (min(12_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
held = []
for n in range(10_000):
    s = socket.socket(socket.AF_UNIX)
    s.connect(path)
    held.append(s)
    if len(held) > 900: held.pop().close()
print(len(held) > 800, llm_query('on'))
import threading
said = []
def ask():
    try: said.append(llm_query('x'))
    except HelperError as error: said.append(str(error))
thread = threading.Thread(target=ask); thread.start(); thread.join()
print(said)
"""
    observation = env.execute(code).observation
    assert observation.result.stdout == "True ON\n['refused: more than 257 threads hold a connection']\n"
    assert len(os.listdir("/proc/self/fd")) < before + 300
    assert env.execute("for s in held: s.close()\nllm_query('on')").observation.result.stdout == "'ON'\n"
    assert env.execute("thread = threading.Thread(target=ask); thread.start(); thread.join(); said[-1]")
    assert env.execute("said[-1]").observation.result.stdout == "'X'\n"
    assert len(os.listdir("/proc/self/fd")) <= before + 2
