"""How forked kernels are confined: namespaces, a root directory of their own, no rights, few system calls.

The template enters namespaces with a small read-only root once (`Sandbox`); each kernel forked from it then
gets its own on top (`confine`), before it has a thread and before it runs code of anybody's. The calls and
their order are those of namespaces(7), pivot_root(2), capabilities(7), landlock(7) and seccomp(2).

Runs in the template and in the kernels forked from it, on Linux and the standard library alone.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import site
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    *(0x00020000, 0x04000000, 0x08000000),
    *(0x10000000, 0x20000000, 0x40000000),
)
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SYS_OPEN_TREE, SYS_MOVE_MOUNT, OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = 428, 429, 1, 4
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
SIOCSIFFLAGS, IFF_UP_AND_LOOPBACK = 0x8914, 1 | 64
CAPABILITIES = 64
OLDEST_LINUX = (5, 14)  # counts processes by user namespace; mounts can be changed as here since 5.12
NO_ROOM = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)

# Rights of landlock(7), and with which version of it the later ones came.
READ, WRITE, EXECUTE, LIST = 4, 2, 1, 8
MAKE_DEVICES = 64 | 2048
RIGHTS_OF_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
IOCTL_DEVICE = 1 << 15
SCOPES = 1 | 2  # abstract sockets and signals, from version 6 on

SHARED_MEMORY_BYTES = 256 * 2**20
TEMPORARY_BYTES = 64 * 2**20
FILES_OF_TMPFS = 65_536
INOTIFY = {"max_inotify_instances": 32, "max_inotify_watches": 16_384}
# Above, where a user's own count is: exhausted, the host's programs could watch no file any more.

EPISODES = "/.episodes"
SYSTEM_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
ETC = (
    *("alternatives", "ca-certificates", "debian_version", "fonts", "gai.conf", "host.conf", "inputrc"),
    *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "locale.alias", "locale.conf", "localtime", "magic"),
    *("mime.types", "nsswitch.conf", "os-release", "pki", "protocols", "services", "ssl", "terminfo"),
    *("timezone", "ImageMagick-6", "matplotlibrc", "R", "texmf"),
)
DEVICES = ("null", "zero", "full", "random", "urandom")
DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "fd/0",
    "stdout": "fd/1",
    "stderr": "fd/2",
    "ptmx": "pts/ptmx",
}
# Linux reaps the children of a process that ignores SIGCHLD, and what is ignored stays so in a new program.
IGNORE_SIGCHLD = ("/usr/bin/env", "--ignore-signal=CHLD")
WAITING = ("sleep", "2147483647")

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The system does not let a process confine itself; says at which step, and why."""


