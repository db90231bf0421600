"""The helpers in a process that a cell spawned: what `kernel_env_helpers` is there.

Stands in the kernel's folder beside `_kernel_env_bridge.py` and `helpers.json`, for children that import
what a cell hands to them (`multiprocessing` with `spawn`). What needs the kernel's namespace is not here.
"""

import json
import pathlib

import _kernel_env_bridge  # type: ignore[import-not-found]

globals().update(
    _kernel_env_bridge.functions(json.loads(pathlib.Path(__file__).with_name("helpers.json").read_text()))[1]
)
