"""What a pruned step writes to the paged KV cache: only tokens that own a slot."""

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

    A prompt's text has its slots from the start. Which visual tokens are retained is known at L2 only. What
    layers L1 .. L2-1 compute of the visual tokens waits until then.
    """

    def __init__(self, batch: PrunedBatch) -> None:
        self.batch = batch
        self._waiting: list[tuple[MetokAttention, torch.Tensor, torch.Tensor]] = []
        # Slots, by the block table's address, the request's batch index, the first slot index and how many.
        self._known: dict[tuple[int, int, int, int], torch.Tensor] = {}

    def write(
        self,
        layer: MetokAttention,
        survivors: Sequence[Survivors],
        key: torch.Tensor,
        value: torch.Tensor,
        before_l2: bool,
    ) -> None:
        """Write one layer's tokens that own a slot.

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
            rows.append(of_prompt.text + offset)
            slots.append(self._text_slots(layer, of_prompt))
            if of_prompt.retained_rows is not None and layer.metok.retains:
                rows.append(of_prompt.retained_rows + offset)
                slots.append(self._retained_slots(layer, of_prompt))
            offset += of_prompt.size
        index = torch.cat(rows)
        _update_cache(layer, key[index], value[index], torch.cat(slots))
        if before_l2 and any(of_prompt.retained for of_prompt in survivors):
            self._waiting.append((layer, key, value))

    def write_waiting(self, survivors: Sequence[Survivors], sizes: Sequence[int]) -> None:
        """Write what has waited of the tokens that L2 retains; `sizes` are the prompts' before L2."""
        if not self._waiting:
            return
        offset, rows, retaining = self.batch.num_others, [], []
        for of_prompt, size in zip(survivors, sizes, strict=True):
            if of_prompt.retained_rows_at_l1 is not None:
                rows.append(of_prompt.retained_rows_at_l1 + offset)
                retaining.append(of_prompt)
            offset += size
        index = torch.cat(rows)
        for layer, key, value in self._waiting:
            slots = torch.cat([self._retained_slots(layer, of_prompt) for of_prompt in retaining])
            _update_cache(layer, key[index], value[index], slots)
        self._waiting.clear()

    def _text_slots(self, layer: MetokAttention, survivors: Survivors) -> torch.Tensor:
        return self._slots(layer, survivors, 0, survivors.text.shape[0])

    def _retained_slots(self, layer: MetokAttention, survivors: Survivors) -> torch.Tensor:
        return self._slots(layer, survivors, survivors.chunk.request.text.shape[0], survivors.retained)

    def _slots(self, layer: MetokAttention, survivors: Survivors, start: int, count: int) -> torch.Tensor:
        """Slots with the indices from `start` on, int64 [count]; the layers of a group share them."""
        table, request = self.batch.tables[layer.layer_name], survivors.chunk.batch_index
        at = (table.data_ptr(), request, start, count)
        if at not in self._known:
            requests = torch.full((count,), request, device=table.device)
            indices = torch.arange(start, start + count, device=table.device)
            self._known[at] = slots_of(table, requests, indices, self.batch.block_size)
        return self._known[at]


def _update_cache(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
