"""Messages to outputs to text, against the notebook format and against a plain model of it."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_env.fitting import clip
from kernel_env.guest.messages import shortened
from kernel_env.outputs import Outputs, _size, plain_traceback, stderr_text, stdout_text


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


def held(outputs: list[dict[str, Any]]) -> int:
    return len(json.dumps(outputs))


@pytest.mark.parametrize(
    "message",
    [
        ("display_data", {"data": {"text/plain": "t" * 5000} | {f"a/{n}": "x" for n in range(20_000)}}),
        ("display_data", {"data": {f"a/{n}": "" for n in range(20_000)}}),
        ("display_data", {"data": {"a/" + "n" * 100_000: "x" * 5000}}),
        ("display_data", {"data": {"text/plain": "t"}, "metadata": {"m": "x" * 100_000}}),
        ("error", {"ename": "E" * 5000, "evalue": "v" * 5000, "traceback": ["t" * 5000] * 10}),
        ("error", {"ename": "E", "evalue": "v", "traceback": [""] * 20_000}),
    ],
)
def test_an_output_of_many_parts_is_bounded_as_a_whole(message: tuple[str, dict[str, Any]]) -> None:
    outputs = collect(message, limit=1000)
    assert held(outputs) < 3000
    assert "truncated, total" in str(outputs) or "not kept" in str(outputs)
    assert held(collect(*[message] * 5, limit=1000)) < 5000


def test_many_empty_pieces_of_a_stream_are_nothing() -> None:
    assert collect(*[stream("")] * 1000) == []


def test_what_is_cut_to_fit_stays_when_more_follows() -> None:
    outputs = collect(display("r" * 50_000), stream("on"), limit=10_000)
    assert "total 50000 chars" in outputs[0]["data"]["text/plain"]
    assert outputs[1]["text"] == "on"


@pytest.mark.parametrize("metadata", [5, {"deep": None}])
def test_an_update_that_is_no_display_changes_nothing(metadata: Any) -> None:
    if isinstance(metadata, dict):
        for _ in range(200):
            metadata = {"deep": metadata}
    outputs = Outputs(1000)
    outputs.add(*display("1", "a"))
    update = {"data": {"text/plain": "2"}, "metadata": metadata, "transient": {"display_id": "a"}}
    with pytest.raises((ValueError, TypeError)):
        outputs.add("update_display_data", update)
    assert outputs.finish()[0]["data"] == {"text/plain": "1"}


def test_an_update_finds_displays_only() -> None:
    text = {"name": "stdout", "text": "s", "transient": {"display_id": "a"}}
    got = collect(("stream", text), display("d", "a", "update_display_data"))
    assert got[0] == {"output_type": "stream", "name": "stdout", "text": "s"}
    assert got[1]["data"] == {"text/plain": "d"}


def test_an_update_of_what_was_cleared_or_has_no_id_shows_nothing() -> None:
    clear = ("clear_output", {"wait": False})
    assert collect(display("1", "a"), clear, display("2", "a", "update_display_data")) == []
    assert collect(display("2", None, "update_display_data")) == []
    again = collect(display("1", "a"), clear, display("2", "a"), display("3", "a", "update_display_data"))
    assert [o["data"]["text/plain"] for o in again] == ["3"]


def test_an_update_changes_so_many_displays_of_its_id_and_no_more() -> None:
    got = collect(*[display("1", "a")] * 500, display("2", "a", "update_display_data"))
    assert [o["data"]["text/plain"] for o in got] == ["2"] * 100 + ["1"] * 400


def test_json_of_texts_is_no_text_in_lines() -> None:
    (output,) = collect(("display_data", {"data": {"application/json": ["a", "b"], "text/html": ["a", "b"]}}))
    assert output["data"] == {"application/json": ["a", "b"], "text/html": "ab"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"text/plain": ["a\n", "b"], "image/png": "x" * 500}, "a\nb\n<image/png of 500 chars, over "),
        ({"text/plain": 5, "image/png": "x" * 500}, "5\n<image/png of 500 chars, over "),
        ({"image/png": ["x" * 500, "y"]}, "<image/png of 501 chars, over "),
        (
            {"application/json": None, "text/plain": "t" * 500},
            "t" * 50 + "\n... (truncated, total 500 chars) ",
        ),
    ],
)
def test_a_guest_shortens_any_display(data: dict[str, Any], expected: str) -> None:
    text = shortened({"data": data}, 100)["data"]["text/plain"]
    assert text.startswith(expected)


@pytest.mark.parametrize("limit", [10_000, 100_000])
def test_an_exception_that_both_sides_cut_has_its_true_length(limit: int) -> None:
    content = {"ename": "E", "evalue": "v" * 500_000, "traceback": ["head", "t" * 500_000, "tail"]}
    (output,) = collect(("error", shortened(content, limit // 2)), limit=limit)
    (line,) = output["traceback"]
    assert line.count("truncated") == output["evalue"].count("truncated") == 1
    assert "(truncated, total 500010 chars)" in line
    assert "(truncated, total 500000 chars)" in output["evalue"]
    assert held([output]) < limit


MESSAGES = st.one_of(
    st.builds(stream, st.text(max_size=400), st.sampled_from(["stdout", "stderr"])),
    st.builds(
        display,
        st.text(max_size=400),
        st.sampled_from([None, "a", "b"]),
        st.sampled_from(["display_data", "update_display_data", "execute_result"]),
    ),
    st.builds(
        lambda mime, text, plain: ("display_data", {"data": {mime: text} | plain, "metadata": {"m": text}}),
        st.sampled_from(["image/png", "application/json", "model/gltf+json", "application/x+json"]),
        st.text(max_size=400) | st.lists(st.text(max_size=20)) | st.just({"a": [1, None, float("nan")]}),
        st.sampled_from([{}, {"text/plain": "p"}, {"text/plain": ["p\n", "q"]}]),
    ),
    st.builds(
        lambda text, lines: ("error", {"ename": "E", "evalue": text, "traceback": [text] * lines}),
        st.text(max_size=400),
        st.integers(0, 50),
    ),
    st.builds(lambda wait: ("clear_output", {"wait": wait}), st.booleans()),
    st.just(("error", {"traceback": "no list"})),
    st.just(("stream", {"name": "stdout", "text": "lost", "dropped": 7})),
    st.just(("execute_result", {"data": {}, "execution_count": True})),
    st.just(("display_data", {"data": {}, "transient": {"display_id": "i" * 2000}})),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(MESSAGES, max_size=60), st.integers(1, 3000))
def test_any_messages_are_bounded_counted_and_valid(
    messages: list[tuple[str, dict[str, Any]]], limit: int
) -> None:
    outputs = Outputs(limit)
    for message in messages:
        with contextlib.suppress(ValueError):
            outputs.add(*message)
        pieces = [outputs._head, outputs._tail]
        assert outputs._sizes == [sum(piece.weight for piece in half) for half in pieces]
        assert all(piece.size == _size(piece.output) for half in pieces for piece in half)
    got = outputs.finish()
    assert held(got) < 20 * limit + 20_000
    cell = nbformat.v4.new_code_cell("", outputs=[nbformat.from_dict(o) for o in got])  # type: ignore[no-untyped-call]
    nbformat.validate(nbformat.v4.new_notebook(cells=[cell]))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "message",
    [
        ("display_data", {"data": {}, "transient": {"display_id": "i" * 100_000}}),
        ("error", {"ename": "", "evalue": "", "traceback": [""] * 4700}),
        ("error", {"ename": "", "evalue": "", "traceback": "x" * 100_000}),
    ],
)
def test_what_weighs_nothing_cannot_be_piled_up(message: tuple[str, dict[str, Any]]) -> None:
    outputs = Outputs(10_000)
    for _ in range(100):
        with contextlib.suppress(ValueError):
            outputs.add(*message)
    assert held(outputs.finish()) < 20_000
    assert not outputs._displays


def test_characters_that_come_alone_are_kept_together() -> None:
    outputs = Outputs(10**6)
    for n in range(10_000):
        outputs.add(*stream(str(n % 10)))
    assert len(outputs._head) < 50
    (output,) = outputs.finish()
    assert output["text"] == "0123456789" * 1000


def test_streams_in_turns_are_bounded_with_what_they_take_around_them() -> None:
    turns = [stream("x", name) for _ in range(5_000) for name in ("stdout", "stderr")]
    assert held(collect(*turns, limit=10_000)) < 30_000


@pytest.mark.parametrize("limit", [64, 100, 500, 514, 1000])
def test_a_short_result_is_whole_within_a_small_limit(limit: int) -> None:
    (output,) = collect(display("r" * 44), limit=limit)
    assert output["data"] == {"text/plain": "r" * 44}


def test_an_update_of_a_full_head_is_not_cut_to_be_longer() -> None:
    outputs = Outputs(10_000)
    outputs.add(*display("0%", "bar"))
    for n in range(200):
        outputs.add(*display(f"{n}"))
    outputs.add(*display("100% done: 15 of 15 files", "bar", "update_display_data"))
    assert outputs.finish()[0]["data"] == {"text/plain": "100% done: 15 of 15 files"}


def test_what_an_update_cuts_is_counted_and_what_it_brings_back_no_longer() -> None:
    outputs = Outputs(10_000)
    outputs.add(*display("1", "a"))
    outputs.add(*display("x" * 50_000, "a", "update_display_data"))
    assert outputs.dropped["stdout"] > 40_000
    outputs.add(*display("2", "a", "update_display_data"))
    assert not outputs.dropped
