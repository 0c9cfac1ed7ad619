"""Accuracy of a training run on held-out videos, per kind, with stock pooling.

All questions of a video share one pass over it; "right" means that greedy decoding would give exactly the
expected answer. ``--against`` also decodes some of them with transformers' own ``generate`` on an exported
folder and counts disagreements. Usage::

    python -m training.evaluate --tower runs/tower/tower.pt --lm runs/lm --split test --videos 150 --json
    out/test.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from training.draw import draw_video
from training.export import load_model
from training.packing import LONG, SHORT, Coder, collate, encode, pick, plan
from training.questions import Question, form
from training.seeds import SPLITS, seed_of
from training.tokenizer import load_tokenizer
from training.train_lm import load_tower, scores
from training.video_file import through_codec
from training.world import Video, make_video

CRF = 23


def interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if total == 0:
        return 0.0, 1.0
    p, n = right / total, total
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


@torch.no_grad()
def run(args: argparse.Namespace) -> tuple[dict[str, list[bool]], list[tuple[Video, Question, bool]]]:
    """Hits per kind (letters and sentences also by :func:`form`),
    and every question with its video and verdict.
    """
    tower = load_tower(args.tower)
    model, _ = load_model(args.lm, tower)
    tower, model = tower.to(torch.bfloat16), model.to(torch.bfloat16)
    coder = Coder(load_tokenizer(args.lm))
    hits: dict[str, list[bool]] = defaultdict(list)
    log = []
    for index in range(args.first, args.first + args.videos):
        video = make_video(seed_of(args.split, index))
        encoded = encode(tower, video, crf=CRF)
        layout = plan(video.frames, [args.stride] * video.frames, set())
        rng = random.Random(video.seed)
        for kinds in (SHORT, LONG):
            asked = pick(encoded, args.per_kind * len(kinds), kinds, rng)
            _, verdicts, _ = scores(model, coder, collate(coder, [encoded], [layout], [asked]))
            for q, hit in zip(asked, verdicts[0], strict=True):
                hits[q.kind].append(hit)
                if q.kind in ("letter", "open"):
                    hits[f"{q.kind}/{form(q)}"].append(hit)
                log.append((video, q, hit))
    return hits, log


def against(folder: Path, log: list[tuple[Video, Question, bool]], count: int) -> int:
    """How many of ``count`` verdicts differ from those of transformers' ``generate`` on the folder."""
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

    model: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    differ = 0
    for video, q, hit in random.Random(0).sample(log, min(count, len(log))):
        content = [{"type": "video"}, {"type": "text", "text": q.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        frames = through_codec(draw_video(video), CRF)
        inputs = processor(text=text, videos=[frames], return_tensors="pt")
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(torch.bfloat16)
        out = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        differ += (processor.decode(out, skip_special_tokens=True) == q.answer) != hit
    return differ


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--tower", type=Path, required=True)
    ap.add_argument("--lm", type=Path, required=True)
    ap.add_argument("--split", choices=sorted(SPLITS), default="valid")
    ap.add_argument(
        "--first", type=int, default=1000, help="index of the first video (training scores itself on 0..39)"
    )
    ap.add_argument("--videos", type=int, default=100)
    ap.add_argument("--per-kind", type=int, default=1)
    ap.add_argument("--stride", type=int, choices=(2, 4, 8), default=2, help="2 is stock; coarser for curiosity")
    ap.add_argument("--against", type=Path, help="exported folder to compare with")
    ap.add_argument("--count", type=int, default=20, help="questions compared with --against")
    ap.add_argument("--json", type=Path)
    args = ap.parse_args()
    torch.set_num_threads(1)
    hits, log = run(args)
    table = {}
    for kind, verdicts in sorted(hits.items()):
        low, high = interval(sum(verdicts), len(verdicts))
        share = sum(verdicts) / len(verdicts)
        table[kind] = {
            "accuracy": round(share, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "n": len(verdicts),
        }
        print(f"{kind:24s} {100 * share:5.1f} %  [{100 * low:.1f}, {100 * high:.1f}]  n = {len(verdicts)}")
    if args.against:
        differ = against(args.against, log, args.count)
        print(f"transformers disagrees on {differ} of {min(args.count, len(log))}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"split": args.split, "videos": args.videos, "kinds": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
