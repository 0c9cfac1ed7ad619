"""A video named by its `uuid`: asked about again without its data; dropped on the way, and sent again."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from tests.support.oracle import assert_same
from tests.support.oracle.samples import Sample, scene_video
from tests.support.server.asking import QUESTION, assert_drained, chat, oracle, oracle_on_prompt, result, user
from tests.support.server.clips import data_url, mp4, seen
from tests.support.server.live import Server

OTHER = "How many people are on the stage when the lights go out?"


def about(uuid: str, question: str = QUESTION, video: bytes | None = None) -> list[dict[str, Any]]:
    """A conversation about a video of this uuid, with its data or without."""
    turn = user(question, "")
    turn["content"][0] |= {"uuid": uuid, "video_url": None if video is None else {"url": data_url(video)}}
    return [turn]


def post(server: Server, messages: list[dict[str, Any]], **more: Any) -> httpx.Response:
    body = {"model": "tiny", "max_tokens": 2, "temperature": 0, "messages": messages, **more}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


def test_another_question_about_a_video_without_its_data(server: Server, sample: Sample) -> None:
    video = mp4(scene_video(71, 21))
    assert_same(oracle(sample, video), result(chat(server, about("clip-71", QUESTION, video))), 1e-3)
    for question in (OTHER, QUESTION, "What else?"):
        answer = chat(server, about("clip-71", question))
        assert_same(oracle(sample, video, question=question), result(answer), 1e-3)


def test_a_stated_question_is_no_part_of_the_videos_name(server: Server, sample: Sample) -> None:
    video = mp4(scene_video(72, 19))
    chat(server, about("clip-72", QUESTION, video))
    prompt = sample.prompt_ids(QUESTION, videos=1)
    expected = oracle_on_prompt(sample, prompt, seen(video), None, 24, OTHER)
    assert_same(expected, result(chat(server, about("clip-72"), {"query": OTHER})), 1e-3)


@pytest.mark.parametrize("metok", [None, "off"])
def test_a_video_that_was_never_here(server: Server, metok: Any) -> None:
    more = {} if metok is None else {"mm_processor_kwargs": {"metok": metok}}
    answer = post(server, about("nobody's"), **more)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        'METok: this server has no video of uuid "nobody\'s" with these settings, or has it no longer; '
        "send the data with it once more."
    )


def test_other_settings_need_the_data_once_more(server: Server, sample: Sample) -> None:
    video = mp4(scene_video(73, 18))
    chat(server, about("clip-73", QUESTION, video))
    settings = {"strides": [4, 4, 8]}
    refused = post(server, about("clip-73"), mm_processor_kwargs={"metok": settings})
    assert refused.status_code == 400
    assert "with these settings" in refused.json()["error"]["message"]
    again = chat(server, about("clip-73", QUESTION, video), {"decode_retention": 1})
    assert_same(oracle(sample, video, {"decode_retention": 1}), result(again), 1e-3)


@pytest.mark.parametrize("frames", [18, 23], ids=["equal counts", "other counts"])
def test_two_videos_of_one_name(server: Server, sample: Sample, frames: int) -> None:
    """A uuid is the client's word that the data is the same: the first counts, as in stock vLLM.
    Nothing breaks.
    """
    first, second = mp4(scene_video(74, 18)), mp4(scene_video(75, frames))
    name = f"one-name-{frames}"
    chat(server, about(name, QUESTION, first))
    answer = chat(server, about(name, QUESTION, second))
    assert_same(oracle(sample, first), result(answer), 1e-3)
    assert_drained(server)


def test_dropped_and_sent_again(server: Server) -> None:
    """A client goes away while its video is prepared, at any moment; the same request then gets an answer.

    Each video is new, and so is in no cache. Every moment up to a whole answer is tried.
    """
    chance = random.Random(5)
    video = mp4(scene_video(76, 30))
    dropped = 0
    for i in range(30):
        url = data_url(video + i.to_bytes(2, "big"))
        messages = [user(f"What is number {i}?", url)]
        body = {"model": "tiny", "max_tokens": 1, "messages": messages}
        try:
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=chance.uniform(0.01, 0.4))
        except httpx.TimeoutException:
            dropped += 1
        again = post(server, messages)
        assert again.status_code == 200, f"{i}: {again.text}"
    assert dropped > 5, "no request was dropped"
    assert "cache drift" not in server.log.read_text(errors="replace")
    assert_drained(server)


def test_refused_late_and_sent_again(server: Server) -> None:
    """vLLM looks at one parameter only after the video has been prepared and is about to be sent."""
    messages = [user("What comes first?", data_url(mp4(scene_video(78, 21))))]
    refused = post(server, messages, routed_experts_prompt_start=100_000)
    assert refused.status_code == 400
    assert "routed_experts_prompt_start" in refused.json()["error"]["message"]
    again = post(server, messages)
    assert again.status_code == 200, again.text


# --- an answer that the client has begun ---


def test_an_answer_that_the_client_has_begun(server: Server, sample: Sample) -> None:
    """What a client sends is prompt: a begun answer scores like text behind the video (method.md, 2.2)."""
    video = mp4(scene_video(77, 20))
    begun = "After the band leaves, the"
    messages = [user(QUESTION, data_url(video)), {"role": "assistant", "content": begun}]
    extra = {
        "return_token_ids": True,
        "ignore_eos": True,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    answer = chat(server, messages, extra=extra)
    parts = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": begun}]}]
    text = sample.processor.apply_chat_template(turns, continue_final_message=True)
    assert text.endswith(begun)
    ids = list(sample.processor.tokenizer(text).input_ids)
    assert_same(oracle_on_prompt(sample, ids, seen(video), None, 24, QUESTION), result(answer), 1e-3)


# --- beam search ---


@pytest.mark.parametrize("metok", [None, {"decode_retention": 0}], ids=json.dumps)
def test_beam_search_of_width_one_is_greedy(server: Server, sample: Sample, metok: Any) -> None:
    video = mp4(scene_video(78, 20))
    more = {} if metok is None else {"mm_processor_kwargs": {"metok": metok}}
    messages = [user(QUESTION, data_url(video))]
    found = post(server, messages, use_beam_search=True, max_tokens=6, ignore_eos=True, **more).json()
    tokens = oracle(sample, video, metok, steps=6).tokens
    assert found["choices"][0]["message"]["content"] == sample.processor.tokenizer.decode(
        tokens, skip_special_tokens=True
    )
    assert_drained(server)


def test_settings_in_the_wrong_place(server: Server) -> None:
    video = mp4(scene_video(79, 12))
    answer = post(server, [user(QUESTION, data_url(video))], vllm_xargs={"metok": "off"})
    assert answer.status_code == 400
    assert "settings go into mm_processor_kwargs" in answer.json()["error"]["message"]
