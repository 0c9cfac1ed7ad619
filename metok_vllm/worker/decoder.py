"""How a language model is reached: its layers, their attention, its embeddings. Families override it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Decoder:
    """A decoder as vLLM builds those of Llama and Qwen2.

    `body` has `layers`, `norm` and `embed_tokens`; a layer has its attention as `self_attn.attn` and its MLP
    as `mlp`, and takes positions, hidden state and residual.
    """

    def __init__(self, body: Any) -> None:
        self.body = body

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The layers, first to last."""
        layers: Sequence[nn.Module] = self.body.layers
        return layers

    @property
    def norm(self) -> nn.Module:
        """What follows the last layer: called with hidden state and residual."""
        norm: nn.Module = self.body.norm
        return norm

    def attention(self, index: int) -> Any:
        """The attention of a layer: vLLM's `Attention`."""
        layer: Any = self.layers[index]
        return layer.self_attn.attn

    def mlp(self, index: int) -> nn.Module:
        """The MLP of a layer, dense or of experts; it treats each row alone.

        Raises:
            TypeError: it has none.
        """
        layer = self.layers[index]
        mlp = getattr(layer, "mlp", None)
        if not isinstance(mlp, nn.Module):
            raise TypeError(f"METok runs the MLP of a layer in slices, but {type(layer).__name__} has no mlp")
        return mlp

    def call(
        self, index: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a layer.

        Args:
            index: which.
            positions: int64 [rows], or [axes, rows] where rotary positions have several axes.
            hidden: [rows, hidden].
            residual: [rows, hidden]; None before the first layer.

        Returns:
            Hidden state and residual, [rows, hidden] each.
        """
        hidden, residual = self.layers[index](positions, hidden, residual)
        assert residual is not None
        return hidden, residual

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of token ids int64 [n]: [n, hidden]."""
        embeddings: torch.Tensor = self.body.embed_tokens(ids)
        return embeddings
