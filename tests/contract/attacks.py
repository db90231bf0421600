"""What model code might try against its host and its siblings, and what comes of it by isolation.

An attack is a cell; it has reached something if it prints `reached`. `context` tells it where things are.
`python -m tests.contract.attacks` prints the README's table, and `test_attacks.py` holds it to what happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["held", "reached", "depends", "not tried"]


@dataclass(frozen=True)
class Attack:
    group: str
    name: str
    code: str
    process: Outcome = "reached"
    """What comes of it without a sandbox, by root and by an ordinary user; in a sandbox all are held.

    `depends`: on the user and the system's settings; `not tried`: it could harm the machine that tests.
    """


SOCKET = """
import socket
s = socket.socket({family}, socket.{kind})
s.settimeout(2)
s.connect({address})
s.sendall(b'hello'); s.recv(10)
print('reached')
"""
CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if {call} >= 0: print('reached')
"""
IN_CHILD = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
r, w = os.pipe()
child = os.fork()
if child == 0:
    os.write(w, b'reached' if {call} >= 0 else b'no')
    os._exit(0)
os.waitpid(child, 0)
print(os.read(r, 10).decode())
"""
SEARCH = """
import re
wanted = re.compile(b'{first}' + b'{second}' + b'-[0-9a-f]{{16}}')
with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb', 0) as memory:
    for line in maps:
        area, rights = line.split()[:2]
        start, end = (int(n, 16) for n in area.split('-'))
        if 'r' not in rights or '[v' in line: continue
        while start < end:
            try:
                memory.seek(start)
                found = wanted.search(memory.read(min(end - start, 2**24)))
            except (OSError, OverflowError): break
            if found: print('reached')
            start += 2**24 - 64
"""

FILES = "Files"
PROCESSES = "Processes"
NETWORK = "Network"
RIGHTS = "Rights"
MEMORY = "What its own memory holds"

ATTACKS = (
    Attack(
        FILES,
        "a file in the user's home",
        "if b'HOME' in open(context['home'] + '/secret', 'rb').read(): print('reached')",
    ),
    Attack(
        FILES,
        "whether a file of the user's exists",
        """
import os
if os.path.exists(context['home'] + '/secret'):
    print('reached')
""",
    ),
    Attack(
        FILES,
        "the host's temporary files",
        """
import os
if os.path.basename(context['temporary']) in os.listdir(os.path.dirname(context['temporary'])):
    print('reached')
""",
    ),
    Attack(
        FILES,
        "another episode's working directory",
        "if 'OTHER' in open(context['other'] + '/work/data').read(): print('reached')",
    ),
    Attack(
        FILES,
        "another episode's connection file and key",
        "if 'key' in open(context['other'] + '/connection.json').read(): print('reached')",
    ),
    Attack(
        FILES,
        "write into the interpreter's packages",
        """
import os, IPython
path = os.path.dirname(IPython.__file__) + '/attack-' + context['id']
open(path, 'w').close()
os.unlink(path)
print('reached')
""",
    ),
    Attack(
        FILES,
        "write into its own guest folder, for the host to follow",
        """
import os
folder = os.path.dirname(os.getcwd())
os.rename(folder + '/guest', folder + '/moved')
os.rename(folder + '/moved', folder + '/guest')
print('reached')
""",
    ),
    Attack(
        FILES,
        "through `/proc/*/root` and `/proc/*/cwd`",
        """
import glob
for way in glob.glob('/proc/[0-9]*/root') + glob.glob('/proc/[0-9]*/cwd'):
    try:
        if b'HOME' in open(way + context['home'] + '/secret', 'rb').read():
            print('reached')
            break
    except OSError:
        pass
""",
    ),
    Attack(
        FILES,
        "a symbolic or hard link to a file of the user's",
        """
import os
try:
    os.symlink(context['home'] + '/secret', 'soft')
except FileExistsError:
    pass
if b'HOME' in open('soft', 'rb').read():
    print('reached')
""",
    ),
    Attack(
        FILES,
        "a device: make one, or open the disk's",
        """
