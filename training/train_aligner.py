"""The paired text/image tower: which frames is a question about?

A SigLIP whose image side starts as the video model's tower (frozen) and learns its pooling head; the text
side is new. Sigmoid loss over all pairs of a batch, labelled from the scene graphs
(:mod:`training.relevance`): several frames may match one text. Usage::

    python -m training.train_aligner --tower runs/tower/tower.pt --tokenizer runs/lm --out runs/aligner
    --minutes 12
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel

from training import optim
from training.draw import background, draw_frame
from training.packing import Coder
from training.questions import ASKERS, all_questions
from training.relevance import focus_of
from training.seeds import seed_of
from training.tokenizer import load_tokenizer
from training.tower import TowerConfig, augment
from training.train_lm import load_tower, word_directions
from training.video_file import through_codec
from training.world import make_video

WINDOW = 32  # tokens of the text tower; shorter texts are padded, as SigLIP does


def build(vocab: int, tower: TowerConfig) -> SiglipModel:
    """An untrained SigLIP of the tower's shape and a two-layer text side."""
    shared = {"hidden_size": tower.hidden, "num_attention_heads": tower.heads}
    text: dict[str, Any] = shared | {
        "vocab_size": vocab,
        "max_position_embeddings": WINDOW,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "projection_size": tower.hidden,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = shared | {
        "intermediate_size": tower.intermediate,
        "num_hidden_layers": tower.layers,
        "image_size": 64,
        "patch_size": tower.patch,
    }
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


def encode_texts(tok: Tokenizer, texts: list[str]) -> Tensor:
    """First window of every text, padded with 0: int64 ``[B, 32]``."""
    out = torch.zeros(len(texts), WINDOW, dtype=torch.long)
    for row, text in zip(out, texts, strict=True):
        ids = tok.encode(text).ids[:WINDOW]
        row[: len(ids)] = torch.tensor(ids)
    return out


def sample(split: str, first: int, videos: int, frames: int = 4, texts: int = 3) -> tuple[Tensor, list[str], Tensor]:
    """Frames ``uint8 [B, 64, 64, 3]``, texts, and whether they match, bool ``[frames, texts]``."""
    pixels, names, where = [], [], []
    for index in range(first, first + videos):
        rng = random.Random(index)
        video = make_video(seed_of(split, index), (10, 30))
        stock = [q for kind in ASKERS for q in all_questions(video)[kind]]
        rng.shuffle(stock)
        names += [q.text for q in stock if focus_of(q.text)][:texts]
        weights = [1 + 4 * len(video.visible(t)) for t in range(video.frames)]
        for t in rng.choices(range(video.frames), weights, k=frames):
            scene = next(s for s in video.scenes if s.start <= t < s.end)
            pixels.append(draw_frame(video, t, background(scene)))
            where.append((video, t))
    stack = np.stack(pixels)
    for low in range(0, len(stack), 16):
        stack[low : low + 16] = through_codec(stack[low : low + 16], 18 + (first + low) % 11)
        if split == "train":
            stack[low : low + 16] = augment(stack[low : low + 16], np.random.default_rng(first + low))
    match = [[any(f.shown(v, t) for f in focus) for focus in map(focus_of, names)] for v, t in where]
    return torch.from_numpy(stack), names, torch.tensor(match)


def similarity(model: SiglipModel, tower: Any, pixels: Tensor, ids: Tensor) -> Tensor:
    """Cosines ``[frames, texts]``; the image side up to its last layer is the frozen ``tower``."""
    with torch.no_grad():
        states = tower.encode(pixels)
    vision: Any = model.vision_model
    image = vision.head(vision.post_layernorm(states.float()))
    text = model.text_model(input_ids=ids).pooler_output
    return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def ranking(cosines: Tensor, match: Tensor) -> float:
    """Mean over texts of the chance that a matching frame is above one that does not match."""
    out = []
    for column, want in zip(cosines.T, match.T, strict=True):
        if want.any() and not want.all():
            out.append((column[want][:, None] > column[~want][None]).float().mean().item())
    return sum(out) / len(out)


def copy_tower(model: SiglipModel, tower: Any) -> None:
    """Put the video model's tower into the image side."""
    from training.export import tower_weights

    own = {k.removeprefix("vision_tower.vision_model."): v for k, v in tower_weights(tower).items()}
    wanted = {k: v for k, v in own.items() if k.startswith(("embeddings.", "encoder."))}
    missing = model.vision_model.load_state_dict(wanted, strict=False)
    left = [k for k in missing.missing_keys if not k.startswith(("post_layernorm", "head"))]
    if left or missing.unexpected_keys:
        raise RuntimeError(f"tower and aligner differ: {left} {missing.unexpected_keys}")


def main() -> None:
    """Train for ``--minutes``; writes ``aligner.pt``, a state dict of ``SiglipModel``."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--tower", "--tokenizer", "--out"):
        ap.add_argument(name, type=Path, required=True)
    ap.add_argument("--minutes", type=float, default=12)
    ap.add_argument("--lr", type=float, default=2e-3)
    args = ap.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(2)
    tok, tower = load_tokenizer(args.tokenizer), load_tower(args.tower)
    model = build(tok.get_vocab_size(), tower.c)
    copy_tower(model, tower)
    path, step, spent = args.out / "aligner.pt", 0, 0.0
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(("vision_model.embeddings", "vision_model.encoder")))
    optimisers = optim.build(model, args.lr, ("encoder.layers", "head."))
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        if "optim" in state:  # training.start has none
            for o, kept in zip(optimisers, state["optim"], strict=True):
                o.load_state_dict(kept)
        step, spent = state["step"], state["spent"]
    else:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(10.0))
            model.logit_bias.fill_(-5.0)
            for token, row in word_directions(args.tower, Coder(tok)).items():
                model.text_model.embeddings.token_embedding.weight[token] = row
    tower = tower.to(torch.bfloat16)
    valid = sample("valid", 2 * 10**7, 60)
    valid_ids = encode_texts(tok, valid[1])
    began = time.time() - spent
    while (share := (time.time() - began) / 60 / args.minutes) < 1:
        optim.set_lr(optimisers, args.lr * min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (1 - share) / 0.4)))
        pixels, texts, match = sample("train", step * 24, 24)
        cosines = similarity(model, tower, pixels, encode_texts(tok, texts))
        logits = cosines * model.logit_scale.exp() + model.logit_bias
        loss = F.binary_cross_entropy_with_logits(logits, match.float(), reduction="sum") / len(texts)
        loss.backward()
        for o in optimisers:
            o.step()
            o.zero_grad()
        step += 1
        if step % 50 == 0:
            with torch.no_grad():
                rank = ranking(similarity(model, tower, valid[0], valid_ids), valid[2])
            print(
                f"{step} {time.time() - began:.0f}s loss {loss.item():.3f} valid ranking {rank:.4f}",
                flush=True,
            )
    state = {"model": model.state_dict(), "optim": [o.state_dict() for o in optimisers], "step": step}
    torch.save(state | {"spent": time.time() - began}, path)


if __name__ == "__main__":
    main()
