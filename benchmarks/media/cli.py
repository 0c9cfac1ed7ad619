"""What a child process costs a good video: the same file decoded in this process and in the pool, in turns.

    python -m benchmarks.media                      # an idle machine; writes benchmarks/results/media.json
    python -m benchmarks.media --video my.mp4       # other files
    python -m benchmarks.media --repeats 3 --out /tmp/media.json

Each pair of runs is one of each kind, in changing order, so that what slows the machine slows both. Before
each run is a pause, as between the videos of a server that is not overloaded: then a child is forked ahead.
The ratio is the median of the pairs' ratios. "At once" hands the pool several copies of the file together,
and the same to as many threads of this process. The last clip is one of the others enlarged to 720 lines, the
size of most real ones.

Two figures: the decoding alone, from the file's bytes to the frames; and all that the host does before the
vision tower, which adds transformers' video processor of LLaVA-OneVision (384 x 384). Excluded: fetching the
file, base64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common.options import positive
from benchmarks.common.paths import RESULTS, ROOT
from benchmarks.common.provenance import commit, hardware, timestamp, versions

ASSETS = ROOT / "metok_vllm" / "demo" / "assets"
CLIPS = ("toy-world.mp4", "big-buck-bunny-30s.mp4", "iscc-band-60s.mp4")
ENLARGED, LINES = "big-buck-bunny-30s.mp4", 720


PAUSE_S = 0.2
SIDE = 384
"""Pixels of the tower's input, each way."""


def seconds(work: Callable[[], Any]) -> float:
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(here: Callable[[], Any], child: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Times of both, taken in pairs; the first pair is left out."""
    pairs = []
    for number in range(repeats + 1):
        if number % 2:
            first, second = seconds(here), seconds(child)
        else:
            second, first = seconds(child), seconds(here)
        pairs.append((first, second))
    pairs = pairs[1:]
    ratios = sorted(child / here for here, child in pairs)
    return {
        "in_process_ms": 1e3 * statistics.median(here for here, _ in pairs),
        "in_a_child_ms": 1e3 * statistics.median(child for _, child in pairs),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "pairs": len(pairs),
    }


def enlarged(clip: Path, folder: Path) -> Path:
    """The same video with `LINES` lines, in `folder`."""
    import av

    out = folder / f"{clip.stem}-{LINES}p.mp4"
    with av.open(clip) as source, av.open(out, "w") as target:
        video = source.streams.video[0]
        stream: Any = target.add_stream("libx264", rate=video.average_rate)
        stream.height, stream.width, stream.pix_fmt = (
            LINES,
            round(video.width * LINES / video.height / 2) * 2,
            "yuv420p",
        )
        for frame in source.decode(video):
            target.mux(stream.encode(frame.reformat(stream.width, stream.height)))
        target.mux(stream.encode())
    return out


def measure(clip: Path, frames: int, at_once: int, repeats: int, pool: Any) -> dict[str, Any]:
    """One row: a file, a number of frames, and how many of it at a time."""
    from transformers import LlavaOnevisionVideoProcessor

    from metok_vllm.media.decoder import decode_video
    from metok_vllm.media.settings import VideoSettings

    processor: Any = LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE})

    data, settings = clip.read_bytes(), VideoSettings(num_frames=frames)
    shape = decode_video(data, settings).frames.shape
    with ThreadPoolExecutor(at_once) as threads:

        def all_of(decode: Callable[..., Any]) -> None:
            for job in [threads.submit(decode, data, settings) for _ in range(at_once)]:
                job.result()

        def host(decode: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *job: processor(videos=[decode(*job).frames], return_tensors="pt")

        row = in_turns(lambda: all_of(decode_video), lambda: all_of(pool.decode), repeats)
        whole = in_turns(lambda: all_of(host(decode_video)), lambda: all_of(host(pool.decode)), repeats)
    about = {"clip": clip.name, "file_bytes": len(data), "frames": list(shape), "at_once": at_once}
    return {**about, "decoding": row, "host": whole}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.media", description=__doc__.splitlines()[0])
    parser.add_argument("--video", type=Path, action="append", help="a video file; may be repeated")
    parser.add_argument("--frames", type=positive, nargs="+", default=[32, 64])
    parser.add_argument("--at-once", type=positive, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=positive, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "media.json")
    options = parser.parse_args(arguments)

    from metok_vllm.media.children.pool import DecodePool

    scratch = tempfile.TemporaryDirectory()
    pool = DecodePool()
    pool.start()
    result: dict[str, Any] = {
        "commit": commit(), "date": timestamp(), "machine": hardware(cuda=False), "versions": versions(),
        "pause_s": PAUSE_S,
        "command": " ".join(["python -m benchmarks.media", *(sys.argv[1:] if arguments is None else arguments)]),
        "rows": [],
    }  # fmt: skip
    folder = Path(scratch.name)
    for clip in options.video or [*(ASSETS / name for name in CLIPS), enlarged(ASSETS / ENLARGED, folder)]:
        for frames in options.frames:
            for at_once in options.at_once:
                row = measure(clip, frames, at_once, options.repeats, pool)
                result["rows"].append(row)
                for part in ("decoding", "host"):
                    found = row[part]
                    print(
                        f"{row['clip']:<27} {frames:>4} frames, {at_once} at once, {part:<8}"
                        f" {found['in_process_ms']:8.1f} ms here, {found['in_a_child_ms']:8.1f} ms in a child,"
                        f" ratio {found['ratio']:.3f}",
                        flush=True,
                    )
    pool.stop()
    scratch.cleanup()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0
