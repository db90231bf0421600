"""Cells that attack their own kernel, by name, with what must be left of it afterwards."""

from __future__ import annotations

from textwrap import dedent

KEPT: dict[str, str] = {
    "stdout is a closed file": "import sys; f = open('/dev/null'); f.close(); sys.stdout = sys.stderr = f",
    "stdout raises": """
        import sys
        class Raises:
            def write(self, *a): raise ValueError('no')
            def flush(self): raise ValueError('no')
        sys.stdout = sys.stderr = Raises()
        """,
    "stdout is None": "import sys; sys.stdout = sys.stderr = None",
    "stdout is deleted": "import sys; del sys.stdout, sys.stderr",
    "stdout's own close": "import sys; sys.stdout.close(); sys.stderr.close()",
    "stdout's write is replaced": "import sys; sys.stdout.write = lambda text: 1 / 0",
    "descriptors 1 and 2 are closed": "import os; os.close(1); os.close(2)",
    "descriptor 0 is closed": "import os; os.close(0)",
    "history is deleted": "del _oh, Out, In, _ih",
    "event callbacks are cleared": "for c in get_ipython().events.callbacks.values(): c.clear()",
    "get_ipython is replaced": "import builtins; get_ipython = builtins.get_ipython = lambda: 1 / 0",
    "the loop is stopped": "import asyncio; asyncio.get_event_loop().stop()",
    "the loop is unset": "import asyncio; asyncio.set_event_loop(None)",
    "builtins are None": "import builtins; builtins.len = builtins.isinstance = builtins.__import__ = None",
    "builtins are deleted": """
        import builtins
        for n in list(vars(builtins)):
            if n != '__build_class__': delattr(builtins, n)
        """,
    "builtins raise": """
        import builtins
        def fails(*a, **k): raise RuntimeError('mine')
        builtins.isinstance = builtins.getattr = builtins.hasattr = fails
        """,
    "repr spins": """
        class Spins:
            def __repr__(self):
                while True: pass
        spins = Spins()
        """,
    "repr sleeps": """
        import time
        class Sleeps:
            def __repr__(self): time.sleep(600)
        sleeps = Sleeps()
        """,
    "repr exits": """
        class Exits:
            def __repr__(self): raise SystemExit
        exits = Exits()
        exits
        """,
    "repr prints": """
        class Prints:
            def __repr__(self): print('IN REPR'); return 'p'
        prints = Prints()
        """,
    "repr allocates": """
        class Allocates:
            def __repr__(self): return 'x' * 10**9
        allocates = Allocates()
        """,
    "class is a property": """
        class Odd:
            @property
            def __class__(self): raise SystemExit
        odd = Odd()
        """,
    "an exception whose str raises": """
        class Bad(Exception):
            def __str__(self): raise SystemExit
        raise Bad
        """,
    "an exception whose str is no text": """
        class Bad(Exception):
            def __str__(self): return 5
        raise Bad
        """,
    "a low recursion limit": """
        import sys
        for n in range(20, 1000):
            try: sys.setrecursionlimit(n); break
            except RecursionError: pass
        """,
    "endless recursion": "def f(): f()\nf()",
    "no garbage collection": "import gc; gc.disable(); gc.freeze()",
    "an alarm": "import signal; signal.alarm(60)",
    "signals are ignored and blocked": """
        import signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _ = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        """,
    "faulthandler": "import faulthandler; faulthandler.enable(); faulthandler.dump_traceback()",
    "threading is patched": """
        import threading as t
        t.Thread = t.Event = t.current_thread = t.Lock = t.local = None
        """,
    "socket is patched": "import socket; socket.socket = socket.recv_fds = socket.socketpair = None",
    "json is patched": "import json; json.dumps = json.loads = json.JSONEncoder = json.JSONDecoder = None",
    "json raises": "import json\njson.dumps = json.loads = lambda *a, **k: 1 / 0",
    "time is patched": "import time; time.time = time.monotonic = time.sleep = None",
    "os is patched": "import os; os.getpid = os._exit = os.write = os.environ = None",
    "modules are cleared": "import sys; sys.modules.clear()",
    "the namespace is replaced": "get_ipython().user_ns = {}",
    "the module is replaced": "get_ipython().user_module = None",
    "zmq is patched": "import zmq; zmq.Socket.send = zmq.Socket.send_multipart = None",
    "payloads are replaced": "get_ipython().payload_manager = None",
    "displays are replaced": "get_ipython().display_pub = get_ipython().displayhook = None",
    "a transformer that fails": "get_ipython().input_transformers_post.append(lambda lines: 1 / 0)",
    "an AST transformer that fails": "get_ipython().ast_transformers.append(1)",
    "tracing that raises": "import sys; sys.setprofile(lambda *a: 1 / 0); sys.settrace(lambda *a: 1 / 0)",
    "a child that comes back": "import os; os.fork()",
    "a child that raises": "import os\nif os.fork() == 0: raise ValueError('child')\n_ = os.wait()",
    "a child that exits": "import os\nif os.fork() == 0: os._exit(3)\n_ = os.wait()",
    "the working folder is removed": "import os, shutil; shutil.rmtree(os.getcwd())",
    "odd names": """
        class Odd(str):
            def isidentifier(self): raise SystemExit
            __hash__ = str.__hash__
        globals().update({Odd('zz'): 1, 'a' * 10**6: 1, 5: 6})
        """,
    "threads that spin": """
        import threading, time
        end = time.monotonic() + 3
        def spin():
            while time.monotonic() < end: pass
        for _ in range(3): threading.Thread(target=spin, daemon=True).start()
        """,
    "logging is patched": "import logging; logging.disable(); logging.Logger.error = None",
    "exit": "exit()",
    "quit": "quit()",
    "SystemExit": "raise SystemExit(3)",
    "more memory than there is": "x = bytearray(10**14)",
    "no address space": """
        import resource
        limit = resource.getrlimit(resource.RLIMIT_AS)
        size = int(open('/proc/self/statm').read().split()[0]) * 4096 + 2**26
        resource.setrlimit(resource.RLIMIT_AS, (size, limit[1]))
        try:
            x = [bytearray(2**20) for _ in range(200)]
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)
        """,
}
"""Name → cell after which the same kernel goes on with its variables."""

