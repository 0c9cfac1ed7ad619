"""What a pruned step writes to the paged KV cache: only rows that own a slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from metok_vllm.engine.attention import MetokAttention
from metok_vllm.engine.batch import PrunedBatch
from metok_vllm.engine.survivors import Survivors


class KVWrites:
    """Writes of one pruned step.

    A prompt's text has its slots from the start. Which visual tokens are retained is known at L2 only: what layers L1 .. L2-1
    compute of the visual tokens is held back until then.
    """

    def __init__(self, batch: PrunedBatch) -> None:
        self.batch = batch
        self._held: list[tuple[MetokAttention, torch.Tensor, torch.Tensor]] = []
        self._text: dict[tuple[int, int], torch.Tensor] = {}  # slots, by the block table's address and the batch row

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
        offset, rows, retaining = self.batch.num_others, [], []
        for of_prompt, size in zip(survivors, sizes, strict=True):
            if of_prompt.held_rows is not None:
                rows.append(of_prompt.held_rows + offset)
                retaining.append(of_prompt)
            offset += size
        for layer, key, value in self._held:
            index = torch.cat(rows)
            slots = torch.cat([self._retained_slots(layer, of_prompt) for of_prompt in retaining])
            _update_cache(layer, key[index], value[index], slots)
        self._held.clear()

    def _text_slots(self, layer: MetokAttention, survivors: Survivors) -> torch.Tensor:
        table = self.batch.tables[layer.layer_name]
        at = (table.data_ptr(), survivors.row.batch_row)
        if at not in self._text:
            ranks = torch.arange(survivors.static.shape[0], device=table.device)
            self._text[at] = self._slots(table, survivors.row.batch_row, ranks)
        return self._text[at]

    def _retained_slots(self, layer: MetokAttention, survivors: Survivors) -> torch.Tensor:
        table = self.batch.tables[layer.layer_name]
        text = survivors.row.request.static.shape[0]
        ranks = torch.arange(text, text + survivors.retained, device=table.device)
        return self._slots(table, survivors.row.batch_row, ranks)

    def _slots(self, table: torch.Tensor, batch_row: int, ranks: torch.Tensor) -> torch.Tensor:
        size = self.batch.block_size
        return table[batch_row][ranks // size].to(torch.int64) * size + ranks % size


def _update_cache(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
