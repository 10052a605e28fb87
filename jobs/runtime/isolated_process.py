"""`python isolated_process.py PROGRAM ARGUMENT…`: replace this process by a program that has no network.

On Linux a process may enter a new user namespace with a new network namespace, which holds nothing but an unconfigured loopback. Many
containers forbid it; the program then keeps the network. The first line of output says which, for the attempt's log.
"""

import ctypes
import os
import sys
from pathlib import Path

NETWORK_LINE = "network: "
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h


def main(program: str, *arguments: str) -> None:
    """Leave the network if the system permits it, and execute the program."""
    print(NETWORK_LINE + ("none" if leave_network() else "inherited"), flush=True)
    os.execvp(program, [program, *arguments])  # noqa: S606  # no shell


def leave_network() -> bool:
    """Move this process, which must have a single thread, to a network namespace of its own; returns whether it was permitted."""
    uid, gid = os.getuid(), os.getgid()
    unshare = getattr(ctypes.CDLL(None), "unshare", None)  # os.unshare is new in Python 3.12; other systems have neither
    if unshare is None or unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return False
    try:
        # The same ids inside, so that the program sees its own files as its own.
        for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path("/proc/self", name).write_text(content)
    except OSError:
        pass  # unmapped ids are shown as nobody; access to files does not change
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
