"""A paired image and text tower beside a model, as the oracle takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from metok_vllm.demo.checkpoint import ALIGNER_FOLDER, ALIGNER_WINDOW, AlignerKind, build_aligner
from tests.support.oracle.run import Towers


def windows(tokenizer: Any, question: str) -> torch.Tensor:
    """The question cut to the tower's window by hand:
    special tokens around every piece, padded to full length.
    """
    ids = tokenizer(question, add_special_tokens=False).input_ids
    special = tokenizer("", add_special_tokens=True).input_ids
    before, after = (special[:1], special[1:]) if len(special) == 2 else ([], special)
    room = ALIGNER_WINDOW - len(special)
    rows = [[*before, *ids[i : i + room], *after] for i in range(0, len(ids), room)]
    return torch.tensor([row + [tokenizer.pad_token_id] * (ALIGNER_WINDOW - len(row)) for row in rows])


@dataclass(frozen=True)
class DualTower:
    """The towers of a folder, with their processors."""

    model: Any
    images: Any
    tokenizer: Any

    def of(self, videos: Sequence[Any], question: str) -> Towers:
        """What the oracle takes: the model, its frames of each video, the question's windows.

        Args:
            videos: of each the frames that the tower looks at, uint8 [T, h, w, 3].
        """
        pixels = [self.images(list(frames), return_tensors="pt")["pixel_values"] for frames in videos]
        return self.model, pixels, windows(self.tokenizer, question)


def load_dual_tower(model: Path) -> DualTower:
    """That of a model's folder."""
    folder = model / ALIGNER_FOLDER
    parts = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    return DualTower(*parts, AutoTokenizer.from_pretrained(folder))


def with_dual_tower(model: Path, kind: AlignerKind, seed: int) -> DualTower:
    """Put a tiny one into a model's folder, and load it."""
    build_aligner(model / ALIGNER_FOLDER, kind, torch.Generator().manual_seed(seed), "float32")
    return load_dual_tower(model)
