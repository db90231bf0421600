"""Forged and broken messages, strangers on the kernel's channels, and nonsense on the helper channel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from kernel_env import Limits, LocalREPLEnv
from kernel_env.process import KernelProcess

from .conftest import StartEnv

NOT_TAKEN = "malformed or unauthorised messages from the kernel were not taken."

FORGE = """
import json, threading, time
from jupyter_client.session import DELIM
kernel = get_ipython().kernel
def send(*frames):
    sent = threading.Event()
    def in_its_thread():
        kernel.iopub_thread.socket.send_multipart(list(frames))
        sent.set()
    kernel.iopub_thread.schedule(in_its_thread)
    assert sent.wait(20)
def encoded(value):
    return value if isinstance(value, bytes) else json.dumps(value, default=str).encode()
def parts(kind='stream', content=None, parent=None, header=None):
    content = {'name': 'stdout', 'text': 'FORGED'} if content is None else content
    parent = kernel.get_parent()['header'] if parent is None else parent
    header = {'msg_type': kind} if header is None else header
    return [encoded(header), encoded(parent), b'{}', encoded(content)]
def signed(*parts):
    return [DELIM, kernel.session.sign(list(parts)), *parts]
def forge(*args, **kwargs):
    send(*signed(*parts(*args, **kwargs)))
def idle():
    forge('status', {'execution_state': 'idle'})
def reply(content, parent=None):
    manager = kernel.shell_channel_thread.manager
    frames = signed(*parts('execute_reply', content, parent))
    host = kernel.get_parent()['header']['session'].encode()
    manager.get_subshell_to_shell_channel_socket(None).send_multipart([host, *frames])
