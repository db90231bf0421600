"""Tasks, and where they come from: JSON lines, CSV, any rows of Python, or a suite that makes them.

Nothing here holds more than one task at a time: a file is looked through once, to check every line and to
know where it begins; contexts are read when an episode begins.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kernel_env.config import Limits, check_count
from kernel_env.errors import ConfigError
from kernel_env.metrics import check_metric

__all__ = ["FileTasks", "Reference", "RowTasks", "Task", "TaskSet", "load_tasks"]

_SPLIT = "all"
_LIMITS = {entry.name: entry.type for entry in fields(Limits)}


@dataclass(frozen=True)
class Reference:
    """How a task can be done, for policies that are to know: none of it reaches a model."""

    solution: str
    """Code that submits the answer, from `context` alone."""
    chunked: str
    """Code that does so from what `llm_query_batched` says of parts of the context."""
    reader: Callable[[str, Callable[[], bool]], str]
    """Stands in for a model that is asked so: `(prompt, errs)` → reply, wrong where `errs()` is true."""


class Task(BaseModel):
    """A question about a context, and how an answer to it is scored.

    Raises:
        ConfigError: the metric cannot compare with the expected answer, or there are two contexts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    id: str
    """Unique in a run."""
    task_prompt: str = ""
    context: Any = ""
    """Text or a JSON value."""
    context_file: Path | None = None
    """A UTF-8 file with the context, read when an episode begins; one that ends in `.json` is parsed."""
    expected_answer: Any = None
    """Stays in this process."""
    metric: Any = "exact"
    """A name in `METRICS`; the source of `def metric(expected, answer)`, which runs in a kernel of its own;
    or a function `(expected, answer) -> float` of this process, sync or async."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    limits: dict[str, float] = Field(default_factory=dict)
    """Of this task's episodes, over those of the run: names and values of `Limits`."""
    max_iterations: int | None = None
    reference: Reference | None = Field(default=None, exclude=True, repr=False)

    def model_post_init(self, _: Any) -> None:
        if not self.id:
            raise ConfigError("a task's id is empty; give it one, or none")
        if self.context_file is not None and self.context != "":
            raise ConfigError(f"task {self.id!r} has a context and a context_file; give one")
        if self.max_iterations is not None:
            check_count(f"task {self.id!r}: max_iterations", self.max_iterations)
        for name, value in self.metadata.items():
            if not _is_json(value):
                raise ConfigError(f"task {self.id!r}: metadata[{name!r}] = {value!r:.100} is no JSON value")
        if unknown := self.limits.keys() - _LIMITS.keys():
            raise ConfigError(f"task {self.id!r}: there is no limit {min(unknown)!r}; see Limits")
        try:
            if self.limits:
                self.limits_over(Limits())
            check_metric(self.metric, self.expected_answer)
        except ConfigError as error:
            raise ConfigError(f"task {self.id!r}: {error}") from None

    def limits_over(self, limits: Limits) -> Limits:
        """The limits of this task's episodes in a run with these."""
        own: dict[str, Any] = {
            name: int(value) if _LIMITS[name] == "int" and value.is_integer() else value
            for name, value in self.limits.items()
        }
        return replace(limits, **own)

    def load_context(self) -> Any:
        """The context itself, read from its file if it has one.

        Raises:
            ConfigError: the file cannot be read, or the context is no text and no JSON value.
        """
        if self.context_file is None:
            return self.context
        try:
            text = self.context_file.read_bytes().decode("utf-8")
            return json.loads(text) if self.context_file.suffix == ".json" else text
        except OSError as error:
            raise ConfigError(
                f"task {self.id!r}: the context {str(self.context_file)!r}: {error.strerror}"
            ) from None
        except ValueError as error:
            raise ConfigError(f"task {self.id!r}: the context {str(self.context_file)!r}: {error}") from None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


