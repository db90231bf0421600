"""What goes into a new kernel: the guest's sources and their options."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_env.bridge import Bridge
from kernel_env.calls import Helper
from kernel_env.config import Limits
from kernel_env.episode import Context
from kernel_env.folder import give_to_owner
from kernel_env.outputs import half
from kernel_env.sidefiles import write_whole
from kernel_env.types import Isolation

__all__ = ["GUEST_MODULES", "RUN_BOOT", "KernelSetup", "describe", "install_request"]

_GUEST = Path(__file__).parent / "guest"
_MESSAGE_CHARS = 2**16  # at least: also a header and a status are messages
GUEST_MODULES = ("limits", "bridge", "streams", "messages", "guard", "seeds", "tracebacks", "helpers")

# An expression, so that it leaves no name behind; what it works on comes in the request's metadata.
RUN_BOOT = (
    "(lambda shell, request: exec(request['boot'], {'shell': shell, 'request': request}))"
    "(get_ipython(), get_ipython().kernel.get_parent()['metadata']['kernel_env'])"
)


@dataclass(frozen=True, kw_only=True)
class KernelSetup:
    """What every kernel of one episode is started with."""

    kernel_name: str
    limits: Limits
    helpers: Mapping[str, Helper]
    context: Context
    seed: int | None
    preload: tuple[str, ...] = ()
    isolation: Isolation = "process"
    is_blank: bool = False
    """Nothing is in its namespace yet: it waits for its episode."""

    @classmethod
    def blank(cls, kernel_name: str, preload: tuple[str, ...], isolation: Isolation) -> KernelSetup:
        """The setup of a kernel that is made ready before its episode is known."""
        return cls(
            kernel_name=kernel_name,
            limits=Limits(),
            helpers={},
            context=Context.of(""),
            seed=None,
            preload=preload,
            isolation=isolation,
            is_blank=True,
        )


def install_request(setup: KernelSetup, bridge: Bridge, session: str, *, has_guest: bool) -> dict[str, Any]:
    """The metadata that `RUN_BOOT` installs the guest from; the folder also gets what spawned processes need.

    Sent as text, not imported from its place, so that any kernelspec's environment will do; a kernel that
    `has_guest` was forked with these modules.
    """
    limits, folder = setup.limits, bridge.path.parent / "guest"
    channel = {
        "socket": str(bridge.path),
        "token": bridge.token,
        "frame_bytes": limits.helper_frame_bytes,
        "answer_bytes": limits.answer_bytes,
        "helpers": [describe(name, helper) for name, helper in setup.helpers.items()],
    }
    sources = {name: "" if has_guest else _source(name) for name in GUEST_MODULES}
    texts = {
        "_kernel_env_bridge.py": _source("bridge"),
        "kernel_env_helpers.py": _source("child"),
        "helpers.json": json.dumps(channel),
    }
    for name, text in texts.items():  # a cell may have put anything in their place
        write_whole(folder / name, text.encode("utf-8"))
    give_to_owner(folder, *(folder / name for name in texts))
    options = channel | {
        "session": session,
        "folder": str(folder),
        "seed": setup.seed,
        "preload": [] if has_guest else list(setup.preload),
        "is_blank": setup.is_blank,
        "message_chars": max(limits.cell_output, _MESSAGE_CHARS),
        "stream_chars": half(limits.cell_output),
        "limits": _of_process(setup),
    }
    return {"boot": _source("boot"), "sources": sources, "options": options}


def _of_process(setup: KernelSetup) -> dict[str, int]:
    names = ["memory_bytes", "open_files", "file_bytes"]
    if setup.isolation == "sandbox":  # elsewhere Linux counts the processes of all of a user's programs
        names.append("processes")
    # A blank kernel may become that of any episode, which can only lower what is set.
    return {} if setup.is_blank else {name: getattr(setup.limits, name) for name in names}


def describe(name: str, helper: Helper) -> dict[str, Any]:
    """What the kernel needs to make a function with this helper's signature and docstring."""
    parameters = []
    for parameter in helper.signature.parameters.values():
        entry = {
            "name": parameter.name,
            "kind": parameter.kind.name,
            "annotation": _annotation_text(parameter.annotation),
        }
        if parameter.default is not parameter.empty:
            entry["default"] = repr(parameter.default)
        parameters.append(entry)
    returns = _annotation_text(helper.signature.return_annotation)
    return {
        "name": name,
        "parameters": parameters,
        "returns": returns,
        "doc": helper.doc,
        "is_typed": helper.is_typed,
    }


def _annotation_text(annotation: Any) -> str | None:
    if annotation is inspect.Signature.empty:
        return None
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


@functools.cache
def _source(name: str) -> str:
    return (_GUEST / f"{name}.py").read_text("utf-8")
