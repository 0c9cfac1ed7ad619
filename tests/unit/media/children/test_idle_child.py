"""The child that is forked ahead: who gets it, what it may do, and how it ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from metok_vllm.media.children.confine import has_filter
from metok_vllm.media.children.pool import Busy, DecodePool
from metok_vllm.media.settings import VideoError, VideoSettings
from tests.support.children import children, idle_children
from tests.support.clips import clip, stuck
from tests.support.until import until

GOOD = clip(6)
LIMITS = (psutil.RLIMIT_NOFILE, psutil.RLIMIT_CORE)


def test_a_video_that_comes_alone_finds_a_child_waiting_and_others_get_fresh_ones(
    make: Callable[..., DecodePool],
) -> None:
    pool = make()
    until(lambda: idle_children(pool))
    waiting = idle_children(pool)[0].pid
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(pool.decode, stuck(), VideoSettings(timeout_s=2)) for _ in range(2)]
        until(lambda: len(children(pool)) == 2)
        assert waiting in {one.pid for one in children(pool)}
        assert not idle_children(pool), "no other is made while there is work"
        confined = lambda one: {one.rlimit(limit) for limit in LIMITS} == {(0, 0)}  # noqa: E731
        until(lambda: all(map(confined, children(pool))))
        for job in jobs:
            with pytest.raises(VideoError, match="took longer than 2 s"):
                job.result()
    until(lambda: len(idle_children(pool)) == 1)


def test_one_that_is_killed_while_it_waits_costs_no_video_and_is_not_replaced_without_end(
    make: Callable[..., DecodePool],
) -> None:
    pool = make()
    until(lambda: idle_children(pool))
    idle_children(pool)[0].kill()
    time.sleep(0.3)
    assert not idle_children(pool), "one that dies of itself would be forked for ever"
    assert len(pool.decode(GOOD, VideoSettings(num_frames=2)).frames) == 2
    until(lambda: idle_children(pool))
    spawner = pool.forks._process
    assert spawner is not None
    spawner.send_signal(signal.SIGSTOP)  # so it hears of the death and of the job at once
    idle_children(pool)[0].kill()
    until(lambda: not idle_children(pool))
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(pool.decode, GOOD, VideoSettings(num_frames=2))
        time.sleep(0.1)
        spawner.send_signal(signal.SIGCONT)
        assert len(job.result().frames) == 2


def test_one_that_ends_before_it_begins_is_no_fault_of_the_videos(make: Callable[..., DecodePool]) -> None:
    """As where the machine runs out of memory: an idle child is the first to be killed."""
    pool = make()
    until(lambda: idle_children(pool))
    waiting = idle_children(pool)[0]
    waiting.suspend()
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(pool.decode, GOOD, VideoSettings(num_frames=2))
        until(lambda: pool.places.used)
        time.sleep(0.2)
        waiting.kill()
        with pytest.raises(Busy, match="try again"):
            job.result()
    assert len(pool.decode(GOOD, VideoSettings(num_frames=2)).frames) == 2


@pytest.mark.skipif(not has_filter(), reason="there is no list of system calls for this machine")
def test_every_thread_of_one_that_was_warm_is_confined(make: Callable[..., DecodePool]) -> None:
    pool = make()
    until(lambda: idle_children(pool))
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(pool.decode, stuck(), VideoSettings(timeout_s=1))
        until(lambda: children(pool))
        (child,) = children(pool)
        until(lambda: child.rlimit(psutil.RLIMIT_NOFILE) == (0, 0))
        time.sleep(0.1)
        for task in Path(f"/proc/{child.pid}/task").iterdir():
            assert "\nSeccomp:\t2\n" in (task / "status").read_text()
        with pytest.raises(VideoError):
            job.result()


def test_the_waiting_one_ends_with_its_pool(make: Callable[..., DecodePool]) -> None:
    pool = make()
    until(lambda: idle_children(pool))
    waiting = idle_children(pool)[0]
    pool.stop()
    until(lambda: not waiting.is_running() or waiting.status() == psutil.STATUS_ZOMBIE)