class TaskSet:
    """Tasks by split and index, made one at a time; the names are those of OpenEnv's task discovery.

    A subclass has `name`, and defines the methods that are not defined here.
    """

    name: str

    def list_splits(self) -> list[str]:
        """The names of the splits."""
        raise NotImplementedError

    def num_tasks(self, split: str) -> int:
        """How many tasks a split has."""
        raise NotImplementedError

    def task_id(self, split: str, index: int) -> str:
        """The id of a task, without making it."""
        raise NotImplementedError

    def get_task(self, split: str, index: int) -> Task:
        """One task, made or read now.

        Raises:
            ConfigError: there is no such split or index, or the task can no longer be read.
        """
        raise NotImplementedError

    def list_tasks(self, split: str) -> list[dict[str, Any]]:
        """What may be told of each task of a split to anybody: `id`, `split`, `index`."""
        count = self.num_tasks(split)
        return [{"id": self.task_id(split, i), "split": split, "index": i} for i in range(count)]

    def get_task_range(self, split: str, start: int = 0, stop: int | None = None) -> list[Task]:
        """The tasks from `start` to before `stop`, default the end."""
        wanted = range(self.num_tasks(split))[start:stop]
        return [self.get_task(split, index) for index in wanted]

    def usual_splits(self) -> list[str]:
        """The splits that are run where none is named."""
        return self.list_splits()

    def usual_number(self, split: str) -> int:
        """How many tasks of a split are run where no number is given."""
        return self.num_tasks(split)

    def describe(self) -> dict[str, Any]:
        """What makes these tasks what they are, in JSON types: a run goes on only with the same."""
        raise NotImplementedError

    def check_split(self, split: str) -> None:
        """Raise ConfigError unless there is such a split."""
        if split not in self.list_splits():
            raise ConfigError(f"{self.name} has no split {split!r}; it has {', '.join(self.list_splits())}")

    def check_index(self, split: str, index: int) -> None:
        """Raise ConfigError unless there is such a task."""
        count = self.num_tasks(split)
        if not 0 <= index < count:
            raise ConfigError(f"{self.name}, split {split!r} has {count} tasks; there is no index {index}")


_FIELDS = ", ".join(name for name in Task.model_fields if name != "reference")


class _ReadTasks(TaskSet):
    """Tasks of rows that can be read again, each by its key."""

    def __init__(self, name: str, base: Path, options: Mapping[str, Any]) -> None:
        self.name = name
        self.bad: list[str] = []
        """What was wrong with the rows that were left out."""
        self._base = base
        self._fields: Mapping[str, str] = options["fields"] or {}
        if unknown := self._fields.keys() - Task.model_fields.keys():
            raise ConfigError(f"fields: a task has no {min(unknown)!r}; it has {_FIELDS}")
        self._metric: str | None = options["metric"]
        self._skip_bad: bool = options["skip_bad"]
        self._index: dict[str, list[tuple[str, Any]]] = {}
        """Split → id and key of each task."""
        self._seen: dict[str, str] = {}
        self._digest = hashlib.sha256()

    def _look_through(self, split: str, rows: Iterable[tuple[str, Any, Any]]) -> None:
        """Check rows, each with where it is and its key, and keep the keys of those that are tasks."""
        entries = self._index.setdefault(split, [])
        for where, key, row in rows:
            try:
                if isinstance(row, ConfigError):
                    raise row
                task = self._task(row, self._default_id(split, len(entries)), where)
                if (first := self._seen.setdefault(task.id, where)) != where:
                    raise ConfigError(f"{where}: the id {task.id!r} is also that of {first}")
                if task.context_file is not None and not task.context_file.is_file():
                    raise ConfigError(f"{where}: there is no context file {str(task.context_file)!r}")
            except ConfigError as error:
                if not self._skip_bad:
                    raise
                self.bad.append(str(error))
                continue
            entries.append((task.id, key))
            self._digest.update(_digested(task))

    def _default_id(self, split: str, number: int) -> str:
        """The id of a task that has none."""
        return f"{self.name}-{number:05}" if split == _SPLIT else f"{self.name}-{split}-{number:05}"

    def _task(self, row: Any, default_id: str, where: str) -> Task:
        if isinstance(row, Task):
            return row
        if not isinstance(row, Mapping):
            raise ConfigError(f"{where} is a {type(row).__name__}; a task is an object with fields")
        given = dict(row)
        values = {name: given.pop(source) for name, source in self._fields.items() if source in given}
        if missing := [source for name, source in self._fields.items() if name not in values]:
            raise ConfigError(f"{where} has no field {missing[0]!r}; it has {', '.join(map(str, row))}")
        for name in Task.model_fields.keys() & given.keys() - values.keys():
            values[name] = given.pop(name)
        if given and not self._fields:
            raise ConfigError(
                f"{where}: a task has no field {min(map(str, given))!r}; it has {_FIELDS} "
                "(map others, as expected_answer=label)"
            )
        if isinstance(own := values.get("metadata") or {}, Mapping):  # else it is refused below
            others = {key: value if _is_json(value) else str(value) for key, value in given.items()}
            values["metadata"] = others | dict(own)
        values = {name: value for name, value in values.items() if value is not None}
        values.setdefault("id", default_id)
        values["id"] = str(values["id"])
        if self._metric is not None:
            values.setdefault("metric", self._metric)
        if "context_file" in values:
            values["context_file"] = self._base / str(values["context_file"])
        try:
            return Task(**values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{where}, field {field!r}: {first['msg']}") from None
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def list_splits(self) -> list[str]:
        return list(self._index)

    def num_tasks(self, split: str) -> int:
        self.check_split(split)
        return len(self._index[split])

    def task_id(self, split: str, index: int) -> str:
        return self._index[split][index][0]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self._digest.hexdigest()}


