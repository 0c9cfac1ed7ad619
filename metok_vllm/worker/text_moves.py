"""Text of released layers: below L1, but outside the window `kv_layers`, so that decoding reads text alone.

Such a layer runs on every token of a prompt, through the paged cache, so in prefill all of them own a slot.
When its attention has run for the last chunk, the text is written once more, without gaps, and what lies
behind it is the scheduler's to give back (`DeepKVManager.release`). It is written from the keys and values
that the layer has computed, by the backend's own cache update, since how a cache lies in memory is the
backend's business. So they are kept until then, chunk by chunk. Text before the first video stays where it
is.
"""

from __future__ import annotations

import torch

from metok_vllm.worker.attention import MetokAttention
from metok_vllm.worker.batch import PromptChunk, PrunedBatch
from metok_vllm.worker.kv_writes import update_cache
from metok_vllm.worker.requests import visual_positions


class TextMoves:
    """Of one pruned step: keeps the text of its chunks, and writes that of the prompts that are complete."""

    def __init__(self, batch: PrunedBatch) -> None:
        self.batch = batch
        self._places: list[torch.Tensor] = []  # of each chunk, the same in every layer

    def move(self, layer: MetokAttention, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take one layer's text, when its attention has run.

        Args:
            layer: a released one.
            key: [tokens of the step, Hkv * d].
            value: [tokens of the step, Hkv * d].
        """
        self._places = self._places or [text_places(chunk) for chunk in self.batch.chunks]
        slots = self.batch.text_slots[self.batch.group_rows[layer.layer_name]]
        key, value = (t.view(-1, layer.num_kv_heads, layer.head_size) for t in (key, value))
        start = 0  # of the prompt's slots among those of all complete prompts
        for chunk, places in zip(self.batch.chunks, self._places, strict=True):
            request = chunk.request
            before, text = request.spans[0].start, request.text_tokens
            kept = request.moving.pop(layer.layer_name, None)
            if kept is None:  # one more, for what is no such text
                kept = key.new_empty(2, text - before + 1, *key.shape[1:])
            for of_layer, rows in zip(kept, (key, value), strict=True):
                of_layer.index_copy_(0, places, rows[chunk.rows])
            if chunk.completes:
                own = slots[start + before : start + text]
                update_cache(layer, kept[0, :-1], kept[1, :-1], own)
                start += text
            else:
                request.moving[layer.layer_name] = kept


def text_places(chunk: PromptChunk) -> torch.Tensor:
    """Where each token of a chunk stands among the prompt's text behind its first video's start.

    int64 [tokens]. What is no such text gets the place behind the last one. Nothing waits for the device.
    """
    request = chunk.request
    before, end = request.spans[0].start, chunk.computed + chunk.length
    every = torch.arange(request.prompt_len, device=request.outside.device)
    is_text = every >= before
    for span, tags in zip(request.spans, request.tags, strict=True):
        if span.start < end:  # those further on are not encoded yet, and move nothing before them
            is_text.index_fill_(0, visual_positions(span, tags, every), False)
    places = torch.where(is_text, is_text.cumsum(0) - 1, request.text_tokens - before)
    return places[chunk.computed : end]
