"""What a confined process still can do: compute, and nothing else. Each attempt runs in a fork."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from metok_vllm.media.children import confine

ATTEMPTS = {
    "open a file": "os.open('/etc/passwd', os.O_RDONLY)",
    "open a file that it made itself": "os.open('/dev/null', os.O_RDWR)",
    "list a folder": "os.listdir('/')",
    "look at a file's size": "os.stat('/etc/passwd')",
    "remove a file": "os.unlink(sys.argv[1])",
    "make a socket": "socket.socket(socket.AF_INET)",
    "make a pair of sockets": "socket.socketpair()",
    "make memory that is a file": "os.memfd_create('x')",
    "make a pipe": "os.pipe()",
    "double a descriptor": "os.dup(1)",
    "fork": "os.fork() or os._exit(0)",
    "run a program": "os.execv('/bin/true', ['true'])",
    "signal its parent": "os.kill(os.getppid(), 0)",
    "signal a thread of its parent": "tgkill(os.getppid(), os.getppid(), 0)",
    "look into its parent": "resource.prlimit(os.getppid(), resource.RLIMIT_AS)",
    "raise the number of its files": "resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))",
    "take a gigabyte": "bytearray(1 << 30)",
    "change its folder": "os.chdir('/')",
    "outlive its parent": "prctl(1, 0)",
    "change its parent's processors": "os.sched_setaffinity(os.getppid(), {0})",
    "give away a file": "socket.send_fds(talk, [b'x'], [1])",
    "read the environment of its parent": "open(f'/proc/{os.getppid()}/environ').read()",
}
PROGRAM = """
import ctypes, json, os, resource, socket, sys, threading
from metok_vllm.media.children.confine import confine, has_filter
libc = ctypes.CDLL(None, use_errno=True)
def tgkill(*arguments):
    if libc.tgkill(*arguments):
        raise OSError(ctypes.get_errno(), "tgkill")
def prctl(*arguments):
    if libc.prctl(*arguments):
        raise OSError(ctypes.get_errno(), "prctl")
talk, other = socket.socketpair()
attempts, filtered = json.loads(sys.argv[2]), sys.argv[3] == "filtered"
own = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
confine(own + (256 << 20), 4096, filtered=filtered)
answers = {}
for name, attempt in attempts.items():
    try:
        exec(attempt)
        answers[name] = None
    except (OSError, MemoryError, ValueError) as error:
        answers[name] = type(error).__name__
thread = threading.Thread(target=lambda: answers.update({"a thread": sum(range(1000))}))
thread.start()
thread.join()
os.write(1, json.dumps(answers).encode())
"""


def answers(tmp_path: Path, attempts: dict[str, str], how: str) -> dict[str, object]:
    file = tmp_path / "file"
    file.write_text("x")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(file), json.dumps(attempts), how],
        env={"PYTHONPATH": ":".join(sys.path), "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert file.exists()
    said: dict[str, object] = json.loads(done.stdout)
    return said


@pytest.mark.skipif(not confine.has_filter(), reason="there is no list of system calls for this machine")
def test_a_confined_process_can_compute_and_nothing_else(tmp_path: Path) -> None:
    said = answers(tmp_path, ATTEMPTS, "filtered")
    assert said.pop("a thread") == 499500
    assert set(said) == set(ATTEMPTS)
    assert [name for name, error in said.items() if error is None] == []


def test_without_the_filter_the_limits_hold(tmp_path: Path) -> None:
    opens = ("open a file", "make a socket", "make memory that is a file", "make a pipe", "double a descriptor")
    held = {name: ATTEMPTS[name] for name in (*opens, "take a gigabyte", "raise the number of its files")}
    said = answers(tmp_path, held, "limits alone")
    assert said.pop("a thread") == 499500
    assert [name for name, error in said.items() if error is None] == []


@pytest.mark.skipif(not confine.has_filter(), reason="there is no list of system calls for this machine")
def test_the_numbers_of_the_calls_are_this_kernels() -> None:
    """Each name on the list, looked up where the C library has it, has the number that the list says."""
    import platform

    headers = {"x86_64": "asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}[platform.machine()]
    places = [Path("/usr/include") / headers, Path("/usr/include/x86_64-linux-gnu") / headers]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        pytest.skip("the kernel's headers are not installed")
    words = [line.split() for line in place.read_text().splitlines()]
    known = {w[1].removeprefix("__NR_"): int(w[2]) for w in words if len(w) == 3 and w[2].isdigit()}
    _, calls = confine._MACHINES[platform.machine()]
    assert calls == {name: known[name] for name in calls}


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    mine, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        grandchild = os.fork()
        if grandchild == 0:
            confine.leave_with_parent(os.getppid())
            theirs.send(str(os.getpid()).encode())
            signal.pause()
            os._exit(0)
        theirs.recv(1)
        os._exit(0)
    theirs.close()
    grandchild = int(mine.recv(100))
    mine.send(b"x")
    os.waitpid(pid, 0)
    mine.settimeout(20)
    assert mine.recv(1) == b""  # its end is closed: the grandchild has gone
    end = time.monotonic() + 20
    while not gone(grandchild):  # it closes its files a little before it has ended
        assert time.monotonic() < end
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_child_whose_parent_has_ended_before_ends_too() -> None:
    pid = os.fork()
    if pid == 0:
        confine.leave_with_parent(os.getppid() + 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_what_the_kernel_refuses_is_an_error() -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        confine._prctl(-1)


def test_memory_can_be_raised_up_to_what_was_stated() -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            confine.confine(8 << 40, 0, filtered=False)
            confine.limit_memory(4 << 40)
            confine.limit_memory(8 << 40)
            try:
                confine.limit_memory((8 << 40) + 4096)
            except ValueError:
                code = 0 if resource.getrlimit(resource.RLIMIT_AS) == (8 << 40, 8 << 40) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_file_grows_only_as_far_as_was_stated(tmp_path: Path) -> None:
    file = os.memfd_create("file")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            confine.confine(8 << 40, 1000, filtered=False)
            with suppress(OSError):
                os.pwrite(file, b"x", 0)
            confine.limit_files(500)
            os.pwrite(file, bytes(2000), 0)
            confine.limit_files(4000)
            os.pwrite(file, bytes(2000), 500)
            try:
                os.pwrite(file, b"x", 1000)
            except OSError as error:
                code = 0 if error.errno == errno.EFBIG else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert os.fstat(file).st_size == 1000
    os.close(file)
