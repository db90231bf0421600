"""Messages to outputs to text, against the notebook format and against a plain model of it."""

from __future__ import annotations

from typing import Any

import pytest

from kernel_env.outputs import Outputs, clip, plain_traceback, stderr_text, stdout_text


def stream(text: str, name: str = "stdout") -> tuple[str, dict[str, Any]]:
    return "stream", {"name": name, "text": text}


def display(
    text: str, display_id: str | None = None, kind: str = "display_data"
) -> tuple[str, dict[str, Any]]:
    transient = {"display_id": display_id} if display_id else {}
    return kind, {"data": {"text/plain": text}, "metadata": {}, "transient": transient}


def collect(*messages: tuple[str, dict[str, Any]], limit: int = 10**6) -> list[dict[str, Any]]:
    outputs = Outputs(limit)
    for message in messages:
        outputs.add(*message)
    return outputs.finish()


def test_neighbouring_pieces_of_a_stream_are_one_output() -> None:
    got = collect(stream("a"), stream("b"), stream("c", "stderr"), stream("d"), stream("e"))
    assert [(o["name"], o["text"]) for o in got] == [("stdout", "ab"), ("stderr", "c"), ("stdout", "de")]


def test_an_update_changes_the_display_it_names() -> None:
    got = collect(display("1", "a"), display("2"), display("3", "a", "update_display_data"))
    assert [o["data"]["text/plain"] for o in got] == ["3", "2"]


def test_clear_output_clears_now_or_with_the_next_output() -> None:
    assert collect(stream("a"), ("clear_output", {"wait": False}), stream("b")) == collect(stream("b"))
    assert collect(stream("a"), ("clear_output", {"wait": True}), stream("b")) == collect(stream("b"))
    assert collect(stream("a"), ("clear_output", {"wait": True})) == collect(stream("a"))


def test_messages_that_are_no_output_are_ignored() -> None:
    assert collect(("comm_open", {"data": {}}), ("execute_input", {"code": "1"})) == []


def test_past_the_limit_the_first_and_the_latest_are_kept() -> None:
    (output,) = collect(*[stream(f"{n:09}\n") for n in range(10_000)], limit=1000)
    text = output["text"]
    assert text.startswith("000000000\n000000001\n")
    assert text.endswith("000009999\n")
    assert "(truncated, total 100000 chars)" in text
    assert len(text) < 1100


def test_an_output_that_is_too_large_says_so() -> None:
    message = ("display_data", {"data": {"image/png": "x" * 5000, "text/plain": "p"}, "metadata": {}})
    (output,) = collect(message, limit=1000)
    assert output["data"] == {"text/plain": "p\n<image/png of 5000 chars, over Limits.cell_output, not kept>"}
    (output,) = collect(("display_data", {"data": {"image/png": "x" * 5000}, "metadata": {}}), limit=1000)
    assert output["data"] == {"text/plain": "<image/png of 5000 chars, over Limits.cell_output, not kept>"}


def test_data_that_the_notebook_format_does_not_allow_becomes_text() -> None:
    data = {"text/plain": 5, "text/html": ["<b>", "</b>"], "application/json": {"a": float("nan")}}
    (output,) = collect(("display_data", {"data": data, "metadata": {}}))
    assert output["data"] == {"text/plain": "5", "text/html": "<b></b>", "application/json": {"a": None}}


@pytest.mark.parametrize("limit", [1, 2, 7, 10])
def test_clip_keeps_exactly_the_limit_around_the_marker(limit: int) -> None:
    clipped = clip("0123456789abc", limit)
    head, _, tail = clipped.partition("\n... (truncated, total 13 chars) ...\n")
    assert len(head) + len(tail) == limit
    assert len(head) - len(tail) in (0, 1)
    assert "0123456789abc".startswith(head)
    assert "0123456789abc".endswith(tail)
    assert clip("x" * limit, limit) == "x" * limit


def test_results_stand_on_lines_of_their_own() -> None:
    outputs = collect(stream("a"), display("b"), display("c"), stream("d"))
    assert stdout_text(outputs) == "a\nb\nc\nd"


def test_tracebacks_lose_colours_and_folders() -> None:
    lines = [
        "\x1b[31mFile \x1b[39m\x1b[32m/opt/python/lib/python3.11/json/decoder.py:337\x1b[39m, in decode",
        "File ~/src/module.py:3, in f",
        'File "/usr/lib/python3/dist-packages/six.py", line 3',
        "ValueError: /not/a/file.py",
    ]
    assert plain_traceback(lines).splitlines() == [
        "File json/decoder.py:337, in decode",
        "File module.py:3, in f",
        'File "six.py", line 3',
        "ValueError: /not/a/file.py",
    ]
    error = ("error", {"ename": "E", "evalue": "v", "traceback": lines[3:]})
    assert stderr_text(collect(stream("warn\n", "stderr"), error)) == "warn\nValueError: /not/a/file.py"
