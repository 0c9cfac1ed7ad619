"""Text of layers below L1 that keep text alone: where each token goes, and what is held."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.worker.batch import PromptChunk, PrunedBatch
from metok_vllm.worker.requests import PrunedRequest
from metok_vllm.worker.text_moves import TextMoves, text_places
from tests.unit.worker.test_survivors import INSIDE, request

LAYERS = ("layer.0", "layer.2")
WIDTH = 6  # two heads of three


class Cache:
    """A layer's cache, by slot; stands in for the backend."""

    def __init__(self) -> None:
        self.key = torch.full((200, 2, 3), torch.nan)
        self.value = torch.full((200, 2, 3), torch.nan)

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, cache: Any, slots: torch.Tensor) -> None:
        self.key[slots] = key
        self.value[slots] = value


def layers() -> list[Any]:
    return [
        SimpleNamespace(layer_name=name, num_kv_heads=2, head_size=3, impl=Cache(), kv_cache=None) for name in LAYERS
    ]


@given(st.sampled_from(list(INSIDE)), st.sets(st.integers(1, 33), max_size=5), st.integers(0, 40))
def test_text_is_where_its_rank_says(inside: str, cuts: set[int], offset: int) -> None:
    """Beside another prompt and others' rows, in chunks of any sizes. Text before the video stays."""
    asked, other = request(0, INSIDE[inside]), request(0)
    text, first = asked.text().tolist(), asked.spans[0].start
    ends = sorted({cut for cut in cuts if cut < asked.prompt_len} | {asked.prompt_len})
    of_layers, computed = layers(), 0
    key, value = (torch.randn(len(LAYERS), asked.prompt_len, WIDTH) for _ in range(2))
    for end in ends:
        chunks = [PromptChunk(asked, 0, offset, end - computed, computed)]
        rows, slots = offset + end - computed, torch.empty(2, 0, dtype=torch.int64)
        if end == asked.prompt_len:
            # Before it another prompt that ends in the same step, in one chunk: its slots come first.
            chunks.insert(0, PromptChunk(other, 1, rows, other.prompt_len, 0))
            rows += other.prompt_len
            slots = torch.cat([torch.arange(100, 100 + other.text_tokens), torch.arange(len(text))])[None].repeat(2, 1)
        batch = PrunedBatch(chunks, rows, torch.empty(0), {}, dict(zip(LAYERS, (0, 1), strict=True)), slots, ())
        moves = TextMoves(batch)
        for i, layer in enumerate(of_layers):
            step = [torch.full((rows, WIDTH), 7.0) for _ in range(2)]
            for of_step, whole in zip(step, (key, value), strict=True):
                of_step[offset : offset + end - computed] = whole[i, computed:end]
            moves.move(layer, *step)
        computed = end
        assert set(asked.moving) == (set(LAYERS) if end < asked.prompt_len else set())
        assert asked.deferred_bytes <= 2 * len(LAYERS) * WIDTH * 4 * asked.prompt_len
    for i, layer in enumerate(of_layers):
        for found, whole in ((layer.impl.key, key), (layer.impl.value, value)):
            moved = found.flatten(1)
            assert torch.equal(moved[first : len(text)], whole[i, text[first:]])
            assert moved[:first].isnan().all()
            assert moved[len(text) : 100].isnan().all()
            assert (moved[100 + first : 100 + other.text_tokens] == 7).all()
            assert moved[100 + other.text_tokens :].isnan().all()


@pytest.mark.parametrize("inside", INSIDE)
def test_places_before_later_videos_are_encoded(inside: str) -> None:
    """A chunk that ends before the second video knows nothing of it."""
    asked = request(0, INSIDE[inside])
    whole = text_places(PromptChunk(asked, 0, 0, asked.prompt_len, 0))
    end = asked.spans[1].start
    unread: Any = PrunedRequest(**{**vars(asked), "tags": [asked.tags[0], None]})
    assert torch.equal(text_places(PromptChunk(unread, 0, 0, end - 2, 2)), whole[2:end])
    text = asked.text().tolist()
    nobody = asked.text_tokens - asked.spans[0].start
    expected = [text.index(p) - text.index(text[asked.spans[0].start]) if p in text else nobody for p in range(end)]
    assert whole[:end].tolist() == [nobody if place < 0 else place for place in expected]