LOST: dict[str, str] = {
    "the session is patched": "get_ipython().kernel.session.send = None",
    "the output channel is closed": "get_ipython().kernel.iopub_thread.close()",
    "descriptors are closed": "import os; os.closerange(3, 1000)",
    "the loop is stopped in await": "import asyncio; asyncio.get_event_loop().stop(); await asyncio.sleep(0)",
    "a cleanup that fails": """
        get_ipython().input_transformer_manager.cleanup_transforms.append(lambda lines: 1 / 0)
        """,
    "a transformer that refuses": """
        from IPython.core.error import InputRejected
        class Refuses:
            def visit(self, tree): raise InputRejected
        get_ipython().ast_transformers.append(Refuses())
        """,
    "a callback that exits": "get_ipython().events.register('pre_run_cell', lambda *a: quit())",
    "os._exit": "import os; os._exit(3)",
    "SIGKILL": "import os; os.kill(os.getpid(), 9)",
    "SIGTERM": "import os; os.kill(os.getpid(), 15)",
    "a segmentation fault": "import ctypes; ctypes.string_at(0)",
    "abort": "import os; os.abort()",
    "faulthandler exits": "import faulthandler as f, time; f.dump_traceback_later(1, exit=1); time.sleep(9)",
}
"""Name → cell that costs the kernel."""


RAISING_TIMER = """
    import signal
    def raises(*a): raise RuntimeError('timer')
    signal.signal(signal.SIGALRM, raises); _ = signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    """

LOST_UNLESS_FORKED: dict[str, str] = {
    "the output thread is stopped": "get_ipython().kernel.iopub_thread.stop()",
    "run_cell does nothing": "get_ipython().run_cell = lambda *a, **k: None",
    "run_cell of the class does nothing": "type(get_ipython()).run_cell = lambda *a, **k: None",
    "should_run_async is None": "get_ipython().should_run_async = None",
}
"""Name → cell that costs a kernel that ipykernel serves, but not a forked one, which serves itself."""


def cell(code: str) -> str:
    """The source of one of these cells."""
    return dedent(code).strip()