"""


def assert_whole(env: LocalREPLEnv, tmp_path: Path) -> None:
    """The next step is whole, and the record can be exported with everything that is in it."""
    observation = env.execute("print('next', llm_query('q'))\n40 + 2").observation
    assert observation.result.stdout.endswith("next Q\n42\n")
    assert (observation.status, observation.restarted, observation.done) == ("ok", False, False)
    assert "kernel_env" not in observation.result.stderr
    nbformat.validate(nbformat.read(env.export(tmp_path / "record.ipynb"), as_version=4))  # type: ignore[no-untyped-call]


MALFORMED = {
    "no signature": "send(DELIM, b'', *parts())",
    "a wrong signature": "send(DELIM, b'0' * 64, *parts())",
    "the signature of another message": "send(*signed(*parts())[:-1], b'{}')",
    "deep JSON": "forge(content=b'[' * 200_000 + b']' * 200_000)",
    "deep JSON in an object": "forge(content=b'{\"a\":' * 200_000 + b'1' + b'}' * 200_000)",
    "a long integer": "forge(content=b'{\"text\": ' + b'9' * 100_000 + b'}')",
    "no delimiter": "send(*parts())",
    "an empty frame": "send(b'')",
    "the delimiter alone": "send(DELIM)",
    "too few parts": "send(*signed(*parts()[:2]))",
    "no JSON": "forge(content=b'{')",
    "no UTF-8": "forge(content=b'\\xff\\xff')",
    "a list for content": "forge(content=[1])",
    "null for content": "forge(content=b'null')",
    "text for content": "forge(content='text')",
    "a list for a parent": "forge(parent=[])",
    "a header without a type": "forge(header={})",
    "a list for a header": "forge(header=[1])",
    "a list for data": "forge('display_data', {'data': [1]})",
    "a number for metadata": "forge('display_data', {'data': {'text/plain': 'x'}, 'metadata': 5})",
    "a number for a traceback": "forge('error', {'traceback': 5})",
    "a list for transient data": "forge('display_data', {'data': {}, 'transient': [1]})",
    "more than the limit": "forge(content={'name': 'stdout', 'text': 'x' * 2**25})",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_message_is_counted_and_logged_and_costs_nothing(
    start: StartEnv, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    env = start(llm_query_fn=str.upper, limits=Limits(cell_output=10_000))
    env.execute(FORGE)
    with caplog.at_level("WARNING", "kernel_env"):
        observation = env.execute(f"{MALFORMED[name]}\nprint('printed')").observation
    assert (observation.status, observation.result.stdout) == ("ok", "printed\n")
    assert f"[kernel_env] 1 {NOT_TAKEN}" in observation.result.stderr
    assert "sent a broken message on iopub" in caplog.text
    assert_whole(env, tmp_path)


def test_a_thousand_malformed_messages_are_each_counted(start: StartEnv, tmp_path: Path) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(FORGE)
    observation = env.execute("for _ in range(1000): send(b'')\nprint('printed')").observation
    assert observation.result.stdout == "printed\n"
    assert f"[kernel_env] 1000 {NOT_TAKEN}" in observation.result.stderr
    assert_whole(env, tmp_path)


STRANGE = {
    "a type nobody knows": "forge('no_such_type', {'text': 'FORGED'})",
    "a list for a type": "forge(header={'msg_type': ['stream']})",
    "a comm nobody knows": "forge('comm_open', {'comm_id': 'x', 'target_name': 'nobody', 'data': {}})",
    "a comm message": "forge('comm_msg', {'comm_id': 'x', 'data': {'text': 'FORGED'}})",
    "another session's output": "forge(parent={'msg_id': 'x', 'session': 'another'})",
    "another session's, with this request's id": """
        forge(parent={**kernel.get_parent()['header'], 'session': 'another'})
        """,
    "output of nobody's": "forge(parent={})",
    "an id that is no text": "forge(parent={'msg_id': {'a': [1]}, 'session': ['another']})",
    "idle of another request": """
        forge('status', {'execution_state': 'idle'}, {**kernel.get_parent()['header'], 'msg_id': 'x'})
        """,
    "a state that is no text": "forge('status', {'execution_state': [1]})",
    "a second welcome": "forge('iopub_welcome', {})",
    "input nobody asked for": "forge('input_request', {'prompt': 'FORGED', 'password': True})",
    "a reply on the output channel": "forge('execute_reply', {'status': 'error', 'ename': 'FORGED'})",
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_message_that_is_not_for_this_cell_changes_nothing(
    start: StartEnv, tmp_path: Path, name: str
) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(FORGE)
    observation = env.execute(f"{STRANGE[name].strip()}\nprint('printed')").observation
    assert (observation.status, observation.result.stdout) == ("ok", "printed\n")
    assert observation.result.stderr == ""
    assert_whole(env, tmp_path)


def test_output_of_another_request_of_ours_shows_like_that_of_an_earlier_cell(
    start: StartEnv, tmp_path: Path
) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(FORGE)
    code = "forge(parent={**kernel.get_parent()['header'], 'msg_id': 'x'})\nprint('printed')"
    assert env.execute(code).observation.result.stdout == "FORGEDprinted\n"
    assert_whole(env, tmp_path)


ODD_OUTPUTS = {
    "NaN in metadata": """
        forge('display_data', b'{"data": {"text/plain": "x"}, "metadata": {"a": NaN}}')
        """,
    "infinity in data": """
        forge('display_data', b'{"data": {"text/plain": "x", "application/json": [Infinity]}}')
        """,
    "a count that is text": """
        forge('execute_result', {'data': {'text/plain': 'x'}, 'metadata': {}, 'execution_count': 'x'})
        """,
    "a count that is an object": """
        forge('execute_result', {'data': {'text/plain': 'x'}, 'metadata': {}, 'execution_count': {}})
        """,
    "a count below zero": """
        forge('execute_result', {'data': {'text/plain': 'x'}, 'metadata': {}, 'execution_count': -5})
        """,
    "more dropped than can be written": """
        for _ in range(2): forge('stream', b'{"text": "x", "dropped": ' + b'9' * 4300 + b'}')
        """,
    "less than nothing dropped": "forge('stream', {'name': 'stdout', 'text': 'x', 'dropped': -5})",
    "deep metadata": """
        forge('display_data', b'{"data": {}, "metadata": {"a": ' + b'[' * 600 + b']' * 600 + b'}}')
        """,
    "deep data": """
        forge('display_data', b'{"data": {"application/json": ' + b'[' * 600 + b']' * 600 + b'}}')
        """,
    "odd types of data": """
        forge('display_data', {'data': {'': 5, 'text/plain': None, 'image/png': {'a': 1}}, 'metadata': {}})
        """,
    "text for a traceback": "forge('error', {'ename': 5, 'evalue': [1], 'traceback': 'text'})",
    "a name nobody knows": "forge('stream', {'name': ['x'], 'text': {'a': 1}})",
    "lone surrogates": "forge('stream', {'name': 'stdout', 'text': '\\ud800'})",
    "an update of nothing": "forge('update_display_data', {'data': [1], 'transient': {'display_id': 'x'}})",
    "a clear that waits for ever": "forge('clear_output', {'wait': [1]})",
}


@pytest.mark.parametrize("name", ODD_OUTPUTS)
def test_forged_output_is_shown_or_left_out_and_the_record_stays_valid(
    start: StartEnv, tmp_path: Path, name: str
) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(FORGE)
    observation = env.execute(f"{ODD_OUTPUTS[name].strip()}\nprint('printed')").observation
    assert observation.status == "ok"
    assert observation.result.stdout.endswith("printed\n")
    assert len(env.episode.turns) == 2
    assert_whole(env, tmp_path)


def test_deep_json_that_a_cell_displays_is_shown_or_left_out(start: StartEnv, tmp_path: Path) -> None:
    env = start(llm_query_fn=str.upper)
    code = """
