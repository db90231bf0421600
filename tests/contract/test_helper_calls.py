"""Contract §2: functions of the host, called from the kernel."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from typing import Any

import pytest

from kernel_env import Limits

from .conftest import MakeFacade


def value(make: MakeFacade, code: str, **options: Any) -> str:
    """The printed value of the last expression of `code` in a fresh episode."""
    env = make(**options)
    env.reset()
    observation = env.execute(code)
    assert observation.status == "ok", observation.result.stderr
    return observation.result.stdout.strip()


ADD = {"add": lambda a, b: a + b}


async def asynchronous(prompt: str, model: str | None = None) -> str:
    await asyncio.sleep(0)
    return f"{prompt}-{model}"


@pytest.mark.parametrize(
    ("function", "reply"),
    [
        (lambda prompt: f"{prompt}!", "'p!'"),
        (lambda prompt, model: f"{prompt}-{model}", "'p-m'"),
        (lambda prompt, m: f"{prompt}-{m}", "'p-m'"),
        (lambda prompt, suffix="?": prompt + suffix, "'p?'"),
        (lambda prompt, *, model=None: f"{prompt}-{model}", "'p-m'"),
        (lambda *args: str(args), "\"('p', 'm')\""),
        (lambda prompt, **options: f"{prompt}-{options}", "\"p-{'model': 'm'}\""),
        (asynchronous, "'p-m'"),
        (str.upper, "'P'"),
        (str, "'p'"),
    ],
)
def test_model_functions_of_every_form(make: MakeFacade, function: Any, reply: str) -> None:
    assert value(make, "llm_query('p', model='m')", llm_query_fn=function) == reply


def test_a_default_model_of_the_function_holds_where_the_call_names_none(make: MakeFacade) -> None:
    def model(prompt: str, model: str = "large") -> str:
        return f"{prompt}-{model}"

    assert (
        value(make, "llm_query('p'), llm_query('p', 'small')", llm_query_fn=model) == "('p-large', 'p-small')"
    )


def test_batches_without_a_batch_function_are_concurrent_singles(make: MakeFacade) -> None:
    barrier = threading.Barrier(8, timeout=20)

    def meets(prompt: str) -> str:
        barrier.wait()
        return prompt.upper()

    code = "llm_query_batched(list('abcdefgh')) == llm_batch(list('abcdefgh')) == list('ABCDEFGH')"
    assert value(make, code, llm_query_fn=meets) == "True"


def test_a_failure_names_the_exception_and_nothing_of_the_host(make: MakeFacade) -> None:
    calls = []

    def fails(prompt: str) -> str:
        calls.append(prompt)
        raise TypeError("secret-key-123 in /home/user")

    env = make(llm_query_fn=fails)
    env.reset()
    observation = env.execute("llm_query('x')")
    assert observation.result.exception == "HelperError: llm_query failed: TypeError"
    assert "secret" not in str(observation.outputs)
    assert calls == ["x"]


def test_a_function_that_exits_does_not_end_the_host(make: MakeFacade) -> None:
    async def exits(prompt: str) -> str:
        raise SystemExit(3)

    for function in (lambda prompt: exit(3), exits):
        env = make(llm_query_fn=function)
        env.reset()
        exception = env.execute("llm_query('x')").result.exception
        assert exception is not None
        assert exception.startswith("HelperError: llm_query failed")
        assert env.execute("1").status == "ok"


def test_a_batch_keeps_length_and_order_around_failures(make: MakeFacade) -> None:
    def fails_on_b(prompt: str) -> Any:
        if prompt == "b":
            raise ValueError
        return 5 if prompt == "c" else prompt.upper()

    code = """
