"""The process that forks a child for every video file, and kills it when its time is up.

One child is forked ahead while none is at work: a video that comes alone finds it waiting and warm.

`python -c` with `START` runs it. It holds one socket to the API server: a job comes with the file to decode,
an empty file for its frames and a socket to the child; ``kill`` ends a job, ``pause`` and ``resume`` stop its
clock while it waits for memory. Where the server's end closes, this process and all its children end.
"""

from __future__ import annotations

import gc
import os
import platform
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from metok_vllm.media.children import child, messages, warm_up
from metok_vllm.media.children.confine import has_filter

START = "import sys; sys.path[:] = sys.argv[2:]; from metok_vllm.media.children.spawner import main; main()"
"""The program, for `python -I -c`: the socket's descriptor, then the places to import from."""

TICK_S = 0.1
"""How exactly clocks are kept."""

NICER = ((0.5, 5), (2.0, 10))
"""Seconds after which a child gives way to others, and its `nice` value from then on: so a file that takes
long does not make a small one wait."""

MOST_FILES = 1024
"""Open files of this process: one for each child, and a few. A child closes all that there may be, and the
system's own limit may be a thousand million.
"""


@dataclass
class Job:
    """A child at work."""

    number: int
    pid: int
    talk: socket.socket
    """Kept to tell the server how the child died."""
    orders: socket.socket
    """Where the child said that it has taken the job."""
    timeout_s: float
    started: float
    deadline: float
    nice: int = 0
    paused: float | None = None
    """When its clock was stopped."""
    late: bool = False


@dataclass
class Idle:
    """A child without a job."""

    pid: int
    orders: socket.socket
    """Its job goes in here."""


