"""Tasks from files and rows: what is read when, and what is said of bad ones."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kernel_env import ConfigError, Limits, Task
from kernel_env.tasks import FileTasks, RowTasks, load_tasks

GOOD = {"id": "a", "task_prompt": "How many?", "context": "x y", "expected_answer": "2"}


def jsonl(path: Path, *rows: Any) -> Path:
    file = path / "tasks.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_json_lines_are_tasks_with_or_without_an_id(tmp_path: Path) -> None:
    row = {**GOOD, "metric": "fuzzy", "metadata": {"k": 1}, "limits": {"restarts": 1}, "max_iterations": 3}
    without = {name: value for name, value in GOOD.items() if name != "id"}
    tasks = FileTasks(jsonl(tmp_path, row, "", without))
    assert tasks.list_splits() == ["all"]
    assert tasks.num_tasks("all") == 2
    assert tasks.list_tasks("all") == [
        {"id": "a", "split": "all", "index": 0},
        {"id": "tasks-00001", "split": "all", "index": 1},
    ]
    first, second = tasks.get_task_range("all")
    assert (first.id, first.metric, first.metadata, first.max_iterations) == ("a", "fuzzy", {"k": 1}, 3)
    assert first.limits_over(Limits(cell_active=5)) == Limits(cell_active=5, restarts=1)
    assert (second.id, second.context, second.expected_answer) == ("tasks-00001", "x y", "2")


def test_csv_keeps_line_ends_in_quotes_and_reads_json_where_it_is_meant(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(
        "\ufeffid,question,context,label,metric,metadata\r\n"
        'a,"say ""hi""","one\r\ntwo, three",3,distance,"{""k"": 1}"\r\n'
        "b,q,ctx,007,,\n".encode()
    )
    tasks = FileTasks(file, fields={"task_prompt": "question", "expected_answer": "label"})
    a, b = tasks.get_task_range("all")
    assert (a.task_prompt, a.context, a.expected_answer) == ('say "hi"', "one\r\ntwo, three", 3)
    assert a.metadata == {"k": 1}
    assert (b.expected_answer, b.metric, b.metadata) == ("007", "exact", {})


def test_a_csv_of_a_megabyte_in_one_cell_is_read(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(f"id,context,expected_answer\na,{'x' * 10**6},y\n")
    assert len(FileTasks(file).get_task("all", 0).context) == 10**6


def test_a_context_file_is_read_when_it_is_needed_and_missed_at_once(tmp_path: Path) -> None:
    row = {"id": "a", "context_file": "c.txt", "expected_answer": "x"}
    with pytest.raises(ConfigError, match=r"line 1: there is no context file '.*c\.txt'"):
        FileTasks(jsonl(tmp_path, row))
    (tmp_path / "c.txt").write_bytes("naïve\r\n".encode())
    task = FileTasks(jsonl(tmp_path, row)).get_task("all", 0)
    assert task.context == ""
    assert task.load_context() == "naïve\r\n"
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="task 'a': the context"):
        task.load_context()
    (tmp_path / "c.json").write_text('{"k": [1, 2]}')
    row["context_file"] = "c.json"
    assert FileTasks(jsonl(tmp_path, row)).get_task("all", 0).load_context() == {"k": [1, 2]}


BAD = [
    ("{", "is no JSON"),
    ("[1]", "is a list; a task is an object"),
    (json.dumps({**GOOD, "expected_anwser": 1}), "no field 'expected_anwser'"),
    (
        json.dumps({**GOOD, "metric": "distance"}),
        "'2' is a str; the metric 'distance' compares with a number",
    ),
    (json.dumps({**GOOD, "context_file": "no.txt"}), "a context and a context_file"),
    (json.dumps({**GOOD, "max_iterations": 0}), "max_iterations = 0"),
    (json.dumps({**GOOD, "limits": {"speed": 1}}), "no limit 'speed'"),
    (json.dumps({**GOOD, "limits": {"restarts": -1}}), "Limits.restarts = -1"),
    (json.dumps({**GOOD, "metadata": 7}), "metadata"),
    (json.dumps({**GOOD, "metadata": {"x": float("nan")}}), "metadata['x'] = nan is no JSON value"),
    (json.dumps({**GOOD, "limits": {"restarts": 1.5}}), "Limits.restarts = 1.5"),
    (json.dumps({**GOOD, "limits": {"restarts": float("inf")}}), "Limits.restarts = inf"),
    (json.dumps({"id": "b"}), "expected_answer None"),
    (json.dumps({**GOOD, "id": ""}), "id is empty"),
    ('{"id": "b", "context": "\xff"}', "is no JSON"),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=[says for _, says in BAD])
