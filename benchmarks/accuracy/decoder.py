"""A Qwen2 decoder for one prompt at a time, in which the rows before the
question can be dropped at any layer and shared.

Plain PyTorch on the checkpoint's own weights, float32. A prompt is `[prefix | question]`. The prefix (chat
header, visual tokens) does not see the question, so its keys and values serve all questions about the video,
until a layer drops rows by what a question looks at. Shapes: rows [n, D], queries [Hq, n, d], keys and values
[Hkv, n, d].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layer:
    """One layer's weights; the projections that read the same rows are fused."""

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norm_1: Tensor
    norm_2: Tensor

    @classmethod
    def of(cls, layer: Any) -> Layer:
        a, m = layer.self_attn, layer.mlp
        parts = (a.q_proj, a.k_proj, a.v_proj)
        bias = None if parts[0].bias is None else torch.cat([p.bias for p in parts])
        return cls(
            qkv=torch.cat([p.weight for p in parts]),
            qkv_bias=bias,
            out=a.o_proj.weight,
            gate_up=torch.cat([m.gate_proj.weight, m.up_proj.weight]),
            down=m.down_proj.weight,
            norm_1=layer.input_layernorm.weight,
            norm_2=layer.post_attention_layernorm.weight,
        )


class Decoder:
    """The language model of a LLaVA-OneVision checkpoint (`transformers`' class, float32)."""

    def __init__(self, model: Any) -> None:
        text, body = model.config.text_config, model.model.language_model
        first = body.layers[0].self_attn
        self.head_dim = int(first.head_dim)
        self.heads, self.kv_heads = int(text.num_attention_heads), int(text.num_key_value_heads)
        self.scale, self.eps = float(first.scaling), float(text.rms_norm_eps)
        self.layers = [Layer.of(layer) for layer in body.layers]
        self.norm, self.head = body.norm.weight, model.lm_head.weight
        self.embedding = model.get_input_embeddings().weight
        self.width = int(self.embedding.shape[1])
        self._rotary = body.rotary_emb
        self._angles = (torch.empty(0), torch.empty(0))

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [n, d] of the rotary positions, int64 [n]."""
        needed = int(positions.max()) + 1 if len(positions) else 0
        if needed > len(self._angles[0]):
            everything = torch.arange(max(needed, 2048))[None]
            cos, sin = self._rotary(torch.zeros(1, 1, self.width), everything)
            self._angles = (cos[0], sin[0])
        return self._angles[0][positions], self._angles[1][positions]

    def project(self, number: int, rows: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of one layer."""
        layer, (cos, sin) = self.layers[number], angles
        normed = F.rms_norm(rows, (self.width,), layer.norm_1, self.eps)
        mixed = F.linear(normed, layer.qkv, layer.qkv_bias).view(len(rows), -1, self.head_dim).transpose(0, 1)
        turning, value = mixed[: self.heads + self.kv_heads], mixed[self.heads + self.kv_heads :]
        half = self.head_dim // 2
        turned = turning * cos + torch.cat([-turning[..., half:], turning[..., :half]], -1) * sin
        return turned[: self.heads], turned[self.heads :], value

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the last rows of a sequence to all of it, causally: [rows, Hq * d]."""
        rows, keys = query.shape[1], key.shape[1]
        whole, mask = rows == keys, None
        if not whole and rows > 1:
            mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        out = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=whole and rows > 1,
            scale=self.scale,
            enable_gqa=self.heads != self.kv_heads,
        )
        return out[0].transpose(0, 1).flatten(1)

    def finish(self, number: int, rows: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: output projection, both residuals, the gated MLP."""
        layer = self.layers[number]
        rows = rows + F.linear(attended, layer.out)
        gate, up = F.linear(F.rms_norm(rows, (self.width,), layer.norm_2, self.eps), layer.gate_up).chunk(2, -1)
        return rows + F.linear(F.silu(gate) * up, layer.down)

    def logits(self, rows: Tensor) -> Tensor:
        """Next-token logits [..., vocabulary] of last-layer rows [..., D]."""
        return F.linear(F.rms_norm(rows, (self.width,), self.norm, self.eps), self.head)


class Prefix:
    """The rows before the question, at every layer; a layer runs when it is first asked for."""

    def __init__(self, decoder: Decoder, rows: Tensor, positions: Tensor, first: int = 0) -> None:
        """`rows` [n, D] enter layer `first`; `positions` int64 [n] are their rotary positions."""
        self.decoder, self.positions, self.first = decoder, positions, first
        self._angles = decoder.angles(positions)
        self._hidden = [rows]  # before layer `first`, `first + 1`, ...
        self._kv: list[KeyValue] = []

    def __len__(self) -> int:
        return len(self.positions)

    def kv(self, layer: int) -> KeyValue:
        """Keys and values of a layer, `layer >= first`."""
        self._run_to(layer)
        at = layer - self.first
        if at == len(self._kv):
            query, key, value = self.decoder.project(layer, self._hidden[at], self._angles)
            self._kv.append((key, value))
            self._query = query
        return self._kv[at]

    def keep(self, layer: int, index: Tensor) -> Prefix:
        """The same prefix with only the rows `index` (ascending, int64) from `layer` on."""
        self._run_to(layer)
        return Prefix(self.decoder, self._hidden[layer - self.first][index], self.positions[index], layer)

    def _run_to(self, layer: int) -> None:
        """Make the rows before `layer` be there."""
        while self.first + len(self._hidden) <= layer:
            number = self.first + len(self._hidden) - 1
            key, value = self.kv(number)
            attended = self.decoder.attend(self._query, key, value)
            self._hidden.append(self.decoder.finish(number, self._hidden[-1], attended))