import os, stat
for path in ['/dev/mem', '/dev/kmsg', '/dev/sda', '/dev/vda', '/dev/nvme0n1']:
    try:
        os.close(os.open(path, os.O_RDONLY))
        print('reached')
        break
    except OSError:
        pass
else:
    os.mknod('device', stat.S_IFCHR | 0o666, os.makedev(1, 1))
    print('reached')
""",
        "depends",
    ),
    Attack(
        PROCESSES,
        "the host's environment, by `/proc`",
        """
if b'SECRET_OF_HOST' in open(f"/proc/{context['pid']}/environ", 'rb').read():
    print('reached')
""",
    ),
    Attack(
        PROCESSES,
        "the host's environment, inherited",
        """
import os
if 'SECRET_OF_HOST' in str(os.environ) + open('/proc/self/environ').read():
    print('reached')
""",
        "held",
    ),
    Attack(
        PROCESSES,
        "the host's command line",
        "if open(f\"/proc/{context['pid']}/cmdline\").read(): print('reached')",
    ),
    Attack(
        PROCESSES,
        "the host's memory, by `/proc` and `process_vm_readv`",
        "open(f\"/proc/{context['pid']}/mem\", 'rb').close(); print('reached')",
        "depends",
    ),
    Attack(
        PROCESSES,
        "trace a process of the host's",
        CALL.format(call="libc.ptrace(0x4206, context['bystander'], 0, 0)"),
        "depends",
    ),
    Attack(
        PROCESSES,
        "signal a process of the host's",
        """
import os
os.kill(context['bystander'], 0); print('reached')
""",
    ),
    Attack(
        PROCESSES,
        "signal another episode's kernel",
        """
import os
os.kill(context['other_pid'], 0); print('reached')
""",
    ),
    Attack(
        PROCESSES,
        "renice a process of the host's",
        """
import os
os.setpriority(os.PRIO_PROCESS, context['bystander'], 5); print('reached')
""",
    ),
    Attack(
        PROCESSES,
        "see the host's processes",
        """
import os
if str(context['pid']) in os.listdir('/proc'):
    print('reached')
""",
    ),
    Attack(
        NETWORK,
        "TCP to the host",
        SOCKET.format(family="socket.AF_INET", kind="SOCK_STREAM", address="('127.0.0.1', context['tcp'])"),
    ),
    Attack(
        NETWORK,
        "UDP to the host, as DNS uses it",
        SOCKET.format(family="socket.AF_INET", kind="SOCK_DGRAM", address="('127.0.0.1', context['udp'])"),
    ),
    Attack(
        NETWORK,
        "TCP to the host's own address",
        SOCKET.format(
            family="socket.AF_INET", kind="SOCK_STREAM", address="(context['address'], context['tcp'])"
        ),
        "depends",
    ),
    Attack(
        NETWORK,
        "a route to anywhere",
        """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect(('192.0.2.1', 53))
print('reached')
""",
        "depends",
    ),
    Attack(
        NETWORK,
        "an abstract Unix socket",
        SOCKET.format(
            family="socket.AF_UNIX", kind="SOCK_STREAM", address="b'\\0' + context['abstract'].encode()"
        ),
    ),
    Attack(
        NETWORK,
        "a Unix socket by its path",
        SOCKET.format(family="socket.AF_UNIX", kind="SOCK_STREAM", address="context['home'] + '/socket'"),
    ),
    Attack(
        NETWORK,
        "another episode's kernel, by its socket",
        """
import socket
s = socket.socket(socket.AF_UNIX)
s.connect(context['other'] + '/run/k-1')
print('reached')
""",
    ),
    Attack(
        NETWORK,
        "another episode's helpers, by their socket",
        """
import socket
s = socket.socket(socket.AF_UNIX)
s.connect(context['other'] + '/h')
print('reached')
""",
    ),
    Attack(
        NETWORK,
        "packets past the protocols (AF_PACKET, AF_VSOCK)",
        """
import socket
for family in (17, 40):
    try:
        socket.socket(family, socket.SOCK_STREAM if family == 40 else socket.SOCK_RAW).close()
        print('reached')
    except OSError:
        pass
""",
        "depends",
    ),
    Attack(
        RIGHTS,
        "capabilities",
        """
