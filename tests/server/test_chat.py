"""What a chat client may ask of the real server beside one whole answer: streams, samples, further turns."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.oracle import OracleResult, assert_same
from tests.support.oracle.samples import Sample, scene_video
from tests.support.server.asking import ask, chat, oracle, oracle_on_prompt, result, user
from tests.support.server.clips import data_url, mp4, seen
from tests.support.server.live import Server

QUESTIONS = ("Who comes in last?", "What stands near the window at the end, and why?")


def test_a_stream_gives_what_the_whole_answer_gives(server: Server, sample: Sample) -> None:
    video = mp4(scene_video(50, 22))
    whole = ask(server, video)
    assert_same(oracle(sample, video), result(whole), 1e-3)
    chunks = list(ask(server, video, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    spoken = [choice for choice in choices if choice.delta.content]
    assert len(spoken) > 5, "the answer did not come in pieces"
    assert "".join(choice.delta.content for choice in spoken) == whole.choices[0].message.content
    tokens = [token for choice in choices for token in getattr(choice, "token_ids", None) or ()]  # not in the last one
    assert tokens == whole.choices[0].token_ids
    logprobs = [entry.logprob for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert logprobs == pytest.approx([entry.logprob for entry in whole.choices[0].logprobs.content], abs=1e-4)
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert choices[-1].finish_reason == "length"


def test_two_samples_of_a_video_request(server: Server, sample: Sample) -> None:
    """So cold that chance decides nothing; vLLM takes no greedy request for several samples."""
    video = mp4(scene_video(51, 18))
    answer = ask(server, video, n=2, temperature=1e-3, max_tokens=4)
    expected = oracle(sample, video, steps=4).tokens
    assert [choice.token_ids for choice in answer.choices] == [expected, expected]


def test_an_answer_of_one_token(server: Server, sample: Sample) -> None:
    """All of METok happens in prefill; such a request never decodes."""
    video = mp4(scene_video(52, 25))
    answer = ask(server, video, max_tokens=1)
    assert_same(oracle(sample, video, steps=1), result(answer), 1e-3)
    assert answer.usage.completion_tokens == 1


def test_another_question_never_gets_the_tokens_of_the_first(server: Server, sample: Sample) -> None:
    """Two questions about one video, one after the other and all at once, again and again."""
    video = mp4(scene_video(53, 24))
    expected = [oracle(sample, video, question=question) for question in QUESTIONS]
    first, second = (answer.logprobs[0] for answer in expected)
    assert not first.allclose(second, atol=1e-2), "the question makes no difference"  # type: ignore[union-attr]
    for answer, question in zip(expected, QUESTIONS, strict=True):
        assert_same(answer, result(ask(server, video, question=question)), 1e-3)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: ask(server, video, question=QUESTIONS[i % 2]), range(6)))
    for i, answer in enumerate(answers):
        assert_same(expected[i % 2], result(answer), 1e-3)


def turns(sample: Sample, messages: list[dict[str, Any]]) -> list[int]:
    """A conversation's prompt, one placeholder a video."""
    rendered = []
    for message in messages:
        parts = message["content"]
        if isinstance(parts, list):
            parts = [{"type": "video"} if part["type"] == "video_url" else part for part in parts]
        rendered.append({"role": message["role"], "content": parts})
    text = sample.processor.apply_chat_template(rendered, add_generation_prompt=True)
    return list(sample.processor.tokenizer(text).input_ids)


@pytest.mark.parametrize("metok", [None, "off"], ids=["pruned", "off"])
def test_a_second_turn_about_the_same_video(server: Server, sample: Sample, metok: Any) -> None:
    """The history grows and the question is another one:
    the video is compressed for that one, and the answer is right.
    """
    video = mp4(scene_video(54, 20))
    history = [user(QUESTIONS[0], data_url(video))]

    def expected(question: str) -> OracleResult:
        return oracle_on_prompt(sample, turns(sample, history), seen(video), metok, 24, question)

    first = chat(server, history, metok)
    assert_same(expected(QUESTIONS[0]), result(first), 1e-3)
    history.append({"role": "assistant", "content": "The white rabbit comes in last, after the bird."})
    history.append(user(QUESTIONS[1]))
    second = chat(server, history, metok)
    assert_same(expected(QUESTIONS[1]), result(second), 1e-3)
    again = chat(server, history, metok)
    assert_same(expected(QUESTIONS[1]), result(again), 1e-3)
    cached = again.usage.prompt_tokens_details.cached_tokens
    # Stock vLLM takes the second turn from the cache; a pruned prompt is computed anew, whatever the cache
    # holds.
    assert cached > again.usage.prompt_tokens // 2 if metok == "off" else cached == 0
    # Back to the first turn, after all that.
    del history[1:]
    assert_same(expected(QUESTIONS[0]), result(chat(server, history, metok)), 1e-3)


def test_sampling_and_a_grammar_over_http(server: Server) -> None:
    video = mp4(scene_video(91, 10))
    sampled = ask(server, video, temperature=0.8, top_p=0.9, max_tokens=4, seed=1, extra={"top_k": 20})
    assert len(sampled.choices[0].token_ids) == 4
    chosen = ask(
        server, video, max_tokens=24, extra={"ignore_eos": False, "structured_outputs": {"choice": ["rabbit", "bird"]}}
    )
    assert chosen.choices[0].message.content in ("rabbit", "bird")
