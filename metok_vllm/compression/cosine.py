"""Cosine similarity as every stage-1 score uses it (docs/method.md sections 1.1 and 1.3)."""

import torch
from torch import Tensor

NORM_FLOOR = 1e-12
"""Smallest norm divided by: the cosine with an all-zero vector is 0, not NaN."""


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the last dimensions of `a` and `b`, which broadcast; always float32."""
    a, b = a.to(torch.float32), b.to(torch.float32)
    return (a * b).sum(dim=-1) / (_norm(a) * _norm(b))


def _norm(a: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(a, dim=-1)
    return norm.clamp_min(NORM_FLOOR)
