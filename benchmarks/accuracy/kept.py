"""How much of what is asked about does a method still show the language
model? Why methods differ, without the model.

    python -m benchmarks.accuracy.kept                  # 40 validation videos
    python -m benchmarks.accuracy.kept --videos 10

For every thing that a question is about, its cells in stock's grid are known from the scene graph. A thing is
**whole** where a token of a single such cell enters; a method that pools more coarsely may show it
**blurred** only, in a token of several cells. Writes `results/accuracy-kept.json`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy.baselines.frames import FewerFrames
from benchmarks.accuracy.data import Item, UsageError
from benchmarks.accuracy.generated_set import MIXED
from benchmarks.accuracy.method import Entering, Reducer
from benchmarks.accuracy.methods import Method, chosen, methods
from benchmarks.accuracy.metok import Stage1
from benchmarks.accuracy.report import write_json
from benchmarks.accuracy.video import STOCK_STRIDE, Asked, Checkpoint, require_model
from benchmarks.accuracy.video import Video as Encoded
from benchmarks.common.options import positive
from benchmarks.common.paths import RESULTS
from benchmarks.common.provenance import conditions
from metok_vllm.demo.model_choice import TRAINED
from training.draw import draw_video
from training.questions import Question, questions
from training.seeds import seed_of
from training.tower import label_cells
from training.video_file import write_mp4
from training.world import MAX_FRAMES, MIN_FRAMES, Video, make_video
from training.world import Item as Thing

COMPARED = (
    "metok stage 1", "frames = entering", "random = entering", "evs = entering", "vidcom2 = entering",
    "frames = average", "random = average", "evs = average", "evs tokens = average", "vidcom2 = average",
    "frames = kv", "random = kv", "evs = kv", "evs tokens = kv", "vidcom2 = kv",
)  # fmt: skip
Cells = NDArray[np.bool_]


@dataclass
class Shown:
    """What a method shows."""

    frames: list[int]  # for every thing asked about: frames with a token of a single cell of the thing
    tokens: list[int]  # for every question: what enters, separators included


def cells_of(video: Video, thing: Thing) -> Cells:
    """Where stock's tokens show a thing: bool [T, tokens of a frame]."""
    only = replace(video, items=(thing,))
    tables = [label_cells(only, frame, lambda *_: [0], 1)[STOCK_STRIDE] for frame in range(video.frames)]
    return np.concatenate(tables, axis=1).T > 0


def asked_about(question: Question) -> list[Thing]:
    """The things that must be seen for the answer;
    none for questions about scenes or what was never there.
    """
    return [t for _, things in (question.things or question.told) for t in things if isinstance(t, Thing)]


def whole_tokens(reducer: Reducer, video: Encoded, asked: Asked, entering: Entering) -> Cells:
    """Stock's tokens that enter as they are: bool [T, tokens of a frame]."""
    frames, each = video.pooled().shape[:2]
    out = np.zeros((frames, each), dtype=bool)
    if isinstance(reducer, Stage1):
        # The first class of frames has stock's own stride.
        out[(reducer.choose(video, asked).tier == 0).numpy()] = True
    elif isinstance(reducer, FewerFrames):
        out[reducer.frames(video)] = True
    else:
        offsets = entering.offsets[entering.offsets < frames * each]
        out.reshape(-1)[offsets.numpy()] = True
    return out


def measure(checkpoint: Checkpoint, compared: list[Method], index: int, folder: Path, shown: dict[str, Shown]) -> None:
    """Add one validation video and its questions to `shown`, an entry a method."""
    graph = make_video(seed_of("valid", index), (MIN_FRAMES, MAX_FRAMES))
    path = folder / f"{index}.mp4"
    write_mp4(draw_video(graph), path)
    video = checkpoint.read(path, MAX_FRAMES)
    for question in questions(graph, MIXED, random.Random(graph.seed)):
        asked = checkpoint.ask(
            Item(0, path, question.text, question.options, question.answer, question.kind, graph.seed)
        )
        things = [cells_of(graph, thing) for thing in asked_about(question)]
        for method in compared:
            entering = method.reducer.enter(video, asked)
            whole = whole_tokens(method.reducer, video, asked, entering)
            shown[method.name].tokens.append(len(entering.rows))
            shown[method.name].frames += [int((whole & cells).any(1).sum()) for cells in things]


def line(method: Method, row: Shown) -> dict[str, float | str]:
    """A method's row of the table."""
    whole = float(np.mean(np.array(row.frames) > 0))
    return {
        "method": method.name,
        "tokens": float(np.mean(row.tokens)),
        "things": len(row.frames),
        "whole": whole,
        # METok pools whole frames: one that is pooled coarsely still shows everything, blurred.
        "blurred_only": 1 - whole if isinstance(method.reducer, Stage1) else 0.0,
        "frames_whole": float(np.mean(row.frames)),
    }


def main() -> None:
    """Measure, print, write."""
    ap = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.kept",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ap.add_argument("--videos", type=positive, default=40)
    ap.add_argument("--model", type=Path, default=TRAINED)
    ap.add_argument("--out", type=Path, default=RESULTS / "accuracy-kept.json")
    args = ap.parse_args()
    try:
        require_model(args.model)
        checkpoint = Checkpoint(args.model)
    except UsageError as error:
        ap.error(str(error))
    compared = chosen(methods(checkpoint), list(COMPARED))
    shown = {method.name: Shown([], []) for method in compared}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for index in range(args.videos):
            measure(checkpoint, compared, index, Path(folder), shown)
    found = [line(method, shown[method.name]) for method in compared]
    table = Table(
        "method", "tokens", "whole %", "blurred only %", "frames whole", title=f"{args.videos} validation videos"
    )
    for row in found:
        share = [f"{100 * float(row[k]):.1f}" for k in ("whole", "blurred_only")]
        table.add_row(str(row["method"]), f"{row['tokens']:.0f}", *share, f"{row['frames_whole']:.2f}")
    Console(width=120).print(table)
    write_json({"videos": args.videos, "methods": found, **conditions()}, args.out)


if __name__ == "__main__":
    main()
