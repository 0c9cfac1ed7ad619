"""The trained model in the real engine: its answers depend on the video,
with METok as without, and are the oracle's.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

from metok_vllm.contract.profile import NAME, read_profile
from metok_vllm.demo.model_choice import TRAINED
from metok_vllm.frontend.fingerprint import fingerprint
from tests.support.harness import Case, Engine, engine
from tests.support.oracle import assert_same
from tests.support.oracle.samples import Sample
from training.draw import draw_video
from training.questions import questions
from training.seeds import seed_of
from training.video_file import through_codec
from training.world import make_video

VIDEOS = 8
KINDS = ("what", "colour", "where", "scene", "letter", "open")


@pytest.fixture(scope="module")
def sample() -> Sample:
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        TRAINED, attn_implementation="eager", dtype="float32"
    )
    return Sample(TRAINED, model.eval(), AutoProcessor.from_pretrained(TRAINED))


@pytest.fixture(scope="module")
def running(sample: Sample) -> Iterator[Engine]:
    """Under the method's own settings, whatever lies in the model's folder."""
    with engine(sample, {"profile": "none"}, max_num_batched_tokens=4096) as started:
        yield started


def asked(metok: Any) -> list[tuple[Case, str, str]]:
    """(request, kind, right answer) about videos that no training has seen and no figure is taken from."""
    found = []
    for index in range(VIDEOS):
        video = make_video(seed_of("demo", 100 + index))
        frames = through_codec(draw_video(video), 23)
        drawn = questions(video, 3, random.Random(index), KINDS)
        found += [(Case((frames,), q.prompt, metok=metok, max_tokens=40), q.kind, q.answer) for q in drawn]
    return found


def right(running: Engine, metok: Any) -> tuple[float, list[Any]]:
    rows = asked(metok)
    ids = [running.add(case, ignore_eos=False) for case, _, _ in rows]
    outputs: dict[str, Any] = {}
    while running.llm.llm_engine.has_unfinished_requests():
        outputs |= running.step()
    texts = [outputs[i].outputs[0].text.strip() for i in ids]
    running.check_drained()
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for (_, kind, answer), text in zip(rows, texts, strict=True):
        by_kind[kind].append(text == answer)
    assert set(by_kind) == set(KINDS), "a kind is missing: take more videos"
    hits = [hit for row in by_kind.values() for hit in row]
    return sum(hits) / len(hits), texts


def test_it_watches_the_video(running: Engine) -> None:
    stock, _ = right(running, "off")
    balanced, _ = right(running, {"preset": "balanced"})
    assert stock >= 0.8
    assert balanced >= 0.7


def test_without_the_video_it_cannot_know(running: Engine) -> None:
    """The same questions about another video: the answers change, so they are not in the questions."""
    rows = asked("off")
    videos = [case.videos for case, _, _ in rows]
    other = videos[len(videos) // 2 :] + videos[: len(videos) // 2]
    cases = [Case(v, case.question, metok="off", max_tokens=40) for v, (case, _, _) in zip(other, rows, strict=True)]
    ids = [running.add(case, ignore_eos=False) for case in cases]
    outputs: dict[str, Any] = {}
    while running.llm.llm_engine.has_unfinished_requests():
        outputs |= running.step()
    hits = [outputs[i].outputs[0].text.strip() == answer for i, (_, _, answer) in zip(ids, rows, strict=True)]
    assert sum(hits) / len(hits) < 0.5


@pytest.mark.parametrize(("retention", "quota"), [(0, "event"), (1, "video")], ids=["paper", "balanced"])
def test_it_answers_as_the_oracle(running: Engine, retention: int, quota: str) -> None:
    check(running, {"decode_retention": retention, "quota": quota})


def check(running: Engine, metok: dict[str, Any]) -> None:
    """With the aligner that needs no second tower; the paper's has its own test, `test_aligners.py`."""
    cases = [case for case, _, _ in asked({"aligner": "embedding", **metok})[::3]]
    compared = 0
    for case, answer in zip(cases, running.run(cases), strict=True):
        expected = running.oracle(case)
        # Frames of a scene in which nothing moves can be equal to the last bit: then either may come first.
        if expected.score_margin > 1e-5:
            assert_same(expected, answer, 2e-3)
            compared += 1
    assert compared >= len(cases) // 2


def test_the_profile_beside_it_keeps_its_answers(sample: Sample) -> None:
    """Nobody states it. `metok calibrate` has not seen these videos."""
    profile = read_profile(TRAINED / NAME)
    assert profile.mark == fingerprint(TRAINED)
    with engine(sample, max_num_batched_tokens=4096) as running:
        stock, answers = right(running, "off")
        found, under_it = right(running, None)
        check(running, {})
    same = [one == other for one, other in zip(answers, under_it, strict=True)]
    assert sum(same) >= 0.9 * len(same)
    assert found >= stock - 0.1