class RowTasks(_ReadTasks):
    """Tasks from rows: `Task` objects or mappings, such as a dataset of the `datasets` package has.

    Args:
        rows: a sequence, which is read again at each use, an iterable, which is kept, or a mapping from names
            of splits to such.
        name: of the set, in ids of tasks that have none.
        fields: name of a field of `Task` → name of it in the rows; others are called what they are. With any,
            what else a row has becomes the task's metadata, as text where it is no JSON value.
        metric: of tasks that name none; default "exact".
        skip_bad: leave out rows that are no task; `bad` says what was wrong with them.

    Raises:
        ConfigError: a row is no task, or an id is there twice; says which.
    """

    def __init__(
        self,
        rows: Any,
        *,
        name: str = "tasks",
        fields: Mapping[str, str] | None = None,
        metric: str | None = None,
        skip_bad: bool = False,
    ) -> None:
        super().__init__(name, Path.cwd(), {"fields": fields, "metric": metric, "skip_bad": skip_bad})
        self._rows: dict[str, Sequence[Any]] = {}
        for split, entries in (rows if isinstance(rows, Mapping) else {_SPLIT: rows}).items():
            if isinstance(entries, str) or not isinstance(entries, Iterable):
                raise ConfigError(f"{name}: rows are a {type(entries).__name__}; give an iterable of rows")
            can_be_read_again = hasattr(entries, "__getitem__") and hasattr(entries, "__len__")
            kept = cast(Sequence[Any], entries) if can_be_read_again else list(entries)
            self._rows[split] = kept
            rows_of = ((self._where(split, number), number, row) for number, row in enumerate(kept))
            self._look_through(split, rows_of)

    def _where(self, split: str, number: int) -> str:
        return f"{self.name}, split {split!r}, row {number + 1}"

    def get_task(self, split: str, index: int) -> Task:
        self.check_index(split, index)
        _, number = self._index[split][index]
        row = self._rows[split][number]
        return self._task(row, self._default_id(split, index), self._where(split, number))


