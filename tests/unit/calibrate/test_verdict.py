"""What is recommended, and that it is true."""

from __future__ import annotations

from metok_vllm.calibrate import verdict as verdicts
from metok_vllm.calibrate.search import Seen
from metok_vllm.calibrate.verdict import Verdict


def seen(agreeing: int, harm: float = 0.0) -> Seen:
    agrees = tuple(i < agreeing for i in range(32))
    return Seen((harm,) * 32, (harm,) * 32, agrees, 10.0, 10.0)


def judge(found: Seen, frames: Seen, frame_count: int, target: float) -> Verdict:
    """Of a setting that passed the search."""
    return verdicts.judge(found, frames, frame_count, target, found.passes(target))


def test_a_setting_that_keeps_the_answers_where_frames_do_not() -> None:
    verdict = judge(seen(32), seen(20), 9, 0.99)
    assert (verdict.passes, verdict.beats_frames) == (True, True)
    assert verdict.sentence == (
        "Use the profile: it keeps 100.0 % of the unseen answers [89 to 100]; 9 frames, which cost as much, keep 62.5 %."
    )


def test_fewer_frames_that_do_as_well_are_recommended() -> None:
    verdict = judge(seen(32), seen(32), 9, 0.99)
    assert (verdict.passes, verdict.beats_frames) == (True, False)
    assert verdict.sentence.startswith("METok does not beat fewer frames here: 9 frames cost as much")
    assert not judge(seen(30), seen(31), 9, 0.9).beats_frames


def test_frames_that_agree_as_often_but_move_an_answer_too_far_do_not_win() -> None:
    assert judge(seen(32, 0.1), seen(32, 0.5), 9, 0.99).beats_frames
    assert not judge(seen(32, 0.1), seen(32, 0.2), 9, 0.99).beats_frames


def test_frames_that_do_not_pass_do_not_win() -> None:
    """All answers agree, and every fourth of them by a hair."""
    frames = Seen((5.0,) * 32, (0.0,) * 24 + (5.0,) * 8, (True,) * 32, 10.0, 10.0)
    assert judge(seen(31), frames, 9, 0.96).beats_frames


def test_what_failed_on_the_search_does_not_pass() -> None:
    verdict = verdicts.judge(seen(32), seen(20), 9, 0.99, False)
    assert not verdict.passes
    assert (
        "the best keeps 100.0 % of the unseen answers [89 to 100], but not of those of the search," in verdict.sentence
    )


def test_what_does_not_reach_the_target_is_not_recommended() -> None:
    for found in (seen(31), seen(32, 0.3)):
        verdict = judge(found, seen(10), 9, 0.99)
        assert (verdict.passes, verdict.beats_frames) == (False, False)
        assert verdict.sentence.startswith("No setting keeps the answers: the best keeps ")
    assert judge(seen(31), seen(10), 9, 0.96).passes
