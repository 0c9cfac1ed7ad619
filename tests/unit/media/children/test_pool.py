"""Child processes for real: what they decode, how they end, and what they cost others."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pytest

from metok_vllm.contract.refusals import FRONT_END
from metok_vllm.media.children import attempt, forks
from metok_vllm.media.children.child import AT_WORK, shared_size
from metok_vllm.media.children.outcomes import DECODES
from metok_vllm.media.children.pool import Busy, DecodePool
from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoError, VideoSettings
from tests.support.children import children, is_called
from tests.support.clips import clip, encode, rotated, stuck, tone
from tests.support.logged import Logged
from tests.support.until import until

HOUR = VideoSettings(timeout_s=3600)


def outcomes() -> dict[str, float]:
    """Videos by what came of them, so far in this process."""
    return {
        sample.labels["outcome"]: sample.value
        for metric in FRONT_END.collect()
        if metric.name == DECODES
        for sample in metric.samples
        if sample.name == f"{DECODES}_total"
    }


VIDEOS = {
    "mp4": clip(30),
    "mkv": clip(30, container="matroska"),
    "vp9": clip(12, container="webm", codec="libvpx-vp9"),
    "gif": clip(12, container="gif", codec="gif", pix_fmt="gray"),
    "turned": rotated(clip(12), 90),
    "cut off": clip(30, container="mpegts")[:-4000],
    "10 bit": clip(12, pix_fmt="yuv420p10le"),
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_a_child_decodes_what_this_process_would(pool: DecodePool, kind: str) -> None:
    for settings in (VideoSettings(num_frames=5), VideoSettings()):
        ours, theirs = decode_video(VIDEOS[kind], settings), pool.decode(VIDEOS[kind], settings)
        assert np.array_equal(ours.frames, theirs.frames)
        assert {**vars(ours), "frames": None} == {**vars(theirs), "frames": None}
        assert theirs.frames.flags.writeable  # as torch wants them
        assert theirs.frames.flags.c_contiguous


def test_what_is_wrong_with_a_file_comes_back_as_the_same_sentence(pool: DecodePool) -> None:
    for data in (b"", b"no video at all", tone(), VIDEOS["mp4"][:900]):
        sentences = []
        for decode in (decode_video, pool.decode):
            with pytest.raises(VideoError) as raised:
                decode(data, VideoSettings())
            sentences.append(str(raised.value))
        assert sentences[0] == sentences[1]


def test_thousands_of_frames_come_with_their_numbers(pool: DecodePool) -> None:
    data = encode([np.zeros((16, 16, 3), np.uint8)] * 3000, codec="mpeg4")
    video = pool.decode(data, VideoSettings(num_frames=2500, max_frames=3000))
    assert len(video.indices) == len(video.frames) == 2500
    assert video.indices[-1] == 2999


def test_frames_outlive_everything_and_are_counted_until_nobody_uses_them(make: Callable[..., DecodePool]) -> None:
    pool = make()
    video = pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=4))
    expected = decode_video(VIDEOS["mp4"], VideoSettings(num_frames=4)).frames
    assert pool.memory.used == video.frames.nbytes
    part = video.frames[1:2]
    del video
    pool.stop()
    assert np.array_equal(part, expected[1:2])
    assert pool.memory.used == expected.nbytes
    del part
    assert pool.memory.used == 0


def test_frames_made_larger_than_the_header_says_count_as_they_are(make: Callable[..., DecodePool]) -> None:
    """The header of a Matroska file states a size of its own; the pictures have another."""
    data = encode([np.full((256, 256, 3), 200, np.uint8)] * 4, codec="mpeg4", container="matroska")
    at = data.index(b"\xb0\x82\x01\x00")  # PixelWidth, in two bytes
    small = data[:at] + b"\xb0\x82\x00\x10" + data[at + 4 :]
    pool = make()
    video = pool.decode(small, VideoSettings())
    assert video.frames.shape == decode_video(small, VideoSettings()).frames.shape
    assert pool.memory.used == video.frames.nbytes


def test_a_call_that_never_ends_is_ended_at_its_time_and_no_other_video_waits(make: Callable[..., DecodePool]) -> None:
    pool = make(at_once=3, waiting=0)
    before, file = outcomes(), stuck()
    with ThreadPoolExecutor(2) as threads:
        start = time.monotonic()
        slow = [threads.submit(pool.decode, file, VideoSettings(timeout_s=2)) for _ in range(2)]
        until(lambda: pool.places.used == 2)
        good = pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=2))
        assert not any(one.done() for one in slow)  # the good one came through while they were at it
        for one in slow:
            with pytest.raises(VideoError, match=r"took longer than 2 s \(video setting timeout_s\)"):
                one.result()
        assert time.monotonic() - start < 2 + 2  # one second is promised; the machine may be busy
    assert len(good.frames) == 2
    until(lambda: not children(pool))
    assert pool.places.used == 0
    assert outcomes()["late"] == before["late"] + 2
    assert outcomes()["decoded"] == before["decoded"] + 1


def test_a_child_that_is_killed_costs_its_own_request_and_nothing_else(make: Callable[..., DecodePool]) -> None:
    pool = make()
    with ThreadPoolExecutor(2) as threads:
        first, second = (threads.submit(pool.decode, stuck(), HOUR) for _ in range(2))
        until(lambda: len(children(pool)) == 2)
        # The one that was started first has the lower number.
        victim, other = sorted(children(pool), key=lambda child: child.create_time())
        victim.kill()
        until(lambda: first.done() or second.done())
        dead = first if first.done() else second
        with pytest.raises(VideoError, match="decoder crash"):
            dead.result()
        assert len(pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=3)).frames) == 3
        until(lambda: children(pool) == [other])
        other.kill()
        with pytest.raises(VideoError, match="decoder crash"):
            (second if dead is first else first).result()


def test_where_the_process_that_forks_dies_another_takes_its_place_and_the_video_is_decoded(
    make: Callable[..., DecodePool],
) -> None:
    pool = make()
    assert pool.forks._process is not None
    old = pool.forks._process.pid
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(pool.decode, stuck(), VideoSettings(timeout_s=4))
        until(lambda: len(children(pool)) == 1)
        child = children(pool)[0]
        os.kill(old, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(child.pid))  # with the process that forked it
        with pytest.raises(VideoError, match="longer than 4 s"):  # the second try ended as this file has to
            job.result()
    assert pool.forks._process.pid != old
    os.kill(pool.forks._process.pid, signal.SIGKILL)
    assert len(pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=3)).frames) == 3


def test_a_process_that_forks_but_does_not_answer_is_replaced(
    make: Callable[..., DecodePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "PATIENCE_S", 0.5)
    pool = make()
    assert pool.forks._process is not None
    os.kill(pool.forks._process.pid, signal.SIGSTOP)
    start = time.monotonic()
    assert len(pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=3, timeout_s=1)).frames) == 3
    assert time.monotonic() - start >= 1.5


def test_videos_wait_in_order_and_no_more_than_may(make: Callable[..., DecodePool]) -> None:
    pool = make(at_once=1, waiting=2)
    before = outcomes()
    order: list[int] = []

    def one(number: int) -> None:
        pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=1))
        order.append(number)

    with ThreadPoolExecutor(3) as threads:
        blocker = threads.submit(pool.decode, stuck(), VideoSettings(timeout_s=2))
        until(lambda: pool.places.used == 1)
        waiting = []
        for number in range(2):
            waiting.append(threads.submit(one, number))
            until(lambda number=number: pool.places.waiting == number + 1)  # type: ignore[misc]
        with pytest.raises(Busy, match="decoding 1 videos and 2 wait: try again later"):
            pool.decode(VIDEOS["mp4"], VideoSettings())
        with pytest.raises(VideoError):
            blocker.result()
        for job in waiting:
            job.result()
    assert order == [0, 1]
    assert outcomes()["busy"] == before["busy"] + 1


def test_frames_wait_for_room_and_their_clock_stands_still(make: Callable[..., DecodePool]) -> None:
    large = encode([np.zeros((720, 1280, 3), np.uint8)] * 20, codec="mpeg4", rate=10)
    size = 20 * 720 * 1280 * 3
    pool = make(memory_mib=200)  # not enough for two with their decoders
    first = pool.decode(large, VideoSettings())
    assert first.frames.nbytes == size == pool.memory.used
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(pool.decode, large, VideoSettings(timeout_s=3))
        until(lambda: pool.memory.waiting == 1)
        time.sleep(2.5)
        assert not second.done()
        del first
        assert len(second.result().frames) == 20
        assert pool.memory.used == size


def test_who_waits_too_long_for_room_is_told_to_come_again(make: Callable[..., DecodePool]) -> None:
    pool = make(memory_mib=100)
    held = pool.hold(90 << 20, 1)
    with pytest.raises(Busy, match=r"no room for 6. MiB more of decoded video now: try again later"):
        pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=2, timeout_s=1))
    pool.memory.give_back(held)
    assert len(pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=2, timeout_s=20)).frames) == 2


def test_what_never_fits_is_refused_at_once(make: Callable[..., DecodePool]) -> None:
    pool = make(memory_mib=64)
    data = encode([np.zeros((720, 1280, 3), np.uint8)] * 20, codec="mpeg4")
    with pytest.raises(VideoError, match=r"takes 1.. MiB, more than the 64 MiB that the server has"):
        pool.decode(data, VideoSettings())


def test_a_task_that_is_cancelled_ends_its_child_or_leaves_the_queue(make: Callable[..., DecodePool]) -> None:
    pool = make(at_once=1)
    before = outcomes()

    async def run() -> None:
        at_work = asyncio.create_task(pool.decode_async(stuck(), HOUR))
        while not children(pool):
            await asyncio.sleep(0.01)
        queued = asyncio.create_task(pool.decode_async(VIDEOS["mp4"], HOUR))
        last = asyncio.create_task(pool.decode_async(VIDEOS["mp4"], VideoSettings(num_frames=2)))
        await asyncio.sleep(0.05)
        for task in (queued, at_work):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert len((await asyncio.wait_for(last, 30)).frames) == 2

    asyncio.run(run())
    until(lambda: not children(pool) and pool.places.used == 0)
    assert outcomes()["cancelled"] == before["cancelled"] + 1


@pytest.mark.parametrize(("gone", "lines"), [(True, 0), (False, 1)])
def test_whose_error_it_is_that_a_child_ended_before_it_began(
    make: Callable[..., DecodePool],
    monkeypatch: pytest.MonkeyPatch,
    gone: bool,
    lines: int,
) -> None:
    """Nobody's, where its client had gone: METok itself has ended it then."""

    def ended(job: Any) -> None:
        job.cancelled = gone
        raise OSError("it ended with status 9 before it began")

    pool = make()
    monkeypatch.setattr(pool, "_in_a_child", ended)
    logged = Logged()
    monkeypatch.setattr("metok_vllm.media.children.pool.logger", lambda: logged)
    with pytest.raises(Busy):
        pool.decode(VIDEOS["mp4"], VideoSettings())
    assert [level for level, _ in logged.lines] == ["ERROR"] * lines


