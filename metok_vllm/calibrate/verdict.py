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


def judge(found: Seen, frames: Seen, frame_count: int, target: float, passes: bool) -> Verdict:
    """Compare the found setting with fewer frames, both on the held-out questions.

    Fewer frames win where they pass and agree at least as often: they save the tower's work too, and need no
    profile.

    Args:
        found: the setting.
        frames: as many tokens in fewer frames.
        frame_count: how many.
        target: share of the answers that must agree.
        passes: whether the setting reaches it on the search's questions and on these.
    """
    frames_win = frames.passes(target) and frames.agreement >= found.agreement
    low, high = interval(sum(found.agrees), len(found.agrees))
    kept = f"{100 * found.agreement:.1f} % of the unseen answers [{100 * low:.0f} to {100 * high:.0f}]"
    if not passes:
        also = f", and fewer frames ({frame_count}) keep {100 * frames.agreement:.1f} %" if frames.agrees else ""
        where = ", but not of those of the search" if found.passes(target) else ""
        return Verdict(
            False,
            False,
            f"No setting keeps the answers: the best keeps {kept}{where}, where {100 * target:g} % are wanted, each with a "
            f"harm of at most {KL_LIMIT:g} nats a token (the largest is {found.worst:.2f}){also}. Leave METok off for this "
            "model, or state a lower --target.",
        )
    if frames_win:
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