replies = llm_query_batched(['a', 'b', 'c', 'd'])
assert [isinstance(r, HelperFailure) for r in replies] == [False, True, True, False]
assert replies[1] == replies[1].error == 'llm_query failed: ValueError'
print(list(replies))
"""
    expected = "['A', 'llm_query failed: ValueError', "
    expected += "\"llm_query failed: the host's function returned int, not str\", 'D']"
    assert value(make, code, llm_query_fn=fails_on_b) == expected


@pytest.mark.parametrize(
    ("batch", "reply"),
    [
        (lambda prompts: [p.upper() for p in prompts], "['A', 'B']"),
        (lambda prompts, model: [f"{p}{model}" for p in prompts], "['aNone', 'bNone']"),
        (
            lambda prompts: ["one"],
            "llm_query_batched failed: the host's function returned 1 items for 2 prompts",
        ),
        (lambda prompts: "ab", "returned str for 2 prompts"),
        (lambda prompts: ["A", 5], "item 1 is int, not str"),
        (lambda prompts: 1 / 0, "llm_query_batched failed: ZeroDivisionError"),
    ],
)
def test_batch_functions(make: MakeFacade, batch: Any, reply: str) -> None:
    replies = value(make, "r = llm_query_batched(['a', 'b'])\nassert len(r) == 2\nr", llm_batch_fn=batch)
    assert reply in replies


def test_a_batch_function_alone_serves_single_queries_too(make: MakeFacade) -> None:
    assert value(make, "llm_query('a')", llm_batch_fn=lambda prompts: [p.upper() for p in prompts]) == "'A'"


def test_an_empty_batch_is_empty(make: MakeFacade) -> None:
    assert value(make, "llm_query_batched([]), rlm_query_batched([])", llm_query_fn=str) == "([], [])"


def test_rlm_query_falls_back_to_a_plain_query(make: MakeFacade) -> None:
    assert value(make, "rlm_query('a'), rlm_query_batched(['b'])", llm_query_fn=str.upper) == "('A', ['B'])"


def test_rlm_query_hands_the_context_over(make: MakeFacade) -> None:
    def subcall(prompt: str, model: str | None, context: Any = None) -> str:
        return f"{prompt}-{model}-{context}"

    code = "rlm_query('a', 'm', {'k': 1}), rlm_query_batched(['b', 'c'], contexts=[1, 2])"
    assert value(make, code, subcall_fn=subcall) == "(\"a-m-{'k': 1}\", ['b-None-1', 'c-None-2'])"


def test_a_context_that_cannot_be_handed_over_is_an_error(make: MakeFacade) -> None:
    env = make(subcall_fn=lambda prompt, model: prompt)
    env.reset()
    observation = env.execute("rlm_query('a', context='c')")
    assert observation.result.exception == "HelperError: rlm_query: the host's function does not take context"
    observation = env.execute("rlm_query_batched(['a', 'b'], contexts=['c'])")
    assert observation.result.exception == "HelperError: rlm_query_batched: 2 prompts but 1 contexts"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("llm_query()", "missing a required argument: 'prompt'"),
        ("llm_query('a', 'b', 'c')", "too many positional arguments"),
        ("llm_query('a', temperature=1)", "got an unexpected keyword argument 'temperature'"),
        ("llm_query(5)", "prompt must be str, not int"),
        ("llm_query('a', model=5)", "model must be str, not int"),
        ("llm_query_batched('abc')", "prompts must be a list of str, not str"),
        ("llm_query_batched(['a', 5])", "prompts[1] must be str, not int"),
        ("add(1, {2})", "Object of type set is not JSON serializable"),
        ("add(float('nan'), 1)", "Out of range float values are not JSON compliant"),
    ],
)
def test_wrong_arguments_are_a_type_error_without_a_round_trip(
    share: MakeFacade, call: str, message: str
) -> None:
    env = share(llm_query_fn=str, tools=ADD)
    exception = env.execute(call).result.exception
    assert exception is not None
    assert exception.startswith("TypeError: ")
    assert message in exception
    assert env.episode.turns[-1].helper_calls == ()


def test_tools_keep_signature_and_docstring(make: MakeFacade) -> None:
    def search(query: str, *words: str, limit: int = 10, **options: Any) -> dict[str, Any]:
        """Search the archive.

        Second paragraph.
        """
        return {"query": query, "words": words, "limit": limit, "options": options}

    async def nap() -> None:
        await asyncio.sleep(0)

    env = make(tools={"search": search, "nap": nap, "largest": max})
    env.reset()
    shown = env.execute("import inspect; print(inspect.signature(search)); print(inspect.getdoc(search))")
    assert shown.result.stdout == f"{inspect.signature(search)}\n{inspect.getdoc(search)}\n".replace("'", "")
    reply = "{'query': 'q', 'words': ['w'], 'limit': 5, 'options': {'x': 1}}\n"
    assert env.execute("search('q', 'w', limit=5, x=1)").result.stdout == reply
    assert env.execute("print(nap(), largest(3, 4), largest([5, 6]))").result.stdout == "None 4 6\n"


def test_parameters_of_a_tool_may_have_any_name(make: MakeFacade) -> None:
    def tool(name: str, function: str = "f", self: str = "s", prompt: str = "p") -> list[str]:
        return [name, function, self, prompt]

    env = make(tools={"tool": tool})
    env.reset()
    assert env.execute("tool('n', self=1)").result.stdout == "['n', 'f', 1, 'p']\n"


def test_a_tool_must_return_json(make: MakeFacade) -> None:
    env = make(tools={"bad": lambda: object()})
    env.reset()
    expected = "HelperError: bad failed: it returned a object that is no JSON value"
    assert env.execute("bad()").result.exception == expected


def test_many_threads_call_at_once(make: MakeFacade) -> None:
    barrier = threading.Barrier(16, timeout=20)

    def meets(prompt: str) -> str:
        barrier.wait()
        return prompt

    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(16) as pool:
    assert list(pool.map(llm_query, map(str, range(64)))) == list(map(str, range(64)))
'done'
"""
    assert value(make, code, llm_query_fn=meets) == "'done'"


