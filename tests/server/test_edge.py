"""The server's edge: no key, no reading; refusals on every route; ids exact, short and on one line.

One server with an API key, behind a path of a proxy's, and with the routes for tokens and features open.
"""

from __future__ import annotations

import json
import socket
import time
from itertools import groupby
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import decode_mm_kwargs_item, encode_mm_kwargs_item

from metok_vllm.contract.fields import PLAN_FIELD
from metok_vllm.contract.refusals import FOREIGN_FEATURES, no_prompt_logprobs
from metok_vllm.contract.request_ids import LONGEST
from tests.server.test_metrics import read_metrics
from tests.support.oracle.samples import Sample, scene_video
from tests.support.server.asking import QUESTION, oracle, user
from tests.support.server.clips import data_url, mp4
from tests.support.server.live import Server
from tests.support.server.strict import KEY, ROOT

CLIP = mp4(scene_video(61, 20))
CHAT, BATCH = "/v1/chat/completions", "/v1/chat/completions/batch"
GENERATE, RENDER = "/inference/v1/generate", "/v1/chat/completions/render"
OURS = ("/metok", "/v1/metok/status", "/v1/metok/state", "/v1/metok/reports/nobody")


def send(server: Server, method: str, path: str, key: str | None = KEY, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    headers |= options.pop("headers", {})
    return httpx.request(method, server.url + path, headers=headers, timeout=120, **options)


def post(server: Server, path: str, body: Any, **options: Any) -> httpx.Response:
    """With JSON as Python writes it: also with what cannot be encoded."""
    options["headers"] = {"Content-Type": "application/json", **options.get("headers", {})}
    return send(server, "POST", path, content=json.dumps(body), **options)


def chat(question: str = QUESTION, video: bytes | None = CLIP, **more: Any) -> dict[str, Any]:
    messages = [user(question, None if video is None else data_url(video))]
    return {"model": "tiny", "max_tokens": 3, "temperature": 0, "ignore_eos": True, "messages": messages, **more}


def metok(**settings: Any) -> dict[str, Any]:
    return {"mm_processor_kwargs": {"metok": settings}}


def assert_answers(server: Server, sample: Sample) -> None:
    """The next request about a video gets the right tokens."""
    answer = post(server, CHAT, chat(return_token_ids=True))
    assert answer.json()["choices"][0]["token_ids"] == oracle(sample, CLIP, {"decode_retention": 0}, steps=3).tokens


def log_of(server: Server) -> str:
    return server.log.read_text(errors="replace")


# --- before the key ---


@pytest.mark.parametrize("path", [CHAT, ROOT + CHAT])
def test_without_the_key_not_a_byte_is_awaited(strict: Server, path: str) -> None:
    """The client announces a body and sends none: whoever reads it first would wait."""
    where = urlsplit(strict.url)
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=20) as client:
        client.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        assert client.recv(100).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("key", [None, KEY])
def test_deep_and_wrong_bodies_are_stocks(strict: Server, key: str | None) -> None:
    bodies = [b'{"prompt_logprobs":1,"video":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'"video_url"', b"\xff", b""]
    for body in bodies:
        answer = send(strict, "POST", CHAT, key, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == (400 if key else 401)
        assert "METok" not in answer.text
    assert "Traceback" not in log_of(strict)


@pytest.mark.parametrize("root", ["", ROOT])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"])
def test_every_method_on_every_route_of_metoks(strict: Server, root: str, method: str) -> None:
    """As vLLM's own `/v1/models`; the page itself is open, since there is nothing in it."""
    for key in (KEY, None):
        stock = send(strict, method, f"{root}/v1/models", key).status_code
        for path in OURS:
            status = send(strict, method, root + path, key).status_code
            if path == "/metok":
                assert status == (200 if method == "GET" else 405), path
            elif path.endswith("nobody"):
                assert status == (404 if stock == 200 else stock), path
            else:
                assert status == stock, path
        assert send(strict, method, f"{root}/metrics", key).status_code == 200


def test_metrics_and_status_under_the_root_path(strict: Server) -> None:
    post(strict, CHAT, chat())
    for path in ("/metrics", f"{ROOT}/metrics", f"{ROOT}/metrics/"):
        time.sleep(1.1)  # or the figures before are young enough
        metrics = read_metrics(send(strict, "GET", path, None).text)
        assert metrics["metok_pruned_requests_total"] >= 1
        assert metrics["metok_figures_age_seconds"] < 1, path
    assert 'fetch("v1/metok/status"' in send(strict, "GET", f"{ROOT}/metok").text, "beside the page, wherever that is"


# --- what is refused, on every route ---

ASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"prompt_logprobs": 1}),
    "the tokens' own": (CHAT, {"prompt_logprobs": 0}),
    "echo": (CHAT, {"echo": True}),
    "several samples": (CHAT, {"prompt_logprobs": 1, "n": 2, "temperature": 1}),
    "batch": (BATCH, {"prompt_logprobs": 1}),
}


