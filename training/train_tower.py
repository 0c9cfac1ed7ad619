"""Stage 1 of training: tower and projector, supervised on single frames.

Every pooled token, at each of the three strides, must name what its own cell shows
(``training.tower.frame_labels``) and which scene it is in. The read-out is one linear layer, thrown away
afterwards. Usage::

    python -m training.train_tower --out runs/tower --minutes 15
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import optim
from training.device import DEVICE
from training.draw import background, draw_frame
from training.seeds import seed_of
from training.tower import LABELS, STRIDES, Tower, TowerConfig, augment, frame_labels, pool, warm_start
from training.video_file import through_codec
from training.world import SCENES, make_video

CLIP = 16
Batch = tuple[Tensor, dict[int, Tensor], Tensor]


def sample(split: str, first: int, videos: int, per_video: int, codec: float = 0.6) -> Batch:
    """Frames ``uint8 [B, 64, 64, 3]``, labels ``{stride: [B, cells, LABELS]}`` and scenes ``int64 [B]``.

    Args:
        split: whose seeds.
        first: index of the first video.
        videos: how many.
        per_video: frames drawn from each (frames that show something are preferred).
        codec: share of the clips (of 16 frames, from several videos) that go through mp4.
    """
    frames, scenes = [], []
    labels: dict[int, list[np.ndarray]] = {s: [] for s in STRIDES}
    for index in range(first, first + videos):
        video = make_video(seed_of(split, index), frames=(10, 24))
        rng = random.Random(index)
        weights = [1 + 3 * len(video.visible(t)) for t in range(video.frames)]
        for t in rng.choices(range(video.frames), weights, k=per_video):
            scene = next(s for s in video.scenes if s.start <= t < s.end)
            table, name = frame_labels(video, t)
            frames.append(draw_frame(video, t, background(scene)))
            scenes.append(name)
            for s in STRIDES:
                labels[s].append(table[s])
    pixels = np.stack(frames)
    for low in range(0, len(pixels), CLIP):
        rng = random.Random(first * 1000 + low)
        part = pixels[low : low + CLIP]
        if rng.random() < codec:
            part = through_codec(part, rng.randint(18, 28))
        if split == "train":
            part = augment(part, np.random.default_rng(first + low))
        pixels[low : low + CLIP] = part
    return (
        torch.from_numpy(pixels),
        {s: torch.from_numpy(np.stack(v)) for s, v in labels.items()},
        torch.tensor(scenes),
    )


class Heads(nn.Module):
    """The read-out: every pooled token to its labels and its scene."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.labels, self.scene = nn.Linear(width, LABELS), nn.Linear(width, len(SCENES))
        nn.init.constant_(self.labels.bias, -4.0)


def loss_of(tower: Tower, heads: Heads, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Loss, and per stride the share of the tokens that show something whose label row is right."""
    frames, labels, scenes = batch[0].to(DEVICE), batch[1], batch[2].to(DEVICE)
    projected = tower.project(tower.encode(frames))
    loss, figures = torch.zeros((), device=DEVICE), {}
    for stride, want in labels.items():
        want = want.to(DEVICE)
        tokens = pool(projected, stride)
        logits = heads.labels(tokens).float()
        scene = heads.scene(tokens).float()
        each = F.binary_cross_entropy_with_logits(logits, want, reduction="none").sum(-1)
        names = scenes[:, None].expand(-1, tokens.shape[1])
        loss = loss + each.mean() + 0.5 * F.cross_entropy(scene.flatten(0, 1), names.flatten())
        busy = want.any(-1)
        right = ((logits > 0) == (want > 0)).all(-1)
        figures[f"busy/{stride}"] = right[busy].float().mean().item()
        figures[f"scene/{stride}"] = (scene.argmax(-1) == names).float().mean().item()
    return loss, figures


def main() -> None:
    """Train until ``--steps`` or ``--minutes`` is over; resumes from ``OUT/tower.pt`` where it exists."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--steps", type=int, default=2500)
    ap.add_argument("--minutes", type=float, default=1e9, help="stop, and let the rate fall, after so long")
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--videos", type=int, default=32)
    ap.add_argument("--per-video", type=int, default=3)
    args = ap.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tower = Tower(TowerConfig())
    warm_start(tower, sample("train", 0, 96, 3)[0])
    heads = Heads(tower.c.out)
    both = nn.ModuleList([tower, heads]).to(DEVICE)
    optimisers = optim.build(both, args.lr, ("blocks", "linear_"))
    path, step, spent = args.out / "tower.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=DEVICE)
        both.load_state_dict(state["model"])
        if "optim" in state:  # training.start has none
            for o, s in zip(optimisers, state["optim"], strict=True):
                o.load_state_dict(s)
        step, spent = state["step"], state["spent"]
    valid = sample("valid", 10**7, 160, 3, codec=1.0)
    began = time.time() - spent
    while True:
        spent = time.time() - began
        share = max(step / args.steps, spent / 60 / args.minutes)
        done = share >= 1
        if step % 100 == 0 or done:
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
                value, figures = loss_of(tower, heads, valid)
            print(
                f"{step} {spent:.0f}s valid {value:.4f} " + " ".join(f"{k} {v:.3f}" for k, v in figures.items()),
                flush=True,
            )
        if step % 200 == 0 or done:
            torch.save(
                {
                    "model": both.state_dict(),
                    "optim": [o.state_dict() for o in optimisers],
                    "step": step,
                    "spent": spent,
                },
                path,
            )
        if done:
            return
        optim.set_lr(optimisers, args.lr * min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (1 - share) / 0.4)))
        batch = sample("train", step * args.videos, args.videos, args.per_video)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss, _ = loss_of(tower, heads, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for o in optimisers:
            o.step()
            o.zero_grad()
        step += 1
        if step % 25 == 0:
            print(f"{step} {loss.item():.4f} {time.time() - began:.0f}s", flush=True)


if __name__ == "__main__":
    main()
