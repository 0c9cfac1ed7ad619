"""A LLaVA-OneVision checkpoint for the local runner: frames to features, prompts to token ids."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.accuracy.data import Item, UsageError
from benchmarks.accuracy.decoder import Decoder
from metok_vllm.compression.events import frame_vectors
from metok_vllm.compression.pooling import pool_frames
from metok_vllm.frontend.aligner_inputs import AlignerProcessor, aligner_folder
from metok_vllm.frontend.question import last_user_text, turn_markers
from metok_vllm.frontend.question_rows import question_rows
from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoSettings
from metok_vllm.worker.dual_tower import DualTower

STOCK_STRIDE = 2
FRAMES_PER_BLOCK = 32
Frames = npt.NDArray[np.uint8]


@dataclass
class Video:
    """One video of T frames, encoded once for all methods and questions."""

    name: str
    frames: Frames  # [T, H, W, 3]
    features: Tensor  # [T, grid, grid, D], tower and projector
    aligned: Tensor | None  # [T, E], pooled embeddings of the aligner's image tower
    newline: Tensor  # [D], what the model puts after a video
    _pooled: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def vectors(self) -> Tensor:
        """Mean feature of each frame, float32 [T, D]."""
        return frame_vectors(self.features.flatten(1, 2))

    def pooled(self, stride: int = STOCK_STRIDE) -> Tensor:
        """Every frame pooled as the model does: [T, tokens of a frame, D]."""
        if stride not in self._pooled:
            self._pooled[stride] = pool_frames(self.features, stride, "bilinear")
        return self._pooled[stride]


@dataclass(frozen=True)
class Asked:
    """A question as the model reads it."""

    header: tuple[int, ...]  # token ids before the video
    suffix: tuple[int, ...]  # and after it
    rows: tuple[int, ...]  # indices in `suffix` of the question's own tokens
    query: tuple[int, ...]  # the question alone, for the embedding aligner
    windows: Tensor | None  # int64 [windows, length], for the aligner's text tower
    draft: tuple[int, ...]  # the expected answer, as a guess at what decoding will give; never believed unchecked
    seed: int  # of whatever is random about this question


def require_model(folder: Path) -> None:
    """Raise `UsageError` unless `folder` holds a model."""
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"There is no model in {folder}; name the folder of one with --model (training/README.md makes one)."
        )


class Checkpoint:
    """A model's folder, loaded in float32 on the CPU.

    Raises:
        UsageError: the folder holds another kind of model.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoProcessor, LlavaOnevisionForConditionalGeneration

        self.folder = folder
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind != "llava_onevision":
            raise UsageError(f"The local runner is for LLaVA-OneVision, and {folder} holds a {kind} model; use --url.")
        load: Any = LlavaOnevisionForConditionalGeneration.from_pretrained
        self.model: Any = load(folder, dtype=torch.float32).eval().requires_grad_(False)
        processor: Any = AutoProcessor
        self.processor: Any = processor.from_pretrained(folder)
        self.tokenizer: Any = self.processor.tokenizer
        self.decoder = Decoder(self.model)
        vision = self.model.config.vision_config
        self.grid = int(vision.image_size) // int(vision.patch_size)
        tower = aligner_folder(str(folder))
        self.aligner = None if tower is None else AlignerProcessor(tower)
        self.tower = None if tower is None else DualTower(tower, torch.float32, torch.device("cpu"))
        stop = self.model.generation_config.eos_token_id
        self.stop = frozenset(stop if isinstance(stop, list) else [] if stop is None else [stop])
        self._markers = turn_markers(self.tokenizer)

    def read(self, path: Path, most: int) -> Video:
        """Decode (evenly sampled, at most `most` frames, as the server does) and encode a video.

        Raises:
            metok_vllm.media.settings.VideoError: the file is no usable video.
        """
        frames = decode_video(path.read_bytes(), VideoSettings(num_frames=most, threads=1)).frames
        return self.encode(path.name, frames)

    @torch.inference_mode()
    def encode(self, name: str, frames: Frames) -> Video:
        """Encode frames [T, H, W, 3]."""
        pixels = self.processor.video_processor([frames], return_tensors="pt")["pixel_values_videos"][0]
        features = torch.cat([self._features(block) for block in torch.split(pixels, FRAMES_PER_BLOCK)])
        aligned = None
        if self.tower is not None:
            assert self.aligner is not None
            aligned = self.tower.frames(self.aligner.pixels(frames))
        return Video(name, frames, features, aligned, self.model.model.image_newline.detach())

    def _features(self, pixels: Tensor) -> Tensor:
        config = self.model.config
        states = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        tokens: Tensor = self.model.model.multi_modal_projector(states[config.vision_feature_layer])
        grid: Tensor = tokens.view(len(pixels), self.grid, self.grid, -1)
        return grid

    @torch.inference_mode()
    def ask(self, item: Item) -> Asked:
        """Lay out the chat prompt of a question."""
        content = [{"type": "video"}, {"type": "text", "text": item.prompt}]
        message = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(message, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text).input_ids
        at = ids.index(self.model.config.video_token_id)
        remove = tuple(sorted({self.processor.video_token, *self.tokenizer.all_special_tokens}, key=len, reverse=True))
        query = last_user_text(self.tokenizer.decode(ids), self._markers, remove)
        words = self.tokenizer(query, add_special_tokens=False).input_ids
        windows = None if self.aligner is None else self.aligner.windows(query)
        draft = self.tokenizer(item.answer, add_special_tokens=False).input_ids
        seed = zlib.crc32(f"{item.video.name}\n{item.prompt}".encode())
        rows = question_rows(ids, [(at, 1)], at + 1, self.tokenizer, self._markers, remove)
        own = tuple(row - at - 1 for row in rows)
        return Asked(tuple(ids[:at]), tuple(ids[at + 1 :]), own, tuple(words), windows, tuple(draft), seed)

    def embed(self, ids: tuple[int, ...]) -> Tensor:
        """Input embeddings [n, D] of token ids."""
        rows: Tensor = self.decoder.embedding[torch.tensor(ids, dtype=torch.long)]
        return rows
