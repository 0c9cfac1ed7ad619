"""A server under load that means it no good: bombs, crowds, clients that dawdle or vanish, and signals.

What is asserted are counts of what ran while something else did. Seconds only bound what could last for ever.
"""

from __future__ import annotations

import json
import re
import statistics
import threading
import time
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
from tests.support.server.asking import ask, oracle, result
from tests.support.server.clips import mp4
from tests.support.server.live import Server
from tests.support.server.load import (
    Client,
    alive,
    body,
    decoders,
    decoding,
    family,
    idle,
    leaving,
    memory_mib,
)
from tests.support.server.strict import AT_ONCE, GOOD, KEY, MEMORY_MIB, ODD, PERCENT, WAITING
from tests.support.until import until


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
def expected(sample: Sample) -> list[int]:
    """The strict server's answer about the good video."""
    return oracle(sample, GOOD, {"decode_retention": 0}, steps=3).tokens


def send(server: Server, request: dict[str, Any]) -> Client:
    return Client(server, KEY).post(request)


# --- bombs beside good requests ---


def test_good_requests_are_answered_while_bombs_are_at_work(server: Server, sample: Sample) -> None:
    """Twelve files that hold libav for minutes and three slow GIFs: 15 of the 24 places. Then they go."""
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


def test_every_hostile_file_is_answered_in_time_and_in_little_memory(strict: Server, expected: list[int]) -> None:
    """All kinds twice, as many at a time as the server takes; a good video comes right after."""
    assert tokens(send(strict, body(GOOD)).answer()) == expected
    before, most, done = memory_mib(strict), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.1):
            most = max(most, memory_mib(strict))

    def one(name: str) -> tuple[str, tuple[int, Any, bytes]]:
        return name, send(strict, body(HOSTILE[name][0], **of_video(timeout_s=2, num_frames=4))).answer()

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
    assert tokens(send(strict, body(GOOD)).answer()) == expected
    until(lambda: idle(strict))


# --- more than there is room for ---


def test_who_finds_no_place_is_told_when_to_come_again_and_others_are_served(
    strict: Server, expected: list[int]
) -> None:
    before = decoding(strict)
    with leaving([send(strict, body(stuck())) for _ in range(AT_ONCE)]) as bombs:
        until(lambda: decoding(strict)["running"] == AT_ONCE)
        waiting = [send(strict, body(GOOD)) for _ in range(WAITING)]
        until(lambda: decoding(strict)["waiting"] == WAITING)
        for _ in range(3):
            status, headers, text = answer = send(strict, body(GOOD)).answer()
            assert status == 503, text
            assert int(headers["Retry-After"]) > 0
            assert sentence(answer) == "The server is decoding 2 videos and 2 wait: try again later."
        assert tokens(send(strict, body(None)).answer()), "a question without a video needs no place"
        during = decoding(strict)
        assert (during["running"], during["waiting"]) == (AT_ONCE, WAITING)
        assert during["refused busy"] == before["refused busy"] + 3
        assert during["was busy"] == before["was busy"] + 3
        bombs[0].leave()
        assert [tokens(one.answer()) for one in waiting] == [expected] * WAITING, "one place is enough for both"
        assert decoding(strict)["running"] == 1
    until(lambda: idle(strict))


def test_large_frames_wait_for_memory_and_are_answered(strict: Server) -> None:
    """Each takes 55 MB for its frames, and its decoder as much again: never two of them at a time."""
    large = encode([np.zeros((720, 1280, 3), np.uint8)] * 20, codec="mpeg4", rate=10)
    before = decoding(strict)
    with leaving([send(strict, body(large, **of_video(num_frames=-1))) for _ in range(AT_ONCE + WAITING)]) as clients:
        answers = []
        with ThreadPoolExecutor(len(clients)) as pool:
            waiting = [pool.submit(client.answer) for client in clients]
            most = 0.0
            while not all(one.done() for one in waiting):
                most = max(most, decoding(strict)["memory"])
                time.sleep(0.05)
            answers = [one.result() for one in waiting]
    assert len({tuple(tokens(answer)) for answer in answers}) == 1
    assert 55e6 < most <= MEMORY_MIB << 20
    assert decoding(strict)["was decoded"] == before["was decoded"] + len(clients)
    until(lambda: idle(strict))


def test_a_client_that_waits_and_goes_leaves_no_trace(strict: Server, expected: list[int]) -> None:
    before = decoding(strict)
    with leaving([send(strict, body(stuck())) for _ in range(AT_ONCE)]):
        until(lambda: decoding(strict)["running"] == AT_ONCE)
        with leaving([send(strict, body(GOOD)) for _ in range(WAITING)]):
            until(lambda: decoding(strict)["waiting"] == WAITING)
        until(lambda: decoding(strict)["waiting"] == 0)
        assert decoding(strict)["running"] == AT_ONCE
    until(lambda: idle(strict))
    assert decoding(strict)["was decoded"] == before["was decoded"], "nobody wanted the videos any more"
    assert tokens(send(strict, body(GOOD)).answer()) == expected


