"""Children that a file has taken over, confined as always: each costs its own request and nothing else.

A file that begins with ``run:`` is Python, which the child runs in the place of its decoder.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from metok_vllm.media.children import forks
from metok_vllm.media.children.pool import Busy, DecodePool
from metok_vllm.media.settings import PoolLimits, VideoError, VideoSettings
from tests.support.children import children
from tests.support.clips import clip, stuck

START = """
import sys; sys.path[:] = sys.argv[2:]
import json, os, resource, socket, time
from metok_vllm.media.children import child, spawner
from metok_vllm.media.decoder import decode_video
def taken_over(data, settings, memory=None):
    if bytes(data[:4]) != b"run:":
        return decode_video(data, settings, memory)
    talk = memory._talk
    def ask(what):
        talk.send(json.dumps(what).encode())
        return talk.recv(9999)
    def video(shape=(1, 2, 2, 3), **about):
        known = {"total_frames": 1, "fps": 1.0, "duration": 1.0, "missing": 0, "packets_decoded": 1}
        talk.send(json.dumps({"video": {**known, **about}, "shape": shape}).encode())
    def room(frames=12, count=1):
        ask({"reserve": {"frames": 12, "working": 0}})
        ask({"frames": frames, "count": count})
    exec(bytes(data[4:]).decode())
    time.sleep(3600)
child.decode_video = taken_over
if "NO_FORK" in os.environ.get("LANG", ""):
    tried, real = [], os.fork
    def fork():
        if tried:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        tried.append(1)
        return real()
    os.fork = fork
spawner.main()
"""
GOOD = clip(6)
SETTINGS = VideoSettings(num_frames=2, timeout_s=20)
CRASHED = "makes its decoder crash"


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forks, "START", START)
        made = DecodePool(PoolLimits(memory_mib=256))
        made.start()
        yield made
        made.stop()


def run(pool: DecodePool, program: str) -> None:
    pool.decode(b"run:" + program.encode(), SETTINGS)


ENDS = {
    "no message": "talk.send(b'null')",
    "a message of another kind": "talk.send(b'[1]')",
    "no JSON": "talk.send(b'\\xff{')",
    "much JSON": "talk.send(b'[' * 16000)",
    "an empty message": "talk.send(b'')",
    "no word": "os._exit(0)",
    "talk without end": 'while True: talk.send(b\'{"frames": 0, "count": 0}\')',
    "memory below nothing": "ask({'reserve': {'frames': 10, 'working': -5}})",
    "memory without a size": "ask({'reserve': {}})",
    "memory without a number": "ask({'reserve': {'frames': 1e400, 'working': 0}})",
    "memory twice": "room(); ask({'reserve': {'frames': 12, 'working': 0}})",
    "room before memory": "ask({'frames': 12, 'count': 1})",
    "room for numbers without end": "room(12, 1 << 40)",
    "room below nothing": "room(-1, 1)",
    "a sentence that forges a line of the log": 'talk.send(b\'{"error": "x\\\\nINFO all is well"}\')',
    "no sentence": "talk.send(b'{\"error\": 5}')",
    "a figure that is none": 'talk.send(b\'{"memory": "all"}\')',
    "frames before room": "video()",
    "frames larger than their room": "room(); video((9, 2, 2, 3))",
    "frames of nothing": "room(); video((0, 2, 2, 3))",
    "frames below nothing": "room(); video((-1, -1, 4, 3))",
    "frames of another form": "room(); video((12,))",
    "frames without a rate": "room(); video(fps=float('nan'))",
    "frames of a video without any": "room(); video(total_frames=0)",
    "frames without figures": 'room(); talk.send(b\'{"video": 5, "shape": [1, 2, 2, 3]}\')',
    "numbers that do not rise": "room(24, 2); video((2, 2, 2, 3), total_frames=9)",
    "frames in a larger file": (
        "room(); most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)); os.pwrite(memory._file, b'x', 9999); video()"
    ),
    "a crash": "import ctypes; ctypes.string_at(0)",
}


@pytest.mark.parametrize("how", ENDS)
def test_it_ends_its_own_request_in_one_sentence(pool: DecodePool, how: str, caplog: pytest.LogCaptureFixture) -> None:
    assert pool.forks._process is not None
    spawner = pool.forks._process
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(pool.decode, stuck(), VideoSettings(timeout_s=3600)) if how == "no word" else None
        while other is not None and not children(pool):
            time.sleep(0.01)
        with pytest.raises(VideoError, match=CRASHED):
            run(pool, ENDS[how])
        assert "of a video failed" not in caplog.text, "the program itself is wrong"
        assert pool.forks._process is spawner, "all others lost their children"
        if other is not None:
            assert not other.done()
            children(pool)[0].kill()
            with pytest.raises(VideoError):
                other.result()
    gc.collect()
    assert (pool.memory.used, pool.places.used) == (0, 0)
    assert len(pool.decode(GOOD, SETTINGS).frames) == 2


def test_memory_for_frames_is_none_for_the_decoder(pool: DecodePool) -> None:
    """They are in a file of their own, so what they take comes beside what a decoder may."""
    take = "memory.reserve(150 << 20, 0); bytearray({} << 20); room = memory.room((1, 2, 2, 3)); video()"
    run(pool, take.format(100))
    with pytest.raises(VideoError, match="takes more than"):
        run(pool, take.format(320))


def test_what_it_may_say_is_taken(pool: DecodePool) -> None:
    """That what is refused above is refused for the reason stated."""
    video = pool.decode(b"run:room(); video()", SETTINGS)
    assert (video.frames.shape, video.indices, video.fps) == ((1, 2, 2, 3), [0], 1.0)


def test_it_cannot_change_frames_that_were_taken(pool: DecodePool) -> None:
    """Else it could give another video's frames to whoever computes a cache's key, and its own afterwards."""
    program = """
room()
video()
number = 0
while True:
    number += 1
    os.pwrite(memory._file, bytes([number % 200]) * 12, 0)
"""
    for _ in range(5):
        video = pool.decode(b"run:" + program.encode(), SETTINGS)
        before = video.frames.copy()
        time.sleep(0.02)
        assert (video.frames == before).all()


def test_one_that_fills_its_socket_does_not_stop_the_clocks_of_others(pool: DecodePool) -> None:
    """The spawner says over the same socket how it died. Nobody reads there while the request waits."""
    held = pool.hold(pool.memory.total - (1 << 20), 1)
    flood = """
talk.send(b'{"reserve": {"frames": 100000000, "working": 0}}')
try:
    while True:
        talk.send(b'{}' * 100, socket.MSG_DONTWAIT)
except BlockingIOError:
    os._exit(3)
"""
    with ThreadPoolExecutor(1) as threads:
        hostile = threads.submit(run, pool, flood)
        with pytest.raises(VideoError, match="longer than 2 s"):
            pool.decode(stuck(), VideoSettings(timeout_s=2))
        pool.memory.give_back(held)
        with pytest.raises(VideoError, match=CRASHED):
            hostile.result()


def test_where_no_process_can_be_started_all_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "START", START)
    monkeypatch.setenv("LANG", "NO_FORK")
    pool = DecodePool()
    pool.start()
    try:
        assert pool.forks._process is not None
        for _ in range(2):
            with pytest.raises(Busy, match="cannot start a process for the video now: try again later"):
                pool.decode(GOOD, SETTINGS)
        assert pool.forks._process.poll() is None
        assert len(os.listdir(f"/proc/{pool.forks._process.pid}/fd")) < 10
    finally:
        pool.stop()
