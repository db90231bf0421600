"""First code of ours in a new kernel: makes modules of the guest's sources and installs them.

Executed with `shell` and `request` (the metadata that came with it) as its only names.
"""

import sys
import types

for _name, _source in request["sources"].items():  # type: ignore[name-defined]  # noqa: F821
    if _name not in sys.modules:
        sys.modules[_name] = types.ModuleType(_name)
        exec(compile(_source, _name, "exec"), sys.modules[_name].__dict__)

sys.modules["_kernel_env_helpers"].install(
    shell,  # type: ignore[name-defined]  # noqa: F821
    sys.modules["_kernel_env_bridge"],
    request["options"],  # type: ignore[name-defined]  # noqa: F821
)
