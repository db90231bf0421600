"""What model code finds in its namespace, and the report on that namespace after each of its cells.

Runs inside the kernel, on the standard library and IPython alone.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import itertools
import json
import random
import sys
import time
import types
from typing import Any

REPORTED_NAMES = 10_000
SNAPSHOT_NAMES = 100
SNAPSHOT_SECONDS = 0.05
SNAPSHOT_CHARS = 500
SHOWN_ITEMS = (120, 12, 4)  # of a container, of one in it, of one in that
SHOWN_ANSWER_CHARS = 200

_guest: Guest | None = None


class CellExit(BaseException):
    """Raised by `exit()` and `quit()`: ends the cell, not the kernel."""


class Guest:
    """The helpers of one kernel and what must be known to report on its namespace."""

    def __init__(self, shell: Any, bridge: Any, options: dict[str, Any]) -> None:
        self.shell = shell
        self.bridge = bridge
        self.session = options["session"]
        self.answer_bytes = options["answer_bytes"]
        self.channel = bridge.Channel(options["socket"], options["token"], options["frame_bytes"])
        self.streams = (sys.stdout, sys.stderr)
        self.helpers: dict[str, Any] = {
            "HelperError": bridge.HelperError,
            "HelperFailure": bridge.HelperFailure,
        }
        self.helpers.update({function.__name__: function for function in self._functions()})
        for description in options["helpers"]:
            self.helpers[description["name"]] = bridge.proxy(self.channel, description)
        self._known: dict[str, tuple[int, int, Any]] = {}
        self._system = {
            name: value
            for name, value in shell.user_ns.items()
            if name.startswith("_") or name in shell.user_ns_hidden
        }

    def put_in_place(self) -> None:
        """Fill the namespace, and take it as the state that the first report compares with."""
        self.shell.push(self.helpers, interactive=False)
        self._restore_data()
        self._known = {name: self._identity(value) for name, value in self._user_variables().items()}
        self._write_report({}, [], [])

    def _restore_data(self) -> list[str]:
        namespace = self.shell.user_ns
        missing = [name for name in ("context", "answer") if name not in namespace]
        if "context" in missing:
            namespace["context"] = self.channel.receive_context()
        if "answer" in missing:
            namespace["answer"] = {"content": "", "ready": False}
        return missing

    def _user_variables(self) -> dict[str, Any]:
        """What the cells defined: no helper, nothing of IPython's, no name with a leading underscore."""
        hidden = self.shell.user_ns_hidden
        return {
            name: value
            for name, value in list(self.shell.user_ns.items())
            if isinstance(name, str)
            and name.isidentifier()
            and not name.startswith("_")
            and name not in self.helpers
            and name not in ("context", "answer")
            and not (name in hidden and hidden[name] is value)
        }

    def _functions(self) -> list[Any]:
        def FINAL(value: Any) -> Any:
            """Submit `str(value)` as the final answer; the episode ends with this cell."""
            __tracebackhide__ = True
            text = str(value)
            self.submit(text)
            shown = text if len(text) <= SHOWN_ANSWER_CHARS else text[:SHOWN_ANSWER_CHARS] + "…"
            return self.bridge.Verbatim(f"FINAL({shown})")

        def FINAL_VAR(x: Any) -> Any:
            """Submit the variable that the text `x` names; anything else is itself the answer."""
            __tracebackhide__ = True
            return FINAL(self._variable(x))

        def SHOW_VARS() -> list[str]:
            """The sorted names of your variables, without the helpers, `context` and `answer`."""
            return sorted(self._user_variables())

        for function in (FINAL, FINAL_VAR, SHOW_VARS):
            function.__qualname__ = function.__name__
            function.__module__ = "kernel_env"
        return [FINAL, FINAL_VAR, SHOW_VARS]

    def _variable(self, x: Any) -> Any:
        __tracebackhide__ = True
        if not isinstance(x, str):
            return x
        name = x.strip()
        if len(name) >= 2 and name[0] == name[-1] and name[0] in "'\"":
            name = name[1:-1]
        if name in self.shell.user_ns:
            return self.shell.user_ns[name]
        if not name.isidentifier():
            return x
        known = ", ".join(sorted(self._user_variables())) or "none yet"
        raise NameError(
            f"FINAL_VAR: there is no variable {name!r}; your variables: {known}. "
            f"If {name!r} is the answer itself, call FINAL({name!r})."
        )

    def submit(self, text: str) -> None:
        """Send a text that leaves the kernel: a final answer, or the value the host asked for."""
        __tracebackhide__ = True
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > self.answer_bytes:
            raise self.bridge.HelperError(
                f"the answer has {size:,} bytes; Limits.answer_bytes is {self.answer_bytes:,}: shorten it"
            )
        self.channel.exchange(self.channel.encode({"op": "submit", "text": text}))

    def is_own(self, parent: dict[str, Any]) -> bool:
        """Whether a request came from the host, not from somebody else's client."""
        return bool(parent.get("header", {}).get("session") == self.session)

    def before_cell(self) -> None:
        parent = self.shell.kernel.get_parent()
        self.bridge.enter_cell(parent.get("header", {}).get("msg_id", ""))

    def after_cell(self, result: Any) -> None:
        """Put back what the cell broke, then add the report to the reply to its request."""
        if result is not None and isinstance(result.error_in_exec, CellExit):
            result.error_in_exec = None
        if not self.is_own(self.shell.kernel.get_parent()):
            return
        notes: list[str] = []
        restored = self._restore(notes)
        self._submit_ready_answer(notes)
        self._write_report(self._changes(), restored, notes)

    def _write_report(self, changed: dict[str, str], restored: list[str], notes: list[str]) -> None:
        given = {*self.helpers, "context", "answer"}
        names = sorted([*given, *sorted(self._known)[: REPORTED_NAMES - len(given)]])
        self.shell.payload_manager.write_payload(
            {"source": "kernel_env", "names": names, "changed": changed, "restored": restored, "notes": notes}
        )

    def _restore(self, notes: list[str]) -> list[str]:
        sys.stdout, sys.stderr = self.streams
        namespace = self.shell.user_ns
        for name, value in self._system.items():
            if name not in namespace or name in ("get_ipython", "__builtins__"):
                namespace[name] = value
        broken = [name for name, helper in self.helpers.items() if namespace.get(name) is not helper]
        for name in broken:
            namespace[name] = self.helpers[name]
        try:
            broken += self._restore_data()
        except (OSError, EOFError, self.bridge.HelperError) as error:
            notes.append(f"context could not be restored: {error}")
        return sorted(broken)

    def _submit_ready_answer(self, notes: list[str]) -> None:
        answer = self.shell.user_ns.get("answer")
        try:
            if isinstance(answer, dict) and answer.get("ready"):
                self.submit(str(answer.get("content", "")))
        except BaseException as error:  # noqa: BLE001 - `content` is any object: its __str__ and its size are the cell's
            notes.append(f"answer not submitted: {type(error).__name__}: {error}")

    def _changes(self) -> dict[str, str]:
        current = self._user_variables()
        identities = {name: self._identity(value) for name, value in current.items()}
        before, self._known = self._known, identities
        changed: dict[str, str] = {}
        deadline = time.monotonic() + SNAPSHOT_SECONDS
        for name, identity in identities.items():
            if name in before and identity[:2] == before[name][:2]:
                continue
            if len(changed) >= SNAPSHOT_NAMES or time.monotonic() > deadline:
                break
            changed[name] = bounded_repr(current[name])
        return changed

    @staticmethod
    def _identity(value: Any) -> tuple[int, int, Any]:
        kind = type(value)
        # The base's own __len__: a subclass's may do anything.
        bases: tuple[Any, ...] = (list, dict, set)
        length = next((base.__len__(value) for base in bases if isinstance(value, base)), -1)
        # A small value is held, so that its id is not used again; holding a large one would keep alive
        # what the cell deleted.
        small = kind in (int, float, bool, complex) or (kind in (str, bytes) and len(value) < 1000)
        return id(value), length, value if small else None


