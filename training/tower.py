"""The vision tower and projector as training runs them, and the labels they are pre-trained with.

Arithmetic and parameter shapes are SigLIP's (``transformers``' ``SiglipVisionModel`` without post norm and
head, then LLaVA-OneVision's projector); a test compares the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training.draw import Pixels, item_mask
from training.world import COLOURS, DIGITS, PLACES, SCENES, SHAPES, SIZE, WORDS, Item, Video

STRIDES = (2, 4, 8)  # of the 8 x 8 grid: 16, 4 and 1 tokens a frame
COMBOS = len(SHAPES) * len(COLOURS)
LABELS = COMBOS + len(DIGITS) + len(WORDS) + len(SHAPES) * len(PLACES) + len(SHAPES) + len(COLOURS)
SHARE = 0.12  # of an item's pixels that must lie in a cell for the cell to show it


@dataclass(frozen=True)
class TowerConfig:
    """Shape of the tower; ``out`` is the language model's hidden size."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 384
    patch: int = 8
    out: int = 128

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return SIZE // self.patch


class Block(nn.Module):
    """One pre-norm SigLIP encoder layer."""

    def __init__(self, c: TowerConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.layer_norm1, self.layer_norm2 = (
            nn.LayerNorm(c.hidden, eps=1e-6),
            nn.LayerNorm(c.hidden, eps=1e-6),
        )
        self.q_proj, self.k_proj = nn.Linear(c.hidden, c.hidden), nn.Linear(c.hidden, c.hidden)
        self.v_proj, self.out_proj = nn.Linear(c.hidden, c.hidden), nn.Linear(c.hidden, c.hidden)
        self.fc1, self.fc2 = nn.Linear(c.hidden, c.intermediate), nn.Linear(c.intermediate, c.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to the same shape."""
        b, n, width = x.shape
        h = self.layer_norm1(x)
        q, k, v = (f(h).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        weights = ((q * (width // self.heads) ** -0.5) @ k.transpose(2, 3)).softmax(-1)
        x = x + self.out_proj((weights @ v).transpose(1, 2).reshape(b, n, width))
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


class Tower(nn.Module):
    """Tower and projector."""

    def __init__(self, c: TowerConfig) -> None:
        super().__init__()
        self.c = c
        self.patch_embedding = nn.Linear(3 * c.patch**2, c.hidden)
        self.position_embedding = nn.Parameter(torch.randn(c.grid**2, c.hidden) * 0.02)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.linear_1, self.linear_2 = nn.Linear(c.hidden, c.out), nn.Linear(c.out, c.out)

    def patches(self, frames: Tensor) -> Tensor:
        """``uint8 [B, 64, 64, 3]`` to normalised patches
        ``float [B, N, 3 * p * p]`` (mean and deviation 0.5).
        """
        b, p, g = len(frames), self.c.patch, self.c.grid
        x = frames.view(b, g, p, g, p, 3).permute(0, 1, 3, 5, 2, 4).reshape(b, g * g, -1)
        return x.to(self.patch_embedding.weight.dtype) / 127.5 - 1.0

    def encode(self, frames: Tensor) -> Tensor:
        """Tower output, ``[B, N, C]``, without the post norm."""
        x = self.patch_embedding(self.patches(frames)) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return x

    def project(self, x: Tensor) -> Tensor:
        """The projector, ``[..., C]`` to ``[..., H]``."""
        return self.linear_2(F.gelu(self.linear_1(x)))


def pool(x: Tensor, stride: int) -> Tensor:
    """Bilinear pooling of ``[B, g * g, H]`` to ``[B, t * t, H]``,
    ``t = ceil(g / stride)``, as LLaVA-OneVision does it.
    """
    b, n, width = x.shape
    g = round(n**0.5)
    size = -(-g // stride)
    if g % stride == 0:  # the same numbers as interpolate: the two middle rows of every cell, averaged
        x = x.view(b, size, stride, size, stride, width)
        lo = stride // 2 - 1
        return x[:, :, lo : lo + 2, :, lo : lo + 2].mean(dim=(2, 4)).reshape(b, size * size, width)
    x = x.transpose(1, 2).view(b, width, g, g)
    x = F.interpolate(x, size=(size, size), mode="bilinear")
    return x.flatten(2).transpose(1, 2)


def _columns(item: Item, frame: int) -> list[int]:
    if item.kind == "digit":
        return [COMBOS + DIGITS.index(item.name)]
    if item.kind == "word":
        return [COMBOS + len(DIGITS) + WORDS.index(item.name)]
    colour = item.colour_at(frame)
    assert colour is not None
    x, y = item.centre(frame)
    place = 2 * (y >= SIZE / 2) + (x >= SIZE / 2)
    shape = SHAPES.index(item.name)
    base = COMBOS + len(DIGITS) + len(WORDS)
    tail = base + len(SHAPES) * len(PLACES)
    return [
        shape * len(COLOURS) + COLOURS.index(colour),
        base + shape * len(PLACES) + int(place),
        tail + shape,
        tail + len(SHAPES) + COLOURS.index(colour),
    ]


def frame_labels(video: Video, frame: int) -> tuple[dict[int, NDArray[np.float32]], int]:
    """What each cell of each stride shows, ``{stride: [cells, LABELS]}`` of 0 and 1; the scene's index."""
    scene = next(s for s in video.scenes if s.start <= frame < s.end)
    return label_cells(video, frame, _columns, LABELS), SCENES.index(scene.kind)


def label_cells(
    video: Video, frame: int, columns: Callable[[Item, int], list[int]], width: int
) -> dict[int, NDArray[np.float32]]:
    """``{stride: [cells, width]}``: 1 in an item's ``columns(item, frame)``
    where a cell shows enough of it, else 0.
    """
    labels = {s: np.zeros(((8 // s) ** 2, width), np.float32) for s in STRIDES}
    for item in video.visible(frame):
        mask = item_mask(item, frame).astype(np.float32)
        mask /= mask.sum()
        for stride, table in labels.items():
            cells = 8 // stride
            share = mask.reshape(cells, SIZE // cells, cells, SIZE // cells).sum(axis=(1, 3)).ravel()
            for column in columns(item, frame):
                table[share >= SHARE, column] = 1.0
    return labels


def augment(frames: Pixels, rng: np.random.Generator) -> Pixels:
    """Slight brightness, contrast and noise, one draw for all frames."""
    x = frames.astype(np.float32)
    x = (x - 128) * rng.uniform(0.9, 1.1) + 128 + rng.uniform(-12, 12)
    if rng.random() < 0.5:
        x += rng.normal(0, rng.uniform(0, 5), x.shape)
    return np.clip(x, 0, 255).astype(np.uint8)


@torch.no_grad()
def warm_start(tower: Tower, frames: Tensor) -> None:
    """Start from whitened patches and sine-cosine positions: a fresh ViT needs long to find either by itself.

    Args:
        tower: changed in place.
        frames: ``uint8 [B, 64, 64, 3]``, a few hundred; their patches' principal axes become the patch
            embedding.
    """
    c = tower.c
    patches = tower.patches(frames).flatten(0, 1).float()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    values, vectors = values.flip(0)[: c.hidden], vectors.flip(1)[:, : c.hidden]
    tower.patch_embedding.weight.copy_((vectors / (values + 3e-3).sqrt()).T)
    tower.patch_embedding.bias.copy_(-(tower.patch_embedding.weight @ mean))
    at = torch.arange(c.grid).float()
    rate = torch.pi * torch.arange(1, c.hidden // 4 + 1) / c.grid * 0.5
    axis = torch.cat((torch.sin(at[:, None] * rate), torch.cos(at[:, None] * rate)), dim=1)  # [g, hidden / 2]
    both = torch.cat((axis[:, None].expand(-1, c.grid, -1), axis[None].expand(c.grid, -1, -1)), dim=-1)
    tower.position_embedding.copy_(both.reshape(c.grid**2, c.hidden) * 0.5)
