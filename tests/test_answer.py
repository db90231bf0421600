"""Printed markers, without a kernel; the rules with one are in contract/test_rules.py."""

from __future__ import annotations

import pytest

from kernel_env.answer import Marker, printed_marker


def test_many_unbalanced_markers_take_one_pass() -> None:
    stdout = "FINAL(\n" * 200_000 + "FINAL(x)\n"
    assert printed_marker("print('FINAL(')", stdout) == Marker("x", is_variable=False)


@pytest.mark.parametrize(
    ("code", "stdout", "found"),
    [
        ("print('FINAL(1)')", "FINAL(1)\n", Marker("1", is_variable=False)),
        ("print('FINAL_VAR(x)')", "FINAL_VAR( 'x' )\n", Marker("x", is_variable=True)),
        ("print(f'FINAL({x})')", "a\nFINAL((b)(c))\n", Marker("(b)(c)", is_variable=False)),
        ("print(context)", "FINAL(1)\n", None),
        ("# FINAL(\nprint(context)", "FINAL(1)\n", None),
        ("FINAL(1) if False else print(context)", "FINAL(1)\n", None),
        ("!echo 'FINAL(1)'", "FINAL(1)\n", None),
        ("print('FINAL(1')", "FINAL(1\n", None),
        ("print(' FINAL(1)')", " FINAL(1)\n", None),
        ("print('FINAL(' + ')')", "FINAL()\n", Marker("", is_variable=False)),
        ("x = '\x00'", "FINAL(1)\n", None),
        ("(" * 5000, "FINAL(1)\n", None),
    ],
)
def test_printed_marker(code: str, stdout: str, found: Marker | None) -> None:
    assert printed_marker(code, stdout) == found
