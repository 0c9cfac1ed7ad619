"""Attention of packed rows for training: PyTorch's fused forward, and a backward that knows the packing.

PyTorch's own CPU backward of ``scaled_dot_product_attention`` is several times slower than its forward, and a
mask over all questions wastes most of its work. Both halves of a packed row are done here as they are: the
prefix causally, every question over the prefix and itself.

Notation: B videos, H heads, P prefix tokens, N questions of L tokens, D a head's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 128  # of the scores at a time in the backward: what stays in a core's cache
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(q: Tensor, k: Tensor, v: Tensor, prefix: int, questions: int, bias: Tensor) -> Tensor:
    """Attention of packed rows.

    Args:
        q: ``[B, H, P + N * L, D]``, as ``k`` and ``v``.
        k: see ``q``.
        v: see ``q``.
        prefix: P.
        questions: N.
        bias: ``[B, 1, 1, P]``, 0 or a large negative number, added to the questions' scores of the prefix.

    Returns:
        ``[B, H, P + N * L, D]``.
    """
    (qp, qo), (kp, ko), (vp, vo) = ((t[:, :, :prefix], t[:, :, prefix:]) for t in (q, k, v))
    if q.device.type == "cpu":
        return torch.cat((_Causal.apply(qp, kp, vp), _Asked.apply(qo, kp, vp, ko, vo, bias, questions)), dim=2)
    first = F.scaled_dot_product_attention(qp, kp, vp, is_causal=True)
    own = _own(qo.shape[2], questions, q).expand(len(q), 1, -1, -1)
    mask = torch.cat((bias.expand(-1, -1, qo.shape[2], -1), own), dim=-1)
    return torch.cat((first, F.scaled_dot_product_attention(qo, k, v, attn_mask=mask)), dim=2)


def _own(rows: int, questions: int, like: Tensor) -> Tensor:
    """``[N * L, N * L]``: 0 where a token may see another of its question, else a large negative number."""
    at = torch.arange(rows, device=like.device)
    owner = at // (rows // questions)
    seen = (owner[:, None] == owner) & (at[:, None] >= at)
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, torch.finfo(like.dtype).min)


class _Backward:
    """Gradients of ``softmax(q k' / sqrt(D)) v`` from the row's log-sum-exp, a block of rows at a time."""

    def __init__(self, q: Tensor, lse: Tensor, out: Tensor, grad: Tensor) -> None:
        self.scale = q.shape[-1] ** -0.5
        self.low = lse.to(q.dtype)
        off = (self.low.float() - lse).exp().to(q.dtype)[..., None]  # undoes the rounding of lse
        self.q, self.grad = q * self.scale, grad
        self.delta = (grad.float() * out.float()).sum(-1).to(q.dtype)
        self.q_off, self.grad_off, self.off = self.q * off, grad * off, off

    def block(self, rows: slice, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Probabilities and the scores' gradients of ``rows`` by the keys ``k``:
        ``[B, H, rows, keys]`` each.
        """
        p = self.q[:, :, rows] @ k.transpose(-1, -2)
        if bias is not None:
            p += bias
        p = p.sub_(self.low[:, :, rows, None]).exp_()
        ds = self.grad[:, :, rows] @ v.transpose(-1, -2)
        return p, ds.sub_(self.delta[:, :, rows, None]).mul_(p)


class _Causal(torch.autograd.Function):
    """The prefix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = _flash(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, out, lse.view(q.shape[:3]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        back = _Backward(q, lse, out, grads[0])
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for low in range(0, q.shape[2], _ROWS):
            rows = slice(low, low + _ROWS)
            high = min(low + _ROWS, q.shape[2])
            p, ds = back.block(rows, k[:, :, :high], v[:, :, :high], None)
            ds, p = (torch.cat((t[..., :low], t[..., low:].tril()), dim=-1) for t in (ds, p))
            dq[:, :, rows] = ds @ k[:, :, :high]
            dk[:, :, :high] += ds.transpose(-1, -2) @ back.q_off[:, :, rows]
            dv[:, :, :high] += p.transpose(-1, -2) @ back.grad_off[:, :, rows]
        return dq.mul_(back.off * back.scale), dk, dv


class _Asked(torch.autograd.Function):
    """The questions: each over the prefix and over itself."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kp: Tensor, vp: Tensor, ko: Tensor, vo: Tensor, bias: Tensor, questions: int
    ) -> Tensor:
        b, h, rows, d = q.shape
        far, lse_far = _flash(q, kp, vp, 0.0, False, attn_mask=bias.expand(-1, -1, rows, -1))
        lse_far = lse_far.view(b, h, rows)
        qn, kn, vn = (t.reshape(b, h, questions, rows // questions, d) for t in (q, ko, vo))
        length = qn.shape[3]
        causal = torch.full((length, length), float("-inf"), device=q.device).triu(1)
        near = (qn @ kn.transpose(-1, -2)).float() * d**-0.5 + causal
        lse = torch.logaddexp(lse_far, near.logsumexp(-1).view(b, h, rows))
        near = (near - lse.view(b, h, questions, length, 1)).exp()
        out = far * (lse_far - lse).exp()[..., None].to(q.dtype) + (near.to(q.dtype) @ vn).view_as(q)
        ctx.save_for_backward(q, kp, vp, kn, vn, bias, lse, near, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, kp, vp, kn, vn, bias, lse, near, out = ctx.saved_tensors
        b, h, questions, length, _ = kn.shape
        back = _Backward(q, lse, out, grads[0])
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(kp), torch.zeros_like(vp)
        for low in range(0, q.shape[2], _ROWS):
            rows = slice(low, low + _ROWS)
            p, ds = back.block(rows, kp, vp, bias)
            dq[:, :, rows] = ds @ kp
            dk += ds.transpose(-1, -2) @ back.q_off[:, :, rows]
            dv += p.transpose(-1, -2) @ back.grad_off[:, :, rows]
        dq *= back.off * back.scale
        near = near.to(q.dtype)
        grad = grads[0].reshape(kn.shape)
        ds = (grad @ vn.transpose(-1, -2) - back.delta.view(b, h, questions, length, 1)) * near
        dq += (ds @ kn).view_as(q) * back.scale
        dko = (ds.transpose(-1, -2) @ q.reshape(kn.shape)) * back.scale
        dvo = near.transpose(-1, -2) @ grad
        return dq, dk, dv, dko.reshape(q.shape), dvo.reshape(q.shape), None, None
