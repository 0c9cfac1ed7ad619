"""Stage 1 of a whole video, against what transformers computes for the same frames."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.support.oracle import OracleSettings, stage1
from tests.support.oracle.samples import Sample, scene_video


@pytest.mark.parametrize("frames", [1, 3, 12, 30])
@pytest.mark.parametrize("aligner", ["embedding", "none"])
def test_stage_one_of_a_whole_video(sample: Callable[..., Sample], frames, aligner):
    """Rows of frames at stride 2 are transformers' own; a newline follows each event; the rest is counted."""
    tiny = sample(seed=1)
    settings = OracleSettings(aligner=aligner, key_events=2, key_frames=3)
    pixels = tiny.pixels(scene_video(5, frames))
    with torch.no_grad():
        result = stage1.encode(tiny.model, pixels, tiny.question_ids(), settings, None)
        plain = tiny.model.model.get_video_features(pixels[None]).pooler_output[0]
    newline, plain = plain[-1], plain[:-1].reshape(frames, 16, -1)

    assert [f for a, b in result.events for f in range(a, b)] == list(range(frames))
    assert len(result.events) == min(5, frames)
    position = 0
    for number, (first, last) in enumerate(result.events):
        start = position
        for frame in range(first, last):
            tokens = math.ceil(7 / result.strides[frame]) ** 2
            if tokens == 16:
                rows = result.embeddings[position : position + 16]
                torch.testing.assert_close(rows, plain[frame], rtol=0, atol=1e-6)
            position += tokens
        assert torch.equal(result.embeddings[position], newline)
        position += 1
        assert result.event_of_token[start:position] == [number] * (position - start)
    assert position == len(result.embeddings) == len(result.event_of_token)
    assert 2 in result.strides

    cuts = [result.similarities[start - 1] for start, _ in result.events[1:]]
    inside = [s for i, s in enumerate(result.similarities) if i + 1 not in {a for a, _ in result.events}]
    assert not cuts or not inside or max(cuts) <= min(inside)
    best = [max(result.relevance[a:b]) if aligner == "embedding" else b - a for a, b in result.events]
    others = [score for number, score in enumerate(best) if number not in result.key_events]
    assert len(result.key_events) == min(2, frames)
    assert not others or min(best[number] for number in result.key_events) >= max(others)


def test_relevance_of_a_whole_video(sample: Callable[..., Sample]):
    """The mean projected patch against the mean embedding of the question's words."""
    tiny = sample(seed=1)
    pixels = tiny.pixels(scene_video(5, 6))
    with torch.no_grad():
        result = stage1.encode(tiny.model, pixels, tiny.question_ids(), OracleSettings(), None)
        states = tiny.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        frames = tiny.model.model.multi_modal_projector(states).mean(1)
        question = tiny.model.get_input_embeddings()(torch.tensor(tiny.question_ids())).mean(0)
        expected = torch.nn.functional.cosine_similarity(frames, question[None])
        neighbours = torch.nn.functional.cosine_similarity(frames[:-1], frames[1:])
    torch.testing.assert_close(torch.tensor(result.relevance), expected)
    torch.testing.assert_close(torch.tensor(result.similarities), neighbours)
