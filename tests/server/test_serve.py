"""The real server with `--plugin metok`: answers against the oracle, blocks, errors, reports."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.oracle import assert_same
from tests.support.oracle.samples import Sample, scene_video
from tests.support.server.asking import QUESTION, ask, assert_drained, oracle, result
from tests.support.server.clips import mp4
from tests.support.server.live import Server, environment, vllm


def test_concurrent_requests_equal_the_oracle(server: Server, sample: Sample) -> None:
    """Videos of different lengths and settings at once, beside a text-only request and one with METok off."""
    asked: list[tuple[bytes | None, Any]] = [
        (mp4(scene_video(1, 9)), None),
        (mp4(scene_video(2, 30)), {"decode_retention": 1}),
        (mp4(scene_video(3, 17)), {"decode_retention": 0, "events": 3}),
        (mp4(scene_video(4, 12)), "off"),
        (mp4(scene_video(3, 17)), {"stages": 1, "events": 3}),
        (mp4(scene_video(5, 21)), "off"),
        (None, None),
        (mp4(scene_video(6, 1, 1)), None),
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: ask(server, *one), asked))
    for (video, metok), answer in zip(asked, answers, strict=True):
        assert_same(oracle(sample, video, metok), result(answer), 1e-3)


def test_deep_groups_hold_blocks_for_text_alone_and_all_are_free_at_the_end(server: Server, sample: Sample) -> None:
    video = mp4(scene_video(7, 32))
    metok = {"decode_retention": 0}
    prompt = len(oracle(sample, video, metok, steps=1).prompt_ids)
    text = len(sample.prompt_ids(QUESTION, videos=1)) - 1
    steps = 64  # long enough to be seen at work

    def most(size: int) -> int:
        return -(-(text + steps) // size)

    assert most(32) < prompt // 32, "the prompt's own blocks would not show"
    states: list[dict[str, Any]] = []
    done = threading.Event()

    def poll() -> None:
        while not done.is_set():
            states.append(json.loads(server.get("/v1/metok/state")[1])["workers"][0])
            time.sleep(0.02)

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        answer = ask(server, video, metok, max_tokens=steps)
    finally:
        done.set()
        poller.join()
    seen_deep = set()
    for state in states:
        for group in state["groups"]:
            size = group["block_size"]
            for request_id, blocks in group["blocks"].items():
                if not request_id.startswith(answer.id):
                    continue
                if group["holds"] == "every token":
                    assert blocks <= -(-(prompt + steps) // size)
                else:
                    seen_deep.add((group["holds"], size, blocks))
    # A prompt of two steps holds fewer at first; from its end on it holds what its text and its answer need.
    assert all(blocks <= most(size) for _, size, blocks in seen_deep)
    complete = {kind for kind, size, blocks in seen_deep if -(-text // size) <= blocks}
    assert complete == {"text", "text and retained"}
    assert prompt > 4 * text

    assert_drained(server)


def test_a_report_says_what_was_done(server: Server, sample: Sample) -> None:
    video = mp4(scene_video(8, 20))
    answer = ask(server, video, {"report": True})
    expected = oracle(sample, video)
    status, body = server.get(f"/v1/metok/reports/{answer.id}")
    assert status == 200
    report = json.loads(body)
    trace = (expected.videos or [])[0]
    assert report["visual_tokens"]["stock"] == 20 * 16 + 1
    assert report["visual_tokens"]["encoded"] == (trace.span or (0, 0))[1] - (trace.span or (0, 0))[0]
    assert report["visual_tokens"]["after_l1"] == len(trace.after_l1 or [])
    assert report["visual_tokens"]["after_l2"] == len(trace.after_l2 or [])
    assert report["visual_tokens"]["retained"] == len(expected.retained or [])
    kv_tokens = sum(expected.kv_tokens or [])
    assert report["kv_bytes"]["metok"] == kv_tokens * 2 * 2 * 32 * 4  # K and V, 2 KV heads of 32, float32
    (described,) = report["videos"]
    assert [frame["stride"] for frame in described["per_frame"]] == trace.strides
    starts = [
        i for i, f in enumerate(described["per_frame"]) if not i or f["event"] != described["per_frame"][i - 1]["event"]
    ]
    assert starts == [start for start, _ in trace.events or []]
    assert {f["event"] for f in described["per_frame"] if f["key_event"]} == set(trace.key_events or [])
    assert sum(frame["tokens"] for frame in described["per_frame"]) == report["visual_tokens"]["encoded"]
    assert f"METok {answer.id}" in server.log.read_text(errors="replace")
    assert server.get("/v1/metok/reports/nobody")[0] == 404


BAD_SETTINGS = [
    ({"evnts": 3}, "unknown setting 'evnts'"),
    ({"events": "five"}, "'events' got 'five'"),
    ({"events": 0}, "'events' got 0"),
    ({"keep_ratio": 1.5}, "'keep_ratio' got 1.5"),
    ({"strides": [8, 4, 2]}, "strides must be from 1 to 64"),
    ({"token_budget": 3}, "the smallest possible is"),
    ({"prune_layers": [1, 2, 3]}, "'prune_layers' belongs to the server"),
    ({"aligner": "dual-tower"}, "no dual tower"),
    ({"stages": 2}, "'stages' got 2"),
    (
        {"stages": 1, "keep_ratio": 0.5},
        "with stages 1 nothing is pruned inside the model, so 'keep_ratio' has no effect",
    ),
    ({"stages": 1, "report": True}, "with stages 1 there is none: leave out report"),
    ("on", 'must be "off" or an object'),
    (7, 'must be "off" or an object'),
    ([], 'must be "off" or an object'),
]


@pytest.mark.parametrize(("metok", "sentence"), BAD_SETTINGS, ids=[str(m) for m, _ in BAD_SETTINGS])
def test_a_wrong_setting_gets_one_sentence(server: Server, metok: Any, sentence: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, mp4(scene_video(9, 6)), metok)
    message = refused.value.body["message"]  # type: ignore[index]
    assert sentence in message
    assert "\n" not in message
    assert "Traceback" not in message


def test_other_impossible_requests_get_one_sentence(server: Server) -> None:
    video = mp4(scene_video(9, 6))
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs do not exist"):
        ask(server, video, extra={"prompt_logprobs": 1})
    assert ask(server, video, "off", extra={"prompt_logprobs": 1}).prompt_logprobs
    assert ask(server, video, {"stages": 1}, extra={"prompt_logprobs": 1}).prompt_logprobs
    with pytest.raises(openai.BadRequestError):
        ask(server, b"not a video at all")
    with pytest.raises(openai.BadRequestError):
        ask(server, video[: len(video) // 3])
    with pytest.raises(openai.BadRequestError):  # an address inside the network, with --allowed-media-domains set
        server.client().chat.completions.create(
            model="tiny",
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "video_url", "video_url": {"url": "http://127.0.0.1:9/secret.mp4"}}],
                }
            ],
        )
    assert ask(server, None, max_tokens=2).choices[0].message.content is not None
    assert "Traceback" not in server.log.read_text(errors="replace")


def test_a_model_that_cannot_be_served_is_refused_with_the_list(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64})
    )
    started = subprocess.run(
        [vllm(), "serve", str(tmp_path), "--plugin", "metok"], env=environment(), capture_output=True, timeout=120
    )
    assert started.returncode != 0
    message = started.stderr.decode()
    assert "METok cannot serve" in message
    assert "LlavaOnevisionForConditionalGeneration" in message
    assert "Traceback" not in message
