"""What is wrong with the outcome of a case; nothing, if the decoder holds."""

from __future__ import annotations

import re
from collections.abc import Callable

from metok_vllm.media.settings import VideoSettings

from .cases import Case
from .runner import Outcome

SETTINGS = VideoSettings(num_frames=8, timeout_s=2.0, max_output_mib=256, max_frames=64)
"""How cases are decoded."""
MOST_MIB = 1024
"""Memory that the process of one decode may hold at its peak."""
CRASHED = "makes its decoder crash"
"""What the pool says of a child that died or failed: held, but libav's fault or ours, and worth knowing."""
Decode = Callable[[bytes], Outcome]


def sentence_fault(text: str) -> str | None:
    """Why `text` is not one sentence for a user, free of libav's own wording."""
    if not re.fullmatch(r"[A-Z0-9][^\n]*\.", text) or ". " in text:
        return "not one sentence"
    if re.search(r"Errno|avcodec|avformat|0x|Traceback|<none>", text):
        return "libav's wording"
    return "too long a sentence" if len(text) >= 250 else None


def fault(outcome: Outcome, settings: VideoSettings = SETTINGS) -> str | None:
    """What is wrong with one outcome, or None."""
    if outcome.kind == "broken":
        return f"broken: {outcome.said}"
    if CRASHED in outcome.said:
        return f"crash: {outcome.said}"
    if outcome.seconds > settings.timeout_s + 1:
        return f"slow: {outcome.seconds:.1f} s"
    if outcome.peak_mib > MOST_MIB:
        return f"memory: {outcome.peak_mib:.0f} MiB"
    wrong = sentence_fault(outcome.said) if outcome.kind == "refused" else None
    return f"{wrong}: {outcome.said}" if wrong else None


TRIES = 3
"""Decodes that must all be slow before one is called so: a busy machine stops every process now and then."""


def verdict(case: Case, decode: Decode, settings: VideoSettings = SETTINGS) -> tuple[Outcome, str | None]:
    """The first outcome of `case`, decoded twice, and what is wrong with it or with the second."""
    data = case.data()
    first, wrong = _outcome(data, decode, settings)
    if wrong is not None:
        return first, wrong
    second, wrong = _outcome(data, decode, settings)
    # The time limit strikes where it strikes: near it, two runs may differ.
    near = settings.timeout_s / 2
    if wrong is None and first.said != second.said and max(first.seconds, second.seconds) < near:
        wrong = f"differs: {first.said!r}, then {second.said!r}"
    return first, wrong


def _outcome(data: bytes, decode: Decode, settings: VideoSettings) -> tuple[Outcome, str | None]:
    """One outcome and what is wrong with it, slow alone only if it is slow each time."""
    for _ in range(TRIES):
        outcome = decode(data)
        wrong = fault(outcome, settings)
        if wrong is None or not wrong.startswith("slow"):
            break
    return outcome, wrong
