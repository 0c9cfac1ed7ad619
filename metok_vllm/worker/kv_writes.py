"""What a pruned step writes to the paged KV cache: only rows that own a slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from metok_vllm.worker.attention import MetokAttention
from metok_vllm.worker.batch import PrunedBatch
from metok_vllm.worker.slots import slots_of
from metok_vllm.worker.survivors import Survivors


class KVWrites:
    """Writes of one pruned step.

    A prompt's text has its slots from the start. Which visual tokens are retained is known at L2 only: what layers L1 .. L2-1
    compute of the visual tokens is held back until then.
    """

    def __init__(self, batch: PrunedBatch) -> None:
        self.batch = batch
        self._held: list[tuple[MetokAttention, torch.Tensor, torch.Tensor]] = []
        # Slots, by the block table's address, the batch row, the first rank and how many.
        self._known: dict[tuple[int, int, int, int], torch.Tensor] = {}

    def write(
        self,
        layer: MetokAttention,
        survivors: Sequence[Survivors],
        key: torch.Tensor,
        value: torch.Tensor,
        before_l2: bool,
    ) -> None:
        """Write one layer's rows that own a slot.

        Args:
            layer: from L1 up.
            survivors: the prompts, behind the other requests' rows.
            key: [rows, Hkv, d].
            value: [rows, Hkv, d].
            before_l2: whether the visual tokens that are retained are still to be chosen.
        """
        offset = self.batch.num_others
        rows, slots = [], []
        for of_prompt in survivors:
            rows.append(of_prompt.static + offset)
            slots.append(self._text_slots(layer, of_prompt))
            if of_prompt.retained_rows is not None and layer.metok.retains:
                rows.append(of_prompt.retained_rows + offset)
                slots.append(self._retained_slots(layer, of_prompt))
            offset += of_prompt.size
        index = torch.cat(rows)
        _update_cache(layer, key[index], value[index], torch.cat(slots))
        if before_l2 and any(of_prompt.retained for of_prompt in survivors):
            self._held.append((layer, key, value))

    def write_held(self, survivors: Sequence[Survivors], sizes: Sequence[int]) -> None:
        """Write what was held back of the tokens that L2 has chosen; `sizes` are the prompts' before L2."""
        if not self._held:
            return
        offset, rows, retaining = self.batch.num_others, [], []
        for of_prompt, size in zip(survivors, sizes, strict=True):
            if of_prompt.held_rows is not None:
                rows.append(of_prompt.held_rows + offset)
                retaining.append(of_prompt)
            offset += size
        index = torch.cat(rows)
        for layer, key, value in self._held:
            slots = torch.cat([self._retained_slots(layer, of_prompt) for of_prompt in retaining])
            _update_cache(layer, key[index], value[index], slots)
        self._held.clear()

    def _text_slots(self, layer: MetokAttention, survivors: Survivors) -> torch.Tensor:
        return self._slots(layer, survivors, 0, survivors.static.shape[0])

    def _retained_slots(self, layer: MetokAttention, survivors: Survivors) -> torch.Tensor:
        return self._slots(layer, survivors, survivors.row.request.static.shape[0], survivors.retained)

    def _slots(self, layer: MetokAttention, survivors: Survivors, start: int, count: int) -> torch.Tensor:
        """Slots of the ranks from `start` on, int64 [count]; the layers of a group share them."""
        table, row = self.batch.tables[layer.layer_name], survivors.row.batch_row
        at = (table.data_ptr(), row, start, count)
        if at not in self._known:
            rows = torch.full((count,), row, device=table.device)
            ranks = torch.arange(start, start + count, device=table.device)
            self._known[at] = slots_of(table, rows, ranks, self.batch.block_size)
        return self._known[at]


def _update_cache(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
