"""Muon for the matrices, AdamW for the rest, and a learning-rate schedule that a restart does not disturb."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration to the nearest semi-orthogonal matrices: ``[K, m, n]`` to the same."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16)
    turned = x.shape[1] > x.shape[2]
    if turned:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.transpose(1, 2)
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.transpose(1, 2) if turned else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix; matrices of one shape are handled as one batch."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.01, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update; ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(m, group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5  # the update's RMS is then AdamW's
                for p, u in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(u, alpha=-group["lr"] * scale)


def build(module: nn.Module, lr: float, matrices: tuple[str, ...], decay: float = 0.01) -> list[torch.optim.Optimizer]:
    """Muon over 2-D weights whose name contains one of ``matrices``, AdamW over all else that trains."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    inner = [p for n, p in named if p.dim() == 2 and any(m in n for m in matrices)]
    chosen = {id(p) for p in inner}
    outer = [p for _, p in named if id(p) not in chosen]
    return [Muon(inner, lr, decay=decay), torch.optim.AdamW(outer, lr, betas=(0.9, 0.98), weight_decay=0.0)]


def set_lr(optimisers: list[torch.optim.Optimizer], lr: float) -> None:
    """The same learning rate everywhere."""
    for o in optimisers:
        for group in o.param_groups:
            group["lr"] = lr


def trapezoid(step: int, total: int, peak: float, warm: int = 100, fall: float = 0.25, least: float = 0.02) -> float:
    """Warm-up, plateau, linear fall to ``least * peak`` over the last ``fall`` of ``total`` steps."""
    down = max(1, int(total * fall))
    return peak * min((step + 1) / warm, 1.0) * max(least, min(1.0, (total - step) / down))
