"""How a cell's errors are shown: without our own frames, and exception groups like any other error.

Runs inside the kernel, on the standard library and IPython alone.
"""

from __future__ import annotations

import builtins
import functools
import re
import traceback
from typing import Any

OURS = "_kernel_env_"
DEEPEST_CONTEXT = 1000


def install(shell: Any, release: Any) -> None:
    """Replace the two methods of `shell` that show errors; `release` gives them memory."""
    shell._showtraceback = functools.partial(_show_without_ours, type(shell)._showtraceback.__get__(shell))
    shell.showtraceback = functools.partial(_show, shell, type(shell).showtraceback.__get__(shell), release)


def _show_without_ours(show: Any, etype: Any, evalue: Any, stb: Any) -> None:
    # As if helpers were built in: IPython hides marked frames, but never the last one.
    ours = (OURS, "[... skipping hidden")
    show(etype, evalue, [part for part in stb if not any(mark in part.split("\n")[0] for mark in ours)])


def _show(shell: Any, show: Any, release: Any, exc_tuple: Any = None, *args: Any, **kwargs: Any) -> None:
    """IPython prints an exception group to stderr, and then the reply names no error at all."""
    release()
    try:
        etype, value, trace = shell._get_exc_info(exc_tuple)
    except ValueError:  # there is none
        value = None
    if not _has_group(value):
        return show(exc_tuple, *args, **kwargs)  # type: ignore[no-any-return]
    cells = shell.compile._filename_map
    while trace is not None and trace.tb_frame.f_code.co_filename not in cells:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(etype, value, trace))
    text = re.sub(r'File "([^"\n]+)"', lambda found: _name_of(found, cells), text)
    return shell._showtraceback(etype, value, text.splitlines())  # type: ignore[no-any-return]


def _name_of(found: re.Match[str], cells: dict[str, int]) -> str:
    return f"Cell In[{cells[found[1]]}]" if found[1] in cells else found[0]


def _has_group(error: Any) -> bool:
    for _ in range(DEEPEST_CONTEXT):
        if error is None or isinstance(error, getattr(builtins, "BaseExceptionGroup", ())):
            break
        error = error.__context__
    return error is not None
