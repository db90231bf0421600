"""Chat models, against a real HTTP server on loopback that follows a script."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from kernel_env import (
    ChatReply,
    ConfigError,
    HFChatModel,
    LocalREPLEnv,
    LocalRLMRunner,
    ModelError,
    ScriptedChatModel,
)
from kernel_env.notebook import to_notebook, write_notebook

from .chat_server import Server, completion

ASK = [{"role": "user", "content": "hello"}]
TOKEN = "hf_secret_token"


def ask(server: Server, **options: Any) -> ChatReply:
    model = HFChatModel("m", base_url=server.url, token=TOKEN, **options)
    return asyncio.run(model(ASK))


def test_a_reply_comes_with_what_it_took(server: Server) -> None:
    server.say(completion("hi"))
    reply = ask(server, temperature=0.5)
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens, reply.model) == ("hi", 11, 7, "served")
    assert server.requests[0]["messages"] == ASK
    assert (server.requests[0]["model"], server.requests[0]["temperature"]) == ("m", 0.5)
    assert server.tokens == [f"Bearer {TOKEN}"]


def test_a_call_may_name_another_model(server: Server) -> None:
    server.say(completion("hi"))
    asyncio.run(HFChatModel("m", base_url=server.url, token=TOKEN)(ASK, "other"))
    assert server.requests[0]["model"] == "other"


@pytest.mark.parametrize(
    ("status", "headers"), [(429, {"Retry-After": "0.2"}), (429, {}), (500, {}), (503, {}), (0, {})]
)
def test_what_may_pass_is_asked_again(server: Server, status: int, headers: dict[str, str]) -> None:
    server.say(b'{"error": {"message": "slow down"}}', status, headers)
    server.say(completion("at last"))
    begin = time.monotonic()
    assert ask(server).text == "at last"
    if "Retry-After" in headers:
        assert 0.2 <= time.monotonic() - begin < 3


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, b'{"error": {"message": "no model m here"}}', "replied 404: .*no model m here"),
        (401, b'{"error": {"message": "bad token"}}', "replied 401"),
        (400, b'{"error": {"message": "context too long"}}', "replied 400: .*context too long"),
        (200, b"not json", "no chat completion"),
        (200, b"\xff\xfe", "no chat completion"),
        (200, b'{"choices": []}', "no chat completion"),
        (200, b"[]", "no chat completion"),
    ],
)
def test_what_will_not_pass_is_an_error_at_once(server: Server, status: int, body: bytes, words: str) -> None:
    server.say(body, status)
    with pytest.raises(ModelError, match=words) as caught:
        ask(server)
    assert not caught.value.is_transient
    assert len(server.requests) == 1
    assert TOKEN not in str(caught.value)


def test_attempts_are_bounded(server: Server) -> None:
    for _ in range(3):
        server.say(b"{}", 500)
    with pytest.raises(ModelError, match="replied 500"):
        ask(server, attempts=2)
    assert len(server.requests) == 2


def test_a_server_that_takes_too_long_or_is_not_there_is_a_clear_error(server: Server) -> None:
    server.say(completion("late"), wait=3)
    with pytest.raises(ModelError, match=r"no reply within 0\.5 s|cannot be reached"):
        ask(server, timeout=0.5, attempts=1)
    nobody = HFChatModel("m", base_url="http://127.0.0.1:9/v1", token=TOKEN, attempts=1, timeout=5)
    with pytest.raises(ModelError, match="the server cannot be reached"):
        asyncio.run(nobody(ASK))


def test_a_huge_reply_and_none_are_replies(server: Server) -> None:
    server.say(completion("x" * 5_000_000))
    assert len(ask(server).text) == 5_000_000
    server.say(completion(None))
    assert ask(server).text == ""


def test_the_token_is_nowhere(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.say(b"{}", 500)
    server.say(completion("```repl\nFINAL(1)\n```"))
    model = HFChatModel("m", base_url=server.url, token=TOKEN)
    result = LocalRLMRunner(model).run("", "t")
    assert result.final_answer == "1"
    assert result.usage.prompt_tokens == 11
    assert result.usage_by_model.keys() == {"served"}
    assert TOKEN not in repr(model) + caplog.text + json.dumps(to_notebook(result.episode))


def test_without_a_model_or_a_server_there_is_nobody_to_ask() -> None:
    with pytest.raises(ConfigError, match="give a model, or the base_url"):
        HFChatModel()
    with pytest.raises(ConfigError, match="timeout = 0"):
        HFChatModel("m", timeout=0)


def test_a_script_of_replies_a_function_and_a_notebook(tmp_path: Path) -> None:
    listed = ScriptedChatModel(["one", "two"])
    assert [asyncio.run(listed(ASK)).text for _ in range(2)] == ["one", "two"]
    with pytest.raises(ModelError, match="the script has 2 replies"):
        asyncio.run(listed(ASK))
    assert listed.asked == [ASK] * 3
    called = ScriptedChatModel(lambda messages: messages[-1]["content"].upper())
    assert asyncio.run(called(ASK)).text == "HELLO"
    (tmp_path / "script.py").write_text("# %%\nx = len(context)\n# %%\nFINAL(x)")
    result = LocalRLMRunner(ScriptedChatModel(tmp_path / "script.py")).run("abc", "t")
    assert (result.final_answer, result.iterations) == ("3", 2)
    with pytest.raises(ConfigError, match="give replies"):
        ScriptedChatModel([5])  # type: ignore[list-item]


def test_the_notebook_of_a_run_replies_as_the_models_did(tmp_path: Path) -> None:
    asked = 0

    def chat(messages: list[dict[str, str]]) -> str:
        nonlocal asked
        asked += 1
        if len(messages) == 1:
            return f"leaf {asked}"
        if "the root" not in messages[2]["content"]:
            return f"```repl\nFINAL(llm_query('q') + ' {asked}')\n```"
        code = "FINAL(a + [llm_query('q')])" if len(messages) > 3 else "a = rlm_query_batched(['child'] * 2)"
        return f"```repl\n{code}\n```"

    first = LocalRLMRunner(chat, max_batch_workers=1).run("", "the root")
    write_notebook(first.episode, tmp_path / "run.ipynb")
    model = ScriptedChatModel(tmp_path / "run.ipynb")
    again = LocalRLMRunner(model, max_batch_workers=1).run("", "the root")
    assert again.final_answer == first.final_answer
    assert again.messages == first.messages
    assert len(model.asked) == asked
    with pytest.raises(ModelError, match="has no reply left to 'other', number 1"):
        asyncio.run(model([{"role": "user", "content": "other"}]))
    (tmp_path / "run-child-1.ipynb").unlink()
    with pytest.raises(ConfigError, match=r"the script: NotebookError: cannot read .*run-child-1.ipynb"):
        ScriptedChatModel(tmp_path / "run.ipynb")


def test_a_model_named_at_reset_answers_in_that_episode_alone(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.say(completion("one"))
    server.say(completion("two"))
    server.say(b'{"error": {"message": "no credit"}}', 402)
    with LocalREPLEnv(llm_query_fn=str.upper) as env:
        env.reset(llm_model=server.url, hf_token=TOKEN)
        shown = env.execute(
            "import os; print(llm_query('a'), llm_query_batched(['b']), os.environ)"
        ).observation
        assert shown.result.stdout.startswith("one ['two'] ")
        failed = env.execute("rlm_query('c')").observation
        assert failed.result.exception == "HelperError: rlm_query failed: ModelError"
        env.export(tmp_path / "episode.ipynb")
        told = [
            shown.model_dump_json(),
            repr(env.episode),
            (tmp_path / "episode.ipynb").read_text(),
            repr(env),
        ]
        env.reset()
        assert env.execute("print(llm_query('a'))").observation.result.stdout == "A\n"
    assert server.tokens == [f"Bearer {TOKEN}"] * 3
    assert not any(TOKEN in text for text in [*told, caplog.text])


def test_a_tool_called_budget_is_refused_where_children_have_one() -> None:
    with (
        LocalREPLEnv(tools={"budget": print}) as env,
        pytest.raises(ConfigError, match="reserved in the child"),
    ):
        env.reset(llm_model="m", rlm_max_depth=2)


def test_a_model_named_at_reset_works_in_child_episodes(server: Server) -> None:
    server.say(completion("```repl\nFINAL(rlm_query(context, context=7))\n```"))
    server.say(completion("```repl\nFINAL(context * 6)\n```"))
    with LocalREPLEnv() as env:
        env.reset(llm_model=server.url, hf_token=TOKEN, rlm_max_depth=3, rlm_max_iterations=4)
        shown = env.execute("print(rlm_query('begin'))").observation.result
        assert shown.stdout == "42\n", shown.stderr
        (child,) = env.episode.children
        assert (child.final_answer, child.children[0].final_answer) == ("42", "42")
        assert "4 replies" in child.messages[1]["content"]
