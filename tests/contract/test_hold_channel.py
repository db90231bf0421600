"""The helper channel under attack: counted, logged, survived."""

from __future__ import annotations

import os
import re

import pytest

from .conftest import LendEnv, StartEnv

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


NOT_TAKEN = "1 malformed or unauthorised messages from the kernel were not taken."


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_the_helper_channel_is_counted_logged_and_survived(
    lend: LendEnv, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    env = lend(llm_query_fn=str.upper)
    env.execute(CHANNEL)
    with caplog.at_level("WARNING", "kernel_env"):
        observation = env.execute(f"cell = guest.bridge.current_cell()\nprint({ATTACKS[name]})").observation
    assert observation.status == "ok"
    assert not observation.done
    reply = observation.result.stdout
    assert reply.startswith(("b''", "b'ConnectionResetError", "b'BrokenPipeError")) or "refused" in reply
    assert NOT_TAKEN in observation.result.stderr
    assert caplog.text.count("not taken: ") == 1
    assert env.execute("llm_query('on')").observation.result.stdout == "'ON'\n"


def test_a_truncated_frame_is_counted_logged_and_survived(
    start: StartEnv, caplog: pytest.LogCaptureFixture
) -> None:
    env = start(llm_query_fn=str.upper)
    # The host closes its end once it has seen that of the kernel.
    code = (
        "s = socket.socket(socket.AF_UNIX); s.connect(path); s.sendall(HELLO + call()[:-3])\n"
        "s.shutdown(socket.SHUT_WR); s.recv(1)"
    )
    env.execute(CHANNEL)
    with caplog.at_level("WARNING", "kernel_env"):
        observation = env.execute(code).observation
    assert observation.status == "ok"
    assert NOT_TAKEN in observation.result.stderr
    assert "not taken: a frame that broke off after" in caplog.text
    assert env.execute("llm_query('on')").observation.result.stdout == "'ON'\n"


def test_endless_attacks_are_counted_and_do_not_fill_the_log(
    start: StartEnv, caplog: pytest.LogCaptureFixture
) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(CHANNEL)
    with caplog.at_level("WARNING", "kernel_env"):
        observation = env.execute(f"for _ in range(300): {ATTACKS['an unknown op']}").observation
    assert "300 malformed or unauthorised messages from the kernel" in observation.result.stderr
    assert caplog.text.count("not taken: ") == 20
    assert "what follows is counted and not logged" in caplog.text


@pytest.mark.parametrize("end", ["reset", "death"])
def test_the_token_of_an_earlier_kernel_is_worth_nothing(start: StartEnv, end: str) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(CHANNEL)
    token = env.execute("print(token)").observation.result.stdout.strip()
    env.reset() if end == "reset" else env.execute("os._exit(0)")
    env.execute(CHANNEL)
    observation = env.execute(
        f"HELLO = frame(json.dumps({{'token': {token!r}}}).encode())\n"
        "cell = guest.bridge.current_cell()\nprint(talk(HELLO, request('submit', text='x')))"
    ).observation
    assert not observation.done
    assert NOT_TAKEN in observation.result.stderr
    assert env.execute("token").observation.result.stdout != f"{token!r}\n"


def test_a_request_beside_a_cell_does_not_take_its_children(start: StartEnv) -> None:
    env = start(llm_query_fn=str.upper)
    code = """
import multiprocessing as m, sys, threading
bridge = sys.modules['_kernel_env_bridge']
beside = threading.Thread(target=bridge.enter_cell, args=('a request in a subshell',))
beside.start(); beside.join()
with m.get_context('spawn').Pool(1) as pool: print(pool.map(llm_query, ['a']))
"""
    assert env.execute(code).observation.result.stdout == "['A']\n"


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
    refused = re.search(r"([0-9]+) malformed or unauthorised messages", observation.result.stderr)
    assert refused is not None
    assert 10_000 - 257 <= int(refused[1]) <= 10_001
    assert len(os.listdir("/proc/self/fd")) < before + 300
    assert env.execute("for s in held: s.close()\nllm_query('on')").observation.result.stdout == "'ON'\n"
    env.execute("thread = threading.Thread(target=ask); thread.start(); thread.join()")
    assert env.execute("said[-1]").observation.result.stdout == "'X'\n"
    assert len(os.listdir("/proc/self/fd")) <= before + 2
