"""The configuration of IPython in a kernel's own profile."""

import sys

c = get_config()  # type: ignore[name-defined]  # noqa: F821 - IPython executes this file with it
# History goes to a database file: 2.6 ms of a step, and locks on network file systems.
c.HistoryManager.enabled = False
c.InteractiveShellApp.exec_PYTHONSTARTUP = False
c.IPKernelApp.quiet = True
# ipykernel would import it for a debugger: a quarter of a start. Once the guest is in, cells can.
sys.modules["debugpy"] = None  # type: ignore[assignment]