def test_helpers_work_in_tasks_and_forked_children(make: MakeFacade) -> None:
    code = """
import asyncio, multiprocessing
async def ask(x): return await asyncio.to_thread(llm_query, x)
print(await asyncio.gather(*map(ask, 'abc')))
def child(queue): queue.put(llm_query('from a child'))
context_ = multiprocessing.get_context('fork')
queue = context_.Queue()
process = context_.Process(target=child, args=(queue,))
process.start(); print(queue.get(timeout=30)); process.join()
"""
    env = make(llm_query_fn=str.upper)
    env.reset()
    stdout = env.execute(code).result.stdout
    assert "['A', 'B', 'C']" in stdout
    assert "FROM A CHILD" in stdout


def test_calls_of_an_ended_cell_are_refused(make: MakeFacade) -> None:
    env = make(llm_query_fn=str.upper)
    env.reset()
    env.execute("""
import threading
go, over, seen = threading.Event(), threading.Event(), []
def later():
    go.wait()
    for call in (lambda: llm_query('x'), lambda: FINAL('late')):
        try: seen.append(call())
        except HelperError as error: seen.append(str(error))
    over.set()
threading.Thread(target=later).start()
""")
    observation = env.execute("go.set(); over.wait(20); print(seen)")
    assert not observation.done
    assert observation.result.stdout.count("refused: its cell has ended") == 2
    assert env.episode.turns[1].helper_calls == ()


def test_a_pool_made_by_an_earlier_cell_works_for_the_cell_that_uses_it(make: MakeFacade) -> None:
    env = make(llm_query_fn=str.upper)
    env.reset()
    env.execute("from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(1)")
    env.execute("pool.submit(int).result()")
    assert env.execute("pool.submit(llm_query, 'x').result()").result.stdout == "'X'\n"


def test_concurrency_is_bounded_by_the_limit(make: MakeFacade) -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def counts(prompt: str) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)  # long enough for others to come in, if they may
        with lock:
            running -= 1
        return prompt

    options: dict[str, Any] = {"llm_query_fn": counts, "limits": Limits(helper_concurrency=3)}
    assert value(make, "len(llm_query_batched(['x'] * 20))", **options) == "20"
    assert most <= 3


def test_large_prompts_and_replies(make: MakeFacade) -> None:
    code = "len(llm_query('x' * 10_000_000))"
    assert value(make, code, llm_query_fn=lambda prompt: prompt + "é" * 1_000_000) == "11000000"


def test_a_call_over_the_frame_limit_is_refused(make: MakeFacade) -> None:
    env = make(llm_query_fn=str, limits=Limits(helper_frame_bytes=10_000))
    env.reset()
    exception = env.execute("llm_query('x' * 20_000)").result.exception
    assert exception is not None
    assert "Limits.helper_frame_bytes is 10,000" in exception
    assert env.execute("llm_query('x')").result.stdout == "'x'\n"