from IPython.display import JSON, display
value = 1
for _ in range(600): value = [value]
display(JSON(value))
del value
print('printed')
"""
    observation = env.execute(code).observation
    assert observation.status == "ok"
    assert observation.result.stdout.endswith("printed\n")
    assert_whole(env, tmp_path)


REPLIES = {
    "an ok": "reply({'status': 'ok'})",
    "an error": "reply({'status': 'error', 'ename': 'FORGED', 'evalue': 'x', 'traceback': []})",
    "nothing": "reply({})",
    "a status that is no text": "reply({'status': [1], 'ename': {'a': 1}, 'evalue': [1]})",
    "deep names": "reply(b'{\"ename\": ' + b'[' * 960 + b']' * 960 + b'}')",
    "long numbers": "reply(b'{\"ename\": ' + b'9' * 4300 + b', \"execution_count\": ' + b'9' * 4300 + b'}')",
    "a count that is true": "reply({'status': 'ok', 'execution_count': True})",
    "a number for payloads": "reply({'status': 'ok', 'payload': 5})",
    "an object for payloads": "reply({'status': 'ok', 'payload': {'source': 'kernel_env'}})",
    "a page that is none": "reply({'status': 'ok', 'payload': [{'source': 'page', 'data': [1]}, 5]})",
    "a report that is none": "reply({'status': 'ok', 'payload': [{'source': 'kernel_env', 'names': 5}]})",
    "a report of too many names": """
        reply({'status': 'ok', 'payload': [{'source': 'kernel_env', 'names': ['x'] * 20_000, 'changed': {},
               'restored': [], 'notes': []}]})
        """,
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_forged_end_with_any_reply_is_an_observation_and_the_next_step_is_whole(
    start: StartEnv, tmp_path: Path, name: str
) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(FORGE)
    # Once the forged reply is there, idle ends the request, before its own reply or after it.
    observation = env.execute(f"print('printed', flush=True)\n{REPLIES[name].strip()}\nidle();").observation
    assert observation.status in ("ok", "error")
    assert observation.result.stdout == "printed\n"
    assert not observation.restarted
    assert len(env.episode.turns) == 2
    assert_whole(env, tmp_path)


@pytest.mark.parametrize(
    "code",
    ["reply(b'[1]')", "reply(b'null')", "reply(b'[' * 200_000)", "reply({}, parent=[])"],
)
def test_a_reply_that_is_no_object_is_counted_and_the_true_one_counts(
    start: StartEnv, tmp_path: Path, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(FORGE)
    with caplog.at_level("WARNING", "kernel_env"):
        observation = env.execute(f"{code}\nprint('printed')").observation
    assert (observation.status, observation.result.stdout) == ("ok", "printed\n")
    assert f"[kernel_env] 1 {NOT_TAKEN}" in observation.result.stderr
    assert "sent a broken message on shell" in caplog.text
    assert_whole(env, tmp_path)


def test_a_reply_to_another_request_changes_nothing(start: StartEnv, tmp_path: Path) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(FORGE)
    code = "reply({'status': 'error', 'ename': 'FORGED'}, {'msg_id': 'x'})\nidle()\nprint('printed')"
    observations = [env.execute(code).observation, env.execute("x = 1").observation]
    assert [observation.status for observation in observations] == ["ok", "ok"]
    assert "printed\n" in "".join(observation.result.stdout for observation in observations)
    assert_whole(env, tmp_path)


def test_an_early_idle_loses_no_output(start: StartEnv, tmp_path: Path) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(FORGE)
    first = env.execute("print('before')\nidle()\nfor n in range(100): print('after', n)").observation
    second = env.execute("x = 1").observation
    assert (first.status, second.status) == ("ok", "ok")
    shown = first.result.stdout + second.result.stdout
    assert shown == "before\n" + "".join(f"after {n}\n" for n in range(100))
    assert_whole(env, tmp_path)


def test_a_cell_that_says_idle_and_goes_on_for_long_has_an_end(start: StartEnv, tmp_path: Path) -> None:
    env = start(llm_query_fn=str.upper, limits=Limits(interrupt_grace=1))
    env.execute(FORGE)
    begin = time.monotonic()
    observation = env.execute("idle()\ntime.sleep(600)", timeout_s=60).observation
    assert time.monotonic() - begin < 15
    assert (observation.status, observation.restarted) == ("died", True)
    assert "its reply did not come" in observation.result.stderr
    assert_whole(env, tmp_path)


def test_a_cell_that_forges_its_end_and_goes_on_for_ever_is_stopped(start: StartEnv, tmp_path: Path) -> None:
    env = start(llm_query_fn=str.upper, limits=Limits(kernel_start=3, interrupt_grace=1))
    env.execute(FORGE)
    begin = time.monotonic()
    env.execute("reply({'status': 'ok'}); idle()\nwhile True: time.sleep(0.01)", timeout_s=1)
    assert time.monotonic() - begin < 20
    assert_whole(env, tmp_path)


def test_a_forged_abort_does_not_run_the_cell_again(start: StartEnv, tmp_path: Path) -> None:
    runs: list[int] = []
    env = start(llm_query_fn=str.upper, tools={"ran": lambda: runs.append(1)})
    env.execute(FORGE)
    # The helper call before it is in any case no call of a cell that was aborted in the queue.
    env.execute("ran(); reply({'status': 'aborted'}); idle(); time.sleep(0.1)", timeout_s=2)
    assert len(runs) == 1
    assert_whole(env, tmp_path)


def test_a_stranger_that_is_said_to_be_busy_does_not_stop_the_clock(start: StartEnv, tmp_path: Path) -> None:
    env = start(llm_query_fn=str.upper)
    env.execute(FORGE)
    busy = (
        "forge('status', {'execution_state': 'busy'}, {'msg_id': f'{n}', 'session': f'{n}', 'x': 'x' * 1000})"
    )
    env.execute(f"for n in range(1000): {busy}")
    observation = env.execute("while True: pass", timeout_s=0.5).observation
    assert (observation.status, observation.restarted) == ("timeout", False)
    assert observation.result.execution_time < 5
    assert_whole(env, tmp_path)


@contextlib.contextmanager
def second_client(env: LocalREPLEnv) -> Iterator[Any]:
    """A client of the same kernel, with its key, that is no part of the environment."""
    folder = Path(env.execute("import os; print(os.getcwd())").observation.result.stdout.strip()).parent
    client = BlockingKernelClient(connection_file=str(folder / "connection.json"))
    client.load_connection_file()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=30)
        yield client
    finally:
        client.stop_channels()


def wait_for_text(client: Any, text: str) -> None:
    """Wait until a cell of the client's has printed `text`."""
    while True:
        message = client.get_iopub_msg(timeout=30)
        if message["msg_type"] == "stream" and text in message["content"]["text"]:
            return


