"""Chat requests to the live server, and what the oracle says to the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from metok_vllm.serve.figures import KEPT_SECONDS
from tests.support.oracle import OracleResult, OracleSettings
from tests.support.oracle import run as run_oracle
from tests.support.oracle.samples import Sample
from tests.support.server.clips import data_url, seen
from tests.support.server.live import Server

T = TypeVar("T")
QUESTION = "What happens after the band leaves the stage, and who is there?"
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--block-size", "32")


def ask(server: Server, video: bytes | None, metok: Any = None, question: str = QUESTION, **options: Any) -> Any:
    return chat(server, [user(question, None if video is None else data_url(video))], metok, **options)


def user(text: str, video: str | None = None) -> dict[str, Any]:
    """A user's turn, about the video at a URL if there is one."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if video is not None:
        content.insert(0, {"type": "video_url", "video_url": {"url": video}})
    return {"role": "user", "content": content}


def chat(server: Server, messages: list[dict[str, Any]], metok: Any = None, **options: Any) -> Any:
    """Send a conversation through the `openai` client, greedily and with token ids and log-probabilities."""
    extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
    if metok is not None:
        extra["mm_processor_kwargs"] = {"metok": metok}
    return server.client().chat.completions.create(
        model="tiny",
        messages=messages,
        extra_body=extra | options.pop("extra", {}),
        **{"max_tokens": 24, "temperature": 0, "logprobs": True, **options},
    )


def oracle(
    sample: Sample, video: bytes | None, metok: Any = None, steps: int = 24, question: str = QUESTION
) -> OracleResult:
    return oracle_on_frames(sample, None if video is None else seen(video), metok, steps, question)


def oracle_on_frames(
    sample: Sample, frames: NDArray[np.uint8] | None, metok: Any = None, steps: int = 24, question: str = QUESTION
) -> OracleResult:
    """The oracle's answer to a question about frames uint8 [T, H, W, 3], or about nothing."""
    ids = sample.prompt_ids(question, videos=0 if frames is None else 1)
    return oracle_on_prompt(sample, ids, frames, metok, steps, question)


def oracle_on_prompt(
    sample: Sample, ids: list[int], frames: NDArray[np.uint8] | None, metok: Any, steps: int, question: str
) -> OracleResult:
    """The oracle's answer to a prompt with one placeholder a video."""
    settings = OracleSettings(decode_retention=0.5)
    if metok == "off":
        settings = OracleSettings(off=True)
    elif metok:
        settings = OracleSettings(**{"decode_retention": 0.5, **{k: v for k, v in metok.items() if k != "report"}})
    videos = [] if frames is None else [sample.pixels(frames)]
    return decided(run_oracle(sample.model, ids, videos, None, sample.question_ids(question), settings, steps))


def decided(expected: OracleResult) -> OracleResult:
    """The same, if float32 can tell its decisions apart: else a comparison is a coin toss, not a test."""
    assert min(expected.cosine_margin, expected.score_margin) > 1e-5, "choose another seed for the video"
    return expected


def result(answer: Any) -> OracleResult:
    """What the engine says, for the oracle.

    Where alternatives were asked for, every token must be the engine's own best.
    """
    choice = answer.choices[0]
    for step, entry in enumerate(choice.logprobs.content):
        best = max((each.logprob for each in entry.top_logprobs), default=entry.logprob)
        assert entry.logprob >= best, (
            f"step {step} gave {entry.token!r} at {entry.logprob:.4f}, not the engine's best at {best:.4f}: sampled, not greedy"
        )
    logprobs = [{token: entry.logprob} for token, entry in zip(choice.token_ids, choice.logprobs.content, strict=True)]
    return OracleResult(list(answer.prompt_token_ids), list(choice.token_ids), logprobs)


def assert_drained(server: Server) -> None:
    """The server answers, its workers hold nothing of any video, and every KV block is free."""
    assert server.get("/health")[0] == 200
    ask(server, None, question="One more, so that the workers hear of what has finished.", max_tokens=1)
    for worker in json.loads(server.get("/v1/metok/state")[1])["workers"]:
        assert (worker["pruned_requests"], worker["deferred_bytes"]) == (0, 0)
    usage = [line for line in server.get("/metrics")[1].decode().splitlines() if "kv_cache_usage_perc{" in line]
    assert usage
    assert all(float(line.split()[-1]) == 0 for line in usage)


def measured_after_now(read: Callable[[], tuple[T, float]]) -> T:
    """What `read` gives once it was measured after this call began;
    `read` returns a value and its age in seconds.

    A busy engine answers between two of its steps, and who asks meanwhile rightly gets the figures before.
    """
    begun = time.monotonic()
    while True:
        time.sleep(KEPT_SECONDS + 0.1)
        waited = time.monotonic() - begun
        value, age = read()
        if age < waited:
            return value
        assert waited < 120, f"the engine's figures have not changed for {age:.0f} s"
