"""First code of ours in a new kernel: makes modules of the guest's sources and installs them.

Executed with `shell` and `request` (the metadata that came with it) as its only names.
"""

import builtins
import sys
import types

_modules = {}
for _name, _source in request["sources"].items():  # type: ignore[name-defined]  # noqa: F821
    _full = f"_kernel_env_{_name}"
    if _full not in sys.modules:  # as text, unless the kernel was forked with it
        _module = types.ModuleType(_full)
        # Builtins of its own: the ones that a cell replaces are not ours.
        _module.__dict__["__builtins__"] = dict(vars(builtins))
        sys.modules[_full] = _module
        exec(compile(_source, _full, "exec"), _module.__dict__)
    _modules[_name] = sys.modules[_full]

if request["options"] is not None:  # type: ignore[name-defined]  # noqa: F821 - a template only makes modules
    _modules["helpers"].install(
        shell,  # type: ignore[name-defined]  # noqa: F821
        _modules,
        request["options"],  # type: ignore[name-defined]  # noqa: F821
    )