@contextlib.contextmanager
def asking_for(name: str) -> Iterator[None]:
    """Name what the system said no to; that it has no room now is another matter."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        at = f" ({error.filename})" if error.filename else ""
        raise Refused(f"{name}: {error.strerror}{at}") from error


def call(function: Any, *args: Any, about: str | None = None) -> int:
    """Call a function of libc; raise OSError if it fails."""
    result: int = function(*args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), about)
    return result


def prctl(option: int, value: Any = 0, pointer: Any = 0) -> int:
    return call(libc.prctl, option, ctypes.c_ulong(value), pointer, 0, 0)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    kinds = kind.encode() or None
    where = os.fsencode(target)
    call(libc.mount, os.fsencode(source), where, kinds, ctypes.c_ulong(flags), data.encode(), about=target)


def bind(source: str, target: str, *, attributes: int) -> None:
    """Make what is at `source` be at `target` too, with everything mounted below it."""
    mount(source, target, flags=MS_BIND | MS_REC)
    set_attributes(target, attributes)


def set_attributes(target: str, attributes: int, flags: int = AT_RECURSIVE) -> None:
    """Make mounts read-only, without devices, …; those that are there already stay."""
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    where = os.fsencode(target)
    call(libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, where, flags, wanted, len(wanted), about=target)


def write(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)


def clone_mounts(path: str) -> int:
    """A descriptor of what is mounted at `path` and below it, to be put elsewhere."""
    flags = OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC
    return call(libc.syscall, SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags, about=path)


def is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def libraries(parent: str) -> list[str]:
    """The folders of this interpreter and of what it imports, none inside another.

    Not what is installed as a link into a project's folder (`pip install -e`): that has more than code in it.
    """
    found = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, "/usr"}
    found |= {path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isdir(path)}
    if site.ENABLE_USER_SITE and os.path.isdir(site.getusersitepackages()):
        found.add(site.getusersitepackages())
    found = {path for path in found if not is_below(parent, os.path.realpath(path))}  # nor all kernels
    found = {os.path.abspath(path) for path in found} | {os.path.realpath(path) for path in found}
    return sorted(path for path in found if not any(is_below(path, other) for other in found - {path}))


def enter(
    folder: str, program: str, writable: list[str], as_root: bool, lifeline: socket.socket, control: int
) -> Sandbox:
    """Make a sandbox and go on in it; the arguments are those of `Sandbox`, the filter in base 64."""
    sandbox = Sandbox(folder, base64.b64decode(program), writable, as_root)
    sandbox.enter(folder, lifeline, control)
    return sandbox


class Sandbox:
    """The namespaces that a template and its kernels live in; made in the template's first moments.

    `folder` is the template's own, beside which those of the kernels are; of those `writable` are the
    folders that the kernels can write to. `program` is the filter of system calls, `as_root` says whether
    kernels get user ids of their own instead of a user namespace.
    """

    def __init__(self, folder: str, program: bytes, writable: list[str], as_root: bool) -> None:
        self._parent = os.path.dirname(folder)
        self._program = program
        self._writable = writable
        if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) < OLDEST_LINUX:
            raise Refused(f"Linux: {os.uname().release} is older than 5.14")
        self._ids = os.getuid(), os.getgid()
        self._libraries = libraries(self._parent)
        # A GNU env of 2019 or later; without, zombies stay until the end.
        ignores = run(*IGNORE_SIGCHLD, "true") == 0
        self._first = (*IGNORE_SIGCHLD, *WAITING) if ignores else ("/usr/bin/env", *WAITING)
        others = NEWNS | NEWPID | NEWIPC | NEWUTS
        if as_root:
            with asking_for("namespaces"):
                call(libc.unshare, others)
        else:
            with asking_for("user namespace"):
                call(libc.unshare, NEWUSER | others)
                self._map_ids()
        root = f"{folder}/tmp"
        with asking_for("mounts"):
            mount("none", "/", flags=MS_REC | MS_PRIVATE)
            episodes = clone_mounts(self._parent)  # before the new root is in there, too
            mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=8m")
            self._build(root, folder, episodes)

    def _map_ids(self) -> None:
        write("/proc/self/setgroups", b"deny")
        for name, number in zip(("uid_map", "gid_map"), self._ids):  # noqa: B905 - Python 3.9
            write(f"/proc/self/{name}", f"{number} {number} 1".encode())

    def _build(self, root: str, folder: str, episodes: int) -> None:
        fixed = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV
        for path in self._libraries:
            os.makedirs(root + path, exist_ok=True)
            bind(path, root + path, attributes=fixed)
        for name in SYSTEM_LINKS:
            if os.path.islink(f"/{name}"):
                os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
            elif os.path.isdir(f"/{name}"):
                os.mkdir(f"{root}/{name}")
                bind(f"/{name}", f"{root}/{name}", attributes=fixed)
        for name in ("etc", "dev", "dev/pts", "dev/shm", "proc", "tmp"):
            os.makedirs(f"{root}/{name}", exist_ok=True)
        for name in ETC:
            path = f"/etc/{name}"
            if os.path.isdir(path):
                os.mkdir(root + path)
                bind(path, root + path, attributes=fixed)
            elif os.path.isfile(path):  # every mount costs every kernel
                with open(path, "rb") as file:
                    write(root + path, file.read())
        for name, text in (
            ("hosts", b"127.0.0.1 localhost kernel\n::1 localhost\n"),
            ("hostname", b"kernel\n"),
            ("passwd", b""),
            ("group", b"root:x:0:\nnogroup:x:65534:\n"),
        ):
            write(f"{root}/etc/{name}", text)
        for name in DEVICES:
            write(f"{root}/dev/{name}", b"")
            bind(f"/dev/{name}", f"{root}/dev/{name}", attributes=ATTR_NOSUID)
        for name, target in DEVICE_LINKS.items():
            os.symlink(target, f"{root}/dev/{name}")
        os.mkdir(root + EPISODES)
        there = os.fsencode(root + EPISODES)
        call(libc.syscall, SYS_MOVE_MOUNT, episodes, b"", AT_FDCWD, there, MOVE_MOUNT_F_EMPTY_PATH)
        os.close(episodes)
        set_attributes(root + EPISODES, ATTR_NOSUID | ATTR_NODEV)
        os.makedirs(root + folder, exist_ok=True)
        bind(f"{root}{EPISODES}/{os.path.basename(folder)}", root + folder, attributes=ATTR_NOSUID)

    def enter(self, folder: str, lifeline: socket.socket, control: int) -> None:
        """Go on as the first process of the namespaces; the one that was here waits for its end.

        That one holds no end of `control`. When the host is gone it kills everything in the namespaces.
        """
        with asking_for("process namespace"):
            first = os.fork()
        if first:
            os.close(control)
            _see_to_the_end(first, lifeline)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        root = f"{folder}/tmp"
        with asking_for("proc"):
            mount("none", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        with asking_for("root directory"):
            os.chdir(root)
            call(libc.pivot_root, b".", b".")
            call(libc.umount2, b".", MNT_DETACH)
            os.chdir("/")
            set_attributes("/", ATTR_RDONLY, flags=0)
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        os.chdir(folder)

    def begin_namespace(self) -> int:
        """Let the next child be in a new process namespace; returns the first process there."""
        call(libc.unshare, NEWPID)
        nothing = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0)
        quiet = [(os.POSIX_SPAWN_DUP2, 0, fd) for fd in (1, 2)]
        try:
            return os.posix_spawn(
                self._first[0], self._first, {}, file_actions=[nothing, *quiet], setsid=True
            )
        except OSError:
            self.end_namespace()
            raise

    def end_namespace(self) -> None:
        """Let children be where this process is, again."""
        call(libc.setns, self._own, NEWPID)

    def confine(self, folder: str, uid: int | None) -> None:
        """Confine this process, for good, to what is its own: `folder`, and nothing else that can change."""
        os.close(self._own)
        with asking_for("namespaces"):
            call(libc.unshare, NEWNS | NEWIPC | NEWUTS | NEWNET)
            call(libc.sethostname, b"kernel", 6)
        with asking_for("loopback"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP_AND_LOOPBACK))
        with asking_for("mounts"):
            self._mount_own(folder, uid)
        self._drop_rights(uid)
        version = landlock_version()
        if version:
            with asking_for("Landlock"):
                self._lock_files(folder, version)
        with asking_for("seccomp"):
            prctl(PR_SET_SECCOMP, 2, filter_program(self._program))

    def _mount_own(self, folder: str, uid: int | None) -> None:
        mounted = MS_NOSUID | MS_NODEV
        covers = {"/tmp": TEMPORARY_BYTES, "/dev/shm": SHARED_MEMORY_BYTES}
        if not any(is_below(self._parent, cover) for cover in covers):
            covers[self._parent] = TEMPORARY_BYTES
        hidden = [path for path in self._libraries if any(is_below(path, cover) for cover in covers)]
        kept = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in hidden]
        for cover, size in covers.items():
            mount("none", cover, "tmpfs", mounted, f"mode=1777,size={size},nr_inodes={FILES_OF_TMPFS}")
        for path, fd in kept:
            os.makedirs(path, exist_ok=True)
            mount(f"/proc/self/fd/{fd}", path, flags=MS_BIND | MS_REC)
            os.close(fd)
        source = f"{EPISODES}/{os.path.basename(folder)}"
        os.makedirs(folder, exist_ok=True)
        bind(source, folder, attributes=ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
        for name in self._writable:
            bind(f"{source}/{name}", f"{folder}/{name}", attributes=ATTR_NOSUID | ATTR_NODEV)
        call(libc.umount2, EPISODES.encode(), MNT_DETACH)
        user, group = self._ids if uid is None else (uid, uid)
        write("/tmp/passwd", f"kernel:x:{user}:{group}::{folder}/home:/bin/sh\n".encode())
        mount("/tmp/passwd", "/etc/passwd", flags=MS_BIND)
        os.unlink("/tmp/passwd")
        set_attributes("/etc/passwd", ATTR_RDONLY)
        mount("none", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0600")
        mount("none", "/proc", "proc", mounted | MS_NOEXEC)

    def _drop_rights(self, uid: int | None) -> None:
        with asking_for("user"):
            if uid is None:
                call(libc.unshare, NEWUSER)
                self._map_ids()
                for name, value in INOTIFY.items():
                    write(f"/proc/sys/user/{name}", str(value).encode())
        with asking_for("capabilities"):
            for number in range(CAPABILITIES):
                libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0)
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            version_3 = struct.pack("Ii", 0x20080522, 0)
            call(libc.capset, version_3, bytes(24))
            prctl(PR_SET_NO_NEW_PRIVS, 1)
            prctl(PR_SET_DUMPABLE, 1)  # its own /proc entries are its own
        for path in self._libraries:
            if not os.access(path, os.R_OK | os.X_OK):
                raise Refused(
                    f"user: {path} is not open to other users, and kernels run as one; chmod a+rX it"
                )

    def _lock_files(self, folder: str, version: int) -> None:
        rights = max(rights for first, rights in RIGHTS_OF_VERSION.items() if first <= version)
        # Older versions refuse a structure that is longer than theirs, unless the rest is zero.
        handled = struct.pack("QQQ", rights, 0, SCOPES if version >= 6 else 0)
        rules = call(libc.syscall, SYS_LANDLOCK_CREATE, handled, ctypes.c_size_t(len(handled)), 0)
        allowed = {"/": READ | EXECUTE | LIST, "/dev": READ | WRITE | LIST | IOCTL_DEVICE}
        own = [f"{folder}/{name}" for name in self._writable]
        allowed |= dict.fromkeys((*own, "/tmp", "/dev/shm"), rights & ~MAKE_DEVICES)
        for path, access in allowed.items():
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", access & rights, fd)
            call(libc.syscall, SYS_LANDLOCK_ADD, rules, 1, rule, 0)
            os.close(fd)
        call(libc.syscall, SYS_LANDLOCK_RESTRICT, rules, 0)
        os.close(rules)


def run(*command: str) -> int:
    """The exit status of a program that runs silently; not 0 if there is none."""
    nothing = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_RDWR, 0)
    try:
        child = os.posix_spawn(command[0], command, {}, file_actions=[nothing, (os.POSIX_SPAWN_DUP2, 1, 2)])
    except OSError:
        return 127
    return os.waitpid(child, 0)[1]


def _see_to_the_end(first: int, lifeline: socket.socket) -> None:
    """Wait for the end of a process or of the host, which is the end of both."""
    watched = select.poll()
    watched.register(os.pidfd_open(first), select.POLLIN)
    watched.register(lifeline, select.POLLIN)
    watched.poll()
    os.kill(first, signal.SIGKILL)  # not reaped yet, in any case
    _, status = os.waitpid(first, 0)
    os._exit(max(os.waitstatus_to_exitcode(status), 0))


def landlock_version() -> int:
    """The version of landlock(7) there is; 0 without it."""
    return max(int(libc.syscall(SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)), 0)


def filter_program(program: bytes) -> Any:
    """`struct sock_fprog` of a program of classic BPF."""
    code = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    whole = ctypes.create_string_buffer(described, len(described))
    whole.code = code  # type: ignore[attr-defined] # it must live as long
    return whole