def test_many_at_once_on_an_event_loop_that_stays_free(make: Callable[..., DecodePool]) -> None:
    pool = make(at_once=4)

    async def run() -> int:
        turns = 0
        tasks = [asyncio.create_task(pool.decode_async(VIDEOS["mp4"], VideoSettings(num_frames=3))) for _ in range(24)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.005)
            turns += 1
            assert pool.places.used <= 4
        assert {task.result().frames.shape for task in tasks} == {(3, 48, 64, 3)}
        return turns

    assert asyncio.run(run()) > 10
    gc.collect()
    assert pool.memory.used == 0


def test_a_child_that_works_long_gives_way(make: Callable[..., DecodePool]) -> None:
    pool = make()
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(pool.decode, stuck(), VideoSettings(timeout_s=4))
        until(lambda: children(pool))
        child = children(pool)[0]
        before = child.nice()
        until(lambda: child.nice() >= before + 10, seconds=3.5)
        with pytest.raises(VideoError):
            job.result()


def test_stopping_ends_everything_now(make: Callable[..., DecodePool]) -> None:
    pool = make()
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(pool.decode, stuck(), HOUR) for _ in range(2)]
        until(lambda: len(children(pool)) == 2)
        gone = children(pool)
        start = time.monotonic()
        pool.stop()
        for job in jobs:
            with pytest.raises(Busy, match="shutting down"):
                job.result()
        assert time.monotonic() - start < 1
    until(lambda: not any(psutil.pid_exists(child.pid) for child in gone))