class Spawner:
    """Forks, keeps the clocks, and reaps."""

    def __init__(self, control: socket.socket, clip: bytes, *, filtered: bool) -> None:
        self.control = control
        self.jobs: dict[int, Job] = {}
        self.clip = clip
        self.filtered = filtered
        self.ahead: Idle | None = None
        self.wants_ahead = True
        """Not after one that died of itself: until the next job, another would do the same."""

    def run(self) -> None:
        """Until the server's end of the control socket closes."""
        wake_read, wake_write = os.pipe()
        for end in (wake_read, wake_write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with selectors.DefaultSelector() as selector:
            selector.register(self.control, selectors.EVENT_READ)
            selector.register(wake_read, selectors.EVENT_READ)
            while True:
                self._fork_ahead()
                for key, _ in selector.select(TICK_S if self.jobs else None):
                    if key.fileobj is self.control:
                        if not self._take_message():
                            return
                    else:
                        with suppress(BlockingIOError):
                            os.read(wake_read, 4096)
                self._reap()
                self._keep_time()

    def _take_message(self) -> bool:
        """One message of the server; False where it has gone."""
        message, files = messages.receive_with_files(self.control, 3)
        if message is None:
            return False
        if files:
            self._start(message, files)
        elif (job := self.jobs.get(message["job"])) is not None:
            now = time.monotonic()
            if message["do"] == "kill":
                _kill(job)
            elif message["do"] == "pause":
                job.paused = now
            elif message["do"] == "resume" and job.paused is not None:
                job.deadline += now - job.paused
                job.paused = None
        return True

    def _start(self, job: dict[str, Any], files: list[int]) -> None:
        file, frames_file, end = files
        taker, failed = self._given_to_idle(job, files), ""
        if taker is None:
            try:
                taker = _fork(job, files, filtered=self.filtered)
            except OSError as error:  # as many processes as there may be, or no memory
                failed = str(error)
        self.wants_ahead = True
        os.close(file)
        os.close(frames_file)
        talk = socket.socket(fileno=end)
        if taker is None:
            _tell(talk, {"no_process": failed})
            return
        now, timeout_s, number = time.monotonic(), job["settings"]["timeout_s"], job["job"]
        self.jobs[number] = Job(number, taker.pid, talk, taker.orders, timeout_s, now, now + timeout_s)

    def _given_to_idle(self, job: dict[str, Any], files: list[int]) -> Idle | None:
        """The child that waited, if there was one."""
        ahead, self.ahead = self.ahead, None
        if ahead is None:
            return None
        try:
            messages.send(ahead.orders, job, files)
        except OSError:  # it has been killed
            ahead.orders.close()
            os.waitpid(ahead.pid, 0)
            return None
        return ahead

    def _fork_ahead(self) -> None:
        if self.wants_ahead and self.ahead is None and not self.jobs:
            self.wants_ahead = False
            with suppress(OSError):
                self.ahead = _fork(clip=self.clip, filtered=self.filtered)

    def _reap(self) -> None:
        """Tell the server how children ended: where one has said its last word, nobody listens any more."""
        if self.ahead is not None and os.waitpid(self.ahead.pid, os.WNOHANG)[0]:
            self.ahead.orders.close()
            self.ahead = None
        for job in list(self.jobs.values()):
            pid, status = os.waitpid(job.pid, os.WNOHANG)
            if pid == 0:
                continue
            del self.jobs[job.number]
            with job.orders:
                taken = _has_taken(job.orders)
            if job.late:
                _tell(job.talk, {"late": True})
            elif taken:
                _tell(job.talk, {"died": os.waitstatus_to_exitcode(status)})
            else:  # nothing that the file did
                _tell(job.talk, {"no_process": f"it ended with status {status} before it began"})

    def _keep_time(self) -> None:
        now = time.monotonic()
        for job in self.jobs.values():
            if job.paused is None and now > job.deadline:
                job.late = True
                _kill(job)
            for seconds, nice in NICER:
                if now - job.started > seconds and job.nice < nice:
                    job.nice = nice
                    _give_way(job)


def _has_taken(orders: socket.socket) -> bool:
    """Whether a child that has ended said before that it has taken its job."""
    return messages.there(orders) and messages.receive(orders) is not None


def _tell(talk: socket.socket, message: dict[str, Any]) -> None:
    """Say a last word to the server. A child may have filled the socket; waiting would stop all clocks."""
    with talk, suppress(OSError):
        messages.send(talk, message, wait=False)


def _fork(job: dict[str, Any] | None = None, files: Sequence[int] = (), *, clip: bytes = b"", filtered: bool) -> Idle:
    """A child, with a job or without one.

    Raises:
        OSError: there is no process, file or memory for it.
    """
    orders, its_end = messages.pair()
    with its_end:
        try:
            if job is not None:
                messages.send(orders, job, files)
            parent, pid = os.getpid(), os.fork()
        except OSError:
            orders.close()
            raise
        if pid == 0:
            _become_child(its_end, parent, clip, filtered=filtered)
    return Idle(pid, orders)


def _become_child(orders: socket.socket, parent: int, clip: bytes, *, filtered: bool) -> NoReturn:
    """In the fork: keep the socket alone, and decode what comes there."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        # All others belong to this process or to other jobs.
        os.closerange(3, orders.fileno())
        os.closerange(orders.fileno() + 1, MOST_FILES)
        child.take_a_job(orders, parent, clip, filtered=filtered)
    finally:
        os._exit(1)


def _why_it_fails(*, filtered: bool) -> str | None:
    """Try a child on a small picture: a machine may need a system call that is not on the list.

    Returns:
        None where it decodes, else what went wrong.
    """
    talk, other = messages.pair()
    files = [os.memfd_create("file"), os.memfd_create("frames"), other.detach()]
    os.write(files[0], warm_up.PICTURE)
    job = {"settings": {"timeout_s": 10, "threads": 2}, "most_memory": 1 << 30}
    tried = _fork(job, files, filtered=filtered)
    os.close(files[2])
    talk.settimeout(10)
    try:
        while (message := messages.receive(talk)) is not None and not {"video", "fault", "error", "memory"} & {
            *message
        }:
            if "frames" in message:
                os.ftruncate(files[1], child.shared_size(message["frames"], message["count"]))
            messages.send(talk, {})
    except OSError as error:
        message = {"fault": str(error)}
    finally:
        talk.close()
        tried.orders.close()
        os.close(files[0])
        os.close(files[1])
        os.kill(tried.pid, signal.SIGKILL)
        _, status = os.waitpid(tried.pid, 0)
    if message is not None and "video" in message:
        return None
    return str(message or f"it ended with status {os.waitstatus_to_exitcode(status)}")


def _kill(job: Job) -> None:
    with suppress(ProcessLookupError):  # it is not reaped yet, so the number is still its own
        os.kill(job.pid, signal.SIGKILL)


def _give_way(job: Job) -> None:
    """Lower the priority of all threads of a child: Linux has one for each."""
    with suppress(OSError):
        for thread in Path(f"/proc/{job.pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), job.nice)


def main() -> None:
    """Serve until the server has gone; `sys.argv[1]` is the socket's descriptor."""
    control = socket.socket(fileno=int(sys.argv[1]))
    # Where all processes are told to end, this one is needed until the server has ended.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # one that is ignored is inherited, and waitpid finds nothing then
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    own = MOST_FILES if most == resource.RLIM_INFINITY else min(MOST_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (own, most))
    warm_up.import_all()
    clip = warm_up.small_clip()
    gc.collect()
    gc.freeze()  # a fork then copies fewer pages
    fault = _why_it_fails(filtered=True) if has_filter() else f"METok has no list of calls for {platform.machine()}"
    filtered = fault is None
    broken = None if filtered else _why_it_fails(filtered=False)
    messages.send(control, {"filtered": filtered, "unfiltered": fault, "broken": broken})
    if broken is None:
        Spawner(control, clip, filtered=filtered).run()
    os._exit(0)  # children end with it (`confine.leave_with_parent`)