def test_a_bad_line_is_named_and_can_be_left_out(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_bytes(f"{json.dumps({**GOOD, 'id': 'first'})}\n{line}\n{json.dumps(GOOD)}\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"tasks\.jsonl', line 2") as caught:
        FileTasks(file)
    assert says in str(caught.value)
    tasks = FileTasks(file, skip_bad=True)
    assert [task["id"] for task in tasks.list_tasks("all")] == ["first", "a"]
    (bad,) = tasks.bad
    assert "line 2" in bad


def test_an_id_that_is_there_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 3: the id 'a' is also that of .*line 1"):
        FileTasks(jsonl(tmp_path, GOOD, {**GOOD, "id": "b"}, GOOD))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.txt", "", "must end in .jsonl or .csv"),
        ("none.jsonl", None, "No such file"),
        ("t.csv", "id,context\na\n", "line 2 is no CSV: it has 1 values, and the header 2 names"),
    ],
)
def test_a_file_that_is_none_of_tasks_is_refused(
    tmp_path: Path, name: str, text: str | None, says: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        FileTasks(tmp_path / name)
    assert says in str(caught.value)


def test_a_file_that_was_altered_since_is_noticed(tmp_path: Path) -> None:
    file = jsonl(tmp_path, GOOD)
    tasks = FileTasks(file)
    jsonl(tmp_path, {**GOOD, "id": "b"})
    with pytest.raises(ConfigError, match="line 1 was altered: it had the task 'a'"):
        tasks.get_task("all", 0)


class Lazy(Sequence[Any]):
    """Rows as a dataset has them, which says when it is asked for one."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.asked = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        self.asked += 1
        return self.rows[index]


def test_rows_of_a_dataset_are_mapped_and_read_again() -> None:
    rows = Lazy([{"q": f"q{n}", "text": "c", "label": n, "year": 1999} for n in range(3)])
    fields = {"task_prompt": "q", "context": "text", "expected_answer": "label"}
    tasks = RowTasks({"test": rows, "train": rows}, name="mine", fields=fields, metric="distance")
    asked = rows.asked
    task = tasks.get_task("test", 2)
    assert rows.asked == asked + 1
    assert (task.id, task.task_prompt, task.expected_answer, task.metric) == (
        "mine-test-00002",
        "q2",
        2,
        "distance",
    )
    assert task.metadata == {"year": 1999}
    assert tasks.list_splits() == ["test", "train"]
    assert tasks.task_id("train", 0) == "mine-train-00000"
    with pytest.raises(ConfigError, match="no split 'dev'; it has test, train"):
        tasks.num_tasks("dev")
    with pytest.raises(ConfigError, match="there is no index 3"):
        tasks.get_task("test", 3)
    with pytest.raises(ConfigError, match=r"row 1 has no field 'label'; it has q"):
        RowTasks([{"q": 1}], fields={"expected_answer": "label"})
    with pytest.raises(ConfigError, match="a task has no 'prompt'"):
        RowTasks([], fields={"prompt": "q"})


def test_an_iterator_of_tasks_is_kept() -> None:
    def made() -> Iterator[Task]:
        for n in range(2):
            yield Task(id=f"t{n}", expected_answer="x", metric=lambda expected, answer: 1.0)

    tasks = load_tasks(made())
    assert [task.id for task in tasks.get_task_range("all")] == ["t0", "t1"]
    with pytest.raises(ConfigError, match="rows are a int"):
        load_tasks(7)


def test_what_tasks_are_is_known_by_their_content(tmp_path: Path) -> None:
    described = [
        FileTasks(jsonl(tmp_path, row)).describe() for row in (GOOD, GOOD, {**GOOD, "expected_answer": "3"})
    ]
    assert described[0] == described[1] != described[2]

    def by(metric: Any) -> dict[str, Any]:
        return RowTasks([Task(id="a", expected_answer="x", metric=metric)]).describe()

    assert by(lambda expected, answer: 1.0) == by(lambda expected, answer: 2.0)  # known by their names
    odd = RowTasks([{"label": "x", "when": datetime.date(2026, 1, 2)}], fields={"expected_answer": "label"})
    assert odd.get_task("all", 0).metadata == {"when": "2026-01-02"}
