"""What of ours goes into a kernel: the guest's sources and their options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kernel_env.bridge import Bridge, Helper, describe
from kernel_env.config import Limits
from kernel_env.outputs import half

__all__ = ["RUN_BOOT", "install_request"]

_GUEST = Path(__file__).parent / "guest"
_MODULES = ("bridge", "streams", "guard", "helpers")

# An expression, so that it leaves no name behind; what it works on comes in the request's metadata.
RUN_BOOT = (
    "(lambda shell, request: exec(request['boot'], {'shell': shell, 'request': request}))"
    "(get_ipython(), get_ipython().kernel.get_parent()['metadata']['kernel_env'])"
)


def install_request(
    bridge: Bridge, folder: Path, session: str, helpers: dict[str, Helper], limits: Limits, seed: int | None
) -> dict[str, Any]:
    """The metadata that `RUN_BOOT` installs the guest from; also puts into `folder` what spawned processes need.

    Sent as text, not imported from its place, so that any kernelspec's environment will do.
    """
    channel = {
        "socket": str(bridge.path),
        "token": bridge.token,
        "frame_bytes": limits.helper_frame_bytes,
        "answer_bytes": limits.answer_bytes,
        "helpers": [describe(name, helper) for name, helper in helpers.items()],
    }
    sources = {name: _source(name) for name in _MODULES}
    (folder / "_kernel_env_bridge.py").write_text(sources["bridge"], "utf-8")
    (folder / "kernel_env_helpers.py").write_text(_source("child"), "utf-8")
    (folder / "helpers.json").write_text(json.dumps(channel), "utf-8")
    options = channel | {
        "session": session,
        "folder": str(folder),
        "seed": seed,
        "message_chars": limits.cell_output,
        "stream_chars": half(limits.cell_output),
    }
    return {"boot": _source("boot"), "sources": sources, "options": options}


def _source(name: str) -> str:
    return (_GUEST / f"{name}.py").read_text("utf-8")
