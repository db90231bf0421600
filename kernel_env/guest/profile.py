"""The configuration of IPython in a kernel's own profile."""

import sys

c = get_config()  # type: ignore[name-defined]  # noqa: F821 - IPython executes this file with it
# History goes to a database file: 2.6 ms of a step, and locks on network file systems.
c.HistoryManager.enabled = False
c.InteractiveShellApp.exec_PYTHONSTARTUP = False
c.IPKernelApp.quiet = True


class NotTheFirstTime:
    """Keeps ipykernel from importing debugpy, a quarter of a start; cells, which come later, can."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name == "debugpy":
            sys.meta_path.remove(cls)
            raise ModuleNotFoundError("kernels of kernel_env have no debugger", name=name)


if "debugpy" not in sys.modules:  # an old ipykernel has it by now, and a template has seen to it
    sys.meta_path.insert(0, NotTheFirstTime)