@pytest.mark.parametrize("how", ["it ends", "it is killed"])
def test_a_server_that_ends_leaves_no_process(how: str) -> None:
    program = """
import sys, threading, time
from metok_vllm.media.children.pool import DecodePool
from metok_vllm.media.settings import VideoSettings
pool = DecodePool()
pool.start()
job = lambda: pool.decode(sys.stdin.buffer.read(), VideoSettings(timeout_s=3600))
threading.Thread(target=job, daemon=True).start()
while not pool.places.used:
    time.sleep(0.01)
time.sleep(0.3)
print(pool.forks._process.pid, flush=True)
time.sleep(1 if sys.argv[1] == "it ends" else 3600)
"""
    server = subprocess.Popen([sys.executable, "-c", program, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(stuck())
    server.stdin.close()
    spawner = psutil.Process(int(server.stdout.readline()))
    until(lambda: any(is_called(one, AT_WORK) for one in spawner.children()))
    family = [spawner, *spawner.children()]
    if how == "it is killed":
        server.kill()
    server.wait(30)
    until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family))


def test_a_child_knows_nothing_of_the_server(make: Callable[..., DecodePool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    pool = make()
    with open(os.devnull) as file, ThreadPoolExecutor(1) as threads:
        os.set_inheritable(file.fileno(), True)
        job = threads.submit(pool.decode, stuck(), VideoSettings(timeout_s=2))
        until(lambda: children(pool))
        child = children(pool)[0]
        until(lambda: child.rlimit(psutil.RLIMIT_NOFILE) == (0, 0))
        assert "secret" not in child.environ().values()
        assert child.cwd() == "/"
        most = VideoSettings()
        assert child.rlimit(psutil.RLIMIT_FSIZE) == (0, shared_size(most.max_output_mib << 20, most.max_frames))
        assert child.rlimit(psutil.RLIMIT_AS)[0] < 2 << 30
        # Standard streams that lead nowhere, its file, its frames, its socket, and its own figures.
        assert len(os.listdir(f"/proc/{child.pid}/fd")) <= 8
        with pytest.raises(VideoError):
            job.result()


def test_the_parts_of_a_pool_may_be_used_from_any_thread(make: Callable[..., DecodePool]) -> None:
    pool = make(at_once=3)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                assert len(pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=2)).frames) == 2
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert pool.places.used == 0


