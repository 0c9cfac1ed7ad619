"""What goes into a result beside the figures: what is excluded, what decoding a file takes, what may be
claimed, what counts are expected.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.common.paths import ROOT
from benchmarks.engine.families import LLAVA_ONEVISION
from benchmarks.engine.models import BenchmarkModel
from benchmarks.engine.qwen import MODELS

CLIP = ROOT / "metok_vllm" / "demo" / "assets" / "iscc-band-60s.mp4"

EXCLUDED = [
    "HTTP, the transport between vLLM's processes and detokenisation: the engine core runs inside the measuring process",
    "decoding of a video file: frames are arrays; timed apart (file_decode_ms)",
    "resizing and normalising of the frames and tokenising: timed apart for each variant (processing_ms), not in TTFT",
    "start of the engine and what comes before it is warm: apart (start_s, first_request)",
    "cache hits: every request counts as a new video, and its tower pass is done anew",
    "accuracy: answers are not looked at",
]


def file_decode(clip: Path, frames: int) -> dict[str, Any]:
    """Time the plugin's decoder on a file, or say why it was not timed."""
    if importlib.util.find_spec("av") is None:
        return {"median": None, "reason": "not measured: PyAV is not installed"}
    if not clip.is_file():
        return {"median": None, "reason": f"not measured: no file {clip.name}"}
    from metok_vllm.media.decoder import decode_video
    from metok_vllm.media.settings import VideoSettings

    data, times = clip.read_bytes(), []
    for _ in range(3):
        began = time.perf_counter()
        decoded = decode_video(data, VideoSettings(num_frames=frames))
        times.append(1e3 * (time.perf_counter() - began))
    return {"median": statistics.median(times), "clip": clip.name, "frames": list(decoded.frames.shape)}


def claim(model: BenchmarkModel, cuda: bool) -> str:
    """What the figures may be used for."""
    if not cuda:
        return (
            f"{model.name} model on a CPU, vLLM's own kernels in Triton's interpreter: "
            "ratios only, dominated by per-step overhead; not a speed claim"
        )
    weights = "made-up weights: speed and memory only" if model.dummy else "real weights"
    return f"{model.name}, {weights}; accuracy not measured"


def weights(model: BenchmarkModel) -> str:
    """Whose the weights are."""
    return "random" if model.dummy or model.name in ("tiny", *MODELS) else "from the folder"


def stated_family(model: BenchmarkModel) -> dict[str, str]:
    """The family, for the workload. LLaVA-OneVision's results, older than the others, do not state it."""
    return {} if model.family is LLAVA_ONEVISION else {"family": model.family.title}


def expected(model: BenchmarkModel, frames: int) -> dict[str, Any]:
    """What the rates of vLLM's own pruning are chosen by, and the fewest tokens that each method leaves.

    Nothing where the family has none.
    """
    if not model.family.pruning:
        return {}
    tokens = model.expected(frames)
    return {
        "expected": {
            "stock": tokens.stock,
            "encoded": tokens.encoded,
            "mean_over_layers": model.expected_mean(frames),
            "least": {"evs": model.family.tokens_per_step(model.grid), "vidcom2": model.family.steps(frames)},
        }
    }
