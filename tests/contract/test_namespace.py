"""Contract §2: what model code finds in its namespace."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from kernel_env import HelperError, Limits

from .conftest import Facade, MakeFacade

AWKWARD = "a\r\nb\rc\n\x00 \ud800 \U0001f600 é"


@pytest.mark.parametrize(
    "context",
    ["", AWKWARD, "x" * 3_000_000, "é" * 20_000_000, {"a": [1, 2.5, None, True, AWKWARD]}, [], 7],
    ids=["empty", "awkward", "3MB", "40MB-of-two-bytes", "dict", "empty-list", "number"],
)
def test_the_context_arrives_exactly(make: MakeFacade, context: Any) -> None:
    env = make()
    observation = env.reset(context=context)
    text = context if isinstance(context, str) else json.dumps(context, ensure_ascii=False)
    assert observation.context_length == len(text)
    assert observation.context_preview == text[:500]
    assert env.state().context == text
    code = "import hashlib, json\nd = hashlib.sha256(json.dumps(context).encode()).hexdigest()"
    code += "\nprint(type(context), d)"
    digest = hashlib.sha256(json.dumps(context).encode()).hexdigest()
    assert env.execute(code).result.stdout == f"{type(context)} {digest}\n"


def test_final_submits_and_prints_itself(make: MakeFacade) -> None:
    env = make()
    env.reset()
    observation = env.execute("FINAL([1, 'a'])")
    assert (observation.done, observation.final_answer, observation.done_reason) == (
        True,
        "[1, 'a']",
        "final",
    )
    assert observation.result.stdout == "FINAL([1, 'a'])\n"


def test_the_last_final_of_a_cell_counts(make: MakeFacade) -> None:
    env = make()
    env.reset()
    assert env.execute("FINAL('first')\nFINAL('second')\nprint('more')").final_answer == "second"


@pytest.mark.parametrize(
    ("before", "call", "answer"),
    [
        ("x = 5", "FINAL_VAR('x')", "5"),
        ("x = 5", "FINAL_VAR('\"x\"')", "5"),
        ("x = None", "FINAL_VAR('x')", "None"),
        ("x = ''", "FINAL_VAR('x')", ""),
        ("x = 5", "FINAL_VAR(x)", "5"),
        ("x = 5", "FINAL_VAR('not an identifier')", "not an identifier"),
        ("x = 5", "FINAL_VAR([x])", "[5]"),
    ],
)
def test_final_var(make: MakeFacade, before: str, call: str, answer: str) -> None:
    env = make()
    env.reset()
    assert env.execute(f"{before}\n{call}").final_answer == answer


def test_final_var_of_an_unbound_name_says_which_names_there_are(make: MakeFacade) -> None:
    env = make()
    env.reset()
    env.execute("total = 1")
    observation = env.execute("FINAL_VAR('totl')")
    assert not observation.done
    assert observation.result.exception is not None
    assert all(word in observation.result.exception for word in ("'totl'", "total", "FINAL('totl')"))


@pytest.mark.parametrize(
    "code",
    [
        "answer['content'] = 42\nanswer['ready'] = True",
        "answer['ready'] = True\nanswer['content'] = 42",
        "answer.update(content='42', ready=1)",
        "answer = {'content': 42, 'ready': True}",
        "answer |= {'content': 42, 'ready': 'yes'}",
        "answer['content'] = 42; answer['ready'] = True\n1/0",
    ],
)
def test_a_ready_answer_counts_however_it_was_set(make: MakeFacade, code: str) -> None:
    env = make()
    env.reset()
    observation = env.execute(code)
    assert (observation.done, observation.final_answer) == (True, "42")


def test_an_answer_that_is_no_dict_is_an_ordinary_variable(make: MakeFacade) -> None:
    env = make()
    env.reset()
    assert not env.execute("answer = 'ready'").done
    assert env.variable("answer").result.stdout == "'ready'\n"


def test_an_answer_that_cannot_be_text_is_said_and_not_submitted(make: MakeFacade) -> None:
    env = make()
    env.reset()
    code = (
        "class Bad:\n    def __str__(self): raise SystemExit('no')\nanswer.update(content=Bad(), ready=True)"
    )
    observation = env.execute(code)
    assert not observation.done
    assert "answer not submitted: SystemExit" in observation.result.stderr
    assert env.execute("1 + 1").result.stdout == "2\n"


def test_large_and_awkward_answers_are_whole(make: MakeFacade) -> None:
    env = make()
    env.reset(context=AWKWARD * 400_000)
    assert env.execute("FINAL(context)").final_answer == AWKWARD * 400_000


def test_show_vars_lists_what_cells_defined(make: MakeFacade) -> None:
    env = make(llm_query_fn=str)
    env.reset(context="c")
    env.execute("import math\nb = 1\na = 2\n_hidden = 3")
    assert env.execute("SHOW_VARS()").result.stdout == "['a', 'b', 'math']\n"
    names = env.execute("pass").available_variables
    assert names == sorted(names)
    assert {"a", "context", "answer", "FINAL", "llm_query", "llm_batch"} <= set(names)
    assert env.state().namespace_keys == names


@pytest.fixture
def broken(make: MakeFacade) -> Facade:
    env = make(llm_query_fn=str.upper)
    env.reset(context="the context")
    return env


CLEAR = "for name in list(globals()):\n    if not name.startswith('__'): del globals()[name]"


@pytest.mark.parametrize("code", ["FINAL = 1", "del FINAL", "del FINAL, llm_query", "%reset -f", CLEAR])
def test_helpers_come_back_and_the_observation_says_so(broken: Facade, code: str) -> None:
    observation = broken.execute(code)
    assert "Restored:" in observation.result.stderr
    assert "FINAL" in observation.result.stderr
    assert broken.execute("llm_query('x')").result.stdout == "'X'\n"
    assert broken.variable("Out").result.success
    assert broken.execute("FINAL(1)").final_answer == "1"


def test_context_and_answer_come_back_only_when_deleted(broken: Facade) -> None:
    assert "context" in broken.execute("del context, answer").result.stderr
    assert (
        broken.execute("context, answer").result.stdout
        == "('the context', {'content': '', 'ready': False})\n"
    )
    assert broken.execute("context = 'mine'").result.stderr == ""
    assert broken.variable("context").result.stdout == "'mine'\n"


def test_input_fails_at_once(share: MakeFacade) -> None:
    env = share()
    observation = env.execute("input('? ')")
    assert observation.result.exception is not None
    assert observation.result.exception.startswith("StdinNotImplementedError")


@pytest.mark.parametrize("code", ["exit()", "quit()", "get_ipython().ask_exit()", "exit"])
def test_exit_ends_the_cell_only(share: MakeFacade, code: str) -> None:
    env = share()
    begin = f"x = {code!r}\nprint('before')\n{code}"
    observation = env.execute(f"{begin}\nx = 2" if "(" in code else begin)
    assert observation.status == "ok"
    assert not observation.restarted
    assert env.variable("x").result.stdout == f"{code!r}\n"


def test_everything_ipython_does(share: MakeFacade) -> None:
    env = share()
    code = """
