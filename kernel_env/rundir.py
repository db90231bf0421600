"""The directory of a run: what there is of it survives a kill at any moment.

config.json       what makes the run what it is, and every session that worked on it
results.jsonl     a line for each episode that ended, appended whole; of two for one episode the later counts
episodes/         their notebooks
contexts/         their large contexts and helper calls, named by their content
summary.json, report.ipynb
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kernel_env import sidefiles
from kernel_env.budget import ModelUsage
from kernel_env.errors import ConfigError

__all__ = ["Result", "RunDirectory", "describe_differences", "read_config", "read_results"]

SCHEMA = 1
_LOCK = ".lock"
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}")
_VERSIONED = ("kernel_env", "ipykernel", "ipython", "jupyter_client", "pyzmq")


class Result(BaseModel):
    """What became of one episode, as a line of `results.jsonl`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    task: str
    sample: int
    tasks: str
    """The name of the set of tasks."""
    split: str
    metadata: dict[str, Any] = Field(default_factory=dict)
    seed: int
    episode_id: str | None = None
    reward: float | None = None
    """None if the episode failed."""
    final_answer: str | None = None
    """Its first 4,096 characters; the notebook has all."""
    answer_length: int = 0
    done_reason: str | None = None
    stopped_by: str | None = None
    """The budget that ended it."""
    error: str | None = None
    """The type of what failed, which is not the policy's answer; such an episode is run again by a resume."""
    message: str | None = None
    steps: int = 0
    statuses: dict[str, int] = Field(default_factory=dict)
    """Status of steps → how many had it."""
    restarts: int = 0
    children: int = 0
    context_length: int = 0
    started: float
    """Seconds since the epoch."""
    seconds: float
    kernel_seconds: float = 0.0
    """Of these, the kernel's start and its cells' active time."""
    model_seconds: float = 0.0
    """And waiting for models: the runner's own and those behind helpers."""
    bookkeeping_seconds: float = 0.0
    """And writing the notebook."""
    usage: ModelUsage = Field(default_factory=ModelUsage)
    notebook: str | None = None
    """Relative to the directory."""

    @property
    def key(self) -> tuple[str, int]:
        return self.task, self.sample

    def line(self) -> str:
        """As JSON, in ASCII: an answer may hold lone surrogates, which UTF-8 has not."""
        return json.dumps(self.model_dump(mode="python"), allow_nan=False)

    @property
    def outcome(self) -> str:
        """In a word or two: `right`, `partly right`, `wrong`, or why there was no answer to score."""
        if self.error is not None:
            return self.error
        if self.reward is not None and self.reward > 0:
            return "right" if self.reward >= 1 else "partly right"
        if self.stopped_by is not None:
            return "budget"
        if self.done_reason != "final":
            return self.done_reason or "no end"
        return "wrong"