def bounded_repr(value: Any) -> str:
    """At most 500 characters of `repr`, made without touching much more of a large value than is shown."""
    try:
        return _repr(value, 0)[:SNAPSHOT_CHARS]
    except BaseException as error:  # noqa: BLE001 - a __repr__ of the model's may raise anything, SystemExit too
        return f"<repr raised {type(error).__name__}>"


def _repr(value: Any, depth: int) -> str:
    # reprlib sorts whole dicts and sets before it shows a few items, and prints bytes in full.
    kind = type(value)
    if kind in (str, bytes):
        return repr(value[:SNAPSHOT_CHARS])
    if kind is types.ModuleType:
        return f"<module {value.__name__!r}>"  # without the folder it came from
    if kind not in (list, tuple, set, frozenset, dict) or not value:
        return repr(value)
    if depth == len(SHOWN_ITEMS):
        return "..."
    if kind is dict:
        pairs = itertools.islice(value.items(), SHOWN_ITEMS[depth])
        parts = [f"{_repr(key, depth + 1)}: {_repr(item, depth + 1)}" for key, item in pairs]
    else:
        parts = [_repr(item, depth + 1) for item in itertools.islice(value, SHOWN_ITEMS[depth])]
    if len(value) > SHOWN_ITEMS[depth]:
        parts.append("...")
    text = ", ".join(parts)
    if kind is list:
        return f"[{text}]"
    if kind is tuple:
        return f"({text},)" if len(value) == 1 else f"({text})"
    return f"frozenset({{{text}}})" if kind is frozenset else f"{{{text}}}"


