"""What is recommended, in a sentence that is true."""

from __future__ import annotations

from dataclasses import dataclass

from metok_vllm.calibrate.measure import interval
from metok_vllm.calibrate.search import Seen
from metok_vllm.contract.forced import KL_LIMIT


@dataclass(frozen=True)
class Verdict:
    """What the held-out questions say."""

    passes: bool  # the found setting leaves the answers what they are
    beats_frames: bool  # and fewer frames at equal cost do not do as well
    sentence: str


def judge(found: Seen, frames: Seen, frame_count: int, target: float) -> Verdict:
    """Compare the found setting with fewer frames, both on the held-out questions.

    At equal agreement fewer frames win, unless they move some answer too far: they save the tower's work too,
    and need no profile.
    """
    passes = found.passes(target)
    better = frames.agreement > found.agreement
    as_good = frames.agreement == found.agreement and frames.worst <= max(found.worst, KL_LIMIT)
    low, high = interval(sum(found.agrees), len(found.agrees))
    kept = f"{100 * found.agreement:.1f} % of the unseen answers [{100 * low:.0f} to {100 * high:.0f}]"
    if not passes:
        also = f", and fewer frames ({frame_count}) keep {100 * frames.agreement:.1f} %" if frames.agrees else ""
        return Verdict(
            False,
            False,
            f"No setting keeps the answers: the best keeps {kept}, where {100 * target:g} % are wanted, each with a "
            f"harm of at most {KL_LIMIT:g} nats a token (the largest is {found.worst:.2f}){also}. Leave METok off for this "
            "model, or state a lower --target.",
        )
    if better or as_good:
        return Verdict(
            True,
            False,
            f"METok does not beat fewer frames here: {frame_count} frames cost as much and keep "
            f"{100 * frames.agreement:.1f} %, METok keeps {kept}. Use fewer frames: they save the tower's work too.",
        )
    return Verdict(
        True,
        True,
        f"Use the profile: it keeps {kept}; {frame_count} frames, which cost as much, keep "
        f"{100 * frames.agreement:.1f} %.",
    )
