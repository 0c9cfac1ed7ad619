"""A server under load that means it no good: bombs, crowds, clients that dawdle or vanish, and signals.

What is asserted are counts of what ran while something else did. Seconds only bound what could last for ever.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import pytest

from metok_vllm.serve.closing import GRACE_S
from tests.support.clips import box, encode, slow_gif, stuck
from tests.support.oracle import assert_same
from tests.support.oracle.samples import Sample, scene_video
from tests.support.server.asking import OPTIONS, QUESTION, ask, oracle, result, user
from tests.support.server.clips import data_url, mp4
from tests.support.server.live import Server, serving
from tests.support.server.load import (
    Client,
    alive,
    decoders,
    decoding,
    family,
    idle,
    leaving,
    memory_mib,
    spawners,
    until,
)

KEY = "the-operators-key"
AT_ONCE, WAITING, MEMORY_MIB = 2, 2, 200
GOOD = mp4(scene_video(71, 14))
PERCENT = b"50%25 off.mp4"
ODD = b"\xff\xfe caf\xe9.mp4"
"""A file's name outside UTF-8."""


def body(video: bytes | str | None, **changes: Any) -> dict[str, Any]:
    url = data_url(video) if isinstance(video, bytes) else video
    asked = {"model": "tiny", "messages": [user(QUESTION, url)], "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    return {**asked, "return_token_ids": True, **changes}


def of_video(**settings: Any) -> dict[str, Any]:
    return {"media_io_kwargs": {"video": settings}}


def tokens(answer: tuple[int, Any, bytes]) -> list[int]:
    status, _, text = answer
    assert status == 200, text
    ids: list[int] = json.loads(text)["choices"][0]["token_ids"]
    return ids


def sentence(answer: tuple[int, Any, bytes]) -> str:
    message: str = json.loads(answer[2])["error"]["message"]
    assert message.isprintable()
    return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the small server may read from its disk, and a link that leads out of it."""
    top = tmp_path_factory.mktemp("media")
    inside = top / "inside"
    inside.mkdir()
    (inside / "good.mp4").write_bytes(GOOD)
    (inside / os.fsdecode(ODD)).write_bytes(GOOD)
    (inside / os.fsdecode(PERCENT)).write_bytes(GOOD)
    (top / "secret.mp4").write_bytes(GOOD)
    (inside / "link.mp4").symlink_to(top / "secret.mp4")
    return inside


@pytest.fixture(scope="module")
def small(sample: Sample, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with little room, a key and a folder. Its last test ends it."""
    limits = {"videos_at_once": AT_ONCE, "videos_waiting": WAITING, "video_memory_mib": MEMORY_MIB}
    log = tmp_path_factory.mktemp("log") / "small.log"
    with serving(
        sample.path, log, "--plugin", "metok", "--additional-config", json.dumps({"metok": limits}), "--api-key", KEY,
        "--trust-request-mm-kwargs", "--max-num-batched-tokens", "256", "--served-model-name", "tiny",
        "--allowed-local-media-path", str(folder), "--num-gpu-blocks-override", "4096", *OPTIONS,
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def expected(sample: Sample) -> list[int]:
    """The small server's answer about the good video."""
    return oracle(sample, GOOD, {"decode_retention": 0}, steps=3).tokens


def send(server: Server, request: dict[str, Any]) -> Client:
    return Client(server, KEY).post(request)


# --- bombs beside good requests ---


def test_good_requests_are_answered_while_bombs_are_at_work(server: Server, sample: Sample) -> None:
    """Twelve files that hold libav for minutes and three slow GIFs: all places but one. Then they go."""
    bombs = [body(stuck())] * 12 + [body(slow_gif(1500, 20_000), **of_video(num_frames=2))] * 3
    fresh = mp4(scene_video(72, 14))
    before = decoding(server)
    with leaving([Client(server).post(bomb) for bomb in bombs]):
        until(lambda: decoding(server)["running"] == len(bombs))
        delays = []
        with ThreadPoolExecutor(1) as pool:
            good = pool.submit(ask, server, fresh)
            while not good.done():
                started = time.monotonic()
                assert server.get("/health")[0] == 200
                delays.append(time.monotonic() - started)
                time.sleep(0.05)
        assert_same(oracle(sample, fresh), result(good.result()), 1e-3)
        during = decoding(server)
        assert during["running"] >= 12, "the good video had to wait for bombs to end"
        assert during["was decoded"] == before["was decoded"] + 1
        assert during["was late"] == before["was late"]
        assert statistics.median(delays) < 0.5
    until(lambda: not decoders(server), seconds=20)
    until(lambda: idle(server))
    after = decoding(server)
    assert after["was cancelled"] + after["was decoded"] - before["was cancelled"] - before["was decoded"] == 16


HOSTILE = {
    "a call that never ends": (stuck(), "took longer than 2 s"),
    "a gigabyte of black": (slow_gif(4096, 32), "more than the 200 MiB that the server has"),
    "a first box that claims 2 GB": (
        box(b"uuid", bytes(500))[:508].replace(b"\0\0\1\xfc", b"\x7f\xff\xff\xff", 1),
        ".",
    ),
    "a movie that claims 2 GB": (b"\x7f\xff\xff\xf0moov" + bytes(2000), "."),
    "a slow GIF": (slow_gif(700, 60_000), "took longer than 2 s"),
    "an animated WebP": (b"RIFF\x80\0\0\0WEBPVP8X\n\0\0\0\2\0\0\0\7\0\0\7\0\0ANIM\6\0\0\0" + bytes(80), "WebP picture"),
    "a still WebP": (b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\0\0\0\x10\x07\x10\x11\x11\x88\x88\xfe\7\0", "WebP"),
}


def test_every_hostile_file_is_answered_in_time_and_in_little_memory(small: Server, expected: list[int]) -> None:
    """All kinds twice, as many at a time as the server takes; a good video comes right after."""
    assert tokens(send(small, body(GOOD)).answer()) == expected
    before, most, done = memory_mib(small), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.1):
            most = max(most, memory_mib(small))

    def one(name: str) -> tuple[str, tuple[int, Any, bytes]]:
        return name, send(small, body(HOSTILE[name][0], **of_video(timeout_s=2, num_frames=4))).answer()

    watching = threading.Thread(target=watch)
    watching.start()
    started = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE + WAITING) as pool:
        answers = list(pool.map(one, [*HOSTILE, *HOSTILE]))
    seconds = time.monotonic() - started
    done.set()
    watching.join()
    for name, answer in answers:
        assert answer[0] == 400, (name, answer)
        assert HOSTILE[name][1] in sentence(answer), name
    # Two at a time, for 2 s at most; and a machine that has others to serve.
    assert seconds < len(answers) / AT_ONCE * 2 + 20
    assert most - before < MEMORY_MIB + AT_ONCE * 256 + 200
    assert tokens(send(small, body(GOOD)).answer()) == expected
    until(lambda: idle(small))


# --- more than there is room for ---


def test_who_finds_no_place_is_told_when_to_come_again_and_others_are_served(
    small: Server, expected: list[int]
) -> None:
    before = decoding(small)
    with leaving([send(small, body(stuck())) for _ in range(AT_ONCE)]) as bombs:
        until(lambda: decoding(small)["running"] == AT_ONCE)
        waiting = [send(small, body(GOOD)) for _ in range(WAITING)]
        until(lambda: decoding(small)["waiting"] == WAITING)
        for _ in range(3):
            status, headers, text = answer = send(small, body(GOOD)).answer()
            assert status == 503, text
            assert int(headers["Retry-After"]) > 0
            assert sentence(answer) == "The server is decoding 2 videos and 2 wait: try again later."
        assert tokens(send(small, body(None)).answer()), "a question without a video needs no place"
        during = decoding(small)
        assert (during["running"], during["waiting"]) == (AT_ONCE, WAITING)
        assert during["refused busy"] == before["refused busy"] + 3
        assert during["was busy"] == before["was busy"] + 3
        bombs[0].leave()
        assert [tokens(one.answer()) for one in waiting] == [expected] * WAITING, "one place is enough for both"
        assert decoding(small)["running"] == 1
    until(lambda: idle(small))


def test_large_frames_wait_for_memory_and_are_answered(small: Server) -> None:
    """Each takes 55 MB for its frames, and its decoder as much again: never two of them at a time."""
    large = encode([np.zeros((720, 1280, 3), np.uint8)] * 20, codec="mpeg4", rate=10)
    before = decoding(small)
    with leaving([send(small, body(large, **of_video(num_frames=-1))) for _ in range(AT_ONCE + WAITING)]) as clients:
        answers = []
        with ThreadPoolExecutor(len(clients)) as pool:
            waiting = [pool.submit(client.answer) for client in clients]
            most = 0.0
            while not all(one.done() for one in waiting):
                most = max(most, decoding(small)["memory"])
                time.sleep(0.05)
            answers = [one.result() for one in waiting]
    assert len({tuple(tokens(answer)) for answer in answers}) == 1
    assert 55e6 < most <= MEMORY_MIB << 20
    assert decoding(small)["was decoded"] == before["was decoded"] + len(clients)
    until(lambda: idle(small))


def test_a_client_that_waits_and_goes_leaves_no_trace(small: Server, expected: list[int]) -> None:
    before = decoding(small)
    with leaving([send(small, body(stuck())) for _ in range(AT_ONCE)]):
        until(lambda: decoding(small)["running"] == AT_ONCE)
        with leaving([send(small, body(GOOD)) for _ in range(WAITING)]):
            until(lambda: decoding(small)["waiting"] == WAITING)
        until(lambda: decoding(small)["waiting"] == 0)
        assert decoding(small)["running"] == AT_ONCE
    until(lambda: idle(small))
    assert decoding(small)["was decoded"] == before["was decoded"], "nobody wanted the videos any more"
    assert tokens(send(small, body(GOOD)).answer()) == expected


# --- files of the server's own ---


def test_files_in_the_folder_are_read_and_none_outside(small: Server, folder: Path, expected: list[int]) -> None:
    before, names = decoding(small), (b"good.mp4", ODD, PERCENT)
    for name in names:
        url = f"file://{folder}/{quote_from_bytes(name)}"
        assert tokens(send(small, body(url)).answer()) == expected, url
    assert decoding(small)["was decoded"] == before["was decoded"] + len(names)
    for path in (
        f"{folder}/link.mp4",
        f"{folder}/../secret.mp4",
        f"{folder}/%2e%2e/secret.mp4",
        "/etc/passwd",
        f"{folder}",
        f"{folder}/%ff.mp4",
        f"{folder}/../%ff%0a.mp4",
        "/outside/%ff%0a.mp4",
        f"{folder}/a%00b.mp4",
        f"{folder}/{'x' * 5000}.mp4",
    ):
        answer = send(small, body(f"file://{path}")).answer()
        assert answer[0] == 400, (path, answer)
        assert sentence(answer)
    assert "Traceback" not in small.log.read_text(errors="replace")


# --- clients that dawdle ---


def test_slow_uploads_hold_nobody_up(small: Server, expected: list[int]) -> None:
    """64 clients with a few bytes of a request each; without the key they are turned away at its head."""
    request = json.dumps(body(None)).encode()
    with leaving([Client(small, KEY).announce(len(request)) for _ in range(48)]) as slow:
        for at in range(4):
            for client in slow:
                client.send(request[at : at + 1])
        strangers = [Client(small).announce(len(request)) for _ in range(16)]
        for one in strangers:
            assert one.answer()[0] == 401, "not a byte of its body is awaited"
        for _ in range(5):
            assert tokens(send(small, body(GOOD)).answer()) == expected
        for client in slow[:4]:
            client.send(request[4:])
        answers = [tokens(client.answer()) for client in slow[:4]]
    assert len({tuple(answer) for answer in answers}) == 1
    assert small.get("/health")[0] == 200


def test_slow_readers_hold_nobody_up_and_get_all_of_it(small: Server, expected: list[int]) -> None:
    """Long answers that their clients do not read: the server keeps them until they do, byte by byte."""
    long = body(None, max_tokens=120, stream=True, logprobs=True, top_logprobs=20)
    with leaving([Client(small, KEY, receive_buffer=2048).post(long) for _ in range(4)]) as slow:
        heads = [client.read(1) for client in slow]
        for _ in range(3):
            assert tokens(send(small, body(GOOD)).answer()) == expected
            heads = [head + client.read(1) for head, client in zip(heads, slow, strict=True)]
        assert set(heads) == {b"HTTP"}
        until(lambda: running(small) == 0, seconds=120)  # the engine is done with them, whoever reads
        rest = b""
        while b"data: [DONE]" not in rest:
            more = slow[0].read(65536)
            assert more, "the answer ends early"
            rest += more
        assert rest.count(b'"logprobs":{') == 120
    until(lambda: idle(small))


def running(server: Server) -> float:
    """Requests in the engine, running or waiting."""
    lines = server.get("/metrics")[1].decode().splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
    )