import asyncio, threading
class Point:
    def _repr_html_(self): return '<b>p</b>'
    def __repr__(self): return 'p'
await asyncio.sleep(0)
t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()
!echo shell
%timeit -n1 -r1 pass
Point()
"""
    observation = env.execute(code)
    assert observation.status == "ok", observation.result.stderr
    assert "thread\n" in observation.result.stdout
    assert "shell" in observation.result.stdout
    assert observation.outputs[-1]["data"] == {"text/html": "<b>p</b>", "text/plain": "p"}


def test_there_is_no_debugger_but_its_package_can_be_imported(share: MakeFacade) -> None:
    env = share()
    code = "'debugger' in get_ipython().kernel.kernel_info.get('supported_features', [])"
    assert env.execute(code).result.stdout == "False\n"
    result = env.execute("import debugpy.server.api as api; print(api.__name__)").result
    assert (result.stdout, result.stderr) == ("debugpy.server.api\n", "")


def test_a_plot_is_an_image_in_the_outputs(share: MakeFacade) -> None:
    env = share()
    observation = env.execute("import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()", timeout_s=60)
    assert [o for o in observation.outputs if "image/png" in o.get("data", {})]


def test_answers_over_the_limit_are_refused_not_cut(make: MakeFacade) -> None:
    env = make(limits=Limits(answer_bytes=1000))
    env.reset()
    observation = env.execute("FINAL('é' * 600)")
    assert not observation.done
    assert observation.result.exception is not None
    assert "1,200 bytes; Limits.answer_bytes is 1,000" in observation.result.exception
    observation = env.execute("answer.update(content='x' * 2000, ready=True)")
    assert not observation.done
    assert "Limits.answer_bytes is 1,000" in observation.result.stderr


def test_a_helper_that_is_not_configured_is_not_there(make: MakeFacade) -> None:
    env = make()
    names = env.reset().available_variables
    assert not {"llm_query", "rlm_query", "llm_query_batched"} & set(names)


def test_helper_error_is_the_same_class_for_users(make: MakeFacade) -> None:
    def fails(prompt: str) -> str:
        raise HelperError("the model says: ask later")

    env = make(llm_query_fn=fails)
    env.reset()
    code = "try: llm_query('x')\nexcept HelperError as error: print(error)"
    assert env.execute(code).result.stdout == "the model says: ask later\n"