@pytest.mark.parametrize(("path", "asked"), ASKS.values(), ids=ASKS)
def test_prompt_logprobs_of_a_pruned_prompt(strict: Server, path: str, asked: dict[str, Any], request: Any) -> None:
    """Refused when the engine has never seen the video under this question, and when it has."""
    body = chat(f"What is {request.node.name}?")
    if path == BATCH:
        body["messages"] = [chat(video=None)["messages"], body["messages"]]
    for _ in range(2):
        for _ in range(2):
            answer = post(strict, path, {**body, **asked})
            assert (answer.status_code, answer.json()["error"]["message"]) == (400, f"METok: {no_prompt_logprobs()}")
        answer = post(strict, path, body)
        assert answer.status_code == 200, answer.text


def test_a_prompt_that_is_refused_for_its_text_leaves_no_trace(strict: Server) -> None:
    """The same video and question, first with nothing behind the video and then as it should be."""
    settings = metok(query="Is it refused?")
    turned = chat(**settings)
    turned["messages"] = [user("Question first."), *turned["messages"]]
    turned["messages"][-1]["content"] = turned["messages"][-1]["content"][:1]
    template = (
        "{% for m in messages %}{% for p in m.content %}"
        "{% if p.type == 'text' %}{{ p.text }}{% else %}<video>{% endif %}{% endfor %}{% endfor %}"
    )
    refused = post(strict, CHAT, turned | {"chat_template": template, "add_generation_prompt": False})
    assert (refused.status_code, "needs text behind its last video" in refused.text) == (400, True), refused.text
    assert post(strict, CHAT, chat(**settings)).status_code == 200


def test_refused_requests_are_counted(strict: Server) -> None:
    def refused() -> float:
        metrics = read_metrics(send(strict, "GET", "/metrics").text)
        return metrics["metok_refused_requests_total{reason=prompt_logprobs}"]

    before = refused()
    post(strict, CHAT, chat(prompt_logprobs=1))
    assert refused() == before + 1


def test_prompt_logprobs_of_every_other_prompt(strict: Server) -> None:
    """Text that speaks of videos, tools that do, and a video that is not pruned."""
    tool = {"type": "function", "function": {"name": "video", "parameters": {"type": "object", "properties": {}}}}
    for body in (
        chat('What does {"type": "video_url"} mean?', None, prompt_logprobs=1),
        chat("?", None, prompt_logprobs=1, tools=[tool], tool_choice="none"),
        chat(prompt_logprobs=1, mm_processor_kwargs={"metok": "off"}),
    ):
        answer = post(strict, CHAT, body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["prompt_logprobs"]
    echo = {"model": "tiny", "prompt": 'a "video"', "echo": True, "logprobs": 1, "max_tokens": 1}
    assert post(strict, "/v1/completions", echo).json()["choices"][0]["text"].startswith('a "video"')


# --- features that somebody else has made ---


@pytest.fixture(scope="module")
def rendered(strict: Server) -> dict[str, Any]:
    """A prompt about a video as the server renders it, for the route that takes tokens and features."""
    body: dict[str, Any] = post(strict, RENDER, chat()).json()
    body["sampling_params"] = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    return body


def with_item(rendered: dict[str, Any], change: Any, modality: str = "video") -> dict[str, Any]:
    """The same with its item changed: one that a client has made, or a renderer without METok."""
    features = rendered["features"]
    item = decode_mm_kwargs_item(features["kwargs_data"]["video"][0])
    change(item)
    return {
        **rendered,
        "features": {
            "mm_hashes": {modality: [f"made elsewhere {change}"]},
            "mm_placeholders": {modality: features["mm_placeholders"]["video"]},
            "kwargs_data": {modality: [encode_mm_kwargs_item(item)]},
        },
    }


def without_metok(item: Any) -> None:
    for name in [name for name in item if name.startswith("metok_")]:
        del item[name]


def with_a_broken_plan(item: Any) -> None:
    item[PLAN_FIELD].data = torch.zeros(3, dtype=torch.float32)


def with_other_pixels(item: Any) -> None:
    item["pixel_values_videos"].data = torch.zeros(2, 1, 5, 5)


def test_features_made_elsewhere_are_refused_one_by_one(
    strict: Server, rendered: dict[str, Any], sample: Sample
) -> None:
    by_hash = {**rendered["features"], "kwargs_data": None, "mm_metadata": None}
    for body in (
        rendered,
        with_item(rendered, without_metok),
        with_item(rendered, with_a_broken_plan),
        with_item(rendered, with_other_pixels),
        with_item(rendered, without_metok, "image"),
        {**rendered, "features": by_hash},
        {**rendered, "features": {**by_hash, "mm_hashes": {"video": ["never heard of"]}}},
    ):
        answer = post(strict, GENERATE, body)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, f"METok: {FOREIGN_FEATURES}")
        assert_answers(strict, sample)
    assert "Traceback" not in log_of(strict)