def test_a_second_client_s_variables_are_there_and_its_output_is_not(start: StartEnv, tmp_path: Path) -> None:
    env = start(llm_query_fn=str.upper)
    with second_client(env) as client:
        code = "theirs = 41\nprint('THEIRS')\ntry: llm_query('q')\nexcept HelperError as e: refused = str(e)"
        assert client.execute(code, reply=True, timeout=30)["content"]["status"] == "ok"
        observation = env.execute("print(theirs + 1, refused)").observation
        assert observation.result.stdout.startswith("42 refused: its cell has ended")
        assert "theirs" in observation.available_variables
        failed = client.execute("1 / 0", reply=True, timeout=30)
        assert failed["content"]["ename"] == "ZeroDivisionError"
        assert_whole(env, tmp_path)
    assert not any("THEIRS" in str(turn.observation.outputs) for turn in env.episode.turns)
    assert [call.name for turn in env.episode.turns for call in turn.helper_calls] == ["llm_query"]


FAILS_BEFORE_OURS = """
import time, zmq
print('STARTED', flush=True)
kernel = get_ipython().kernel
queue = kernel.shell_channel_thread.manager._shell_channel_to_main
while not queue.to_socket.get(zmq.EVENTS) & zmq.POLLIN: time.sleep(0.005)
kernel.io_loop.add_callback(queue.to_stream.flush)  # to have looked takes away what wakes the loop
1 / 0
"""


