"""The pruned step: one forward pass in which at least one pruned video prompt is in prefill.

Shallow layers run on all tokens of the batch, as in stock vLLM. From L1 on the layers run on
``[other requests' tokens | survivors of each prompt that ends in this step]``: the others attend through the paged cache with
metadata built for them alone, each prompt attends densely over its own fresh queries, keys and values, and only its rows
with a slot are written to the cache. Prompts that do not end in this step leave their state at L1 and go no further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from metok_vllm.compression.events import event_lengths
from metok_vllm.compression.ordering import true_indices
from metok_vllm.compression.retention import retain, retained_count
from metok_vllm.compression.selection import PruneLayers, keep_counts, select_per_event
from metok_vllm.engine import ops
from metok_vllm.engine.attention import LayerRole, MetokAttention
from metok_vllm.engine.requests import DeferredChunk, PrunedRequest, PruningResult


@dataclass(frozen=True)
class DecoderStack:
    """The language model's layers as a pruned step runs them."""

    layers: Sequence[nn.Module]
    norm: nn.Module
    roles: Sequence[LayerRole]
    prune_layers: PruneLayers


@dataclass(frozen=True)
class PrefillRow:
    """The rows that one pruned request has in this step's batch."""

    request: PrunedRequest
    batch_row: int
    start: int  # index of its first token in the batch
    length: int
    computed: int  # position of that token in the prompt

    @property
    def ends(self) -> bool:
        """Whether the prompt is complete with this step."""
        return self.computed + self.length == self.request.prompt_len

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True)
class PrunedBatch:
    """What the step needs to know of the batch; built by the model state, which sees the block tables."""

    rows: Sequence[PrefillRow]
    num_tokens: int
    others: torch.Tensor  # int64 [No], batch index of every token of the other requests
    others_slots: Mapping[str, torch.Tensor]  # layer name -> int64 [No]
    tables: Mapping[str, torch.Tensor]  # layer name of a layer from L1 up -> int32 [batch rows, blocks]
    block_size: int

    @property
    def num_others(self) -> int:
        return self.others.shape[0]


@dataclass
class Survivors:
    """The tokens of one prompt that are still alive, in prompt order."""

    row: PrefillRow
    positions: torch.Tensor  # int64 [n]
    static: torch.Tensor  # int64 [text and image tokens], where they stand among the n
    visual: list[tuple[int, int]]  # for each pruned video: offset among the n, and count
    events: list[torch.Tensor]  # for each pruned video: int64 [count], event of each of its survivors
    counts2: list[torch.Tensor]  # for each pruned video: int64 [events], what each event keeps at L2
    totals2: list[int]
    retained: int  # R: visual tokens that keep their KV below L3
    retained_rows: torch.Tensor | None = None  # int64 [R], where they stand among the n, once L2 has chosen
    held_rows: torch.Tensor | None = None  # int64 [R], where they stood among the survivors of L1
    slots: dict[int, torch.Tensor] = field(default_factory=dict)  # of the text, by the block table's address

    @property
    def size(self) -> int:
        return self.positions.shape[0]


