"""How far kernels are kept apart, whether this system can confine them, and the users that they run as."""

from __future__ import annotations

import functools
import os
import secrets
from pathlib import Path

from kernel_env.errors import SandboxUnavailable

__all__ = ["Support", "can_change_user", "is_own_user", "kernel_user"]

# Where no system has a user of its own; in a container with few ids, the upper ones of those.
_FIRST_UID, _USERS = 2**30, 2**29
_FIRST_OF_FEW, _FEW = 20_000, 60_000
_TO_CHANGE_USER = (0, 6, 7)  # CAP_CHOWN, CAP_SETGID, CAP_SETUID
_SWITCHES = {
    "kernel/unprivileged_userns_clone": ("0", "sysctl kernel.unprivileged_userns_clone=1"),
    "kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile with `userns`",
    ),
    "user/max_user_namespaces": ("0", "a higher sysctl user.max_user_namespaces"),
    "user/max_pid_namespaces": ("0", "a higher sysctl user.max_pid_namespaces"),
    "user/max_mnt_namespaces": ("0", "a higher sysctl user.max_mnt_namespaces"),
    "user/max_net_namespaces": ("0", "a higher sysctl user.max_net_namespaces"),
}


class Support:
    """Whether kernels of one kind can be confined: known once the first was, or could not be."""

    def __init__(self) -> None:
        self.refusal: str | None = None
        """Why they cannot, and what may help; None as long as nothing speaks against it."""
        self.is_proven = False

    def explain(self, error: SandboxUnavailable) -> SandboxUnavailable:
        """Note why a kernel could not be confined, and say what to do about it."""
        self.refusal = f"{error}; {_advice()}"
        return SandboxUnavailable(
            f"isolation='sandbox' cannot be had here: {self.refusal}; "
            "isolation='process' works without, and 'auto' falls back on it"
        )


def _advice() -> str:
    """What may stand in the way, and what would help."""
    found = []
    for name, (refusing, remedy) in _SWITCHES.items():
        try:
            value = Path("/proc/sys", name).read_text().strip()
        except OSError:
            continue
        if value == refusing:
            found.append(f"{name.replace('/', '.')} is {value}: it takes {remedy}")
    status = Path("/proc/self/status").read_text()
    if "Seccomp:\t2" in status:
        found.append(
            "a seccomp filter is on this process, as container engines set it: it must allow unshare, mount, "
            "pivot_root and clone with new namespaces"
        )
    return "; ".join(found) or "no sysctl and no filter explains it, but a security module may"


def can_change_user() -> bool:
    """Whether this process may become any user, so that each kernel gets one; else it gets a user namespace.

    Linux counts processes by user, and never those of user 0.
    """
    if os.geteuid() != 0 or not _range_of_users()[1]:
        return False
    status = Path("/proc/self/status").read_text()
    held = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff")), 16)
    return all(held >> number & 1 for number in _TO_CHANGE_USER)


def kernel_user() -> int | None:
    """A user id for one kernel; None where kernels keep this process's."""
    if not can_change_user():
        return None
    first, count = _range_of_users()
    return first + secrets.randbelow(count)


def is_own_user(uid: int) -> bool:
    """Whether folders of this user are this process's to remove: its own, or those of its kernels."""
    first, count = _range_of_users()
    return uid == os.geteuid() or (os.geteuid() == 0 and first <= uid < first + count)


@functools.cache
def _range_of_users() -> tuple[int, int]:
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    for first, count in ((_FIRST_UID, _USERS), (_FIRST_OF_FEW, _FEW - _FIRST_OF_FEW)):
        if any(start <= first and first + count <= start + length for start, _, length in ranges):
            return first, count
    return 0, 0
