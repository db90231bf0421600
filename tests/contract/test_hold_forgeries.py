"""Forged and broken messages, and strangers on the kernel's channels."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from kernel_env import Limits, LocalREPLEnv
from kernel_env.process import KernelProcess
from tests.processes import folder_of

from .conftest import LendEnv, StartEnv

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
    host = kernel.get_parent()['header']['session'].encode()
    frames = [host, *signed(*parts('execute_reply', content, parent))]
    if kernel.shell_channel_thread:
        kernel.shell_channel_thread.manager.get_subshell_to_shell_channel_socket(None).send_multipart(frames)
    else:
        kernel.shell_stream.send_multipart(frames)
        kernel.shell_stream.flush()
"""


def assert_whole(env: LocalREPLEnv, tmp_path: Path) -> None:
    """The next step is whole, and the record can be exported with everything that is in it."""
    observation = env.execute("print('next', llm_query('q'))\n40 + 2").observation
    assert observation.result.stdout.endswith("next Q\n42\n")
    assert (observation.status, observation.restarted, observation.done) == ("ok", False, False)
    assert "[kernel_env]" not in observation.result.stderr
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
    lend: LendEnv, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    env = lend(llm_query_fn=str.upper, limits=Limits(cell_output=10_000))
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
    lend: LendEnv, tmp_path: Path, name: str
) -> None:
    env = lend(llm_query_fn=str.upper)
    env.execute(FORGE)
    observation = env.execute(f"{STRANGE[name].strip()}\nprint('printed')").observation
    assert (observation.status, observation.result.stdout) == ("ok", "printed\n")
    assert observation.result.stderr == ""
    assert_whole(env, tmp_path)


def test_output_of_another_request_of_ours_shows_like_that_of_an_earlier_cell(
    lend: LendEnv, tmp_path: Path
) -> None:
    env = lend(llm_query_fn=str.upper)
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
    lend: LendEnv, tmp_path: Path, name: str
) -> None:
    env = lend(llm_query_fn=str.upper)
    env.execute(FORGE)
    turns = len(env.episode.turns)
    observation = env.execute(f"{ODD_OUTPUTS[name].strip()}\nprint('printed')").observation
    assert observation.status == "ok"
    assert observation.result.stdout.endswith("printed\n")
    assert len(env.episode.turns) == turns + 1
    assert_whole(env, tmp_path)


def test_deep_json_that_a_cell_displays_is_shown_or_left_out(lend: LendEnv, tmp_path: Path) -> None:
    env = lend(llm_query_fn=str.upper)
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
    lend: LendEnv, tmp_path: Path, name: str
) -> None:
    env = lend(llm_query_fn=str.upper)
    env.execute(FORGE)
    turns = len(env.episode.turns)
    # The sleep is for the host to read the forged end before the true one.
    observation = env.execute(
        f"print('printed', flush=True)\n{REPLIES[name].strip()}\nidle(); time.sleep(0.2)"
    ).observation
    assert observation.status in ("ok", "error")
    assert observation.result.stdout == "printed\n"
    assert not observation.restarted
    assert len(env.episode.turns) == turns + 1
    assert_whole(env, tmp_path)


@pytest.mark.parametrize(
    "code",
    ["reply(b'[1]')", "reply(b'null')", "reply(b'[' * 200_000)", "reply({}, parent=[])"],
)
def test_a_reply_that_is_no_object_is_counted_and_the_true_one_counts(
    lend: LendEnv, tmp_path: Path, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    env = lend(llm_query_fn=str.upper)
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
    env = start(llm_query_fn=str.upper, limits=Limits(kernel_start=8, interrupt_grace=1))
    env.execute(FORGE)
    begin = time.monotonic()
    env.execute("reply({'status': 'ok'}); idle()\nwhile True: time.sleep(0.01)", timeout_s=1)
    assert time.monotonic() - begin < 25
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
    client = BlockingKernelClient(connection_file=str(folder_of(env) / "connection.json"))
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
if kernel.shell_channel_thread:
    stream = kernel.shell_channel_thread.manager._shell_channel_to_main.to_stream
else:
    stream = kernel.shell_stream
while not stream.socket.get(zmq.EVENTS) & zmq.POLLIN: time.sleep(0.005)
kernel.io_loop.add_callback(stream.flush)  # to have looked takes away what wakes the loop
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
    assert len(env.episode.turns) == 4  # none of them twice


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


def test_the_time_between_a_second_client_s_cell_and_ours_is_not_ours(
    start: StartEnv, tmp_path: Path
) -> None:
    env = start(llm_query_fn=str.upper)
    with second_client(env) as client:
        # Its idle goes out, and only then the kernel's loop is held up, for less than a second.
        code = (
            "import time\nloop = get_ipython().kernel.io_loop\nprint('STARTED', flush=True)\ntime.sleep(2)\n"
        )
        client.execute(f"{code}loop.add_callback(time.sleep, 0.8)")
        wait_for_text(client, "STARTED")
        observation = env.execute("print('ours')", timeout_s=0.5).observation
        assert (observation.status, observation.result.stdout) == ("ok", "ours\n")
        assert observation.result.execution_time > 1.5
        assert_whole(env, tmp_path)


@pytest.mark.parametrize("message", ["not json", "[]", '{"status": 0}', '{"error": "x"}', '{"forked": true}'])
def test_what_a_kernel_says_on_its_other_sockets_changes_nothing(lend: LendEnv, message: str) -> None:
    env = lend(limits=Limits(restarts=100))
    code = f"""
import os, socket
for fd in os.listdir('/proc/self/fd'):
    try:
        if os.readlink(f'/proc/self/fd/{{fd}}').startswith('socket'):
            other = socket.socket(fileno=os.dup(int(fd)))
            if other.family == socket.AF_UNIX and other.type == socket.SOCK_SEQPACKET:
                other.send({message!r}.encode())
    except OSError:
        continue
os._exit(3)
"""
    observation = env.execute(code).observation
    assert (observation.status, observation.restarted) == ("died", True)
    assert observation.result.exception == "KernelDied: the kernel exited with code 3"
    assert env.execute("print('on')").observation.result.stdout == "on\n"