def test_that_route_takes_the_video_itself(strict: Server, rendered: dict[str, Any], sample: Sample) -> None:
    """And what is refused on the others is refused there."""
    (place,) = rendered["features"]["mm_placeholders"]["video"]
    ids = rendered["token_ids"]
    inside = ids[place["offset"] : place["offset"] + place["length"]]
    assert len(list(groupby(inside))) == 1
    one_each = ids[: place["offset"] + 1] + ids[place["offset"] + place["length"] :]
    body = {key: value for key, value in rendered.items() if key != "features"}
    body |= {"token_ids": one_each, "content_parts": [{"type": "video_url", "url": data_url(CLIP)}]}
    expected = oracle(sample, CLIP, {"decode_retention": 0}, steps=3).tokens
    assert post(strict, GENERATE, body).json()["choices"][0]["token_ids"] == expected
    for asked in ({"prompt_logprobs": 1}, {"prompt_logprob_token_ids": [[1]] * (len(ids) - 1)}):
        answer = post(strict, GENERATE, body | {"sampling_params": {**body["sampling_params"], **asked}})
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, f"METok: {no_prompt_logprobs()}")


# --- ids ---


def report_of(server: Server, request_id: str) -> httpx.Response:
    return send(server, "GET", f"/v1/metok/reports/{request_id}")


def test_a_report_is_had_by_its_exact_id(strict: Server) -> None:
    for own in ("alice-2", "alice"):
        answer = post(strict, CHAT, chat(**metok(report=True)), headers={"X-Request-Id": own})
        assert answer.json()["id"] == f"chatcmpl-{own}"
        assert report_of(strict, f"chatcmpl-{own}").json()["request_id"] == f"chatcmpl-{own}"
        if own == "alice-2":
            assert report_of(strict, "chatcmpl-alice").status_code == 404
    for other in ("chatcmpl", "chatcmpl-", "chatcmpl-alic", "alice", "0_chatcmpl-alice", "chatcmpl-alice-"):
        assert report_of(strict, other).status_code == 404


def test_samples_and_conversations_have_reports(strict: Server) -> None:
    several = chat(n=2, temperature=1, **metok(report=True))
    post(strict, CHAT, several, headers={"X-Request-Id": "several"})
    assert report_of(strict, "chatcmpl-several").status_code == 200
    batch = chat(**metok(report=True)) | {"messages": [chat()["messages"]] * 2}
    post(strict, BATCH, batch, headers={"X-Request-Id": "both"})
    assert [report_of(strict, f"chatcmpl-both{i}").status_code for i in ("", "_0", "_1", "_2")] == [404, 200, 200, 404]


def test_hostile_ids_are_shortened_and_escaped(strict: Server) -> None:
    for own in ("x" * 500_000, "a\nINFO 11-27 a forged line", "\x1b[2J\u202e"):
        answer = post(strict, CHAT, chat(request_id=own, **metok(report=True)))
        assert answer.status_code == 200
        assert answer.json()["id"] == f"chatcmpl-{own}"
    time.sleep(1.1)
    status = send(strict, "GET", "/v1/metok/status")
    shown = [one["request_id"] for one in status.json()["requests"]][:3]
    assert len(status.content) < 1_000_000
    for one in shown:
        assert one.startswith("chatcmpl-")
        assert one.isprintable()
        assert len(one) <= LONGEST
    assert len(report_of(strict, "y" * 20_000).text) < 500
    ours = [line for line in log_of(strict).splitlines() if "METok" in line or "forged" in line]
    assert any("a forged line" in line and "METok chatcmpl-a\\nINFO" in line for line in ours)
    assert not [line for line in ours if line.startswith("INFO 11-27")]
    assert max(map(len, ours)) < 1000


@pytest.mark.parametrize(
    "settings",
    [{"query": "\ud800"}, {"a\ud800": 1}, {"aligner": "\ud800"}, {"events": "\ud800\n"}, "\ud800", {"a\n\x1b": 1}],
)
def test_a_setting_that_cannot_be_written_gets_a_sentence(strict: Server, settings: Any) -> None:
    answer = post(strict, CHAT, chat(mm_processor_kwargs={"metok": settings}))
    assert answer.status_code == 400
    sentence = answer.json()["error"]["message"]
    assert sentence.startswith("METok (mm_processor_kwargs): ")
    assert sentence.isprintable()


def test_a_question_that_cannot_be_written_is_no_servers_fault(strict: Server, sample: Sample) -> None:
    assert post(strict, CHAT, chat("wh\ud800at?")).status_code == 400
    assert_answers(strict, sample)