# --- signals; from here on the small server is gone ---


def test_sigterm_under_load_ends_every_process(small: Server) -> None:
    """Bombs at work, videos that wait, a request half sent, an answer half read, and one that streams."""
    request = json.dumps(body(None)).encode()
    streaming = body(None, max_tokens=3000, stream=True, logprobs=True, top_logprobs=20)
    clients = [send(small, body(stuck())) for _ in range(AT_ONCE)]
    until(lambda: decoding(small)["running"] == AT_ONCE)
    clients += [send(small, body(GOOD)) for _ in range(WAITING)]
    clients += [Client(small, KEY).announce(len(request)) for _ in range(8)]
    clients += [Client(small, KEY, receive_buffer=2048).post(streaming) for _ in range(4)]
    with leaving(clients):
        for client in clients[-12:-4]:
            client.send(request[:5])
        until(lambda: decoding(small)["waiting"] == WAITING and running(small) == 4)
        everyone = family(small)
        assert len(decoders(small)) == AT_ONCE
        started = time.monotonic()
        small.process.terminate()
        small.process.wait(timeout=60)
        until(lambda: not alive(everyone), seconds=10)
        # The engine stops at once (--shutdown-timeout is 0), then clients have their time; the rest is the
        # interpreter's end on a busy machine.
        assert time.monotonic() - started < GRACE_S + 20


