"""The system calls that a confined kernel may not make, as a program for seccomp(2).

libseccomp writes it, once per process; the kernels only load it.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os

__all__ = ["program"]

_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_KILL_PROCESS = 0x80000000
_ATTRIBUTE_BAD_ARCHITECTURE = 2
_NOT_EQUAL, _EQUAL, _GREATER, _MASKED_EQUAL = 1, 4, 6, 7
_UNKNOWN = -1

_DENIED = (
    # Other processes' memory, descriptors and fate.
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd", "kcmp"),
    *("move_pages", "migrate_pages"),
    # Namespaces and mounts.
    *("unshare", "setns", "mount", "umount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree"),
    *("fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr", "name_to_handle_at", "open_by_handle_at"),
    # The kernel itself, and what watches it.
    *("bpf", "perf_event_open", "userfaultfd", "fanotify_init", "fanotify_mark", "lookup_dcookie", "syslog"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot"),
    *("swapon", "swapoff", "acct", "quotactl", "quotactl_fd", "nfsservctl", "vhangup", "personality"),
    *("iopl", "ioperm", "modify_ldt", "uselib", "ustat", "sysfs", "_sysctl"),
    # The clock, and names of the machine.
    *("settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "stime", "sethostname", "setdomainname"),
    # Memory and names that no limit of a process counts.
    *("add_key", "request_key", "keyctl", "shmget", "msgget", "semget", "mq_open", "memfd_secret"),
)
_ABSENT = ("clone3", "io_uring_setup", "io_uring_enter", "io_uring_register", "memfd_create")
"""Answered as by an older kernel, so that programs take another way: one whose arguments can be looked at
(`clone3`), or whose memory is counted (`memfd_create`)."""
_CLONE_PARENT = 0x00008000
_SOL_SOCKET, _BUFFER_SIZES = 1, (7, 8, 32, 33)
_NEW_NAMESPACES = (
    0x00000080,
    0x00020000,
    0x02000000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
# Without Unix (1), IPv4 (2), IPv6 (10) and Netlink (16), of which the routes (0) alone: programs ask them for
# the interfaces, and libzmq aborts if it cannot.
_OTHER_FAMILIES = (0, *range(3, 10), *range(11, 16))
_NETLINK, _ROUTE = 16, 0
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


@functools.cache
def program() -> bytes:
    """The filter, in classic BPF for this machine's architecture.

    Raises:
        OSError: libseccomp is not installed, or cannot make the filter.
    """
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise FileNotFoundError("libseccomp.so.2 is not installed (package libseccomp2)") from None
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    try:
        _check(library.seccomp_attr_set(context, _ATTRIBUTE_BAD_ARCHITECTURE, ctypes.c_uint32(_KILL_PROCESS)))
        for name in _DENIED:
            _deny(library, context, name, errno.EPERM)
        for name in _ABSENT:
            _deny(library, context, name, errno.ENOSYS)
        # A sibling instead of a child would be nobody's: the host could not see it.
        for flag in (*_NEW_NAMESPACES, _CLONE_PARENT):
            _deny(library, context, "clone", errno.EPERM, _Comparison(0, _MASKED_EQUAL, flag, flag))
        for request in (_TIOCSTI, _TIOCLINUX):
            _deny(library, context, "ioctl", errno.EPERM, _Comparison(1, _MASKED_EQUAL, 0xFFFFFFFF, request))
        # Left as they are, without an error: what stands in sockets is no process's memory.
        for option in _BUFFER_SIZES:
            sizes = _Comparison(1, _EQUAL, _SOL_SOCKET), _Comparison(2, _EQUAL, option)
            _deny(library, context, "setsockopt", 0, *sizes)
        for family in _OTHER_FAMILIES:
            _deny(library, context, "socket", errno.EAFNOSUPPORT, _Comparison(0, _EQUAL, family))
        _deny(library, context, "socket", errno.EAFNOSUPPORT, _Comparison(0, _GREATER, _NETLINK))
        other_netlink = _Comparison(0, _EQUAL, _NETLINK), _Comparison(2, _NOT_EQUAL, _ROUTE)
        _deny(library, context, "socket", errno.EAFNOSUPPORT, *other_netlink)
        return _exported(library, context)
    finally:
        library.seccomp_release(context)


def _deny(
    library: ctypes.CDLL, context: ctypes.c_void_p, name: str, error: int, *arguments: _Comparison
) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number == _UNKNOWN:  # newer than this libseccomp, or of another architecture
        return
    compared = (_Comparison * len(arguments))(*arguments)
    _check(
        library.seccomp_rule_add_array(
            context, ctypes.c_uint32(_ERRNO | error), number, ctypes.c_uint(len(arguments)), compared
        )
    )


def _exported(library: ctypes.CDLL, context: ctypes.c_void_p) -> bytes:
    with os.fdopen(os.memfd_create("seccomp"), "rb") as file:
        _check(library.seccomp_export_bpf(context, file.fileno()))
        file.seek(0)
        return file.read()


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, f"libseccomp could not make the filter: {os.strerror(-result)}")
