"""Everything that can be set, in two frozen objects, and the only reader of `os.environ`."""

from __future__ import annotations

import functools
import inspect
import keyword
import math
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kernel_env.errors import ConfigError

__all__ = ["RESERVED_NAMES", "EnvConfig", "HostEnvironment", "Limits", "from_env"]

RESERVED_NAMES = frozenset(
    {"context", "answer", "FINAL", "FINAL_VAR", "SHOW_VARS", "HelperError", "HelperFailure"}
    | {"llm_query", "llm_query_batched", "llm_batch", "rlm_query", "rlm_query_batched"}
    | {"In", "Out", "exit", "quit", "get_ipython", "open"}
)
"""Names a user's tool cannot have: ours, and IPython's own."""

_ISOLATIONS = ("auto", "sandbox", "process")
_SPARES = 8
_BYTES_OF_KERNEL = 64 * 2**20  # 12 MB of its own, and room for what its cells make
FILES_OF_KERNEL = 24
"""Descriptors that this process holds for one kernel, at most, while no thread of it calls helpers."""

_PASSED_ON = ("PATH", "LANG", "LANGUAGE", "TZ", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH")
_PASSED_ON_PREFIXES = ("LC_", "OMP_", "OPENBLAS_", "MKL_")


_LEAST = {
    # What a kernel needs to serve cells, measured with room to spare; below it, it would seem broken.
    "restarts": 0,
    "helper_calls": 0,
    "memory_bytes": 32 * 2**20,
    "processes": 16,
    "open_files": 64,
    "file_bytes": 2**20,
    "workdir_bytes": 2**20,
    "workdir_files": 100,
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on one episode. Every breach is an observation, or an error that names the limit."""

    cell_active: float = 120.0
    """Seconds a cell may be busy, the time its own helper calls are in flight not counted."""
    cell_total: float = 600.0
    """Seconds a cell may take whatever it does."""
    episode: float = math.inf
    """Seconds from the end of `reset` to the last permitted moment of a step."""
    interrupt_grace: float = 2.0
    """Seconds an interrupted cell has to end before its kernel is killed."""
    kernel_start: float = 60.0
    """Seconds a kernel has to become ready."""
    restarts: int = 3
    """Kernels that may replace a lost one in the same episode."""
    answer_bytes: int = 64 * 2**20
    """UTF-8 bytes of a final answer; a longer one is refused, never cut."""
    helper_frame_bytes: int = 256 * 2**20
    """Bytes of one helper request, JSON-encoded."""
    helper_concurrency: int = 64
    """User functions that run at once for one environment, each in a thread of its own if it is sync."""
    cell_output: int = 4 * 2**20
    """Characters of one cell's output that the record and the notebook keep."""
    files_bytes: int = 2**30
    """Bytes of all `files` that are copied into the working directory of an episode."""
    memory_bytes: int = 4 * 2**30
    """Memory that the cells of a kernel add to what it begins with. A process that asks for more, used or
    not, gets a MemoryError; more in all its processes, or shared, costs the kernel (`out_of_memory`)."""
    cell_cpu: float = math.inf
    """Processor seconds of a cell and the processes it starts."""
    processes: int = 256
    """Processes and threads of a kernel at once, its own four among them. In a sandbox no more start; else
    they cost the kernel."""
    open_files: int = 1024
    """Descriptors that each process of a kernel may have open, its own 40 among them."""
    file_bytes: int = 2 * 2**30
    """Size of any file that a kernel writes."""
    workdir_bytes: int = 4 * 2**30
    """Bytes on the disk of all files in the kernel's folders, counted every second or so: working directory,
    home, temporary files."""
    workdir_files: int = 100_000
    """How many there may be."""
    helper_calls: int = 10_000
    """Helper calls of an episode; a batch counts as its prompts."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type == "int":
                check_count(f"Limits.{entry.name}", value, least=_LEAST.get(entry.name, 1))
            else:
                check_seconds(f"Limits.{entry.name}", value)


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """How an environment makes its episodes; checked once, at construction.

    Raises:
        ConfigError: an argument cannot be used, or what it asks for does not exist yet.
    """

    max_iterations: int = 30
    max_output_length: int = 8192
    """Characters of `stdout` and of `stderr` the policy sees; the marker of a cut comes on top."""
    context_preview_length: int = 500
    kernel_name: str = "python3"
    limits: Limits = field(default_factory=Limits)
    rubric: Any = None
    """Any `(action, observation) -> float`, sync or async; None means `REPLRubric()`."""
    llm_query_fn: Callable[..., Any] | None = None
    llm_batch_fn: Callable[..., Any] | None = None
    subcall_fn: Callable[..., Any] | None = None
    subcall_batch_fn: Callable[..., Any] | None = None
    tools: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    on_output: Callable[[dict[str, Any]], None] | None = None
    """Called with each output as it arrives, on the event loop: it must be quick."""
    on_turn: Callable[[Any], Any] | None = None
    """Called with each finished `Turn`; sync or async."""
    isolation: str = "auto"
    """`sandbox`, `process`, or `auto`: a sandbox where that can be had."""
    preload: Sequence[str] = ()
    """Modules that every kernel has imported when it starts; forked kernels share one import."""
    files: Mapping[str, bytes | str | os.PathLike[str]] | None = None
    """Name in the working directory → its bytes, or the path of a file to copy before the first cell."""
    rlm_max_depth: int = 1
    rlm_max_iterations: int | None = None

    def __post_init__(self) -> None:
        _check_type("kernel_name", self.kernel_name, str)
        _check_type("limits", self.limits, Limits)
        _check_type("tools", self.tools, Mapping)
        if self.isolation not in _ISOLATIONS:
            raise ConfigError(f"isolation={self.isolation!r}; give one of {', '.join(_ISOLATIONS)}")
        check_count("max_iterations", self.max_iterations)
        check_count("max_output_length", self.max_output_length)
        check_count("context_preview_length", self.context_preview_length, least=0)
        for name in (
            "llm_query_fn",
            "llm_batch_fn",
            "subcall_fn",
            "subcall_batch_fn",
            "on_output",
            "on_turn",
            "rubric",
        ):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigError(f"{name} = {value!r} is not callable")
        if inspect.iscoroutinefunction(self.on_output):
            raise ConfigError("on_output is called between two messages and cannot be async; use on_turn")
        for name, tool in self.tools.items():
            _check_tool(name, tool)
        if isinstance(self.preload, str) or not all(
            isinstance(name, str) and all(map(str.isidentifier, name.split("."))) for name in self.preload
        ):
            raise ConfigError(f"preload = {self.preload!r}; give a sequence of module names")
        check_count("rlm_max_depth", self.rlm_max_depth)
        if self.rlm_max_iterations is not None:
            check_count("rlm_max_iterations", self.rlm_max_iterations)


def _check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{name} = {value!r}; give a {kind.__name__}")


def check_text(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is text."""
    _check_type(name, value, str)


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Raise ConfigError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} = {value!r}; give a whole number >= {least}")


def check_seconds(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a number of seconds, more than none; infinity is one."""
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or (not 0 < value < 10**300 and value != math.inf)
    ):
        raise ConfigError(f"{name} = {value!r}; give seconds > 0")


def check_amount(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a number above zero; infinity is one."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"{name} = {value!r}; give a number > 0")


def _check_tool(name: object, tool: object) -> None:
    if (
        not isinstance(name, str)
        or not name.isidentifier()
        or keyword.iskeyword(name)
        or name.startswith("_")
    ):
        raise ConfigError(
            f"tools[{name!r}]: the name must be a Python identifier without a leading underscore"
        )
    if name in RESERVED_NAMES:
        raise ConfigError(f"tools[{name!r}]: the name is reserved; choose another")
    if not callable(tool):
        raise ConfigError(f"tools[{name!r}] = {tool!r} is not callable")


@dataclass(frozen=True)
class HostEnvironment:
    """What kernel_env takes from the environment of its process."""

    kernel_variables: dict[str, str]
    """The allow-list a kernel's own environment is built from: no key, token or address is in it."""
    context: str | None
    """`REPL_CONTEXT`, used where `REPLEnvironment` and `reset` were given no context."""
    task_prompt: str | None
    """`REPL_TASK_PROMPT`, likewise."""
    spare_kernels: int
    """`KERNEL_ENV_SPARES`, default 8: the most kernels that are kept ready; 0 keeps none."""
    max_kernels: int
    """`KERNEL_ENV_MAX_KERNELS`: the most kernels at once; by default as many as memory and files allow."""


def from_env() -> HostEnvironment:
    """Read `os.environ`, now."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    # A kernel's HOME is its own folder; packages of `pip install --user` must still be found.
    passed["PYTHONUSERBASE"] = os.environ.get("PYTHONUSERBASE") or str(Path.home() / ".local")
    return HostEnvironment(
        passed,
        os.environ.get("REPL_CONTEXT"),
        os.environ.get("REPL_TASK_PROMPT"),
        _count_from_env("KERNEL_ENV_SPARES", _SPARES, least=0),
        _count_from_env("KERNEL_ENV_MAX_KERNELS", _most_kernels()),
    )


def _count_from_env(name: str, default: int, *, least: int = 1) -> int:
    given = os.environ.get(name, "")
    if not given:
        return default
    if not given.isdecimal() or int(given) < least:
        raise ConfigError(f"{name}={given!r} in the environment; give a whole number >= {least}")
    return int(given)


@functools.cache
def _most_kernels() -> int:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return max(min(memory // _BYTES_OF_KERNEL, files // FILES_OF_KERNEL), 1)