def test_a_request_that_a_second_client_s_failure_aborts_is_run_exactly_once(
    start: StartEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    sent: list[str] = []
    send = KernelProcess.send

    def noted(process: KernelProcess, message: dict[str, Any]) -> None:
        sent.append(message["header"]["msg_type"])
        send(process, message)

    env = start(llm_query_fn=str.upper, tools={"ran": lambda: runs.append(1)})
    with second_client(env) as client:
        for number in range(1, 4):
            request = client.execute(FAILS_BEFORE_OURS, stop_on_error=True)
            wait_for_text(client, "STARTED")
            sent.clear()
            with monkeypatch.context() as patch:
                patch.setattr(KernelProcess, "send", noted)
                observation = env.execute("ran(); print('ours')", timeout_s=20).observation
            assert (observation.status, observation.result.stdout) == ("ok", "ours\n")
            assert sent.count("execute_request") >= 2, "nothing was aborted: this tests nothing"
            assert len(runs) == number
            assert client._recv_reply(request, timeout=30)["content"]["ename"] == "ZeroDivisionError"
        assert_whole(env, tmp_path)
    assert len(env.episode.turns) == 5


def test_the_time_of_a_second_client_s_cell_is_not_ours(start: StartEnv, tmp_path: Path) -> None:
    env = start(llm_query_fn=str.upper)
    with second_client(env) as client:
        request = client.execute("import time\nprint('STARTED', flush=True)\ntime.sleep(3)")
        wait_for_text(client, "STARTED")
        observation = env.execute("print('ours')", timeout_s=0.5).observation
        assert (observation.status, observation.result.stdout) == ("ok", "ours\n")
        assert observation.result.execution_time > 1.5  # three times what ours may be active
        assert env.episode.turns[-1].active_time < 0.5
        assert client._recv_reply(request, timeout=30)["content"]["status"] == "ok"
        # And while it is behind another's, ours still counts once it runs.
        observation = env.execute("while True: pass", timeout_s=0.5).observation
        assert observation.status == "timeout"
        assert_whole(env, tmp_path)


def test_a_second_client_that_sends_nonsense_costs_us_nothing(start: StartEnv, tmp_path: Path) -> None:
    env = start(llm_query_fn=str.upper)
    with second_client(env) as client:
        session, channel = client.session, client.shell_channel
        for kind in ("comm_open", "comm_msg", "comm_close", "no_such_request", "is_complete_request"):
            content = {"comm_id": "x", "target_name": "nobody", "data": {}}
            channel.send(session.msg(kind, content))
        for frames in ([b""], [b"x"], [b"<IDS|MSG>"], [b"<IDS|MSG>", b"bad", b"{}", b"{}", b"{}", b"{}"]):
            channel.socket.send_multipart(frames)
        client.kernel_info()
        assert_whole(env, tmp_path)
        # Its output, not ours: what ipykernel says of such requests.
        assert env.episode.turns[-1].observation.result.stderr == ""


# The helper channel.

PEER = """
import json, os, socket, struct, sys
channel = sys.modules['_kernel_env_helpers']._guest.channel
cell = sys.modules['_kernel_env_bridge'].current_cell
token = {'token': channel._token}
def frame(data): return struct.pack('>Q', len(data)) + data
def connected(hello=token):
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(os.path.join(os.path.dirname(os.getcwd()), 'h'))
    peer.settimeout(30)
    if hello is not None: peer.sendall(frame(json.dumps(hello).encode()))
    return peer
def said(peer, *frames):
    try:
        for data in frames: peer.sendall(data)
        head = peer.recv(8, socket.MSG_WAITALL)
        return json.loads(peer.recv(int.from_bytes(head, 'big'), socket.MSG_WAITALL)) if head else 'dropped'
    except ConnectionError:
        return 'dropped'
    finally:
        peer.close()
def request(op='call', name='llm_query', arguments={'prompt': 'x'}, **fields):
    return json.dumps({'op': op, 'cell': cell(), 'name': name, 'arguments': arguments, **fields}).encode()
"""


def start_with_peer(start: StartEnv, **options: Any) -> tuple[LocalREPLEnv, int]:
    """An environment whose helper channel is in use, and the number of descriptors this host then has."""
    env = start({"context": "ctx"}, **{"llm_query_fn": str.upper} | options)
    env.execute(PEER)
    env.execute("llm_query('x')")
    return env, len(os.listdir("/proc/self/fd"))


def assert_level(descriptors: int) -> None:
    """This host has no more file descriptors than before, as soon as it has seen the last peer go."""
    deadline = time.monotonic() + 20
    while len(os.listdir("/proc/self/fd")) > descriptors:
        assert time.monotonic() < deadline, {f: os.readlink(f"/proc/self/fd/{f}") for f in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{f}")}
        time.sleep(0.02)


DROPPED = {
    "a wrong token": "said(connected({'token': 'x' * 64}))",
    "a token that is no text": "said(connected({'token': [1]}))",
    "a lone surrogate for a token": "said(connected({'token': '\\ud800'}))",
    "no token": "said(connected(None), frame(request()))",
    "a list for a token": "said(connected([1]))",
    "a large first frame": "said(connected(None), frame(b'x' * 5000))",
    "a frame of a size beyond all bounds": "said(connected(), struct.pack('>Q', 2**63))",
    "a frame beyond the limit": "said(connected(), frame(request(arguments={'prompt': 'x' * 200_000})))",
    "no UTF-8": "said(connected(), frame(b'\\xff\\xfe'))",
    "NaN": "said(connected(), frame(request(arguments={'prompt': float('nan')})))",
    "deep JSON": "said(connected(), frame(b'[' * 50_000 + b']' * 50_000))",
    "deep JSON in an object": "said(connected(), frame(b'{\"op\":' * 10_000 + b'1' + b'}' * 10_000))",
    "a long integer": "said(connected(), frame(b'{\"op\": \"context\", \"start\": ' + b'9' * 50_000 + b'}'))",
    "no object": "said(connected(), frame(b'\"text\"'))",
    "nothing": "said(connected(), frame(b''))",
    "half a message": "said(connected(), frame(request()[:-5]))",
    "two requests at once": "said(connected(), frame(request()) + frame(request()))",
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_bad_frame_costs_its_connection_and_is_counted(
    start: StartEnv, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    limits = Limits(helper_frame_bytes=100_000, answer_bytes=10_000)
    env, descriptors = start_with_peer(start, limits=limits)
    with caplog.at_level("WARNING", "kernel_env"):
        observation = env.execute(f"print({DROPPED[name]}, llm_query('own'))").observation
    assert (observation.status, observation.result.stdout) == ("ok", "dropped OWN\n")
    assert f"[kernel_env] 1 {NOT_TAKEN}" in observation.result.stderr
    assert "the connection is dropped" in caplog.text
    assert_whole(env, tmp_path)
    assert_level(descriptors)


ENDED = "refused: its cell has ended, or it was started by no cell of this episode"
REFUSED = {
    "another cell": ("request(cell='another')", ENDED),
    "a cell that is no text": ("request(cell=[1])", ENDED),
    "another cell's answer": ("request('submit', cell='another', text='FORGED')", ENDED),
    "another cell's fault": ("request('broken', cell='another', text='FORGED')", ENDED),
    "an unknown request": ("request('eval')", "refused: unknown request"),
    "a request that is no text": ("request([1])", "refused: unknown request"),
    "no request": ("b'{}'", "refused: unknown request"),
    "a place below the context": ("request('context', start=-1)", "refused: the context has no such place"),
    "a place beyond it": ("request('context', start=10**100)", "refused: the context has no such place"),
    "a place that is text": ("request('context', start='0')", "refused: the context has no such place"),
    "a place that is none": ("request('context')", "refused: the context has no such place"),
    "an unknown helper": ("request(name='no_such')", "refused: there is no such helper"),
    "a helper that is no text": ("request(name=[1])", "refused: there is no such helper"),
    "arguments that are none": ("request(arguments=[1])", "refused: there is no such helper"),
    "wrong arguments": ("request(arguments={'x': 1})", "llm_query: unexpected arguments ['x']"),
    "a prompt that is no text": ("request(arguments={'prompt': 5})", "llm_query: prompts are text"),
    "an answer that is no text": ("request('submit', text=5)", "refused: an answer is text"),
}
COUNTED = (ENDED, "refused: unknown request", "refused: the context has no such place")


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_is_not_in_the_protocol_is_refused_with_the_reason(
    start: StartEnv, tmp_path: Path, name: str
) -> None:
    env, descriptors = start_with_peer(start)
    code, error = REFUSED[name]
    observation = env.execute(f"print(said(connected(), frame({code})), llm_query('own'))").observation
    assert observation.result.stdout == f"{ {'error': error} } OWN\n"
    assert (observation.status, observation.restarted, observation.done) == ("ok", False, False)
    assert (f"[kernel_env] 1 {NOT_TAKEN}" in observation.result.stderr) is (error in COUNTED)
    assert_whole(env, tmp_path)
    assert_level(descriptors)


def test_frames_that_never_end_are_forgotten_with_their_connection(start: StartEnv, tmp_path: Path) -> None:
    env, descriptors = start_with_peer(start)
    code = """
for size in (1, 7, 8, 20, 1_000_000):
    peer = connected()
    peer.sendall(frame(request(arguments={'prompt': 'x' * 2_000_000}))[:size])
    peer.close()
    peer = connected(None)
    peer.sendall(frame(b'x' * 4000)[:size])
    peer.close()
print(llm_query('own'))
"""
    observation = env.execute(code).observation
    assert (observation.status, observation.result.stdout) == ("ok", "OWN\n")
    assert_whole(env, tmp_path)
    assert_level(descriptors)


def test_ten_thousand_connections_leave_the_helpers_and_nothing_else(start: StartEnv, tmp_path: Path) -> None:
    env, descriptors = start_with_peer(start)
    code = """
for _ in range(50):
    peers = [connected(None) for _ in range(200)]
    for peer in peers: peer.close()
print(llm_query('own'))
"""
    observation = env.execute(code).observation
    assert (observation.status, observation.result.stdout) == ("ok", "OWN\n")
    assert_whole(env, tmp_path)
    assert_level(descriptors)
    # A thread that had no connection yet finds room for one.
    code = "import threading\nthread = threading.Thread(target=lambda: print(llm_query('in a thread')))\n"
    assert env.execute(f"{code}thread.start(); thread.join()").observation.result.stdout == "IN A THREAD\n"


def test_more_connections_than_there_are_threads_are_refused_with_the_reason(
    start: StartEnv, tmp_path: Path
) -> None:
    env, descriptors = start_with_peer(start, limits=Limits(helper_concurrency=10))
    code = """
peers = [connected() for _ in range(100)]
replies = [said(peers[-1]), llm_query('own')]
for peer in peers: peer.close()
print(replies)
"""
    observation = env.execute(code).observation
    assert observation.result.stdout == (
        "[{'error': 'refused: more than 41 threads hold a connection'}, 'OWN']\n"
    )
    assert "malformed or unauthorised messages" in observation.result.stderr
    assert_whole(env, tmp_path)
    assert_level(descriptors)


def test_a_second_request_while_one_is_in_flight_costs_both(start: StartEnv, tmp_path: Path) -> None:
    began = threading.Event()

    async def hang() -> None:
        began.set()
        await asyncio.sleep(3600)

    env, descriptors = start_with_peer(start, tools={"hang": hang, "has_begun": lambda: began.wait(30)})
    code = """
peer = connected()
peer.sendall(frame(request(name='hang', arguments={})))
print(has_begun(), said(peer, frame(request())), llm_query('own'))
"""
    observation = env.execute(code).observation
    assert (observation.status, observation.result.stdout) == ("ok", "True dropped OWN\n")
    assert f"[kernel_env] 1 {NOT_TAKEN}" in observation.result.stderr
    errors = {call.name: call.error for call in env.episode.turns[-1].helper_calls}
    assert errors == {
        "has_begun": None,
        "hang": "hang was cancelled: the caller went away",
        "llm_query": None,
    }
    assert_whole(env, tmp_path)
    assert_level(descriptors)


def test_a_kernel_that_says_it_is_broken_is_replaced(start: StartEnv, tmp_path: Path) -> None:
    env, _ = start_with_peer(start)
    observation = env.execute("said(connected(), frame(request('broken', text=[1])))").observation
    assert (observation.status, observation.restarted) == ("died", True)
    assert "could not go on and was killed: it does not say why" in observation.result.stderr
    assert_whole(env, tmp_path)


def test_a_stranger_between_two_steps_costs_nothing(start: StartEnv, tmp_path: Path) -> None:
    env, descriptors = start_with_peer(start)
    code = """
import threading
go = threading.Event()
thread = threading.Thread(target=lambda: (go.wait(), said(connected(), frame(request('call')))))
thread.start()
threading.Timer(0.2, go.set).start()
"""
    env.execute(code)
    observation = env.execute("thread.join()\nprint('joined')").observation
    assert (observation.status, observation.result.stdout) == ("ok", "joined\n")
    assert_whole(env, tmp_path)
    assert_level(descriptors)
