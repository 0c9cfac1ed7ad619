"""METok's stages on a real language model: SmolLM2-135M-Instruct reads
"videos" of captions (README: Second witness).

    # Run what is missing, then write results/witness.json and .png.
    python -m benchmarks.witness
    # Stop after that time; the next call goes on.
    python -m benchmarks.witness --limit-s 500
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.paths import RESULTS, ROOT
from benchmarks.witness import report
from benchmarks.witness.model import Decoder, load
from benchmarks.witness.run import Witness
from benchmarks.witness.world import Prompt, make_video


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.witness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=200, help="each has one question of every kind")
    parser.add_argument("--probe-videos", type=int, default=20, help="of these, how many go through the probe too")
    parser.add_argument("--seed", type=int, default=2026, help="of the videos; prompts were chosen on seed 99")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="stop after that many seconds")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs/witness/packages", help="packages and weights")
    parser.add_argument("--rows", type=Path, help="answers, one JSON a line; a run goes on from what is there")
    parser.add_argument("--out", type=Path, default=RESULTS / "witness.json")
    options = parser.parse_args(arguments)
    if min(options.videos, options.threads) < 1 or not 0 <= options.probe_videos <= options.videos:
        parser.error("--videos and --threads are at least 1, --probe-videos lies between 0 and --videos")
    if options.rows is None:
        options.rows = ROOT / f"runs/witness/rows-{options.seed}-{options.dtype}.jsonl"
    return options


def read(path: Path) -> list[dict[str, Any]]:
    """What earlier calls answered; a line that one of them was cut off in is taken out of the file."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(lines))
    return [json.loads(line) for line in lines]


def main() -> int:
    options = parse()
    started = time.monotonic()
    torch.set_num_threads(options.threads)
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    parts = read(options.rows)
    done = {(part["part"], part["video"]) for part in parts}
    wanted = [("probe", n) for n in range(options.probe_videos)] + [("answers", n) for n in range(options.videos)]
    missing = [item for item in wanted if item not in done]
    if missing:
        model, tokenizer = load(options.cache, getattr(torch, options.dtype))
        witness = Witness(Decoder(model), Prompt(tokenizer))
        with options.rows.open("a") as file:
            for count, (part, number) in enumerate(missing):
                if time.monotonic() - started > options.limit_s:
                    print(f"{len(missing) - count} of {len(wanted)} parts are left; call again to go on")
                    return 0
                video, begun = make_video(number, options.seed), time.process_time()
                rows = (witness.answer if part == "answers" else witness.probe)(video, number)
                entry = {"part": part, "video": number, "cpu_s": time.process_time() - begun, "rows": rows}
                file.write(json.dumps(entry) + "\n")
                file.flush()
                parts.append(entry)
    parts = [part for part in parts if (part["part"], part["video"]) in set(wanted)]
    report.write(parts, options)
    return 0