def test_two_api_servers_add_up_and_one_that_is_killed_leaves_no_decoder(sample: Sample, tmp_path: Path) -> None:
    with serving(
        sample.path, tmp_path / "two.log", "--plugin", "metok", "--api-server-count", "2", "--served-model-name", "tiny",
        "--trust-request-mm-kwargs", *OPTIONS,
    ) as two:  # fmt: skip
        assert len(spawners(two)) == 2, "each has a pool of its own"
        with leaving(bombs_in_both(two)) as bombs:
            until(lambda: all(decoding(two)["running"] == len(bombs) for _ in range(6)))
        until(lambda: not decoders(two), seconds=20)
        until(lambda: all(idle(two) for _ in range(6)))
        assert decoding(two)["was cancelled"] == len(bombs)
        with leaving(bombs_in_both(two)):
            everyone, forked = family(two), decoders(two)
            victim = spawners(two)[0]
            orphans = [one for one in forked if one.ppid() == victim.pid]
            assert orphans
            os.kill(victim.ppid(), signal.SIGKILL)
            until(lambda: not alive([victim, *orphans]), seconds=20)
            two.process.wait(timeout=60)
            until(lambda: not alive(everyone), seconds=30)


def bombs_in_both(two: Server) -> list[Client]:
    """Bombs one after another, until both processes have one: who takes which is not our choice."""
    clients: list[Client] = []
    while len({one.ppid() for one in decoders(two)}) < 2:
        assert len(clients) < 15, "one process takes all"
        clients.append(Client(two).post(body(stuck())))
        until(lambda: len(decoders(two)) == len(clients))
    return clients
