"""The requests that METok refuses: counts by reason, and the sentences that more than one process says.

The front end refuses most of them, in the process that serves HTTP. There may be several such processes: a
Prometheus counter is what vLLM itself counts with there, and with several processes prometheus_client adds
them up. The counter is made on first use and in a registry of its own, so that a server without METok has
none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter

from metok_vllm.contract.advice import compress_alone
from metok_vllm.contract.request_ids import printable

Reason = Literal[
    "setting", "embeddings", "features", "no_text", "deferral", "prompt_logprobs", "session", "video", "busy", "uuid"
]
"""Why: a setting of the request is wrong or cannot be met; its video came as embeddings; its items were made
elsewhere, or do not fit the prompt; no text follows the last video; the prompt could never be deferred; it
asks for log-probabilities of a pruned prompt; its input goes on streaming; the video itself is broken or too
large; there is no room for it now (`metok_vllm/media`);
it is named by a `uuid` alone and is not there."""

REASONS: tuple[Reason, ...] = get_args(Reason)
REFUSED_BY_SCHEDULER: tuple[Reason, ...] = ("features", "prompt_logprobs", "session")
REFUSED = "metok_refused_requests"
REFUSED_HELP = "Requests that METok refused, by reason."

FOREIGN_FEATURES = (
    "this server makes the features of images and videos itself; send the images and videos, in messages or in "
    "content_parts, in the place of features."
)
NO_SESSIONS = "a session whose input goes on streaming cannot hold a pruned video."

FRONT_END = CollectorRegistry()
"""Holds the counter of this process; `serve/metrics.py` reads it."""


def no_prompt_logprobs() -> str:
    """The sentence for a request that asks for them of a pruned prompt."""
    instead = compress_alone(otherwise="leave them out")
    return (
        "prompt_logprobs do not exist for a prompt whose video is pruned, since its tokens do not reach the last "
        f"layer; {instead}."
    )


@cache
def refused_counter() -> Counter:
    """This process's counter, with every reason at 0 to begin with."""
    counter = Counter(REFUSED, REFUSED_HELP, ["reason"], registry=FRONT_END)
    for reason in REASONS:
        counter.labels(reason)
    return counter


def count_refused(reason: Reason) -> None:
    """Count one request that the front end refuses."""
    refused_counter().labels(reason).inc()


def refusal(reason: Reason, sentence: str) -> ValueError:
    """The error to raise for a refused request, which vLLM answers with HTTP 400; counts it."""
    count_refused(reason)
    return ValueError(printable(sentence))


@contextmanager
def refusing(reason: Reason) -> Iterator[None]:
    """Count a `ValueError` that leaves the block as a refused request.

    Its sentence may quote the client. It leaves fit for an answer and for one line of a log.
    """
    try:
        yield
    except ValueError as error:
        count_refused(reason)
        if str(error).isprintable():
            raise
        raise ValueError(printable(str(error))) from None
