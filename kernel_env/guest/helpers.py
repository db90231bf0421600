"""What model code finds in its namespace, and the report on that namespace after each of its cells.

Runs inside the kernel, on the standard library and IPython alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import operator
import re
import sys
import types
import warnings
from array import array
from collections import deque
from os import _exit, getpid, register_at_fork
from threading import _active, current_thread, main_thread  # type: ignore[attr-defined]
from time import monotonic
from typing import Any

import zmq

REPORTED_NAMES = 10_000
SNAPSHOT_NAMES = 100
SNAPSHOT_SECONDS = 0.05
SNAPSHOT_CHARS = 500
SHOWN_ITEMS = (120, 12, 4)  # of a container, of one in it, of one in that
SIZED: tuple[Any, ...] = (list, tuple, dict, set, frozenset, bytearray, array, deque)
MANY = 10_000
PLAIN = (int, float, bool, complex, str, bytes, type(None), types.ModuleType, types.FunctionType)
REPR_SECONDS = 1.0
NAME_CHARS = 1000
INPUT_NAMES = 100  # `_i7` and its like; IPython keeps all of them, and each report looks at every name

_guest: Guest | None = None
_is_seeded = False


class CellExit(BaseException):
    """Raised by `exit()` and `quit()`: ends the cell, not the kernel."""


class PreloadError(Exception):
    """A module that the user wants imported cannot be."""


class Guest:
    """The helpers of one kernel, what runs around each of its cells, and the report on its namespace."""

    def __init__(self, shell: Any, modules: Any, guard: Any, options: dict[str, Any]) -> None:
        self.shell = shell
        self.bridge = bridge = modules["bridge"]
        self.limits = modules["limits"]
        self.guard = guard
        self.session = options["session"]
        self.pid = getpid()
        self.channel, self.helpers = bridge.functions(options)
        self.lifeline: Any = None
        self.helpers.update({function.__name__: function for function in self._functions()})
        self._known: dict[str, tuple[int, int, Any]] = {}
        self._told: list[str] = []
        self._system = {
            name: value
            for name, value in shell.user_ns.items()
            if name.startswith("_") or name in shell.user_ns_hidden
        }

    def put_in_place(self, *, is_blank: bool) -> None:
        """Fill the namespace, unless it is to stay blank; the first report compares with it."""
        if not is_blank:
            self.shell.push(self.helpers, interactive=False)
            self._restore_data()
        self._known = {name: self._identity(value) for name, value in self._user_variables().items()}
        self.shell.payload_manager.write_payload(self._report({}, [], []))

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
            if type(name) is str  # a subclass of the cell's may do anything
            and not name.startswith("_")
            and name.isidentifier()
            and name not in self.helpers
            and name not in ("context", "answer")
            and not (name in hidden and hidden[name] is value)
        }

    def _functions(self) -> list[Any]:
        def FINAL_VAR(x: Any) -> Any:
            """Submit the variable that the text `x` names; anything else is itself the answer."""
            __tracebackhide__ = True
            return self.helpers["FINAL"](self._variable(x))

        def SHOW_VARS() -> list[str]:
            """The sorted names of your variables, without the helpers, `context` and `answer`."""
            return sorted(self._user_variables())

        for function in (FINAL_VAR, SHOW_VARS):
            function.__qualname__ = function.__name__
            function.__module__ = self.bridge.MODULE
        return [FINAL_VAR, SHOW_VARS]

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

    def is_own(self, parent: dict[str, Any]) -> bool:
        """Whether a request came from the host, not from somebody else's client."""
        return bool(parent.get("header", {}).get("session") == self.session)

    async def serve(self, execute_request: Any, args: Any) -> None:
        """Serve an execute request, or say to the host that the kernel cannot answer any more."""
        self.bridge.enter_cell(args[-1].get("header", {}).get("msg_id", ""))
        try:
            await execute_request(*args)
        except BaseException as error:  # noqa: BLE001 - the cell has broken what ipykernel is made of
            self.guard.restore_functions(even_callable=True)  # the channel needs some of them, too
            if getpid() != self.pid:
                self._leave(failure(error))
            told = {"op": "broken", "text": f"{type(error).__name__}: {_message(error)}"[:500]}
            self.channel.exchange(self.channel.encode(told))

    def before_request(self) -> None:
        """Let an interrupt reach what another client asks for; around a cell `execute` sees to it."""
        if _is_in_subshell():
            return
        if self.shell.kernel.get_parent()["msg_type"] != "execute_request":
            self.guard.before_cell()
            self.guard.is_interruptible = True

    def after_request(self) -> None:
        """Let no interrupt through between requests."""
        if not _is_in_subshell():
            self.guard.is_interruptible = False

    async def execute(self, do_execute: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        """Run a request's code; whatever it does, what it broke is put back and there is a reply."""
        if _is_in_subshell():
            return await do_execute(*args, **kwargs)  # type: ignore[no-any-return]
        parent = self.shell.kernel.get_parent()
        notes: list[str] = []
        has_failed = False
        self.guard.before_cell()
        self.limits.before_cell()
        try:
            reply: dict[str, Any] = await self._run(do_execute, args, kwargs)
            self.guard.is_interruptible = False
        except BaseException as error:  # noqa: BLE001 - the cell has broken IPython itself, or an interrupt came late
            self.guard.is_interruptible = False
            self.limits.release()
            notes.append(f"IPython could not run the cell to its end: {type(error).__name__}")
            reply, has_failed = failure(error), not isinstance(error, KeyboardInterrupt)
            if not has_failed:
                with contextlib.suppress(BaseException):  # of IPython's, which the cell may have replaced
                    self.shell._showtraceback(type(error), error, reply["traceback"])
        if getpid() != self.pid:
            self._leave(reply)
        broken = self.guard.after_cell(has_failed=has_failed)
        if reply["status"] == "error" and not self.guard.can_run_a_cell():
            raise RuntimeError("IPython runs no cell any more")  # `serve` tells the host
        if reply.get("ename") == CellExit.__name__:
            kept = ("execution_count", "payload", "user_expressions")
            reply = {"status": "ok", **{key: reply[key] for key in kept if key in reply}}
        if reply.get("ename") == "MemoryError":
            notes.append(self.limits.note())
        if self.is_own(parent) and not parent["content"].get("silent"):
            self._forget_old_inputs()
            broken += self._restore(notes)
            self._submit_ready_answer(notes)
            reply.setdefault("payload", []).append(self._report(self._changes(), broken, notes))
        self.guard.end_cell()
        return reply

    async def _run(self, do_execute: Any, args: Any, kwargs: Any) -> Any:
        self.guard.is_interruptible = True
        self.guard.take_missed()
        return await do_execute(*args, **kwargs)

    def _forget_old_inputs(self) -> None:
        name = f"_i{self.shell.execution_count - 1 - INPUT_NAMES}"
        for names in (self.shell.user_ns, self.shell.user_ns_hidden):
            names.pop(name, None)

    def _leave(self, reply: dict[str, Any]) -> None:
        # A forked child that came to the cell's end: it shares the parent's sockets and must not serve them.
        with contextlib.suppress(BaseException):
            lines = reply.get("traceback", [])
            sys.stderr.write(re.sub(r"\x1b\[[0-9;]*m", "", "".join(f"{line}\n" for line in lines)))
            self.guard.flush()
        _exit(1 if reply["status"] == "error" else 0)

    def _report(self, changed: dict[str, str], restored: list[str], notes: list[str]) -> dict[str, Any]:
        given = {*self.helpers, "context", "answer"}
        known = (name for name in sorted(self._known) if len(name) <= NAME_CHARS)
        names = sorted([*given, *itertools.islice(known, REPORTED_NAMES - len(given))])
        is_news, self._told = names != self._told, names
        return {
            "source": "kernel_env",
            "names": names if is_news else None,
            "changed": changed,
            "restored": sorted(restored),
            "notes": notes,
        }

    def _restore(self, notes: list[str]) -> list[str]:
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
        return broken

    def _submit_ready_answer(self, notes: list[str]) -> None:
        answer = self.shell.user_ns.get("answer")
        if not issubclass(type(answer), dict):
            return
        try:
            self.guard.is_interruptible = True  # `content` is any object
            text = str(answer.get("content", "")) if answer.get("ready") else None
            self.guard.is_interruptible = False
            if text is not None:
                self.channel.submit(text)
        except BaseException as error:  # noqa: BLE001 - its __str__ may raise anything
            self.guard.is_interruptible = False
            notes.append(f"answer not submitted: {type(error).__name__}: {_message(error)}")
            dict.__setitem__(answer, "ready", False)  # or it would fail after every cell from here on

    def _changes(self) -> dict[str, str]:
        current = self._user_variables()
        identities = {name: self._identity(value) for name, value in current.items()}
        before, self._known = self._known, identities
        changed: dict[str, str] = {}
        deadline = monotonic() + SNAPSHOT_SECONDS
        for name, identity in identities.items():
            if name in before and identity[:2] == before[name][:2]:
                continue
            if len(changed) >= SNAPSHOT_NAMES or monotonic() > deadline:
                break
            if len(name) <= NAME_CHARS:
                changed[name] = self._shown(current[name])
        return changed

    def _shown(self, value: Any) -> str:
        if type(value) in PLAIN:
            return bounded_repr(value)
        try:
            with self.guard.within(REPR_SECONDS):
                self.guard.is_interruptible = True
                shown = bounded_repr(value)
                self.guard.is_interruptible = False
                return shown
        except BaseException as error:  # noqa: BLE001 - the time may be up just after the last of the cell's code
            self.guard.is_interruptible = False
            return f"<repr raised {type(error).__name__}>"

    @staticmethod
    def _identity(value: Any) -> tuple[int, int, Any]:
        kind = type(value)
        # The base's own __len__: a subclass's may do anything, and so may an object's __class__.
        bases: tuple[Any, ...] = (list, dict, set)
        length = next((base.__len__(value) for base in bases if issubclass(kind, base)), -1)
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
    if kind in (str, bytes, bytearray):
        return repr(value[:SNAPSHOT_CHARS])
    if kind is types.ModuleType:
        return f"<module {value.__name__!r}>"  # without the folder it came from
    if kind not in (list, tuple, set, frozenset, dict) or not value:
        for base in SIZED:  # their repr is one call of C, which nothing interrupts
            if issubclass(kind, base) and base.__len__(value) > MANY:
                return f"<{kind.__name__} of {base.__len__(value):,} items>"
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


def _is_in_subshell() -> bool:
    """Whether this is a request of another client, beside those of the main thread, where interrupts come."""
    return current_thread() is not main_thread()


def failure(error: BaseException) -> dict[str, Any]:
    """The reply to a cell that IPython itself could not see through."""
    name, text = type(error).__name__, _message(error)
    return {"status": "error", "ename": name, "evalue": text, "traceback": [f"{name}: {text}"]}


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as another:  # noqa: BLE001 - an exception of the cell's
        return f"<str raised {type(another).__name__}>"


def _show_nothing(shell: Any, etype: Any, value: Any, tb: Any, tb_offset: Any = None) -> None:
    return None


def _end_cell(*_: Any) -> None:
    __tracebackhide__ = True
    raise CellExit


def install(shell: Any, modules: Any, options: dict[str, Any]) -> None:
    """Make this kernel an episode's kernel; done again, it takes over from the earlier installation.

    `modules` are the guest's other modules, by name.
    """
    global _guest, _is_seeded
    bridge, guard, kernel = modules["bridge"], modules["guard"], shell.kernel
    # What can be done again is: a cell may have undone it.
    kernel.session.pack, kernel.session.unpack = (
        modules["messages"].packer(options["message_chars"]),
        modules["messages"].unpacker(),
    )
    kernel.do_execute = functools.partial(_execute, type(kernel).do_execute.__get__(kernel))
    served = type(kernel).execute_request.__get__(kernel)
    kernel.shell_handlers["execute_request"] = functools.partial(_serve, served)
    shell.ask_exit = _end_cell
    shell.set_custom_exc((CellExit,), _show_nothing)
    modules["tracebacks"].install(shell, modules["limits"].release)
    bridge.tag_threads()
    if _guest is None:
        # 0.5 ms of every cell, there for clients that stop reading at the reply; ours waits for idle.
        kernel._execute_sleep = 0
        # IPython tells of it on the cell's stderr, with the folder it is installed in.
        warnings.filterwarnings("ignore", "Output cache limit", UserWarning)
        # traitlets leaves the logger at DEBUG, so every message formatted a line nobody read: 0.5 ms a cell.
        kernel.log.setLevel("WARNING")
        sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "NotTheFirstTime"]
        the_guard = guard.Guard(shell, (sys.stdout, sys.stderr))
        # At the default of 1,000 messages zmq drops output, `idle` included, while the host's reader is slow.
        iopub = kernel.iopub_thread
        if not hasattr(iopub, "sends_at_once"):  # a forked kernel's has no limit from the start
            iopub.schedule(functools.partial(iopub.socket.set, zmq.SNDHWM, 0))
            # An interrupt in `Thread.is_alive` has Python (before 3.13) take the thread for ended, for good:
            # from then on the main thread sends beside it, and the next interrupt cuts a message in two.
            iopub.thread.is_alive = functools.partial(operator.contains, _active, iopub.thread.ident)
            # In a forked child a new thread may have its identifier.
            register_at_fork(after_in_child=functools.partial(vars(iopub.thread).pop, "is_alive", None))
    else:
        the_guard = _guest.guard
    for stream in the_guard.streams:
        modules["streams"].adopt(stream, options["stream_chars"])
    _preload(options["preload"])
    if options["seed"] is not None and not _is_seeded:
        modules["seeds"].seed_generators(options["seed"])
        _is_seeded = True
    kernel._cancel_on_sigint = the_guard.cancel_on_sigint
    lifeline = None if _guest is None else _guest.lifeline
    _guest = Guest(shell, modules, the_guard, options)
    kept_whole = (Guest.execute, Guest._submit_ready_answer, Guest._shown, *guard.HANDLER)
    the_guard.own_code = frozenset(function.__code__ for function in kept_whole)
    if lifeline is None:
        lifeline = _guest.channel.connect()
        guard.die_with(lifeline)
    _guest.lifeline = lifeline
    # Around every request ipykernel lets SIGINT raise anywhere in itself, which costs a cell's reply.
    kernel.pre_handler_hook, kernel.post_handler_hook = _guest.before_request, _guest.after_request
    guard.set_signal(
        guard.signal.SIGINT, the_guard._on_sigint
    )  # from now on, not only from the first cell on
    # What is held back of a stream comes before what is displayed after it.
    shell.display_pub._flush_streams = the_guard.before_display
    finish = type(shell.displayhook).finish_displayhook.__get__(shell.displayhook)
    shell.displayhook.finish_displayhook = functools.partial(_finish_result, the_guard, finish)
    bridge.publish(_guest.helpers, options["folder"])
    bridge.enter_cell(kernel.get_parent()["header"]["msg_id"])
    _guest.put_in_place(is_blank=options["is_blank"])
    if options["limits"]:
        modules["limits"].install(options["limits"])


def _preload(names: list[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - a module of the user's
            raise PreloadError(f"preload: {name} cannot be imported: {error!r}") from None


def _finish_result(guard: Any, finish: Any) -> None:
    guard.before_display()
    finish()


async def _execute(do_execute: Any, *args: Any, **kwargs: Any) -> Any:
    assert _guest is not None
    return await _guest.execute(do_execute, args, kwargs)


async def _serve(execute_request: Any, *args: Any) -> None:
    assert _guest is not None
    await _guest.serve(execute_request, args)


def send_text_of(expression: str, convert: str) -> None:
    """Evaluate an expression of the host's and send its `str` or `repr` back."""
    __tracebackhide__ = True
    guest = _guest
    if guest is None:
        raise RuntimeError("the guest is not installed")
    value = eval(compile(expression, "<expression>", "eval"), guest.shell.user_ns)
    guest.channel.submit(str(value) if convert == "str" else repr(value))
