"""Take from this process what a decoder does not need: files, network, other processes, memory without end.

Without root, in three steps, each of which holds by itself:

- Resource limits (setrlimit(2)): no file descriptor beyond those that are open, an upper bound on the address
  space and on the size of a file, no core dump.
- A filter of system calls (seccomp(2)): all but those that a decoder makes fail with EPERM. Among those that
  fail are whatever opens, connects, executes, forks, traces or signals another process.
- The kernel kills this process when its parent ends (prctl(2)), and first where memory is short.

The filter exists for x86-64 and AArch64, whose call numbers are below (the kernel's `unistd` tables; on
AArch64 it has not been run). Elsewhere the limits stand alone, and the server's log says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 15, 38, 22, 2
_CLONE_THREAD = 0x10000

# Audit architecture (linux/audit.h), and the numbers of the calls that are allowed.
_X86_64 = (
    0xC000003E,
    {
        **{"read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10},
        **{"munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17},
        **{"readv": 19, "writev": 20, "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39},
        **{"pwrite64": 18, "sendto": 44, "recvfrom": 45, "clone": 56, "exit": 60, "gettimeofday": 96},
        **{"getrusage": 98, "times": 100, "sigaltstack": 131, "prctl": 157, "gettid": 186, "futex": 202},
        **{"sched_getaffinity": 204, "restart_syscall": 219, "clock_gettime": 228},
        **{"clock_nanosleep": 230, "exit_group": 231, "tgkill": 234, "ppoll": 271, "set_robust_list": 273},
        **{"prlimit64": 302, "getrandom": 318, "rseq": 334, "clone3": 435},
    },
)
_AARCH64 = (
    0xC00000B7,
    {
        **{"close": 57, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "ppoll": 73},
        **{"fstat": 80, "exit": 93, "exit_group": 94, "futex": 98, "set_robust_list": 99, "nanosleep": 101},
        **{"pwrite64": 68, "clock_gettime": 113, "clock_nanosleep": 115, "sched_getaffinity": 123},
        **{"sched_yield": 124, "restart_syscall": 128, "tgkill": 131, "sigaltstack": 132, "rt_sigaction": 134},
        **{"rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153, "getrusage": 165, "prctl": 167},
        **{"gettimeofday": 169, "getpid": 172, "gettid": 178, "sendto": 206, "recvfrom": 207},
        **{"brk": 214, "munmap": 215, "mremap": 216, "clone": 220, "mmap": 222, "mprotect": 226},
        **{"madvise": 233, "prlimit64": 261, "getrandom": 278, "rseq": 293, "clone3": 435},
    },
)
_MACHINES = {"x86_64": _X86_64, "aarch64": _AARCH64}

# Where in `struct seccomp_data` the filter looks: the call, the architecture, low half of argument i.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06


def has_filter() -> bool:
    """Whether there is a table of system calls for this machine."""
    return platform.machine() in _MACHINES


def leave_with_parent(parent: int) -> None:
    """Be killed when `parent` ends, and before any other process where the machine runs out of memory."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
    with suppress(OSError):  # where it may not be written, the kernel's own choice holds
        Path("/proc/self/oom_score_adj").write_text("1000")


def call_yourself(name: str) -> None:
    """Take a name of up to 15 characters in lists of processes."""
    buffer = ctypes.create_string_buffer(name.encode())
    _prctl(_PR_SET_NAME, ctypes.addressof(buffer))


def limit_memory(address_space: int) -> None:
    """Bound this process's address space, in bytes; up to what `confine` was told, it may be raised again."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space, most))


def limit_files(size: int) -> None:
    """Bound the size to which this process may write a file, in bytes; up to what `confine` was told."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(size, most), most))


def confine(most_memory: int, most_file: int, *, filtered: bool) -> None:
    """Give up all rights but to compute, and to talk over the descriptors that are open.

    Args:
        most_memory: bytes that `limit_memory` may state at most from now on.
        most_file: bytes that `limit_files` may; it is 0 now.
        filtered: set the filter of system calls too. Needs `has_filter`.

    Raises:
        OSError: the kernel refuses.
    """
    for limit, value, most in (
        (resource.RLIMIT_AS, most_memory, most_memory),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_FSIZE, 0, most_file),
        (resource.RLIMIT_NOFILE, 0, 0),
    ):
        resource.setrlimit(limit, (value, most))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if filtered:
        _set_filter()


def _set_filter() -> None:
    program = b"".join(_program(os.getpid(), *_MACHINES[platform.machine()]))
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

    stated = Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(stated))


def _program(pid: int, architecture: int, calls: dict[str, int]) -> list[bytes]:
    """The filter in the kernel's language (linux/filter.h), instruction by instruction."""
    allow, fail = _do(_RETURN, _ALLOW), _do(_RETURN, _FAIL | errno.EPERM)
    unknown = _do(_RETURN, _FAIL | errno.ENOSYS)
    program = [_do(_LOAD, _ARCHITECTURE), _do(_EQUAL, architecture, 1, 0), fail, _do(_LOAD, _NUMBER)]
    conditions = {
        # Threads, but no processes. A filter cannot see what clone3 makes; the C library takes clone then.
        "clone": [_do(_LOAD, _ARGUMENTS), _do(_ANY_BIT, _CLONE_THREAD, 0, 1), allow, fail],
        "clone3": [unknown],
        # Signals and limits for this process alone.
        "tgkill": [_do(_LOAD, _ARGUMENTS), _do(_EQUAL, pid, 0, 1), allow, fail],
        # Names for threads. Not its end with its parent.
        "prctl": [_do(_LOAD, _ARGUMENTS), _do(_EQUAL, _PR_SET_NAME, 0, 1), allow, fail],
        "prlimit64": [_do(_LOAD, _ARGUMENTS), _do(_EQUAL, 0, 0, 1), allow, fail],
    }
    for name, number in calls.items():
        then = conditions.get(name, [allow])
        program += [_do(_EQUAL, number, 0, len(then)), *then]
    return [*program, fail]


def _do(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction; jumps say how many of the next to leave out."""
    return struct.pack("HBBI", code, if_true, if_false, value)


def _prctl(option: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if libc.prctl(option, *padded) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