# --- files of the server's own ---


def test_files_in_the_folder_are_read_and_none_outside(strict: Server, media_folder: Path, expected: list[int]) -> None:
    before, names = decoding(strict), (b"good.mp4", ODD, PERCENT)
    for name in names:
        url = f"file://{media_folder}/{quote_from_bytes(name)}"
        assert tokens(send(strict, body(url)).answer()) == expected, url
    assert decoding(strict)["was decoded"] == before["was decoded"] + len(names)
    for path in (
        f"{media_folder}/link.mp4",
        f"{media_folder}/../secret.mp4",
        f"{media_folder}/%2e%2e/secret.mp4",
        "/etc/passwd",
        f"{media_folder}",
        f"{media_folder}/%ff.mp4",
        f"{media_folder}/../%ff%0a.mp4",
        "/outside/%ff%0a.mp4",
        f"{media_folder}/a%00b.mp4",
        f"{media_folder}/{'x' * 5000}.mp4",
    ):
        answer = send(strict, body(f"file://{path}")).answer()
        assert answer[0] == 400, (path, answer)
        assert sentence(answer)
    assert "Traceback" not in strict.log.read_text(errors="replace")


# --- clients that dawdle ---


def test_slow_uploads_hold_nobody_up(strict: Server, expected: list[int]) -> None:
    """64 clients with a few bytes of a request each; without the key they are turned away at its head."""
    request = json.dumps(body(None)).encode()
    with leaving([Client(strict, KEY).announce(len(request)) for _ in range(48)]) as slow:
        for at in range(4):
            for client in slow:
                client.send(request[at : at + 1])
        strangers = [Client(strict).announce(len(request)) for _ in range(16)]
        for one in strangers:
            assert one.answer()[0] == 401, "not a byte of its body is awaited"
        for _ in range(5):
            assert tokens(send(strict, body(GOOD)).answer()) == expected
        for client in slow[:4]:
            client.send(request[4:])
        answers = [tokens(client.answer()) for client in slow[:4]]
    assert len({tuple(answer) for answer in answers}) == 1
    assert strict.get("/health")[0] == 200


def test_slow_readers_hold_nobody_up_and_get_all_of_it(strict: Server, expected: list[int]) -> None:
    """Long answers that their clients do not read: the server keeps them until they do, byte by byte."""
    long = body(None, max_tokens=120, stream=True, logprobs=True, top_logprobs=20)
    with leaving([Client(strict, KEY, receive_buffer=2048).post(long) for _ in range(4)]) as slow:
        heads = [client.read(1) for client in slow]
        for _ in range(3):
            assert tokens(send(strict, body(GOOD)).answer()) == expected
            heads = [head + client.read(1) for head, client in zip(heads, slow, strict=True)]
        assert set(heads) == {b"HTTP"}
        until(lambda: running(strict) == 0, seconds=120)  # the engine is done with them, whoever reads
        rest = b""
        while b"data: [DONE]" not in rest:
            more = slow[0].read(65536)
            assert more, "the answer ends early"
            rest += more
        # By tokens: the server may send two in one event where it is slower than the engine.
        assert sum(len(found.split(b",")) for found in re.findall(rb'"token_ids":\[([^\]]+)\]', rest)) == 120
    until(lambda: idle(strict))


def running(server: Server) -> float:
    """Requests in the engine, running or waiting."""
    lines = server.get("/metrics")[1].decode().splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
    )


# --- signals; from here on the strict server is gone ---


def test_sigterm_under_load_ends_every_process(strict: Server) -> None:
    """Bombs at work, videos that wait, a request half sent, an answer half read, and one that streams."""
    request = json.dumps(body(None)).encode()
    streaming = body(None, max_tokens=3000, stream=True, logprobs=True, top_logprobs=20)
    clients = [send(strict, body(stuck())) for _ in range(AT_ONCE)]
    until(lambda: decoding(strict)["running"] == AT_ONCE)
    clients += [send(strict, body(GOOD)) for _ in range(WAITING)]
    clients += [Client(strict, KEY).announce(len(request)) for _ in range(8)]
    clients += [Client(strict, KEY, receive_buffer=2048).post(streaming) for _ in range(4)]
    with leaving(clients):
        for client in clients[-12:-4]:
            client.send(request[:5])
        until(lambda: decoding(strict)["waiting"] == WAITING and running(strict) == 4)
        until(lambda: len(decoders(strict)) == AT_ONCE)
        everyone = family(strict)
        started = time.monotonic()
        strict.process.terminate()
        strict.process.wait(timeout=60)
        until(lambda: not alive(everyone), seconds=10)
        # The engine stops at once (--shutdown-timeout is 0), then clients have their time; the rest is the
        # interpreter's end on a busy machine.
        assert time.monotonic() - started < GRACE_S + 20
