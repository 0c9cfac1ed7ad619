"""The definition of the scores, in float32 torch; it builds the rows x keys matrix, item by item."""

from __future__ import annotations

import torch

from metok_kernels.text_to_visual_scores.keys import Keys, PackedKeys


def request_keys(keys: Keys, item: int, count: int) -> torch.Tensor:
    """The first `count` keys of an item's request, [count, kv_heads, head_dim] float32."""
    if isinstance(keys, PackedKeys):
        start = int(keys.start[item])
        return keys.keys[start : start + count].float()
    block_size = keys.cache.shape[1]
    index = torch.arange(count, device=keys.cache.device)
    row = keys.block_table[int(keys.table_row[item])].long()
    block, slot = row[index // block_size], index % block_size
    scales = keys.scales()
    # torch does not index float8 tensors, so a quantised cache is converted whole: a reference may be slow.
    cache = keys.cache if scales is None else keys.cache.float()
    chosen = cache[block, slot].float()
    return chosen if scales is None else chosen * scales[block, slot].unsqueeze(-1)


def reference(
    q: torch.Tensor,
    keys: Keys,
    row_keys: torch.Tensor,
    cu_rows: torch.Tensor,
    visual: torch.Tensor,
    cu_visual: torch.Tensor,
    *,
    scale: float,
    max_rows: int = 0,
    max_visual: int = 0,
    max_keys: int = 0,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same arguments and result as `text_to_visual_scores`; the `max_*` are not used. Reads on the host."""
    out = torch.zeros(visual.shape[0], dtype=torch.float32, device=q.device)
    rows_at, visual_at = cu_rows.tolist(), cu_visual.tolist()
    for item in range(len(rows_at) - 1):
        rows = slice(rows_at[item], rows_at[item + 1])
        columns = slice(visual_at[item], visual_at[item + 1])
        if rows.start == rows.stop or columns.start == columns.stop:
            continue
        visible = row_keys[rows].long()
        queries = (q[rows] if row_index is None else q[row_index[rows].long()]).float()
        known = request_keys(keys, item, int(visible.max()))
        known = known.repeat_interleave(q.shape[1] // known.shape[1], dim=1)
        logits = torch.einsum("rhd,khd->hrk", queries, known) * scale
        hidden = torch.arange(known.shape[0], device=q.device)[None, :] >= visible[:, None]
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
        out[columns] = weights.mean((0, 1))[visual[columns].long()]
    return out
