"""The language model as training runs it: Qwen2's arithmetic with many questions packed behind one video.

Parameter names and shapes are those of ``transformers``' ``Qwen2Model`` (checked by a test that compares the
logits), so export is a renaming. What differs is the attention: a row is ``[prefix | question 1 | question 2
| ...]``, the prefix (chat header, visual tokens, separator) is causal, every question sees the prefix and
itself only and its positions go on from the prefix's end. One pass over a video thus serves all its
questions.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training import fused
from training.attention import attend


@dataclass(frozen=True)
class LMConfig:
    """Shape of the language model; ``head_dim`` is what vLLM's CPU attention accepts (32 or 64)."""

    vocab: int
    hidden: int = 128
    layers: int = 12
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 384
    rope_theta: float = 10000.0
    eps: float = 1e-6


@dataclass
class Packed:
    """A batch of packed rows (all tensors on the model's device);
    ``N`` questions of up to ``L`` tokens each a video.

    Attributes:
        embeds: ``[B, P + N * L, H]``, prefix padded at its end to P, every question at its end to L.
        positions: int64 ``[B, P + N * L]``, rotary positions.
        prefix_bias: ``[B, 1, P]``, 0 for a real prefix token and a large negative number for padding.
        prefix: P.
        questions: N.
    """

    embeds: Tensor
    positions: Tensor
    prefix_bias: Tensor
    prefix: int
    questions: int


class Layer(nn.Module):
    """One decoder layer, parameters named as in ``Qwen2DecoderLayer`` after flattening."""

    def __init__(self, c: LMConfig) -> None:
        super().__init__()
        self.c = c
        self.input_layernorm = nn.Parameter(torch.ones(c.hidden))
        self.post_attention_layernorm = nn.Parameter(torch.ones(c.hidden))
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=False)

    @torch.no_grad()
    def mimic(self, copying: float = 0.3) -> None:
        """Start with attention to similar tokens and a faint copy of what they hold.

        Every query projection begins as its key projection and the output as the value's transpose
        ("mimetic initialisation", arXiv 2305.09828, with a positive sign for the copy): looking things up
        need not be discovered.
        """
        c, group = self.c, self.c.heads // self.c.kv_heads
        keys = self.k_proj.weight.view(c.kv_heads, 1, c.head_dim, c.hidden)
        self.q_proj.weight.copy_(keys.expand(-1, group, -1, -1).reshape(-1, c.hidden))
        values = self.v_proj.weight.view(c.kv_heads, 1, c.head_dim, c.hidden)
        self.o_proj.weight.add_(copying * values.expand(-1, group, -1, -1).reshape(-1, c.hidden).T)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Packed) -> Tensor:
        """``x [B, P + N * L, H]`` to the same shape; ``cos``/``sin`` ``[B, 1, P + N * L, head_dim]``."""
        c, (b, n, _) = self.c, x.shape
        h = fused.rms_norm(x, self.input_layernorm, c.eps)
        q = self.q_proj(h).view(b, n, c.heads, c.head_dim).transpose(1, 2)
        k = self.k_proj(h).view(b, n, c.kv_heads, c.head_dim).transpose(1, 2)
        v = self.v_proj(h).view(b, n, c.kv_heads, c.head_dim).transpose(1, 2)
        q, k = fused.rotate(q, cos, sin), fused.rotate(k, cos, sin)
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, dim=1) for t in (k, v))
        mixed = attend(q, k, v, batch.prefix, batch.questions, batch.prefix_bias[:, None])
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(b, n, -1))
        h = fused.rms_norm(x, self.post_attention_layernorm, c.eps)
        return x + self.down_proj(fused.swiglu(self.gate_proj(h), self.up_proj(h)))


class LM(nn.Module):
    """Qwen2 with an untied head."""

    def __init__(self, c: LMConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.Parameter(torch.ones(c.hidden))
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = 0.3 if "embed" in name else 0.02 if "lm_head" in name else p.shape[1] ** -0.5 * 0.8
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    scale *= (2 * c.layers) ** -0.5
                nn.init.normal_(p, std=scale)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for layer in self.layers:
            layer.mimic()

    def hidden(self, batch: Packed, taps: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Final-norm states of the questions, ``[B, N * L, H]``, and all states after the layers ``taps``."""
        c, x = self.c, batch.embeds
        inv = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=x.device).float() / c.head_dim)
        angle = batch.positions[:, None, :, None].float() * inv
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        tapped = {}
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, cos, sin, batch)
            if number in taps:
                tapped[number] = x
        return self.read_out(x[:, batch.prefix :]), tapped

    def read_out(self, x: Tensor) -> Tensor:
        """The final norm."""
        return fused.rms_norm(x, self.norm, self.c.eps)
