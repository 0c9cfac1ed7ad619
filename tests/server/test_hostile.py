"""Broken files, absurd requests and cancelled ones: each gets a clear answer, and the server stays as it was."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from tests.oracle import assert_same
from tests.oracle.samples import Sample, scene_video
from tests.server.asking import QUESTION, ask, oracle, result
from tests.server.clips import data_url, mp4
from tests.server.live import Server


def body(video: bytes, **changes: Any) -> dict[str, Any]:
    content = [{"type": "video_url", "video_url": {"url": data_url(video)}}, {"type": "text", "text": QUESTION}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **changes}


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
]


@pytest.mark.parametrize("change", WRONG, ids=[json.dumps(c)[:60] for c in WRONG])
def test_wrong_types_at_every_level_never_end_in_500(server: Server, change: dict[str, Any]) -> None:
    response = post(server, {**body(mp4(scene_video(2, 6))), **change})
    assert response.status_code in (200, 400, 422), response.text
    assert "Traceback" not in response.text


def test_a_storm_of_cancelled_requests_leaves_nothing(server: Server, sample: Sample) -> None:
    """Requests dropped at random moments: queued, decoding the file, in prefill, while tokens stream."""
    videos = [mp4(scene_video(seed, 8 + 5 * seed)) for seed in range(4)]
    rng = random.Random(7)

    async def one(client: httpx.AsyncClient, video: bytes, patience: float) -> bool:
        request = body(video, max_tokens=64, stream=True, ignore_eos=True)
        try:
            async with asyncio.timeout(patience):
                async with client.stream("POST", f"{server.url}/v1/chat/completions", json=request) as response:
                    async for _ in response.aiter_lines():
                        pass
            return True
        except TimeoutError:
            return False

    async def storm() -> list[bool]:
        async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=12)) as client:
            jobs = [one(client, rng.choice(videos), rng.choice([0.05, 0.3, 1.0, 2.5])) for _ in range(48)]
            return list(await asyncio.gather(*jobs))

    assert not all(asyncio.run(storm())), "nothing was cancelled"
    assert server.get("/health")[0] == 200
    fresh = mp4(scene_video(40, 15))
    assert_same(oracle(sample, fresh), result(ask(server, fresh)), 1e-3)
    ask(server, None, question="One more, so that the workers hear of what has finished.", max_tokens=1)
    state = json.loads(server.get("/v1/metok/state")[1])["workers"][0]
    assert (state["pruned_requests"], state["deferred_bytes"]) == (0, 0)
    usage = [line for line in server.get("/metrics")[1].decode().splitlines() if "kv_cache_usage_perc{" in line]
    assert usage
    assert all(float(line.split()[-1]) == 0 for line in usage)