# --- frames in their file ---


def test_large_frames_of_a_damaged_video_are_moved_together(pool: DecodePool) -> None:
    """Its first one cannot be decoded, so all others move; a child has no memory of its own for them."""
    frames = [np.full((368, 640, 3), 3 * i, np.uint8) for i in range(64)]
    video = bytearray(encode(frames, codec="mjpeg", container="matroska", pix_fmt="yuvj420p", rate=10))
    start, end = video.index(b"\xff\xd8\xff"), video.index(b"\xff\xd9")
    video[start:end] = bytes(end - start)
    here, there = (decode(bytes(video), VideoSettings(num_frames=64)) for decode in (decode_video, pool.decode))
    assert (here.missing, there.missing) == (1, 1)
    assert here.indices == there.indices == list(range(1, 64))
    assert (here.frames == there.frames).all()


# --- who leaves, and what runs out ---


def test_a_client_that_leaves_while_its_video_waits_for_memory_costs_nobody_anything(
    make: Callable[..., DecodePool],
) -> None:
    pool = make(memory_mib=100)
    spawner, held = pool.forks._process, pool.hold(90 << 20, 1)

    async def run() -> None:
        task = asyncio.create_task(pool.decode_async(VIDEOS["mp4"], VideoSettings(num_frames=2)))
        while not pool.memory.waiting:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    until(lambda: (pool.memory.waiting, pool.places.used) == (0, 0), seconds=10)
    pool.memory.give_back(held)
    assert len(pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=2)).frames) == 2
    assert pool.forks._process is spawner