if any(int(l.split()[1], 16) for l in open('/proc/self/status') if l.startswith('Cap')):
    print('reached')
""",
    ),
    Attack(
        RIGHTS,
        "a setuid program",
        """
import subprocess, time
silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
process = subprocess.Popen(['/usr/bin/passwd'], stdin=subprocess.PIPE, **silent)
status = open(f'/proc/{process.pid}/status').read()
for _ in range(100):
    if 'Name:\\tpasswd' in status:
        break
    time.sleep(0.01)
    try:
        status = open(f'/proc/{process.pid}/status').read()
    except OSError:
        break
process.kill()
if any(l.split()[2] == '0' for l in status.splitlines() if l.startswith('Uid:')):
    print('reached')
""",
        "depends",
    ),
    Attack(
        RIGHTS,
        "namespaces of its own",
        IN_CHILD.format(call="libc.unshare(0x10000000 | 0x20000)"),
        "depends",
    ),
    Attack(
        RIGHTS,
        "namespaces by `clone` and `clone3`",
        IN_CHILD.format(
            call="min(libc.syscall(435, (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17), 88), "
            "libc.syscall(56, 0x10000011, 0, 0, 0, 0))"
        ),
        "not tried",
    ),
    Attack(
        RIGHTS,
        "a process outside its tree (`CLONE_PARENT`)",
        IN_CHILD.format(call="libc.syscall(56, 0x8000 | 17, 0, 0, 0, 0)"),
        "depends",
    ),
    Attack(
        RIGHTS,
        "mounts",
        IN_CHILD.format(call="libc.mount(b'/usr', b'.', None, 4096, None)"),
        "not tried",
    ),
    Attack(
        RIGHTS,
        "make its root writable",
        """
import subprocess
for command in (['mount', '-o', 'remount,rw', '/'], ['mount', '-o', 'remount,rw,bind', '/usr']):
    if subprocess.run(command, capture_output=True).returncode == 0:
        print('reached')
""",
        "not tried",
    ),
    Attack(
        RIGHTS,
        "another root directory",
        IN_CHILD.format(call="libc.chroot(b'/tmp')"),
        "not tried",
    ),
    Attack(
        RIGHTS,
        "the clock, the host's name",
        IN_CHILD.format(
            call="max(libc.sethostname(b'x', 1), libc.clock_settime(0, (ctypes.c_long * 2)(1, 1)))"
        ),
        "not tried",
    ),
    Attack(
        RIGHTS,
        "a keyring",
        CALL.format(call="libc.syscall(248, b'user', b'attack', b'x', 1, -5)"),
        "depends",
    ),
    Attack(
        RIGHTS,
        "bpf, perf, userfaultfd, io_uring",
        CALL.format(
            call="max(libc.syscall(321, 0, bytes(72), 72), libc.syscall(298, bytes(128), 0, -1, -1, 0), "
            "libc.syscall(323, 1), libc.syscall(425, 1, bytes(120)))"
        ),
        "depends",
    ),
    Attack(
        RIGHTS,
        "memory that no limit counts (memfd, System V)",
        CALL.format(
            call="max(libc.memfd_create(b'x', 0), libc.shmget(0, 4096, 0o1600), libc.msgget(0, 0o1600))"
        ),
        "depends",
    ),
    Attack(
        RIGHTS,
        "input into a terminal (TIOCSTI)",
        """
import fcntl, os
fcntl.ioctl(os.openpty()[1], 0x5412, b'x'); print('reached')
""",
        "depends",
    ),
    Attack(
        RIGHTS,
        "raise its own limits",
        """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard + 1, hard + 1))
print('reached')
""",
        "depends",
    ),
    Attack(
        MEMORY,
        "the expected answer",
        SEARCH.format(first="ANSWER", second="EXPECTED"),
        "held",
    ),
    Attack(
        MEMORY,
        "a key in the host's environment",
        SEARCH.format(first="SECRET_OF", second="_HOST"),
        "held",
    ),
    Attack(
        MEMORY,
        "another episode's data",
        SEARCH.format(first="OTHER", second="EPISODE"),
        "held",
    ),
)


@dataclass(frozen=True)
class Bomb:
    """A cell that takes all it can; small limits are set, and it must not get more than the tenfold."""

    name: str
    code: str
    status: str
    """Of the observation in a sandbox."""
    says: str
    """What the observation says there."""
    process: Outcome = "held"


BOMBS = (
    Bomb(
        "processes",
        """