class _SeedNumpy(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Seeds numpy's global generator when `numpy.random` is imported, however late."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._loader: Any = None

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "numpy.random" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        module.seed(self._seed)


def seed_generators(seed: int) -> None:
    """Seed `random` and numpy's global generator, now or when numpy comes."""
    random.seed(seed)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(seed % 2**32)
    else:
        sys.meta_path.insert(0, _SeedNumpy(seed % 2**32))


def _escape_surrogates(pack: Any) -> Any:
    """Let text with lone surrogates leave the kernel: Jupyter's encoder fails on it and loses the message."""

    def packed(message: Any) -> Any:
        try:
            return pack(message)
        except UnicodeEncodeError:
            return json.dumps(message, default=str).encode("ascii")

    return packed


def _without_our_frames(show: Any) -> Any:
    """Show tracebacks as if helpers were built in: IPython hides marked frames, but never the last one."""

    def shown(etype: Any, evalue: Any, stb: Any) -> None:
        ours = ("_kernel_env_", "[... skipping hidden")
        show(etype, evalue, [part for part in stb if not any(mark in part.split("\n")[0] for mark in ours)])

    return shown


def _show_nothing(shell: Any, etype: Any, value: Any, tb: Any, tb_offset: Any = None) -> None:
    return None


def _end_cell(*_: Any) -> None:
    __tracebackhide__ = True
    raise CellExit


def install(shell: Any, bridge: Any, options: dict[str, Any]) -> None:
    """Make this kernel an episode's kernel; done again, it takes over from the earlier installation."""
    global _guest
    if _guest is not None:
        for event, callback in (("pre_execute", _guest.before_cell), ("post_run_cell", _guest.after_cell)):
            if callback in shell.events.callbacks[event]:
                shell.events.unregister(event, callback)
    else:
        shell.kernel.session.pack = _escape_surrogates(shell.kernel.session.pack)
        # 0.5 ms of every cell, there for clients that stop reading at the reply; ours waits for idle.
        shell.kernel._execute_sleep = 0
        # traitlets leaves the logger at DEBUG, so every message formatted a line nobody read: 0.5 ms a cell.
        shell.kernel.log.setLevel("WARNING")
        shell.ask_exit = _end_cell
        shell.set_custom_exc((CellExit,), _show_nothing)
        shell._showtraceback = _without_our_frames(shell._showtraceback)
        if options["seed"] is not None:
            seed_generators(options["seed"])
    bridge.tag_threads()
    _guest = Guest(shell, bridge, options)
    _guest.before_cell()
    _guest.put_in_place()
    shell.events.register("pre_execute", _guest.before_cell)
    shell.events.register("post_run_cell", _guest.after_cell)


def send_text_of(expression: str, convert: str) -> None:
    """Evaluate an expression of the host's and send its `str` or `repr` back."""
    __tracebackhide__ = True
    guest = _guest
    if guest is None:
        raise RuntimeError("the guest is not installed")
    value = eval(compile(expression, "<expression>", "eval"), guest.shell.user_ns)
    guest.submit(str(value) if convert == "str" else repr(value))
