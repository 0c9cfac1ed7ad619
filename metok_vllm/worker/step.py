"""The pruned step: one forward pass in which at least one pruned video prompt is in prefill.

Shallow layers run on all tokens of the batch, as in stock vLLM. From L1 on the layers run on
``[other requests' tokens | survivors of each prompt that ends in this step]``: the others attend through the paged cache with
metadata built for them alone, each prompt attends densely over its own fresh queries, keys and values, and only its rows
with a slot are written to the cache. Prompts that do not end in this step leave their state at L1 and go no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from metok_vllm.worker import ops
from metok_vllm.worker.attention import MetokAttention
from metok_vllm.worker.batch import DecoderStack, PrefillRow, PrunedBatch
from metok_vllm.worker.kv_writes import KVWrites
from metok_vllm.worker.pruning_scores import prompt_scores, survivor_scores
from metok_vllm.worker.requests import DeferredChunk
from metok_vllm.worker.survivors import Survivors, prune_l2, prune_l3, survivors_of_l1

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Hidden state and residual, [rows, hidden] each, and int64 [rows] positions."""


class PrunedStep:
    """One forward pass with pruning. Made anew for each step; implements `attention.AttentionSink`."""

    def __init__(self, stack: DecoderStack, batch: PrunedBatch) -> None:
        self.stack = stack
        self.batch = batch
        self.survivors: list[Survivors] = []
        self._captured: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._writes = KVWrites(batch)
        self._phase = 0

    # --- the forward pass ---

    def run(self, positions: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Run the decoder layers.

        Args:
            positions: int64 [tokens, possibly padded].
            inputs_embeds: [tokens, possibly padded, hidden].

        Returns:
            [tokens, hidden], normed. Rows of other requests and the last row of each prompt that ends hold what stock vLLM
            would compute on the survivors; every other row is zero and must not be read.
        """
        context: Any = get_forward_context()
        context.slot_mapping = {**context.slot_mapping, **self.batch.others_slots}
        for role in self.stack.roles:
            role.step = self
        try:
            positions, hidden = positions[: self.batch.num_tokens], inputs_embeds[: self.batch.num_tokens]
            residual: Any = None
            with self.stack.times.stage("shallow"):
                for layer in self.stack.layers[: self.stack.prune_layers[0]]:
                    hidden, residual = layer(positions, hidden, residual)
            self._defer(hidden, residual)
            ending = [row for row in self.batch.rows if row.ends]
            if not ending and not self.batch.num_others:
                return torch.zeros_like(hidden)
            with self.stack.times.stage("scoring"):
                rows = self._enter(ending, positions, hidden, residual)
            return self._scatter(self._deep(*rows))
        finally:
            for role in self.stack.roles:
                role.step = None
            self._captured.clear()

    def _deep(self, hidden: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Layers from L1 up on the rows that `_enter` has gathered; [rows that are left, hidden], normed."""
        first, second, third = self.stack.prune_layers
        times = self.stack.times
        for start, end in ((first, second), (second, third), (third, len(self.stack.layers))):
            self._phase += 1
            if self._phase > 1:
                with times.stage("scoring"):
                    kept = self._prune(self._phase)
                    hidden, residual, positions = ops.gather(kept, hidden, residual, positions)
            with times.stage("deep"):
                for layer in self.stack.layers[start:end]:
                    hidden, residual = layer(positions, hidden, residual)
        hidden, _ = self.stack.norm(hidden, residual)
        return hidden

    def _scatter(self, hidden: torch.Tensor) -> torch.Tensor:
        out = hidden.new_zeros(self.batch.num_tokens, hidden.shape[-1])
        out[self.batch.others] = hidden[: self.batch.num_others]
        end = self.batch.num_others
        for survivors in self.survivors:
            end += survivors.size
            row = survivors.row
            out[row.start + row.length - 1] = hidden[end - 1]
        return out

    # --- chunks ---

    def _chunk(self, row: PrefillRow, hidden: torch.Tensor, residual: torch.Tensor) -> DeferredChunk:
        query, key = self._captured[self.stack.scoring_layers[0]]
        rows = row.request.rows_within(row.computed, row.length) + (row.start - row.computed)
        return DeferredChunk(hidden[row.tokens], residual[row.tokens], query[rows], key[row.tokens])

    def _defer(self, hidden: torch.Tensor, residual: torch.Tensor) -> None:
        for row in self.batch.rows:
            if row.ends:
                continue
            chunk = self._chunk(row, hidden, residual)
            # Slices would keep the whole step's tensors alive.
            row.request.chunks.append(
                DeferredChunk(chunk.hidden.clone(), chunk.residual.clone(), chunk.query, chunk.key.clone())
            )

    def _joined(self, row: PrefillRow, hidden: torch.Tensor, residual: torch.Tensor) -> DeferredChunk:
        """State of the whole prompt at L1: what earlier chunks left, and this one."""
        last = self._chunk(row, hidden, residual)
        if not row.request.chunks:
            return last
        chunks = [*row.request.chunks, last]
        row.request.chunks = []
        names = ("hidden", "residual", "query", "key")
        return DeferredChunk(*(torch.cat([getattr(chunk, name) for chunk in chunks]) for name in names))

    # --- pruning ---

    def _enter(
        self, ending: Sequence[PrefillRow], positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> Rows:
        """Prune at L1 and gather the rows that go on: the others', then each prompt's survivors."""
        deferred = {row.batch_row for row in ending if row.request.chunks}
        chunks = [self._joined(row, hidden, residual) for row in ending]
        scores = prompt_scores(self.stack.attention(self.stack.scoring_layers[0]), ending, chunks)
        self.survivors = survivors_of_l1(ending, scores)
        if not deferred:
            index = torch.cat([self.batch.others, *(s.positions + s.row.start for s in self.survivors)])
            return ops.gather(index, hidden, residual, positions)
        parts = [ops.gather(self.batch.others, hidden, residual, positions)] if self.batch.num_others else []
        for survivors, chunk in zip(self.survivors, chunks, strict=True):
            # A prompt's chunk, joined or not, starts at its position 0.
            every = torch.arange(chunk.hidden.shape[0], device=hidden.device)
            parts.append(ops.gather(survivors.positions, chunk.hidden, chunk.residual, every))
        h, r, p = zip(*parts, strict=True)
        return torch.cat(h), torch.cat(r), torch.cat(p)

    def _prune(self, stage: int) -> torch.Tensor:
        """Prune at L2 or L3. Returns the rows that go on, int64, among those of the phase before."""
        sizes = [survivors.size for survivors in self.survivors]
        offset = self.batch.num_others
        kept = [torch.arange(offset, device=self.batch.others.device)]
        if not self.survivors:
            return kept[0]
        if stage == 2:
            layer = self.stack.scoring_layers[1]
            query, key = self._captured[layer]
            scores = survivor_scores(self.stack.attention(layer), self.survivors, offset, query, key)
            rows = prune_l2(self.survivors, scores)
            self._writes.write_held(self.survivors, sizes)
        else:
            rows = prune_l3(self.survivors)
        for of_prompt, size in zip(rows, sizes, strict=True):
            kept.append(of_prompt + offset)
            offset += size
        return torch.cat(kept)

    # --- attention ---

    def capture(self, index: int, query: torch.Tensor, key: torch.Tensor) -> None:
        if index in self.stack.scoring_layers:
            self._captured[index] = (query, key)

    def attend(
        self, layer: MetokAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        n = self.batch.num_others
        out = torch.empty_like(query)
        if self.survivors:
            k = key.view(-1, layer.num_kv_heads, layer.head_size)
            v = value.view(-1, layer.num_kv_heads, layer.head_size)
            # Before the others attend: one of them may have hit a block of text that a prompt publishes in this very step.
            self._writes.write(layer, self.survivors, k, v, before_l2=self._phase == 1)
            ops.causal_attention(
                query[n:].view(-1, layer.num_heads, layer.head_size),
                k[n:],
                v[n:],
                [survivors.size for survivors in self.survivors],
                layer.impl.scale,
                out[n:].view(-1, layer.num_heads, layer.head_size),
            )
        if n:
            out[:n] = Attention.forward(layer, query[:n], key[:n], value[:n])
        return out