class PrunedStep:
    """One forward pass with pruning. Made anew for each step; implements `attention.AttentionSink`."""

    def __init__(self, stack: DecoderStack, batch: PrunedBatch) -> None:
        self.stack = stack
        self.batch = batch
        self.survivors: list[Survivors] = []
        self._captured: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._held: list[tuple[MetokAttention, torch.Tensor, torch.Tensor]] = []
        first, second, _ = stack.prune_layers
        self._scoring_layers = (first - 1, second - 1)
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
        first, second, third = self.stack.prune_layers
        context: Any = get_forward_context()
        context.slot_mapping = {**context.slot_mapping, **self.batch.others_slots}
        for role in self.stack.roles:
            role.step = self
        try:
            positions, hidden = positions[: self.batch.num_tokens], inputs_embeds[: self.batch.num_tokens]
            residual: Any = None
            for layer in self.stack.layers[:first]:
                hidden, residual = layer(positions, hidden, residual)
            self._defer(hidden, residual)
            ending = [row for row in self.batch.rows if row.ends]
            if not ending and not self.batch.num_others:
                return torch.zeros_like(hidden)

            hidden, residual = self._enter(ending, hidden, residual)
            positions = self._positions(positions)
            for start, end in ((first, second), (second, third), (third, len(self.stack.layers))):
                self._phase += 1
                if self._phase > 1:
                    kept = self._prune(self._phase)
                    hidden, residual, positions = ops.gather(kept, hidden, residual, positions)
                for layer in self.stack.layers[start:end]:
                    hidden, residual = layer(positions, hidden, residual)
            hidden, _ = self.stack.norm(hidden, residual)
            return self._scatter(hidden)
        finally:
            for role in self.stack.roles:
                role.step = None
            self._captured.clear()
            self._held.clear()

    def _positions(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.cat([positions[self.batch.others], *(s.positions for s in self.survivors)])

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

    def _rows_in_chunk(self, row: PrefillRow) -> torch.Tensor:
        """Offsets in the chunk of the text rows that score, int64 on the host."""
        rows = row.request.score_rows
        inside = rows[(rows >= row.computed) & (rows < row.computed + row.length)]
        return inside - row.computed

    def _chunk(self, row: PrefillRow, hidden: torch.Tensor, residual: torch.Tensor) -> DeferredChunk:
        query, key = self._captured[self._scoring_layers[0]]
        rows = (self._rows_in_chunk(row) + row.start).to(query.device)
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

    # --- pruning ---

    def _enter(
        self, ending: Sequence[PrefillRow], hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prune at L1 and gather the rows that go on: the others', then each prompt's survivors."""
        chunks = [self._joined(row, hidden, residual) for row in ending]
        scores = [self._score_prompt(row, chunk) for row, chunk in zip(ending, chunks, strict=True)]
        self._reduce([score for of_prompt in scores for score in of_prompt])
        self.survivors = self._select(ending, scores)
        parts = [(hidden[self.batch.others], residual[self.batch.others])]
        for survivors, chunk in zip(self.survivors, chunks, strict=True):
            parts.append((chunk.hidden[survivors.positions], chunk.residual[survivors.positions]))
        return torch.cat([h for h, _ in parts]), torch.cat([r for _, r in parts])

    def _joined(self, row: PrefillRow, hidden: torch.Tensor, residual: torch.Tensor) -> DeferredChunk:
        """State of the whole prompt at L1: what earlier chunks left, and this one."""
        last = self._chunk(row, hidden, residual)
        if not row.request.chunks:
            return last
        chunks = [*row.request.chunks, last]
        row.request.chunks = []
        names = ("hidden", "residual", "query", "key")
        return DeferredChunk(*(torch.cat([getattr(chunk, name) for chunk in chunks]) for name in names))

    def _score_prompt(self, row: PrefillRow, chunk: DeferredChunk) -> list[torch.Tensor]:
        """Scores at L1 of every pruned video of one prompt, each float32 [its tokens]."""
        request = row.request
        layer = self._layer(self._scoring_layers[0])
        device = chunk.key.device
        key = chunk.key.view(-1, layer.num_kv_heads, layer.head_size)
        query = chunk.query.view(-1, layer.num_heads, layer.head_size)
        positions = torch.arange(request.prompt_len, device=device)
        row_positions = request.score_rows.to(device)
        return [
            ops.scores(
                query[before:],
                key,
                positions[span.start : span.end],
                row_positions[before:],
                positions,
                layer.impl.scale,
            )
            for span, before in zip(request.spans, request.rows_before, strict=True)
        ]

    def _layer(self, index: int) -> Any:
        layer: Any = self.stack.layers[index]
        return layer.self_attn.attn

    @staticmethod
    def _reduce(scores: Sequence[torch.Tensor]) -> None:
        """Average the scores over the ranks' heads, in place, so that all ranks agree on the survivors."""
        ranks = get_tensor_model_parallel_world_size()
        if ranks == 1 or not scores:
            return
        together = tensor_model_parallel_all_reduce(torch.cat(list(scores))) / ranks
        for score, mean in zip(scores, torch.split(together, [s.shape[0] for s in scores]), strict=True):
            score.copy_(mean)

    def _select(self, ending: Sequence[PrefillRow], scores: Sequence[Sequence[torch.Tensor]]) -> list[Survivors]:
        counts = []  # per video of every prompt: (what each event keeps at L1, at L2)
        for row in ending:
            for span, tags in zip(row.request.spans, row.request.tags, strict=True):
                assert tags is not None
                lengths = event_lengths(tags.event, span.plan.events)
                key = torch.zeros_like(lengths, dtype=torch.bool).index_put_((tags.event,), tags.key)
                first = keep_counts(lengths, key, span.plan.keep_ratio, 1)
                counts.append((first, keep_counts(first, key, span.plan.keep_ratio, 2)))
        if not counts:
            return []
        # The one read of the device in a pruned prompt's prefill: how many tokens survive, which sizes everything after.
        totals = iter(torch.stack([torch.stack([c1.sum(), c2.sum()]) for c1, c2 in counts]).tolist())
        each = iter(counts)
        return [
            self._survivors(
                row, of_prompt, [next(each) for _ in row.request.spans], [next(totals) for _ in row.request.spans]
            )
            for row, of_prompt in zip(ending, scores, strict=True)
        ]

    @staticmethod
    def _survivors(
        row: PrefillRow,
        scores: Sequence[torch.Tensor],
        counts: Sequence[tuple[torch.Tensor, torch.Tensor]],
        totals: Sequence[list[int]],
    ) -> Survivors:
        request = row.request
        device = request.static.device
        alive = torch.ones(request.prompt_len, dtype=torch.bool, device=device)
        is_visual = torch.zeros_like(alive)
        events, visual, offset, previous_end = [], [], 0, 0
        for span, tags, score, (c1, _), (n1, _) in zip(
            request.spans, request.tags, scores, counts, totals, strict=True
        ):
            assert tags is not None
            keep = select_per_event(score, tags.event, c1)
            alive[span.start : span.end] = keep
            is_visual[span.start : span.end] = True
            events.append(tags.event[true_indices(keep, n1)])
            offset += span.start - previous_end
            visual.append((offset, n1))
            offset += n1
            previous_end = span.end
        size = request.static.shape[0] + sum(n1 for n1, _ in totals)
        positions = true_indices(alive, size)
        after_l2 = sum(n2 for _, n2 in totals)
        retained = retained_count(after_l2, request.retention)
        request.result = PruningResult(request.visual, sum(n1 for n1, _ in totals), after_l2, retained)
        return Survivors(
            row=row,
            positions=positions,
            static=true_indices(~is_visual[positions], request.static.shape[0]),
            visual=visual,
            events=events,
            counts2=[c2 for _, c2 in counts],
            totals2=[n2 for _, n2 in totals],
            retained=retained,
        )

    def _prune(self, stage: int) -> torch.Tensor:
        """Prune at L2 or L3. Returns the rows that go on, int64, among those of the phase before."""
        scores = self._score_survivors() if stage == 2 else []
        self._reduce([score for of_prompt in scores for score in of_prompt])
        kept = [torch.arange(self.batch.num_others, device=self.batch.others.device)]
        sizes = [survivors.size for survivors in self.survivors]
        offset = self.batch.num_others
        for i, survivors in enumerate(self.survivors):
            rows = self._second(survivors, scores[i]) if stage == 2 else self._third(survivors)
            kept.append(rows + offset)
            offset += sizes[i]
        if stage == 2:
            self._write_held(sizes)
        return torch.cat(kept)

    def _score_survivors(self) -> list[list[torch.Tensor]]:
        query, key = self._captured[self._scoring_layers[1]]
        layer = self._layer(self._scoring_layers[1])
        query = query.view(-1, layer.num_heads, layer.head_size)
        key = key.view(-1, layer.num_kv_heads, layer.head_size)
        scores, offset = [], self.batch.num_others
        for survivors in self.survivors:
            request = survivors.row.request
            own = slice(offset, offset + survivors.size)
            row_positions = request.score_rows.to(key.device)
            # A scoring row is text, so it is alive; its place among the survivors follows from its position.
            rows = torch.searchsorted(survivors.positions, row_positions)
            scores.append(
                [
                    ops.scores(
                        query[own][rows[before:]],
                        key[own],
                        torch.arange(start, start + count, device=key.device),
                        row_positions[before:],
                        survivors.positions,
                        layer.impl.scale,
                    )
                    for (start, count), before in zip(survivors.visual, request.rows_before, strict=True)
                ]
            )
            offset += survivors.size
        return scores

    @staticmethod
    def _second(survivors: Survivors, scores: Sequence[torch.Tensor]) -> torch.Tensor:
        """Prune one prompt at L2 and choose what is retained; updates `survivors` to what is left."""
        device = survivors.positions.device
        alive = torch.zeros(survivors.size, dtype=torch.bool, device=device)
        alive[survivors.static] = True
        kept_scores = []
        for (start, count), score, event, c2, n2 in zip(
            survivors.visual, scores, survivors.events, survivors.counts2, survivors.totals2, strict=True
        ):
            keep = select_per_event(score, event, c2)
            alive[start : start + count] = keep
            kept_scores.append(score[true_indices(keep, n2)])
        rows = true_indices(alive, survivors.static.shape[0] + sum(survivors.totals2))
        is_static = torch.zeros_like(alive)
        is_static[survivors.static] = True
        static = true_indices(is_static[rows], survivors.static.shape[0])
        if survivors.retained:
            chosen = retain(torch.cat(kept_scores), survivors.row.request.retention)
            among_visual = true_indices(chosen, survivors.retained)
            visual = true_indices(~is_static[rows], sum(survivors.totals2))
            survivors.retained_rows = visual[among_visual]
            survivors.held_rows = rows[survivors.retained_rows]
        survivors.positions = survivors.positions[rows]
        survivors.static = static
        return rows

    @staticmethod
    def _third(survivors: Survivors) -> torch.Tensor:
        """Drop every visual token of one prompt."""
        rows = survivors.static
        survivors.positions = survivors.positions[rows]
        survivors.static = torch.arange(rows.shape[0], device=rows.device)
        survivors.retained_rows = None
        return rows

    # --- attention and the KV cache ---

    def capture(self, index: int, query: torch.Tensor, key: torch.Tensor) -> None:
        if index in self._scoring_layers:
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
            self._write(layer, k, v)
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

    def _write(self, layer: MetokAttention, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the rows that own a slot; hold back visual ones until L2 has chosen among them."""
        offset = self.batch.num_others
        rows, slots = [], []
        for survivors in self.survivors:
            rows.append(survivors.static + offset)
            slots.append(self._text_slots(layer, survivors))
            if survivors.retained_rows is not None and layer.metok.retains:
                rows.append(survivors.retained_rows + offset)
                slots.append(self._retained_slots(layer, survivors))
            offset += survivors.size
        index = torch.cat(rows)
        self._update_cache(layer, key[index], value[index], torch.cat(slots))
        if self._phase == 1 and any(survivors.retained for survivors in self.survivors):
            self._held.append((layer, key, value))

    def _write_held(self, sizes: Sequence[int]) -> None:
        """Write the KV of layers L1 .. L2-1 of the tokens that L2 has chosen; `sizes` are the prompts' before L2."""
        if not self._held:
            return
        offset, rows, retaining = self.batch.num_others, [], []
        for survivors, size in zip(self.survivors, sizes, strict=True):
            if survivors.held_rows is not None:
                rows.append(survivors.held_rows + offset)
                retaining.append(survivors)
            offset += size
        index = torch.cat(rows)
        for layer, key, value in self._held:
            slots = torch.cat([self._retained_slots(layer, survivors) for survivors in retaining])
            self._update_cache(layer, key[index], value[index], slots)
        self._held.clear()

    @staticmethod
    def _update_cache(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)

    def _text_slots(self, layer: MetokAttention, survivors: Survivors) -> torch.Tensor:
        table = self.batch.tables[layer.layer_name]
        if table.data_ptr() not in survivors.slots:
            ranks = torch.arange(survivors.static.shape[0], device=table.device)
            survivors.slots[table.data_ptr()] = self._slots(table, survivors.row.batch_row, ranks)
        return survivors.slots[table.data_ptr()]

    def _retained_slots(self, layer: MetokAttention, survivors: Survivors) -> torch.Tensor:
        table = self.batch.tables[layer.layer_name]
        text = survivors.row.request.static.shape[0]
        ranks = torch.arange(text, text + survivors.retained, device=table.device)
        return self._slots(table, survivors.row.batch_row, ranks)

    def _slots(self, table: torch.Tensor, batch_row: int, ranks: torch.Tensor) -> torch.Tensor:
        size = self.batch.block_size
        return table[batch_row][ranks // size].to(torch.int64) * size + ranks % size
