"""What is recommended, and that it is true."""

from __future__ import annotations

from metok_vllm.calibrate.search import Seen
from metok_vllm.calibrate.verdict import judge


def seen(agreeing: int, harm: float = 0.0) -> Seen:
    agrees = tuple(i < agreeing for i in range(32))
    return Seen((harm,) * 32, (harm,) * 32, agrees, 10.0, 10.0)


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


def test_what_does_not_reach_the_target_is_not_recommended() -> None:
    for found in (seen(31), seen(32, 0.3)):
        verdict = judge(found, seen(10), 9, 0.99)
        assert (verdict.passes, verdict.beats_frames) == (False, False)
        assert verdict.sentence.startswith("No setting keeps the answers: the best keeps ")
    assert judge(seen(31), seen(10), 9, 0.96).passes
