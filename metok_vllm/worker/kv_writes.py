"""What a pruned step writes to the paged KV cache: only tokens that own a slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from metok_vllm.worker.attention import MetokAttention
from metok_vllm.worker.batch import PrunedBatch
from metok_vllm.worker.survivors import Survivors


class KVWrites:
    """Writes of one pruned step.

    A prompt's text has its slots from the start. Which visual tokens are retained is known at L2 only. What
    layers L1 .. L2-1 compute of the visual tokens waits until then. Which ones pass L3 is known there. With
    `kv_layers` nothing waits: a layer keeps all that is alive in it, or text alone.

    The slots of all rows are laid out once after each pruning layer, for all groups, with -1 for a row that
    owns none: vLLM's cache update skips it. So a layer's write is one launch.
    """

    def __init__(self, batch: PrunedBatch) -> None:
        self.batch = batch
        self._slots = batch.text_slots
        self._waiting: list[tuple[MetokAttention, torch.Tensor]] = []

    def rows_are(self, survivors: Sequence[Survivors]) -> None:
        """The next layers run on `survivors`: until L2 has chosen with slots for text alone, then with those
        of the retained tokens, behind L3 with those of the tokens that passed it. With the window `kv_layers`
        up to L3 with slots for all of them.
        """
        sizes = [of_prompt.size for of_prompt in survivors]
        self._slots = self._nobodys(sizes)
        self._slots.index_copy_(1, _joined([p.text for p in survivors], sizes), self.batch.text_slots)
        retaining = [(i, p.kept_rows) for i, p in enumerate(survivors) if p.kept_rows is not None]
        if retaining:
            self._place_retained(self._slots, sizes, retaining)

    def rows_are_text(self) -> None:
        """The next layers run on text alone: behind L3, where nothing visual passed it."""
        self._slots = self.batch.text_slots

    def write(self, layer: MetokAttention, key: torch.Tensor, value: torch.Tensor, waits: bool) -> None:
        """Write one layer's tokens that own a slot.

        Args:
            layer: from L1 up.
            key: [rows of the prompts, Hkv, d].
            value: [rows of the prompts, Hkv, d].
            waits: whether some of its visual tokens will be retained, and L2 has not chosen them yet.
        """
        update_cache(layer, key, value, self._slots_of(layer, self._slots))
        if waits:
            # A copy: the step's queries share the memory of its keys and values.
            self._waiting.append((layer, torch.stack((key, value))))

    def write_waiting(self, survivors: Sequence[Survivors], sizes: Sequence[int]) -> None:
        """Write what has waited of the tokens that L2 retains; `sizes` are the prompts' before L2."""
        if not self._waiting:
            return
        slots = self._nobodys(sizes)
        retaining = [(i, p.retained_rows_at_l1) for i, p in enumerate(survivors) if p.retained_rows_at_l1 is not None]
        self._place_retained(slots, sizes, retaining)
        for layer, (key, value) in self._waiting:
            update_cache(layer, key, value, self._slots_of(layer, slots))
        self._waiting.clear()

    def _nobodys(self, sizes: Sequence[int]) -> torch.Tensor:
        """int64 [groups, rows of the prompts], all -1: no row owns a slot yet."""
        return self.batch.text_slots.new_full((self.batch.text_slots.shape[0], sum(sizes)), -1)

    def _place_retained(
        self, slots: torch.Tensor, sizes: Sequence[int], retaining: Sequence[tuple[int, torch.Tensor]]
    ) -> None:
        """Put into `slots` [groups, rows] those of the visual tokens that are kept:
        of each prompt its index among all and its rows.
        """
        starts = [sum(sizes[:i]) for i, _ in retaining]
        rows = torch.cat([of_prompt + start for (_, of_prompt), start in zip(retaining, starts, strict=True)])
        columns = [self.batch.kept_slots[i][:, : of_prompt.shape[0]] for i, of_prompt in retaining]
        slots.index_copy_(1, rows, torch.cat(columns, dim=1))

    def _slots_of(self, layer: MetokAttention, slots: torch.Tensor) -> torch.Tensor:
        return slots[self.batch.group_rows[layer.layer_name]]


def _joined(rows: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """Rows of each prompt, among its own `sizes`, to rows among all prompts'."""
    if len(rows) == 1:
        return rows[0]
    return torch.cat([of_prompt + sum(sizes[:i]) for i, of_prompt in enumerate(rows)])


def update_cache(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Write `key` and `value` [n, Hkv, d] at `slots` int64 [n] of a layer's cache, as its backend does."""
    layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
