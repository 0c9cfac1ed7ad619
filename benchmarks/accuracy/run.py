"""The runs behind the benchmark: all methods locally, and some of them through a server."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.data import Item, UsageError, by_video
from benchmarks.accuracy.local import LocalRunner, Outcome
from benchmarks.accuracy.methods import STOCK, Method
from benchmarks.accuracy.report import Answers
from benchmarks.accuracy.server import ServerRunner, Settings
from benchmarks.accuracy.video import Checkpoint
from metok_vllm.compression.selection import prune_layers
from metok_vllm.media.settings import VideoError

Say = Callable[[str], None]


def run_local(
    checkpoint: Checkpoint, items: Sequence[Item], methods: Sequence[Method], frames: int, say: Say
) -> tuple[dict[str, Answers], list[int]]:
    """Answer every question with every method; also the number of frames of each video.

    Raises:
        UsageError: a file is no usable video.
    """
    runner = LocalRunner(checkpoint)
    found = {m.name: [Outcome("")] * len(items) for m in methods}
    place = {item.number: index for index, item in enumerate(items)}
    videos, lengths, began = by_video(items), [], time.monotonic()
    for done, (path, asked) in enumerate(videos.items(), start=1):
        try:
            video = checkpoint.read(path, frames)
        except VideoError as error:
            raise UsageError(f"{path}: {error}") from None
        lengths.append(len(video))
        runner.watch(video)
        questions = [(place[item.number], checkpoint.ask(item)) for item in asked]
        for method in methods:
            for index, question in questions:
                found[method.name][index], _ = runner.answer(method.reducer, method.policy, question)
        if done % 5 == 0 or done == len(videos):
            taken = time.monotonic() - began
            left = taken / done * (len(videos) - done)
            say(f"local: {done} of {len(videos)} videos, {taken:.0f} s, about {left:.0f} s left")
    answers = {m.name: Answers(m.family, m.what, f"{m.reducer!r}, {m.policy!r}", found[m.name]) for m in methods}
    return answers, lengths


def run_server(
    runner: ServerRunner, items: Sequence[Item], points: Mapping[str, Settings], say: Say
) -> dict[str, Answers]:
    """Ask a server every question at every operating point; METok's points first,
    since their reports also count for stock.
    """
    answers = {
        name: Answers("stock" if name == STOCK else "METok", "through the server", str(value))
        for name, value in points.items()
    }
    order = sorted(points, key=lambda name: not isinstance(points[name], dict))
    began = time.monotonic()
    for done, item in enumerate(items, start=1):
        for name in order:
            answers[name].outcomes.append(runner.answer(item, points[name]))
        if done % 10 == 0 or done == len(items):
            taken = time.monotonic() - began
            left = taken / done * (len(items) - done)
            say(f"server: {done} of {len(items)} questions, {taken:.0f} s, about {left:.0f} s left")
    return answers


def agreement(items: Sequence[Item], local: Mapping[str, Answers], served: Mapping[str, Answers]) -> dict[str, Any]:
    """How the server's answers and counts to `items` compare with the local runner's,
    for the points that both have.
    """
    table: dict[str, Any] = {}
    counted = ("entering", "after_l1", "after_l2", "retained", "kv_bytes")
    for name in (n for n in served if n in local):
        pairs = list(zip(items, local[name].outcomes, served[name].outcomes, strict=True))
        differ = [(item, ours, theirs) for item, ours, theirs in pairs if ours.text != theirs.text]
        table[name] = {
            "questions": len(pairs),
            "same_text": len(pairs) - len(differ),
            "same_counts": sum(all(getattr(a, k) == getattr(b, k) for k in counted) for _, a, b in pairs),
            "different": [
                {"question": item.prompt, "video": item.video.name, "local": ours.text, "server": theirs.text}
                for item, ours, theirs in differ[:10]
            ],
        }
    return table


def describe_model(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Which model it was, by the hash of its weights."""
    weights = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in weights)).hexdigest() if weights else None
    layers = len(checkpoint.decoder.layers)
    aligner = "dual-tower (metok_aligner/)" if checkpoint.tower is not None else "embedding"
    return {
        "name": folder.name,
        "sha256": digest,
        "layers": layers,
        "prune_layers": list(prune_layers(layers)),
        "aligner": aligner,
        "grid": checkpoint.grid,
    }


def describe_set(path: Path, items: Sequence[Item], lengths: Sequence[int], frames: int) -> dict[str, Any]:
    """Which questions they were."""
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "questions": len(items),
        "videos": len({item.video for item in items}),
        "frames": {
            "most": frames,
            "mean": sum(lengths) / len(lengths) if lengths else None,
            "of_each_video": list(lengths),
        },
        "kinds": {kind: sum(i.kind == kind for i in items) for kind in sorted({i.kind for i in items})},
    }