class FileTasks(_ReadTasks):
    """Tasks from a file of JSON lines (`.jsonl`) or of CSV with a header (`.csv`).

    In CSV, `metadata`, `limits` and `max_iterations` are JSON, and so is an `expected_answer` unless its
    metric compares texts. A relative `context_file` is relative to the file's folder. The other arguments are
    those of `RowTasks`.

    Raises:
        ConfigError: the file cannot be read, or a line is no task; says which.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fields: Mapping[str, str] | None = None,
        metric: str | None = None,
        skip_bad: bool = False,
    ) -> None:
        self._path = Path(path)
        options = {"fields": fields, "metric": metric, "skip_bad": skip_bad}
        super().__init__(self._path.stem, self._path.resolve().parent, options)
        self._is_csv = self._path.suffix == ".csv"
        if not self._is_csv and self._path.suffix not in (".jsonl", ".ndjson"):
            raise ConfigError(f"the tasks {str(path)!r}: the name must end in .jsonl or .csv")
        try:
            with open(self._path, "rb") as file:
                self._header = next(csv.reader([_decoded(file.readline())]), []) if self._is_csv else []
                self._look_through(_SPLIT, self._rows_of(file))
        except OSError as error:
            raise ConfigError(f"cannot read the tasks {str(path)!r}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"the tasks {str(path)!r}, line 1: {error}") from None

    def _rows_of(self, file: io.BufferedReader) -> Iterable[tuple[str, tuple[int, int, str], Any]]:
        number, begin = (1 if self._is_csv else 0), file.tell()
        while data := self._next_row(file):
            where = f"the tasks {str(self._path)!r}, line {number + 1}"
            number += data.count(b"\n")
            if data.strip():
                yield where, (begin, len(data), where), self._parsed(data, where)
            begin += len(data)

    def _next_row(self, file: io.BufferedReader) -> bytes:
        data = file.readline()
        while self._is_csv and data.count(b'"') % 2 and (more := file.readline()):
            data += more  # a line end in quotes
        return data

    def _parsed(self, data: bytes, where: str) -> Any:
        try:
            text = _decoded(data)
            return self._of_csv(text) if self._is_csv else json.loads(text)
        except (ValueError, csv.Error, RecursionError) as error:
            kind = "CSV" if self._is_csv else "JSON"
            return ConfigError(f"{where} is no {kind}: {error}")

    def _of_csv(self, text: str) -> dict[str, Any]:
        limit = csv.field_size_limit(len(text))  # a setting of the whole module, too low for a context
        try:
            [values] = csv.reader([text], strict=True)
        finally:
            csv.field_size_limit(limit)
        if len(values) != len(self._header):
            raise ValueError(f"it has {len(values)} values, and the header {len(self._header)} names")
        row: dict[str, Any] = {name: value for name, value in zip(self._header, values, strict=True) if value}
        columns = {name: self._fields.get(name, name) for name in Task.model_fields}
        metric = row.get(columns["metric"], self._metric or "exact")
        as_json = ["metadata", "limits", "max_iterations"]
        as_json += ["expected_answer"] if metric not in ("exact", "fuzzy") else []
        for name in as_json:
            if columns[name] in row:
                row[columns[name]] = json.loads(row[columns[name]])
        return row

    def get_task(self, split: str, index: int) -> Task:
        self.check_index(split, index)
        id, (begin, length, where) = self._index[split][index]
        try:
            with open(self._path, "rb") as file:
                file.seek(begin)
                row = self._parsed(file.read(length), where)
        except OSError as error:
            raise ConfigError(f"cannot read the tasks {str(self._path)!r}: {error.strerror}") from None
        task = (
            None if isinstance(row, ConfigError) else self._task(row, self._default_id(split, index), where)
        )
        if task is None or task.id != id:
            raise ConfigError(f"{where} was altered: it had the task {id!r}")
        return task


def _digested(task: Task) -> bytes:
    """What a task is, for the digest of all: functions by their names."""
    record = task.model_dump(mode="python", exclude={"metric"})
    metric = getattr(task.metric, "__qualname__", repr(task.metric))
    size = task.context_file.stat().st_size if task.context_file is not None else None
    return f"{record!r} {metric} {size}".encode("utf-8", "backslashreplace")


def _decoded(data: bytes) -> str:
    return data.decode("utf-8-sig")


def load_tasks(source: Any, **options: Any) -> TaskSet:
    """The tasks of `source`: a `TaskSet`, the path of a file, or rows; `options` as for `RowTasks`.

    Raises:
        ConfigError: it is none of these, or a task in it is none.
    """
    if isinstance(source, TaskSet):
        return source
    if isinstance(source, str | Path):
        return FileTasks(source, **options)
    return RowTasks(source, **options)