import os, time
n = 0
try:
    while n < 400:
        if os.fork() == 0:
            time.sleep(600); os._exit(0)
        n += 1
finally:
    print('forked', n, flush=True)
time.sleep(5)
""",
        "error",
        "BlockingIOError",
    ),
    Bomb(
        "threads",
        """
import threading, time
for n in range(400):
    threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
time.sleep(1)
""",
        "error",
        "can't start new thread",
    ),
    Bomb(
        "memory, at once",
        "x = bytearray(2**31)",
        "error",
        "Limits.memory_bytes",
    ),
    Bomb(
        "memory, bit by bit",
        """
x = []
while True:
    x.append('x' * 1000)
""",
        "error",
        "Limits.memory_bytes",
    ),
    Bomb(
        "memory, shared",
        """
import mmap, time
m = mmap.mmap(-1, 2**30)
for n in range(0, 2**30, 4096):
    m[n] = 1
time.sleep(3)
""",
        "out_of_memory",
        "Limits.memory_bytes",
    ),
    Bomb(
        "memory, in many processes",
        """
import os, time
for _ in range(8):
    if os.fork() == 0:
        x = bytearray(b'x') * (90 * 2**20); time.sleep(600)
time.sleep(20)
""",
        "out_of_memory",
        "Limits.memory_bytes",
    ),
    Bomb(
        "one file",
        """
with open('big', 'wb') as f:
    for _ in range(400):
        f.write(bytes(2**20))
""",
        "error",
        "File too large",
    ),
    Bomb(
        "many files' bytes",
        """
import time
for n in range(400):
    open(f'part{n}', 'wb').write(bytes(2**20)); time.sleep(0.02)
""",
        "error",
        "Limits.workdir_bytes",
    ),
    Bomb(
        "files without bytes",
        """
import time
for n in range(4000):
    open(f'empty{n}', 'wb').close(); time.sleep(0.002)
""",
        "error",
        "Limits.workdir_files",
    ),
    Bomb(
        "files in `/dev/shm` and `/tmp`",
        """
for folder in ('/dev/shm', '/tmp'):
    for n in range(100):
        open(f'{folder}/{n}', 'wb').write(bytes(2**22))
""",
        "error",
        "No space left",
        "not tried",
    ),
    Bomb(
        "descriptors",
        """
x = []
while True:
    x.append(open('/dev/null'))
""",
        "error",
        "Too many open files",
    ),
    Bomb(
        "pipes",
        """
import os
x = []
while True:
    x.append(os.pipe())
""",
        "error",
        "Too many open files",
    ),
    Bomb(
        "watches (inotify)",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
x = [libc.inotify_init() for _ in range(500)]
if min(x) < 0:
    raise OSError(ctypes.get_errno(), 'no more inotify instances')
""",
        "error",
        "inotify",
        "not tried",
    ),
    Bomb(
        "processor time",
        """
import os
for _ in range(3):
    os.fork()
while True:
    pass
""",
        "timeout",
        "Limits.cell_cpu",
    ),
    Bomb(
        "helper calls",
        "for n in range(100): llm_query('x')",
        "error",
        "Limits.helper_calls",
    ),
)


def table() -> str:
    """The README's table."""
    said = {"held": "held", "reached": "**reached**", "depends": "depends", "not tried": "–"}
    lines = ["| | sandbox | process |", "|---|---|---|"]
    for group in dict.fromkeys(attack.group for attack in ATTACKS):
        lines.append(f"| **{group}** | | |")
        lines += [f"| {a.name} | held | {said[a.process]} |" for a in ATTACKS if a.group == group]
    lines.append("| **Bombs**, against small limits | | |")
    lines += [f"| {bomb.name} | held | {said[bomb.process]} |" for bomb in BOMBS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201