class RunDirectory:
    """A run's directory, held by this process; make one with `RunDirectory.open`."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.results: dict[tuple[str, int], Result] = {}
        self._file = -1

    @classmethod
    @contextmanager
    def open(cls, path: Path, settings: dict[str, Any], *, resume: bool) -> Iterator[RunDirectory]:
        """Make the directory of a run, or go on with the one there is.

        Raises:
            ConfigError: there is a run and it is not to be resumed, or it has other settings; another process
                holds it; there is something else; it cannot be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot make the run {str(path)!r}: {error.strerror}") from None
        run = None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.pread(lock, 20, 0).decode() or "unknown"
                raise ConfigError(
                    f"the run {str(path)!r} is being worked on by process {holder}; wait for it, or end it"
                ) from None
            with _writing(path):
                os.truncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
                run = cls._begin(path, settings, resume)
            yield run
        finally:
            if run is not None:
                os.close(run._file)
            os.close(lock)

    @classmethod
    def _begin(cls, path: Path, settings: dict[str, Any], resume: bool) -> RunDirectory:
        config = read_config(path) if (path / "config.json").exists() else None
        if config is not None and config["sessions"]:
            if not resume:
                raise ConfigError(
                    f"{str(path)!r} has a run; go on with --resume, or choose another directory"
                )
            run = cls(path, config)
            if differences := describe_differences(run.config["settings"], settings):
                raise ConfigError(
                    f"the run {str(path)!r} was begun with other settings:\n  " + "\n  ".join(differences)
                )
        else:
            # Of a run that ended before its first episode, there may be empty files and folders.
            if left := sorted(entry.name for entry in path.iterdir() if not _is_ours(entry.name)):
                raise ConfigError(f"{str(path)!r} is no run: it has {left[0]!r}; choose another directory")
            run = cls(path, {"schema": SCHEMA, "settings": settings, "sessions": []})
            run.write_json("config.json", run.config)
        (path / "contexts").mkdir(exist_ok=True)
        episodes = path / "episodes"
        episodes.mkdir(exist_ok=True)
        if not (episodes / sidefiles.FOLDER).is_symlink():
            (episodes / sidefiles.FOLDER).symlink_to("../contexts", target_is_directory=True)
        for folder in (path, episodes, path / "contexts"):
            for file in os.scandir(folder):
                if _TEMPORARY.fullmatch(file.name):  # of a process that was killed
                    os.unlink(file)
        run._file = os.open(
            path / "results.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
        )
        run._mend()
        run.results = {result.key: result for result in read_results(path)}
        return run

    def _mend(self) -> None:
        """Cut off a line that was not written to its end."""
        size = os.fstat(self._file).st_size
        begin = size
        while begin > 0:
            length = min(begin, 2**20)
            begin -= length
            end = os.pread(self._file, length, begin).rfind(b"\n")
            if end >= 0:
                begin += end + 1
                break
        if begin < size:
            os.ftruncate(self._file, begin)

    def begin_session(self, **facts: Any) -> None:
        """Put on record that this process works on the run.

        Raises:
            ConfigError: kernels here are not isolated as those of the run were.
        """
        sessions: list[dict[str, Any]] = self.config["sessions"]
        if sessions and sessions[0]["isolation"] != facts["isolation"]:
            raise ConfigError(
                f"the run {str(self.path)!r} was begun with isolation {sessions[0]['isolation']!r}, "
                f"and here it would be {facts['isolation']!r}"
            )
        sessions.append({"started": time.time(), "versions": _versions(), "machine": _machine(), **facts})
        self.write_json("config.json", self.config)

    def append(self, result: Result) -> None:
        """Add a line to the results.

        Raises:
            ConfigError: it cannot be written; then nothing of it is.
        """
        data = result.line().encode() + b"\n"
        size = os.fstat(self._file).st_size
        with _writing(self.path):
            try:
                if os.write(self._file, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(self._file, size)
                raise
        self.results[result.key] = result

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of JSON, whole or not at all.

        Raises:
            ConfigError: it cannot be written.
        """
        with _writing(self.path):
            text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
            sidefiles.write_whole(self.path / name, text.encode("utf-8", "backslashreplace"))


def _is_ours(name: str) -> bool:
    own = (_LOCK, "config.json", "contexts", "episodes", "results.jsonl", "summary.json")
    return name in own or _TEMPORARY.fullmatch(name) is not None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write to the run {str(path)!r}: {error.strerror}; mend that, and go on with --resume"
        ) from error


def read_config(path: str | Path) -> dict[str, Any]:
    """The `config.json` of a run.

    Raises:
        ConfigError: there is none, or it is no config of a run.
    """
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} is no run: {str(file)!r}: {error}") from None
    if not isinstance(config, dict) or config.get("schema") != SCHEMA or "settings" not in config:
        raise ConfigError(f"{str(file)!r} is no config of a run that this version can read")
    return config


def read_results(path: str | Path) -> list[Result]:
    """The results of a run, the last of each episode; a line that is being written is left out.

    Raises:
        ConfigError: there are none, or a line is no result; says which.
    """
    file = Path(path) / "results.jsonl"
    found: dict[tuple[str, int], Result] = {}
    number = 0
    try:
        with open(file, "rb") as lines:
            for line in lines:
                number += 1
                if line.endswith(b"\n"):
                    result = Result.model_validate(json.loads(line))
                    found.pop(result.key, None)
                    found[result.key] = result
    except OSError as error:
        raise ConfigError(f"{str(path)!r} is no run: {str(file)!r}: {error.strerror}") from None
    except ValueError as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ConfigError(f"{str(file)!r}, line {number} is no result: {why}") from None
    return list(found.values())


def describe_differences(there: Any, here: Any, path: str = "") -> list[str]:
    """Each setting that is not the same in both, a line each."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = list(there) + [name for name in here if name not in there]
        return [
            line
            for name in names
            for line in describe_differences(there.get(name), here.get(name), f"{path}.{name}".lstrip("."))
        ]
    return [] if there == here else [f"{path}: {there!r} there, {here!r} here"]


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {"python": platform.python_version(), **versions}


def _machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"platform": platform.platform(), "cores": os.cpu_count(), "memory_bytes": memory}
