"""The pruned step: one forward pass in which at least one pruned prompt is in prefill.

Shallow layers run on all tokens of the batch, as in stock vLLM. From L1 on the layers run on
``[other requests' tokens | survivors of each prompt that is complete with this step]``:

- the others attend through the paged cache, with metadata built for them alone;
- each prompt attends densely over its own fresh queries, keys and values, and only its tokens with a slot are
  written to the cache.

Prompts that are not complete with this step leave their state at L1 and go no further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import async_tensor_h2d

from metok_vllm.worker import ops
from metok_vllm.worker.attention import MetokAttention
from metok_vllm.worker.batch import DecoderStack, PromptChunk, PrunedBatch
from metok_vllm.worker.kv_writes import KVWrites
from metok_vllm.worker.pruning_scores import prompt_scores, survivor_scores
from metok_vllm.worker.requests import ChunkState
from metok_vllm.worker.survivors import Survivors, prune_l2, prune_l3, survivors_of_l1
from metok_vllm.worker.text_moves import TextMoves

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Hidden state and residual, [rows, hidden] each, and rotary positions, int64 [rows] or [axes, rows]."""


class PrunedStep:
    """One forward pass with pruning.

    Made anew for each step; the attention layers call `capture`, `attend` and `move_text`.
    """

    def __init__(self, stack: DecoderStack, batch: PrunedBatch) -> None:
        self.stack = stack
        self.batch = batch
        self.survivors: list[Survivors] = []
        # What goes from layer to layer. Nobody else may hold it: `memory.py` counts it once.
        self._rows: list[torch.Tensor] = []  # as `Rows`
        self._captured: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._writes = KVWrites(batch)
        self._moves: TextMoves | None = None  # made by the first released layer
        self._retains = False  # whether some of the next layers' visual tokens will be retained by L2
        self._starts = batch.others  # int32 [prompts + 1], where each prompt's rows start behind the others'

    # --- the forward pass ---

    def run(
        self, positions: torch.Tensor, inputs_embeds: torch.Tensor, deepstack: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        """Run the decoder layers.

        Args:
            positions: rotary positions, int64 [tokens, possibly padded], or [axes, tokens].
            inputs_embeds: [tokens, possibly padded, hidden].
            deepstack: what is added behind each of the first layers, all of them below L1: [tokens, possibly
                padded, hidden] each, zero for rows without any.

        Returns:
            [tokens, hidden], normed. Rows of other requests and the last row of each complete prompt hold
            what stock vLLM would compute on the survivors; every other row is zero and must not be read.
        """
        context: Any = get_forward_context()
        context.slot_mapping = {**context.slot_mapping, **self.batch.others_slots}
        # It marks rows of the padded batch. Experts would take it for marks of the rows that they get here.
        context.is_padding = None
        with self.stack.running.set_to(self), self.stack.eager.running():
            positions, hidden = positions[..., : self.batch.num_tokens], inputs_embeds[: self.batch.num_tokens]
            hidden, residual = self._shallow(positions, hidden, deepstack)
            self._defer(positions, hidden, residual)
            complete = [chunk for chunk in self.batch.chunks if chunk.completes]
            if not complete and not self.batch.num_others:
                return torch.zeros_like(hidden)
            self._rows += self._at_l1(complete, positions, hidden, residual)
            self._captured.clear()
            del hidden, residual
            return self._scatter(self._deep())

    def _shallow(
        self, positions: torch.Tensor, hidden: torch.Tensor, deepstack: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual: Any = None
        assert len(deepstack) <= self.stack.prune_layers[0], "the start refuses such pruning layers"
        with self.stack.times.part("shallow"):
            for index in range(self.stack.prune_layers[0]):
                hidden, residual = self.stack.decoder.call(index, positions, hidden, residual)
                if index < len(deepstack):
                    # Chunk by chunk, as the tokens are; what a deferred prompt keeps at L1 has it already.
                    hidden = hidden + deepstack[index][: self.batch.num_tokens]
        return hidden, residual

    def _deep(self) -> torch.Tensor:
        """Layers from L1 up on the rows that `_at_l1` has gathered; [rows that are left, hidden], normed."""
        first, second, third = self.stack.prune_layers
        self._layers(first, second)
        self._gather(self._at_l2)
        self._captured.clear()
        self._layers(second, third)
        self._gather(self._at_l3)
        self._captured.clear()
        self._layers(third, len(self.stack.layers))
        hidden, residual, _ = self._rows
        self._rows.clear()
        normed: torch.Tensor = self.stack.decoder.norm(hidden, residual)[0]
        return normed

    def _layers(self, start: int, end: int) -> None:
        hidden, residual, positions = self._rows
        self._rows.clear()
        with self.stack.times.part("deep"):
            for index in range(start, end):
                hidden, residual = self.stack.decoder.call(index, positions, hidden, residual)
        self._rows += hidden, residual, positions

    def _scatter(self, hidden: torch.Tensor) -> torch.Tensor:
        out = hidden.new_zeros(self.batch.num_tokens, hidden.shape[-1])
        out[self.batch.others] = hidden[: self.batch.num_others]
        end = self.batch.num_others
        for survivors in self.survivors:
            end += survivors.size
            chunk = survivors.chunk
            out[chunk.start + chunk.length - 1] = hidden[end - 1]
        return out

    # --- chunks ---

    def _state(
        self, chunk: PromptChunk, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> ChunkState:
        query, key = self._captured[self.stack.scoring_layers[0]]
        scoring = chunk.request.scoring_within(chunk.computed, chunk.length) + (chunk.start - chunk.computed)
        rows = chunk.rows
        return ChunkState(hidden[rows], residual[rows], query[scoring], key[rows], positions[..., rows])

    def _defer(self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor) -> None:
        for chunk in self.batch.chunks:
            if chunk.completes:
                continue
            state = self._state(chunk, positions, hidden, residual)
            # Slices would keep the whole step's tensors alive. vLLM writes the next step's positions in their
            # place.
            slices = {name: getattr(state, name).clone() for name in ("hidden", "residual", "key", "positions")}
            chunk.request.chunks.append(replace(state, **slices))

    def _whole_state(
        self, chunk: PromptChunk, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> ChunkState:
        """State of the whole prompt at L1: what earlier chunks left, and this one."""
        last = self._state(chunk, positions, hidden, residual)
        if not chunk.request.chunks:
            return last
        states = [*chunk.request.chunks, last]
        chunk.request.chunks = []
        own = torch.cat([state.positions for state in states], dim=-1)
        tensors = [[getattr(state, name) for state in states] for name in ("hidden", "residual", "query", "key")]
        # One after the other, and the pieces of each are freed before the next is joined.
        del states, last
        hidden, residual, query, key = (torch.cat(tensors.pop(0)) for _ in range(4))
        return ChunkState(hidden, residual, query, key, own)

    # --- pruning ---

    def _at_l1(
        self, complete: Sequence[PromptChunk], positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> Rows:
        """Prune at L1 and gather the rows that go on: the others', then each prompt's survivors."""
        with self.stack.times.part("scoring"):
            was_deferred = any(chunk.request.chunks for chunk in complete)
            states = [self._whole_state(chunk, positions, hidden, residual) for chunk in complete]
            scores = prompt_scores(self.stack.attention(self.stack.scoring_layers[0]), complete, states)
            self.survivors = survivors_of_l1(complete, scores, self.batch.keeps_survivors)
            self._retains = any(survivors.retained for survivors in self.survivors)
            if self.survivors:
                self._rows_changed()
                self._writes.rows_are(self.survivors)
            if not was_deferred:
                index = torch.cat([self.batch.others, *(s.positions + s.chunk.start for s in self.survivors)])
                return ops.gather(index, hidden, residual, positions)
            return self._gather_states(states, positions, hidden, residual)

    def _gather_states(
        self, states: Sequence[ChunkState], positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> Rows:
        """The rows that go on: the others' of the batch, the survivors' of each state."""
        parts = [(self.batch.others, hidden, residual)]
        parts += [(s.positions, state.hidden, state.residual) for s, state in zip(self.survivors, states, strict=True)]
        rows, start = sum(index.shape[0] for index, _, _ in parts), 0
        all_hidden, all_residual = (t.new_empty(rows, t.shape[1]) for t in (hidden, residual))
        for index, of_hidden, of_residual in parts:
            here = slice(start, start + index.shape[0])
            torch.index_select(of_hidden, 0, index, out=all_hidden[here])
            torch.index_select(of_residual, 0, index, out=all_residual[here])
            start = here.stop
        own = [state.positions[..., s.positions] for s, state in zip(self.survivors, states, strict=True)]
        return all_hidden, all_residual, torch.cat([positions[..., self.batch.others], *own], dim=-1)

    def _at_l2(self) -> list[torch.Tensor]:
        """Prune at L2. Returns for each prompt the rows that go on, int64, among those it had."""
        sizes = [survivors.size for survivors in self.survivors]
        layer = self.stack.scoring_layers[1]
        query, key = self._captured.pop(layer)
        scores = survivor_scores(self.stack.attention(layer), self.survivors, self.batch.num_others, query, key)
        rows = prune_l2(self.survivors, scores)
        self._writes.write_waiting(self.survivors, sizes)
        self._writes.rows_are(self.survivors)
        self._retains = False
        self._rows_changed()
        return rows

    def _at_l3(self) -> list[torch.Tensor]:
        """Prune at L3. Returns what `_at_l2` does."""
        scores = None
        if self._passes_l3:
            layer, first = self.stack.final_scoring_layer, self.batch.num_others
            scores = survivor_scores(self.stack.attention(layer), self.survivors, first, *self._captured.pop(layer))
        rows = prune_l3(self.survivors, scores)
        if self._passes_l3:
            self._writes.rows_are(self.survivors)
        else:
            self._writes.rows_are_text()
        self._rows_changed()
        return rows

    @property
    def _passes_l3(self) -> bool:
        """Whether visual tokens of any prompt pass L3."""
        return any(survivors.after_l3 for survivors in self.survivors)

    def _rows_changed(self) -> None:
        """After a pruning layer: where each prompt's rows start, for all layers until the next."""
        ends = np.cumsum([0, *(survivors.size for survivors in self.survivors)], dtype=np.int32)
        self._starts = async_tensor_h2d(ends, self.batch.others.device)

    def _gather(self, prune: Callable[[], list[torch.Tensor]]) -> None:
        """Prune, and gather the rows that go on."""
        with self.stack.times.part("scoring"):
            kept = [torch.arange(self.batch.num_others, device=self.batch.others.device)]
            if self.survivors:
                offset = self.batch.num_others
                sizes = [survivors.size for survivors in self.survivors]
                for of_prompt, size in zip(prune(), sizes, strict=True):
                    kept.append(of_prompt + offset)
                    offset += size
            self._rows[:] = ops.gather(torch.cat(kept), *self._rows)

    # --- attention ---

    def capture(self, index: int, query: torch.Tensor, key: torch.Tensor) -> None:
        """Keep what a scoring layer's attention computes; called for every layer."""
        if index in self.stack.scoring_layers or (self._passes_l3 and index == self.stack.final_scoring_layer):
            self._captured[index] = (query, key)

    def move_text(self, layer: MetokAttention, key: torch.Tensor, value: torch.Tensor) -> None:
        """Called for every released layer, when its attention has run; `key` and `value` [rows, Hkv * d]."""
        self._moves = self._moves or TextMoves(self.batch)
        self._moves.move(layer, key, value)

    def attend(
        self, layer: MetokAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Replaces a deep layer's attention and cache update; `query` [rows, Hq * d], `key` and `value`
        [rows, Hkv * d].
        """
        n = self.batch.num_others
        out = torch.empty_like(query)
        if self.survivors:
            k = key[n:].view(-1, layer.num_kv_heads, layer.head_size)
            v = value[n:].view(-1, layer.num_kv_heads, layer.head_size)
            # Before the others attend: one of them may have hit a block of text that a prompt publishes in
            # this very step.
            self._writes.write(layer, k, v, waits=self._retains)
            lengths = [survivors.size for survivors in self.survivors]
            ops.causal_attention(
                query[n:].view(-1, layer.num_heads, layer.head_size),
                k,
                v,
                lengths,
                self._starts,
                max(lengths),
                layer.impl.scale,
                out[n:].view(-1, layer.num_heads, layer.head_size),
                layer.dense,
            )
        if n:
            out[:n] = Attention.forward(layer, query[:n], key[:n], value[:n])
        return out
