"""A scripted model in real episodes, and its recursion into episodes of their own."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from kernel_env import Budget, ChatReply, ConfigError, LocalRLMRunner, ModelError, ResetRequired, pool
from kernel_env.notebook import to_notebook, write_notebook

Messages = list[dict[str, str]]
Chat = Callable[..., Any]


def says(*replies: str, leaf: str = "leaf") -> Chat:
    """A model that gives these replies in order in every run, and `leaf` to a plain query."""

    def chat(messages: Messages) -> str:
        if len(messages) == 1:
            return leaf
        return replies[sum(message["role"] == "assistant" for message in messages)]

    return chat


def repl(code: str) -> str:
    return f"I will run this.\n\n```repl\n{code}\n```\n"


def test_a_run_works_through_turns_to_an_answer() -> None:
    chat = says(repl("n = len(context)\nprint(n)"), repl("FINAL(n * 2)"))
    result = LocalRLMRunner(chat).run("x" * 21, "Twice its length?", expected_answer="42")
    assert (result.final_answer, result.iterations, result.depth) == ("42", 2, 0)
    assert [message["role"] for message in result.messages] == [
        "system",
        "user",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert "Output of block 1:\n21" in result.messages[4]["content"]
    assert "Twice its length?" in result.messages[2]["content"]
    assert result.episode.reward == 1.0
    assert result.episode.messages == result.messages
    json.dumps(to_notebook(result.episode))


def test_blocks_run_in_order_and_those_behind_the_answer_are_recorded_as_skipped() -> None:
    chat = says(repl("x = 1") + repl("x += 1\nFINAL(x)") + repl("x += 1") + repl("print(x)"))
    result = LocalRLMRunner(chat).run("", "t")
    assert result.final_answer == "2"
    (skipped,) = result.episode.skipped
    assert (skipped.after_turn, skipped.blocks) == (2, ["x += 1", "print(x)"])


@pytest.mark.parametrize("reply", ["", "only prose", "```json\n{}\n```", "FINAL(5) in prose", "x" * 10**6])
def test_a_reply_without_code_is_asked_to_go_on(reply: str) -> None:
    result = LocalRLMRunner(says(reply, repl("FINAL('done')"))).run("", "t")
    assert result.final_answer == "done"
    assert "There was no code in that reply" in result.messages[4]["content"]


@pytest.mark.parametrize(
    ("last", "answer"),
    [
        ("FINAL(7)", "7"),
        ("So:\nFINAL('a (b) c')", "a (b) c"),
        ("FINAL_VAR(kept)", "kept text"),
        ("It is 9.", "It is 9."),
        ("I would call FINAL(x) when done.", "I would call FINAL(x) when done."),
        ("", None),
    ],
)
def test_without_iterations_left_the_model_is_asked_once_more(last: str, answer: str | None) -> None:
    seen: list[Messages] = []

    def chat(messages: Messages) -> str:
        seen.append(messages)
        return last if len(seen) == 3 else repl("kept = 'kept text'")

    result = LocalRLMRunner(chat, max_iterations=2).run("", "t")
    assert (result.final_answer, result.iterations) == (answer, 2)
    assert "run out of REPL iterations" in seen[2][-1]["content"]
    assert len(seen) == 3


def test_more_blocks_than_steps_end_the_run_with_the_last_request() -> None:
    chat = says(repl("1") * 7, "FINAL(late)")
    result = LocalRLMRunner(chat, max_iterations=1, env_max_iterations_multiplier=5).run("", "t")
    assert result.final_answer == "late"
    assert len(result.episode.turns) == 5
    assert len(result.episode.skipped[0].blocks) == 2


def test_a_child_has_an_episode_of_its_own_with_its_own_context() -> None:
    def chat(messages: Messages) -> str:
        if "parent" in messages[2]["content"]:
            return repl("secret = 5\nFINAL(rlm_query('child', context=[1, 2, 3]))")
        return repl("FINAL(f\"{sum(context)} {'secret' in globals()}\")")

    result = LocalRLMRunner(chat).run("c", "parent")
    assert result.final_answer == "6 False"
    (trace,) = result.child_traces
    assert (trace.depth, trace.prompt_preview, trace.result_preview, trace.error) == (
        1,
        "child",
        "6 False",
        None,
    )
    (child,) = result.episode.children
    assert (child.context, child.task_prompt, child.final_answer) == ("[1, 2, 3]", "child", "6 False")


def test_each_child_is_a_notebook_linked_from_the_cell_that_started_it(tmp_path: Path) -> None:
    blocks = ("x = 1", "print(rlm_query_batched(['one [a]', 'two']))", "FINAL(rlm_query('three'))")

    def chat(messages: Messages) -> str:
        is_root = "root" in messages[2]["content"]
        return "".join(map(repl, blocks)) if is_root else repl("FINAL(context)")

    result = LocalRLMRunner(chat).run("", "root")
    write_notebook(result.episode, tmp_path / "run.ipynb")
    notebook = nbformat.read(tmp_path / "run.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    assert [cell.id for cell in notebook.cells if not cell.id.endswith("-head")][2:] == [
        *("turn-1", "turn-2", "turn-2-children", "turn-3", "turn-3-children")
    ]
    cells = {cell.id: cell.source for cell in notebook.cells}
    names = [f"run-child-{number}.ipynb" for number in (1, 2, 3)]
    assert notebook.metadata.kernel_env.episode.children == names
    assert sorted(re.findall(r"\]\((.*?)\)", cells["turn-2-children"])) == names[:2]
    assert f"[three]({names[2]}): three" in cells["turn-3-children"]
    for name in names:
        nbformat.validate(nbformat.read(tmp_path / name, as_version=4))  # type: ignore[no-untyped-call]


def test_a_child_without_context_gets_the_prompt_as_both() -> None:
    def chat(messages: Messages) -> str:
        is_root = "root" in messages[2]["content"]
        return repl("FINAL(rlm_query('the task'))" if is_root else "FINAL(context)")

    assert LocalRLMRunner(chat).run("", "root").final_answer == "the task"


@pytest.mark.parametrize(("depth", "levels"), [(1, 0), (2, 1), (4, 3)])
def test_depth_allows_one_level_fewer_of_children(depth: int, levels: int) -> None:
    chat = says(repl("FINAL(str(rlm_query('deeper')) + '+')"), leaf="leaf")
    result = LocalRLMRunner(chat, max_depth=depth).run("", "t")
    assert result.final_answer == "leaf" + "+" * (levels + 1)
    episode, found = result.episode, 0
    while episode.children:
        episode, found = episode.children[0], found + 1
    assert found == levels


def tree(fan_out: int) -> Chat:
    ask = f"rlm_query_batched(['t'] * {fan_out}, contexts=['c'] * {fan_out})"
    code = f"FINAL(sum(map(int, {ask})))"
    return says(repl(code), leaf="1")


@pytest.mark.parametrize("fan_out", [3, pytest.param(8, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_a_deep_and_wide_tree_on_two_workers_ends_and_holds_few_kernels(
    fan_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERNEL_ENV_MAX_KERNELS", "7")
    result = LocalRLMRunner(tree(fan_out), max_depth=4, max_batch_workers=2).run("", "t")
    assert result.final_answer == str(fan_out**4)
    assert pool._slots._used == 0


def test_a_tree_that_there_may_not_be_kernels_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNEL_ENV_MAX_KERNELS", "6")
    with pytest.raises(ConfigError, match="may hold 7 kernels at once"):
        LocalRLMRunner(tree(2), max_depth=4, max_batch_workers=2).run("", "t")


def test_no_more_children_work_at_once_than_there_are_workers() -> None:
    lock, active, most = threading.Lock(), 0, 0
    three = threading.Barrier(3)

    def chat(messages: Messages) -> str:
        nonlocal active, most
        if "root" in messages[2]["content"]:
            return repl("FINAL(len(rlm_query_batched(['t'] * 9)))")
        with lock:
            active += 1
            most = max(most, active)
        three.wait(60)
        with lock:
            active -= 1
        return repl("FINAL(1)")

    assert LocalRLMRunner(chat, max_batch_workers=3).run("", "root").final_answer == "9"
    assert most == 3


def test_children_are_bounded_in_all_and_by_batch() -> None:
    code = "FINAL(str([str(r) for r in rlm_query_batched(['t'] * 4)]))"

    def chat(messages: Messages) -> str:
        return repl(code if "root" in messages[2]["content"] else "FINAL('ok')")

    by_batch = LocalRLMRunner(chat, max_children_per_batch=3).run("", "root")
    answers = eval(str(by_batch.final_answer))
    assert answers[:3] == ["ok"] * 3
    assert "at most 3 children" in answers[3]
    in_all = LocalRLMRunner(chat, max_children_total=2).run("", "root")
    assert eval(str(in_all.final_answer)).count("ok") == 2


def test_a_child_s_answer_is_cut_to_the_limit() -> None:
    def chat(messages: Messages) -> str:
        root = "FINAL(len(rlm_query('t')))"
        return repl(root if "root" in messages[2]["content"] else "FINAL('x' * 500)")

    result = LocalRLMRunner(chat, result_truncation_limit=100).run("", "root")
    assert result.final_answer == "100"
    told = result.episode.turns[0].observation.result.stderr
    assert "An answer of a child was cut to result_truncation_limit = 100 characters." in told


def test_a_child_past_its_time_is_a_failure_and_its_kernel_is_gone() -> None:
    def chat(messages: Messages) -> str:
        root = "try: rlm_query('t')\nexcept HelperError as e: FINAL(str(e))"
        return repl(root if "root" in messages[2]["content"] else "import time; time.sleep(600)")

    result = LocalRLMRunner(chat, per_child_timeout_s=1.0).run("", "root")
    assert "the child took more than 1 s" in str(result.final_answer)
    assert result.child_traces[0].error == "the child took more than 1 s"
    assert [child.done_reason for child in result.episode.children] == ["closed"]
    assert pool._slots._used == 0


def test_callbacks_hear_of_children_and_may_raise() -> None:
    heard: list[tuple[Any, ...]] = []

    def start(*arguments: Any) -> None:
        heard.append(arguments)
        raise ValueError("a callback that raises is logged")

    def chat(messages: Messages) -> str:
        return repl("FINAL(rlm_query('t', model='m'))" if "root" in messages[2]["content"] else "FINAL('ok')")

    runner = LocalRLMRunner(chat, on_subcall_start=start, on_subcall_complete=lambda *a: heard.append(a))
    assert runner.run("", "root").final_answer == "ok"
    assert heard[0] == (1, "m", "t")
    assert (*heard[1][:2], heard[1][3]) == (1, "m", None)


def test_a_run_past_its_time_or_cancelled_takes_its_tree_along() -> None:
    def chat(messages: Messages) -> str:
        is_root = "root" in messages[2]["content"]
        return repl("rlm_query_batched(['t'] * 3)" if is_root else "import time; time.sleep(600)")

    with pytest.raises(TimeoutError):
        LocalRLMRunner(chat).run("", "root", timeout_s=1.5)
    assert pool._slots._used == 0

    async def cancelled() -> None:
        task = asyncio.create_task(LocalRLMRunner(chat).run_async("", "root"))
        await asyncio.sleep(1.5)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(cancelled())
    assert pool._slots._used == 0


def test_a_model_that_fails_ends_the_run_with_its_cause() -> None:
    def chat(messages: Messages) -> str:
        raise ConnectionError("no route")

    with pytest.raises(ModelError, match="could not be asked: ConnectionError: no route") as caught:
        LocalRLMRunner(chat).run("", "t")
    assert isinstance(caught.value.__cause__, ConnectionError)
    with pytest.raises(ModelError, match="replied with NoneType, which is no text"):
        LocalRLMRunner(lambda messages: None).run("", "t")
    assert pool._slots._used == 0


def test_a_model_that_fails_in_a_child_is_an_error_of_the_helper() -> None:
    def chat(messages: Messages) -> str:
        if "root" in messages[2]["content"]:
            return repl("try: rlm_query('t')\nexcept HelperError as e: FINAL(str(e))")
        raise ConnectionError("secret-key")

    answer = str(LocalRLMRunner(chat).run("", "root").final_answer)
    assert answer == "rlm_query failed: ModelError"


async def asynchronous(messages: Messages, model: str | None = None) -> Any:
    class Reply:
        text = repl(f"FINAL({model!r})")

    return Reply()


def test_an_async_function_that_takes_a_model_and_gives_an_object() -> None:
    assert LocalRLMRunner(asynchronous).run("", "t", model="big").final_answer == "big"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"llm_chat_fn": 5}, "llm_chat_fn = 5 is not callable"),
        ({"llm_chat_fn": lambda: ""}, r"llm_chat_fn takes \(\); it is called with \(messages\)"),
        ({"llm_chat_fn": lambda a, b, c: ""}, "llm_chat_fn takes"),
        ({"max_depth": -1}, "max_depth = -1"),
        ({"max_iterations": 0}, "max_iterations = 0"),
        ({"max_batch_workers": 0}, "max_batch_workers = 0"),
        ({"per_child_timeout_s": 0}, "per_child_timeout_s = 0"),
        ({"result_truncation_limit": -1}, "result_truncation_limit = -1"),
        ({"tools": {"FINAL": print}}, "reserved"),
        ({"tools": {"budget": print}}, "reserved in runs"),
        ({"isolation": "docker"}, "isolation='docker'"),
    ],
)
def test_bad_arguments_are_named_at_construction(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LocalRLMRunner(**{"llm_chat_fn": lambda messages: "", **options})


def test_tools_are_there_in_every_episode_and_described() -> None:
    def double(number: int) -> int:
        """Twice the number."""
        return 2 * number

    def chat(messages: Messages) -> str:
        assert "`double(number: int) -> int`: Twice the number." in messages[1]["content"]
        return repl("FINAL(rlm_query('t'))" if "root" in messages[2]["content"] else "FINAL(double(21))")

    assert LocalRLMRunner(chat, tools={"double": double}).run("", "root").final_answer == "42"


def test_a_backend_of_the_user_s_replaces_the_recursion() -> None:
    class Backend:
        def query(self, prompt: str, model: str | None = None) -> str:
            return f"q:{prompt}"

        def query_batched(self, prompts: list[str], model: str | None = None) -> list[str]:
            return [f"b:{prompt}" for prompt in prompts]

        def recursive_query(self, prompt: str, model: str | None = None) -> str:
            return f"r:{prompt}"

        def recursive_query_batched(self, prompts: list[str], model: str | None = None) -> list[str]:
            return [f"rb:{prompt}" for prompt in prompts]

    def factory(chat: Chat, **options: Any) -> Backend:
        assert options["depth"] == 0
        return Backend()

    asked = "llm_query('1'), *llm_query_batched(['2']), rlm_query('3'), *rlm_query_batched(['4'])"
    code = f"FINAL(' '.join([{asked}]))"
    result = LocalRLMRunner(says(repl(code)), backend_factory=factory).run("", "t")
    assert result.final_answer == "q:1 b:2 r:3 rb:4"


def test_what_the_model_function_does_to_its_messages_changes_nothing() -> None:
    def chat(messages: Messages) -> str:
        messages.clear()
        return repl("FINAL(1)")

    assert len(LocalRLMRunner(chat).run("", "t").messages) == 4


def test_it_works_inside_a_running_loop() -> None:
    async def main() -> str | None:
        return LocalRLMRunner(says(repl("FINAL('in a loop')"))).run("", "t").final_answer

    assert asyncio.run(main()) == "in a loop"


def counting(*replies: str, leaf: str = "leaf", tokens: int = 10) -> Chat:
    chat = says(*replies, leaf=leaf)

    def counted(messages: Messages) -> ChatReply:
        return ChatReply(chat(messages), prompt_tokens=tokens - 1, completion_tokens=1, model="m")

    return counted


def test_usage_is_told_in_all_by_model_and_by_depth() -> None:
    code = "print(llm_query('x'))\nFINAL(rlm_query('t', context='c')) if not context else FINAL('ok')"
    result = LocalRLMRunner(counting(repl(code)), cost=lambda usage: usage.completion_tokens * 0.5).run(
        "", "t"
    )
    assert result.final_answer == "ok"
    assert (result.usage.calls, result.usage.prompt_tokens, result.usage.cost) == (4, 36, 2.0)
    assert result.usage_by_model == {"m": result.usage}
    assert {depth: usage.calls for depth, usage in result.usage_by_depth.items()} == {0: 2, 1: 2}
    assert result.stopped_by is None


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Budget(tokens=25), "tokens"),
        (Budget(cost=2.5), "cost"),
        (Budget(model_calls=3), "model_calls"),
        (Budget(seconds=0.4), "seconds"),
    ],
)
def test_a_budget_ends_the_run_with_what_there_is(budget: Budget, name: str) -> None:
    chat = counting(*[repl("import time; time.sleep(0.2); answer['content'] += '+'")] * 30)
    result = LocalRLMRunner(chat, budget=budget, cost=lambda usage: 1.0).run("", "t")
    assert result.stopped_by is not None
    assert name in result.stopped_by
    assert result.final_answer is not None
    assert set(result.final_answer) == {"+"}
    assert result.iterations < 10


def test_a_budget_that_is_used_up_in_a_child_ends_the_whole_run() -> None:
    code = "answer['content'] = 'so far'\nprint(rlm_query('t'))"
    result = LocalRLMRunner(counting(*[repl(code)] * 9), budget=Budget(model_calls=4), max_depth=2).run(
        "", "t"
    )
    assert (result.final_answer, result.usage.calls) == ("so far", 4)
    assert result.stopped_by == "the budget of the run is used up: model_calls 4 of 4"
    assert result.child_traces[-1].result_preview == "so far"


def test_the_kernel_can_ask_what_is_left() -> None:
    chat = counting(repl("left = budget()\nFINAL(f\"{left['tokens']} {left['cost']}\")"))
    assert LocalRLMRunner(chat, budget=Budget(tokens=100)).run("", "t").final_answer == "90 None"


def test_the_budget_is_in_the_prompt_and_the_record_there_after_a_failure() -> None:
    def chat(messages: Messages) -> str:
        assert "Left of the budget of the whole run: 100 tokens." in messages[1]["content"]
        raise ConnectionError

    runner = LocalRLMRunner(chat, budget=Budget(tokens=100))
    with pytest.raises(ResetRequired):
        _ = runner.episode
    with pytest.raises(ModelError):
        runner.run("", "t")
    assert (runner.episode.task_prompt, runner.episode.done_reason) == ("t", "closed")
    assert len(runner.episode.messages) == 3


def test_failures_in_a_row_are_bounded() -> None:
    failures = 0

    def chat(messages: Messages) -> str:
        nonlocal failures
        failures += 1
        if failures % 3:
            raise ConnectionError("again")
        return repl("FINAL(1)")

    assert LocalRLMRunner(chat, budget=Budget(consecutive_errors=3)).run("", "t").final_answer == "1"
    with pytest.raises(ModelError):
        LocalRLMRunner(chat, budget=Budget(consecutive_errors=2)).run("", "t")


@pytest.mark.parametrize("value", [0, -1, "1", True, float("nan")])
def test_budgets_are_numbers_above_zero(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"Budget\.tokens = "):
        Budget(tokens=value)
