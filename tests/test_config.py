"""What cannot be set, and what the process's environment gives."""

from __future__ import annotations

from typing import Any

import pytest

from kernel_env import ConfigError, Limits, LocalREPLEnv, REPLEnvironment
from kernel_env.config import from_env


async def asynchronous(output: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_output_length": 0}, "max_output_length = 0"),
        ({"max_output_length": "8192"}, "max_output_length = '8192'"),
        ({"context_preview_length": -1}, "context_preview_length = -1"),
        ({"llm_query_fn": "gpt"}, "llm_query_fn = 'gpt' is not callable"),
        ({"rubric": 1.0}, "rubric = 1.0 is not callable"),
        ({"on_output": asynchronous}, "on_output"),
        ({"tools": {"FINAL": print}}, r"tools\['FINAL'\]: the name is reserved"),
        ({"tools": {"llm_query": print}}, "reserved"),
        ({"tools": {"two words": print}}, "must be a Python identifier"),
        ({"tools": {"class": print}}, "must be a Python identifier"),
        ({"tools": {"_private": print}}, "must be a Python identifier"),
        ({"tools": {"five": 5}}, r"tools\['five'\] = 5 is not callable"),
        ({"isolation": "docker"}, "isolation='docker'"),
        ({"isolation": ["process"]}, r"isolation=\['process'\]; give one of auto, sandbox, process"),
        ({"kernel_name": 5}, "kernel_name = 5"),
        ({"limits": {"restarts": 1}}, "limits = "),
        ({"tools": [print]}, "tools = "),
        ({"preload": "numpy"}, r"preload = 'numpy'; give a sequence of module names"),
        ({"preload": ["numpy.", "os"]}, r"preload = \['numpy.', 'os'\]"),
        ({"preload": [5]}, r"preload = \[5\]"),
        ({"rlm_max_depth": 0}, "rlm_max_depth = 0"),
        ({"rlm_max_iterations": -5}, "rlm_max_iterations = -5"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named_at_construction(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        LocalREPLEnv(**options)


def test_max_iterations_is_checked_at_construction() -> None:
    with pytest.raises(ConfigError, match="max_iterations = 0"):
        REPLEnvironment(max_iterations=0)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("memory_bytes", 32 * 2**20),
        ("processes", 16),
        ("open_files", 64),
        ("file_bytes", 2**20),
        ("workdir_bytes", 2**20),
        ("workdir_files", 100),
    ],
)
def test_a_limit_below_what_a_kernel_needs_names_the_least_that_works(name: str, least: int) -> None:
    with pytest.raises(ConfigError, match=f"Limits.{name} = {least - 1}; give a whole number >= {least}"):
        Limits(**{name: least - 1})
    with LocalREPLEnv(limits=Limits(**{name: least}), llm_query_fn=str.upper) as env:
        env.reset(context="here")
        code = "import json, re, threading, os\nprint(os.system('true'), llm_query(context))"
        assert env.execute(code).observation.result.stdout == "0 HERE\n"
        assert env.execute("1 / 0").observation.result.exception == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("name", list(Limits.__dataclass_fields__))
@pytest.mark.parametrize("value", [-1, "1", True, None])
def test_limits_are_positive_numbers(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"Limits.{name} = {value!r}"):
        Limits(**{name: value})


@pytest.mark.parametrize("name", ["restarts", "cell_output", "answer_bytes", "helper_concurrency"])
def test_counts_and_sizes_are_whole_numbers(name: str) -> None:
    with pytest.raises(ConfigError, match=f"Limits.{name} = 1.5; give a whole number"):
        Limits(**{name: 1.5})  # type: ignore[arg-type]


def test_zero_restarts_are_a_limit_and_zero_seconds_are_not() -> None:
    assert Limits(restarts=0).restarts == 0
    with pytest.raises(ConfigError, match="cell_active = 0"):
        Limits(cell_active=0)


def test_a_kernel_gets_an_allow_list_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("PYTHONSTARTUP", "/tmp/startup.py")
    monkeypatch.setenv("LC_TIME", "C")
    variables = from_env().kernel_variables
    assert variables["LC_TIME"] == "C"
    assert "PATH" in variables
    assert not {"OPENAI_API_KEY", "PYTHONSTARTUP", "HOME"} & variables.keys()


def test_an_explicit_argument_beats_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPL_CONTEXT", "from the variable")
    monkeypatch.setenv("REPL_TASK_PROMPT", "task of the variable")
    env = REPLEnvironment(task_prompt="task of the constructor")
    try:
        env.reset()
        assert (env.state.context, env.state.task_prompt) == ("from the variable", "task of the constructor")
        env.reset(context="", task_prompt="of the reset")
        assert (env.state.context, env.state.task_prompt) == ("", "of the reset")
    finally:
        env.close()
