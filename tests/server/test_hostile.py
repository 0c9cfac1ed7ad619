"""Broken files, absurd requests and cancelled ones: each gets a clear answer,
and the server stays as it was.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.clips import encode, tone
from tests.support.oracle import assert_same
from tests.support.oracle.samples import Sample, scene_video
from tests.support.server.asking import QUESTION, ask, assert_drained, chat, oracle, oracle_on_frames, result, user
from tests.support.server.clips import data_url, jpegs, mp4, seen_jpegs
from tests.support.server.live import Server


def body(video: bytes | str, **changes: Any) -> dict[str, Any]:
    url = video if isinstance(video, str) else data_url(video)
    return {"model": "tiny", "messages": [user(QUESTION, url)], "max_tokens": 4, **changes}


def post(server: Server, request: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=request, timeout=120)


def broken_files() -> list[bytes]:
    """Truncations and bit flips of a small mp4, from fixed seeds."""
    whole = mp4(scene_video(1, 12))
    files = [whole[: len(whole) * i // 6] for i in range(6)]
    for seed in range(14):
        rng = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 8, 64])):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        files.append(bytes(damaged))
    return files


def test_a_broken_file_gets_a_right_answer_or_400(server: Server) -> None:
    statuses = set()
    for file in broken_files():
        response = post(server, body(file))
        statuses.add(response.status_code)
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            message = response.json()["error"]["message"]
            assert message
            assert "Traceback" not in message
    assert 400 in statuses
    assert server.get("/health")[0] == 200


WRONG = [
    {"mm_processor_kwargs": {"metok": None}},
    {"mm_processor_kwargs": {"metok": {"strides": [1e9, 1, 1]}}},
    {"mm_processor_kwargs": {"metok": {"events": -1}}},
    {"mm_processor_kwargs": {"metok": {"events": 10**30}}},
    {"mm_processor_kwargs": {"metok": {"query": ["a"]}}},
    {"mm_processor_kwargs": {"metok": {"query": "x" * 20000}}},
    {"mm_processor_kwargs": {"metok": {"keep_ratio": "0.5"}}},
    {"mm_processor_kwargs": {"metok": {"": 1}}},
    {"mm_processor_kwargs": {"metok": {"events": {"a": 1}}}},
    {"mm_processor_kwargs": []},
    {"mm_processor_kwargs": "metok"},
    {"mm_processor_kwargs": {"videos_kwargs": 3}},
    {"mm_processor_kwargs": {"videos_kwargs": {"metok": {"off": True}}}},
    {"media_io_kwargs": {"video": {"num_frames": "many"}}},
    {"media_io_kwargs": {"video": {"no_such_key": 1}}},
    {
        "messages": [
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,"}}]}
        ]
    },
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": None}]}]},
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": 7}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "video_embeds", "video_embeds": "AAAA"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:video/mp4,abc"}}]}]},
    {"messages": [None]},
    {"messages": {}},
    # Each of these reached the worker's vision tower in another shape than it takes, and ended the engine.
    {"mm_processor_kwargs": {"do_resize": False}},
    {"mm_processor_kwargs": {"size": {"height": 64, "width": 64}}},
    {"mm_processor_kwargs": {"do_rescale": False, "do_normalize": False}},
    {"mm_processor_kwargs": {"videos_kwargs": {"do_sample_frames": True, "num_frames": 3}}},
    {"mm_processor_kwargs": {"metok": {"token_budget": 10**18}}},
    {"mm_processor_kwargs": {"metok": {"keep_ratio": 1e-300}}},
    {"media_io_kwargs": {"video": {"num_frames": 10**9}}},
    {"media_io_kwargs": {"video": {"fps": 1e308}}},
    {"media_io_kwargs": {"video": {"timeout_s": 1e-9}}},
    {"media_io_kwargs": {"video": {"video_backend": "nobody"}}},
    {"media_io_kwargs": {"video": {"video_backend": 7}}},
    {"media_io_kwargs": {"video": None}},
    {"truncate_prompt_tokens": 5},
    {"max_tokens": 10**9},
    {"logprobs": True, "top_logprobs": 10**6},
    {"priority": "x"},
]


@pytest.mark.parametrize("change", WRONG, ids=[json.dumps(c)[:60] for c in WRONG])
def test_wrong_types_at_every_level_never_end_in_500(server: Server, change: dict[str, Any]) -> None:
    response = post(server, {**body(mp4(scene_video(2, 6))), **change})
    assert response.status_code in (200, 400, 422), response.text
    assert "Traceback" not in response.text


def base64_file(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def black_jpeg(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG")
    return buffer.getvalue()


def absurd_files() -> dict[str, tuple[str, str]]:
    """Media URLs that are to be refused, and words of the sentence that says why."""
    tiny = base64.b64encode(black_jpeg(16)).decode()
    huge = base64.b64encode(black_jpeg(7000)).decode()
    bomb = base64.b64encode(black_jpeg(15000)).decode()
    small = mp4(scene_video(3, 6))
    return {
        "one frame of 8000 x 8000": (data_url(encode([np.zeros((8000, 8000, 3), np.uint8)])), "8000 x 8000"),
        "sound alone": (base64_file(tone()), "no video stream"),
        "thousands of frames": ("data:video/jpeg;base64," + ",".join([tiny] * 4000), "a list of 4000 frames"),
        "huge frames in a list": (f"data:video/jpeg;base64,{tiny},{huge}", "7000 x 7000"),
        "a decompression bomb": (f"data:video/jpeg;base64,{bomb}", "far more pixels"),
        "frames of two sizes": (
            f"data:video/jpeg;base64,{base64.b64encode(black_jpeg(32)).decode()},{tiny}",
            "same shape",
        ),
        "a file that is called a list of frames": (base64_file(small, "video/jpeg"), "not a JPEG file"),
        "a picture that is called a video": (base64_file(black_jpeg(64)), "still image"),
        "an empty list of frames": ("data:video/jpeg;base64,", "not a JPEG file"),
        "no base64": ("data:video/mp4;base64,@@@@", "base64"),
        "another encoding": ("data:video/mp4,abc", "base64"),
    }


ABSURD = absurd_files()


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_file_is_refused_while_others_are_answered(server: Server, sample: Sample, name: str) -> None:
    url, words = ABSURD[name]
    with ThreadPoolExecutor(2) as pool:
        neighbour = pool.submit(ask, server, None, None, "Say something.", max_tokens=3)
        started = time.monotonic()
        response = post(server, body(url))
        assert time.monotonic() - started < 30
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert words in message
    assert "\n" not in message
    assert_same(oracle(sample, None, steps=3, question="Say something."), result(neighbour.result()), 1e-3)


def test_limits_hold_for_a_list_of_all_its_frames(server: Server) -> None:
    every = {"media_io_kwargs": {"video": {"num_frames": -1}}}
    response = post(server, body(ABSURD["thousands of frames"][0], **every))
    assert response.status_code == 400
    assert "more than 1024 (video setting max_frames)" in response.json()["error"]["message"]
    memory = {"media_io_kwargs": {"video": {"num_frames": -1, "max_output_mib": 1}}}
    response = post(server, body(jpegs(np.zeros((30, 128, 128, 3), np.uint8)), **memory))
    assert response.status_code == 400
    assert "fill more than 1 MiB" in response.json()["error"]["message"]


def test_frames_as_pictures_are_answered_like_a_file(server: Server, sample: Sample) -> None:
    url = jpegs(scene_video(61, 26))
    assert_same(oracle_on_frames(sample, seen_jpegs(url)), result(chat(server, [user(QUESTION, url)])), 1e-3)


def test_the_name_of_the_type_does_not_matter(server: Server, sample: Sample) -> None:
    video = mp4(scene_video(62, 11))
    for kind in ("image/png", "application/octet-stream", "video/webm;codecs=vp9", ""):
        answer = chat(server, [user(QUESTION, base64_file(video, kind))])
        assert_same(oracle(sample, video), result(answer), 1e-3)


def test_an_hour_of_tiny_frames_is_answered_right_and_soon(server: Server, sample: Sample) -> None:
    """3600 frames, one a second, of which 32 are sampled."""
    scenes = np.repeat(scene_video(63, 120, scenes=6, side=64), 30, axis=0)
    hour = mp4(scenes, rate=1)
    expected = oracle(sample, hour)
    ask(server, None, question="Warm.", max_tokens=1)
    started = time.monotonic()
    answer = ask(server, hour)
    assert time.monotonic() - started < 45
    assert_same(expected, result(answer), 1e-3)
    # All of its frames are more than one request may take, and the server says so.
    response = post(server, body(hour, media_io_kwargs={"video": {"num_frames": -1}}))
    assert response.status_code == 400
    assert "3600 frames" in response.json()["error"]["message"]


def test_a_storm_of_cancelled_requests_leaves_nothing(server: Server, sample: Sample) -> None:
    """100 requests, most dropped: at random moments from 20 ms on (queued, decoding the file, in prefill), or
    at a random event of their stream. No time in seconds falls into the same part of a request on every
    machine, so those that are to be dropped while tokens come wait for the tokens.
    """
    videos = [mp4(scene_video(seed, 8 + 5 * seed)) for seed in range(4)]
    rng = random.Random(7)
    settings: list[Any] = [None, {"decode_retention": 1}, {"decode_retention": 0}, "off"]

    def request(tokens: int) -> dict[str, Any]:
        changes = {"max_tokens": tokens, "stream": True, "ignore_eos": True}
        return body(rng.choice(videos), **changes, mm_processor_kwargs={"metok": rng.choice(settings)})

    # The request, the seconds after which it is dropped, and the event at which it is.
    jobs: list[tuple[dict[str, Any], float | None, int | None]] = [
        *(
            (request(rng.choice([2, 64])), rng.choice([0.02, 0.1, 0.5, 1.0, 2.0]) * rng.random(), None)
            for _ in range(60)
        ),
        *((request(64), None, rng.randrange(2, 20)) for _ in range(25)),
        *((request(2), None, None) for _ in range(15)),
    ]
    rng.shuffle(jobs)
    gate = asyncio.Semaphore(16)

    async def one(
        client: httpx.AsyncClient, request: dict[str, Any], patience: float | None, last: int | None
    ) -> tuple[int, bool]:
        """Events that came, and whether the request was dropped; patience begins when it is sent."""
        events = 0
        async with gate:
            try:
                async with (
                    asyncio.timeout(patience),
                    client.stream("POST", f"{server.url}/v1/chat/completions", json=request) as response,
                ):
                    async for line in response.aiter_lines():
                        events += line.startswith("data: ")
                        if events == last:
                            return events, True
                return events, False
            except TimeoutError:
                return events, True

    async def storm() -> list[tuple[int, bool]]:
        async with httpx.AsyncClient(timeout=None) as client:
            return list(await asyncio.gather(*(one(client, *job) for job in jobs)))

    seen = asyncio.run(storm())
    assert sum(dropped and events == 0 for events, dropped in seen) >= 10, (
        "too few were dropped before their first token"
    )
    # Tokens that a busy server sends together are one event, so a few of the 25 may end before theirs.
    assert sum(dropped and events > 1 for events, dropped in seen) >= 15, "too few were dropped while tokens came"
    kept = [
        events for (_, patience, last), (events, _) in zip(jobs, seen, strict=True) if patience is None and last is None
    ]
    assert min(kept) >= 2, "a request that was not dropped got no answer"  # its text, and [DONE]
    fresh = mp4(scene_video(40, 15))
    assert_same(oracle(sample, fresh), result(ask(server, fresh)), 1e-3)
    assert_drained(server)
