"""The ids of requests: which one the client saw, and how one is stored, logged and shown.

A client chooses the id that it sees (the header `X-Request-Id`, a field of the body), of any length and with
any character. vLLM makes another of it for the engine.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from vllm import envs

LONGEST = 128
"""Characters of an id, or of another word of a client's, as METok stores, logs and shows it."""

SHADOW = "metok-shadow-"
"""Begins the engine's id of a request that METok makes itself, to compare an answer."""

_DIGEST = 12  # hexadecimal digits that tell shortened words apart
_CHILD = re.compile(r"^\d+_")
_RANDOM = re.compile(r"-[0-9a-f]{8}\Z")


def client_id(engine_id: str) -> str:
    """The id that the client saw, of the one that the engine has.

    vLLM 0.32 and 0.33 append eight random digits (vllm/v1/engine/input_processor.py, `assign_request_id`),
    and put `0_`, `1_`, ... before the samples of a request with `n` above 1 (`get_child_info` in
    vllm/v1/engine/parallel_sampling.py). The id that the client saw does not reach the worker. The HTTP
    server's ids begin with a word (`chatcmpl-`), so a number before them is a sample's.
    """
    own = _CHILD.sub("", engine_id)
    # A wish of the operator's, which a later vLLM will not know.
    return own if getattr(envs, "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", False) else _RANDOM.sub("", own)


def is_shadow(engine_id: str, params: Any) -> bool:
    """Whether METok has made this request itself: it is told its answer.

    A client can choose such an id on some routes, but nobody is told an answer there.

    Args:
        engine_id: the engine's.
        params: its `SamplingParams`, or what stands in their place.
    """
    return engine_id.startswith(SHADOW) and bool(getattr(params, "trace_decode_token_ids", None))


def is_first_sample(engine_id: str) -> bool:
    """Whether a request of the engine is the first sample, or the only one, of what the client asked for."""
    child = _CHILD.match(engine_id)
    return child is None or child.group() == "0_"


def key(request_id: str) -> str:
    """What an id of any length is stored and found by: equal for equal ids alone."""
    return hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).hexdigest()


def shown(request_id: str) -> str:
    """An id as it is logged and shown: on one line, at most `LONGEST` characters, and fit for UTF-8.

    What is cut off is stood for by a digest, so that two ids do not look the same.
    """
    text = printable(request_id[: LONGEST + 1])
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - _DIGEST - 3]}...{key(request_id)[:_DIGEST]}"


def printable(text: str) -> str:
    """A client's text with every character that could forge a line, hide, or not be encoded written out:
    `\\n`, `\\u202e`, `\\ud800`.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _written_out(c) for c in text)


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
