"""What of a reply is code, what a model is told, and how results are shown to it."""

from __future__ import annotations

import inspect

import pytest

from kernel_env import CodeBlockResult, REPLObservation
from kernel_env.calls import Helper
from kernel_env.prompts import (
    RLM_SYSTEM_PROMPT,
    RLM_SYSTEM_PROMPT_QWEN,
    QueryMetadata,
    build_rlm_system_prompt,
    build_user_prompt,
    describe_helpers,
    extract_code_blocks,
    format_observations,
)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("no code", []),
        ("```repl\nx = 1\n```", ["x = 1"]),
        ("```python\na\n```\nthen\n```repl\nb\n```\n```py\nc\n```", ["a", "b", "c"]),
        ("~~~repl\nx\n~~~", ["x"]),
        ("````repl\nprint('''\n```\n''')\n````", ["print('''\n```\n''')"]),
        ("```repl\nx = 1\ny = 2", ["x = 1\ny = 2"]),
        ("- a list:\n\n  ```repl\n  if x:\n      y\n  ```", ["if x:\n    y"]),
        ("> ```repl\n> x\n> ```", ["x"]),
        ("```python3\nx\n```", []),
        ("```replica\nx\n```", []),
        ("```\nx\n```", []),
        ("```json\n{}\n```", []),
        ("inline ```repl x``` is none", []),
        ("    ```repl\n    x\n    ```", []),
        ("```repl\n\n```", []),
        ("```repl title='a'\nx\n```", ["x"]),
        ("```repl\r\nx\r\n```", ["x"]),
        ("```repl\n" + "x = 1\n" * 200_000 + "```", ["\n".join(["x = 1"] * 200_000)]),
    ],
)
def test_code_blocks(text: str, blocks: list[str]) -> None:
    assert extract_code_blocks(text) == blocks


def test_another_language_can_be_asked_for() -> None:
    assert extract_code_blocks("```sql\nselect 1\n```\n```repl\nx\n```", "sql") == ["select 1", "x"]


def test_the_system_prompt_tells_of_every_way_to_work_and_to_answer() -> None:
    for prompt in (RLM_SYSTEM_PROMPT, RLM_SYSTEM_PROMPT_QWEN):
        for name in (
            "context",
            "llm_query",
            "llm_query_batched",
            "rlm_query",
            "FINAL(",
            "FINAL_VAR",
            "SHOW_VARS",
        ):
            assert name in prompt
        assert extract_code_blocks(prompt)
    assert "cost" not in RLM_SYSTEM_PROMPT.replace("cheaper", "")
    assert "costs time and money" in RLM_SYSTEM_PROMPT_QWEN


def test_the_context_is_described_not_shown() -> None:
    messages = build_rlm_system_prompt("S", QueryMetadata.of(["secret"] * 150, 1234), notes=["Note."])
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[1]["content"].startswith(
        "`context` is a list of 1,234 characters, in 150 parts of 6, 6, "
    )
    assert messages[1]["content"].endswith(", and 50 more characters.\n\nNote.")
    assert "secret" not in messages[1]["content"]


def test_the_first_request_asks_to_look_first() -> None:
    first, later = build_user_prompt("How many?"), build_user_prompt("How many?", 3)
    assert "look at it before you answer" in first["content"]
    assert "look at it before you answer" not in later["content"]
    assert "How many?" in first["content"]
    assert "How many?" in later["content"]


def test_helpers_are_described_with_their_signatures() -> None:
    async def double(number: int, times: int = 2) -> int:
        """Multiply.

        More that nobody needs.
        """
        return number * times

    shown = describe_helpers(
        {"double": Helper(double, inspect.signature(double), inspect.getdoc(double) or "")}
    )
    assert shown.splitlines()[1] == "- `double(number: int, times: int = 2) -> int`: Multiply."


def test_results_are_shown_with_the_code_that_made_them() -> None:
    observations = [
        REPLObservation(result=CodeBlockResult(stdout="one\n")),
        REPLObservation(result=CodeBlockResult(stderr="Traceback …", success=False, exception="E: e")),
        REPLObservation(result=CodeBlockResult()),
    ]
    shown = format_observations(observations, ["print('one')", "s = '```'", "pass"])
    assert "Code:\n```python\nprint('one')\n```\n\nOutput of block 1:\none" in shown
    assert "````python\ns = '```'\n````" in shown
    assert "stderr:\nTraceback …" in shown
    assert shown.endswith("Output of block 3:\n(no output)")


def test_long_results_are_cut_with_a_marker() -> None:
    observation = REPLObservation(result=CodeBlockResult(stdout="x" * 50_000))
    shown = format_observations([observation], max_character_length=100)
    assert len(shown) < 300
    assert "50000" in shown.replace(",", "")
