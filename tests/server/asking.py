"""Chat requests to the live server, and what the oracle says to the same."""

from __future__ import annotations

from typing import Any

from tests.oracle import OracleResult, OracleSettings
from tests.oracle import run as run_oracle
from tests.oracle.samples import Sample
from tests.server.clips import data_url, seen
from tests.server.live import Server

QUESTION = "What happens after the band leaves the stage, and who is there?"
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--block-size", "32")


def ask(server: Server, video: bytes | None, metok: Any = None, question: str = QUESTION, **options: Any) -> Any:
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if video is not None:
        content.insert(0, {"type": "video_url", "video_url": {"url": data_url(video)}})
    extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
    if metok is not None:
        extra["mm_processor_kwargs"] = {"metok": metok}
    return server.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        logprobs=True,
        extra_body=extra | options.pop("extra", {}),
        **{"max_tokens": 24, **options},
    )


def oracle(sample: Sample, video: bytes | None, metok: Any = None, steps: int = 24) -> OracleResult:
    settings = OracleSettings(decode_retention=0.5)
    if metok == "off":
        settings = OracleSettings(off=True)
    elif metok:
        settings = OracleSettings(**{"decode_retention": 0.5, **{k: v for k, v in metok.items() if k != "report"}})
    videos = [] if video is None else [sample.pixels(seen(video))]
    return run_oracle(
        sample.model, sample.prompt_ids(QUESTION, videos=len(videos)), videos, None, sample.question_ids(QUESTION),
        settings, steps,
    )  # fmt: skip


def result(answer: Any) -> OracleResult:
    choice = answer.choices[0]
    logprobs = [{token: entry.logprob} for token, entry in zip(choice.token_ids, choice.logprobs.content, strict=True)]
    return OracleResult(list(answer.prompt_token_ids), list(choice.token_ids), logprobs)