def test_a_child_that_dies_while_it_waits_for_memory_leaves_the_queue(make: Callable[..., DecodePool]) -> None:
    """As where the machine runs out of memory."""
    pool = make(memory_mib=100)
    spawner, held = pool.forks._process, pool.hold(90 << 20, 1)
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(pool.decode, VIDEOS["mp4"], VideoSettings(num_frames=2))
        until(lambda: pool.memory.waiting == 1)
        children(pool)[0].kill()
        with pytest.raises(VideoError, match="decoder crash"):
            job.result(10)
    assert (pool.memory.used, pool.memory.waiting) == (held.amount, 0)
    assert pool.forks._process is spawner


def test_the_event_loop_waits_for_no_process_that_starts(make: Callable[..., DecodePool]) -> None:
    pool = make()

    async def run() -> float:
        task = asyncio.create_task(pool.decode_async(stuck(), HOUR))
        while not children(pool):
            await asyncio.sleep(0.01)
        with pool.forks._lock:  # as while one starts
            start = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return time.monotonic() - start

    assert asyncio.run(asyncio.wait_for(run(), 30)) < 5
    until(lambda: pool.places.used == 0)


def test_stopping_does_not_wait_for_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "START", "import time; time.sleep(3600)")
    pool = DecodePool()
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(pool.start)
        until(lambda: pool.forks._process is not None)
        pool.stop()
        with pytest.raises(Busy, match="shutting down"):
            starting.result(10)


@pytest.mark.parametrize("which", range(3))
def test_where_files_run_out_the_client_is_told_to_come_again_and_none_is_lost(
    make: Callable[..., DecodePool], which: int
) -> None:
    pool = make()
    forks.logger()  # imports vLLM, which opens files
    before, open_files = outcomes(), len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fill = [os.open(os.devnull, os.O_RDONLY) for _ in range(50)]  # so no lower number is free
    limit = max(fill) + 1
    for file in fill[len(fill) - which :]:
        os.close(file)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        with pytest.raises(Busy, match="cannot start a process for the video now: try again later"):
            pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in fill[: len(fill) - which]:
            os.close(file)
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert outcomes()["busy"] == before["busy"] + 1
    assert len(pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=2)).frames) == 2
    assert pool.places.used == 0


def test_where_threads_run_out_the_client_is_told_to_come_again(
    make: Callable[..., DecodePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make()

    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(Busy, match="try again later"):
        asyncio.run(pool.decode_async(VIDEOS["mp4"], VideoSettings(num_frames=2)))
    assert pool.places.used == 0


def test_where_another_process_that_forks_cannot_start_the_client_is_told_to_come_again(
    make: Callable[..., DecodePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make()
    assert pool.forks._process is not None
    monkeypatch.setattr(forks, "START", "raise SystemExit(3)")
    pool.forks._process.kill()
    with pytest.raises(Busy, match="cannot start a process for the video now: try again later"):
        pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=2))
    monkeypatch.undo()
    assert len(pool.decode(VIDEOS["mp4"], VideoSettings(num_frames=2)).frames) == 2


SMALL_MACHINE = """
import os, resource, signal, sys
from metok_vllm.media.children.pool import DecodePool
from metok_vllm.media.settings import VideoSettings
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
pool = DecodePool()
pool.start()
os.kill(pool.forks._process.pid, signal.SIGTERM)
print(len(pool.decode(sys.stdin.buffer.read(), VideoSettings(num_frames=2)).frames), pool.forks._process.poll())
pool.stop()
"""


def test_it_works_with_few_files_and_odd_signals() -> None:
    """A limit of 64 open files, children that nobody wants to hear of, all processes told to end at once."""
    done = subprocess.run(
        [sys.executable, "-c", SMALL_MACHINE], input=VIDEOS["mp4"], capture_output=True, timeout=60, check=False
    )
    assert done.stdout.decode() == "2 None\n", done.stderr.decode()


@pytest.mark.parametrize("executable", ["", None, "/nowhere/python"])
def test_where_there_is_no_interpreter_the_start_says_so(
    monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(RuntimeError, match="cannot decode videos in a child process here"):
        DecodePool().start()
