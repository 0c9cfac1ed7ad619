"""Measure whole requests: stock vLLM, stock vLLM with fewer frames or with its own pruning,
and METok, on the same model, frames and prompts.

    # Anywhere: the tiny model on the CPU, a few minutes, ratios only.
    python -m benchmarks.engine --small
    # A GPU; the published shapes, weights made up.
    python -m benchmarks.engine --model 7b --frames 64
    # Later: one more variant into the same file, of the same workload on the same machine.
    python -m benchmarks.engine --model 7b --frames 64 --variants metok-balanced --merge
    # Beside vLLM's own pruning, EVS and VidCom2: Qwen's models, and their tiny forms for a CPU.
    python -m benchmarks.engine --model qwen3-vl-8b --frames 128
    python -m benchmarks.engine --small --model qwen3-vl-tiny
    python -m benchmarks.engine --plot benchmarks/results/engine-7b.json

Each variant runs in a process of its own, one after the other. Writes one JSON and two PNGs. See
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common.options import positive
from benchmarks.common.paths import RESULTS, ROOT
from benchmarks.common.provenance import conditions, timestamp
from benchmarks.engine.conditions import CLIP, EXCLUDED, claim, expected, file_decode, stated_family, weights
from benchmarks.engine.merge import add, continued, mismatch
from benchmarks.engine.models import BenchmarkModel, write_model
from benchmarks.engine.qwen import MODELS
from benchmarks.engine.report import notes, plot, ratios, ratios_to_pruning, request_ms, summarise
from benchmarks.engine.variants import Variant, not_in_the_run, prefill_budget, variants


def integers(text: str) -> list[int]:
    """A comma-separated list of positive integers, ascending."""
    values = sorted({int(part) for part in text.split(",")})
    if values[0] < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more: {text}")
    return values


def keywords(text: str) -> dict[str, Any]:
    """Keyword arguments as a JSON object."""
    given = json.loads(text)
    if not isinstance(given, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object: {text}")
    return given


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. `--small` sets what is not set by hand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny model, 32 frames, 1,2,4 requests at a time")
    parser.add_argument("--model", help=f"tiny, 0.5b, 7b, {', '.join(MODELS)}, or a folder (7b)")
    parser.add_argument("--frames", type=positive, help="frames of each video (64)")
    parser.add_argument("--concurrency", type=integers, metavar="1,2,...", help="requests at a time (1,2,4,8,16,32)")
    parser.add_argument("--requests", type=positive, help="least requests a level; twice the concurrency at least (8)")
    parser.add_argument("--text-tokens", type=positive, help="text tokens of a prompt, about (200)")
    parser.add_argument("--max-tokens", type=positive, help="tokens to generate, 2 or more (64)")
    parser.add_argument("--repeats", type=positive, help="requests in the breakdown (5)")
    parser.add_argument("--videos", type=positive, default=4, help="different videos, used in turn (4)")
    parser.add_argument("--variants", type=lambda text: text.split(","), help="only these, by name, in this order")
    parser.add_argument("--eager", action="store_true", help="no torch.compile, no CUDA graphs")
    parser.add_argument("--attention-backend", metavar="NAME", help="vLLM's --attention-backend")
    parser.add_argument("--kv-cache-dtype", metavar="DTYPE", help="vLLM's --kv-cache-dtype")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="vLLM's (0.9)")
    parser.add_argument(
        "--engine-option", type=keywords, default={}, metavar="JSON", help="more keyword arguments of vllm.LLM"
    )
    parser.add_argument("--no-breakdown", action="store_true", help="do not time the parts of a request")
    parser.add_argument("--counts", action="store_true", help="count tokens and KV blocks, and time nothing")
    parser.add_argument("--clip", type=Path, default=CLIP, help="the file whose decoding is timed")
    parser.add_argument("--timeout", type=positive, default=1800, help="seconds for one process (1800)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmark", help="model folders and logs")
    parser.add_argument("--out", type=Path, help="JSON to write (benchmarks/results/engine-MODEL.json)")
    parser.add_argument("--merge", action="store_true", help="keep the other variants that --out holds already")
    parser.add_argument("--no-plots", action="store_true", help="write the JSON alone; --plot draws later")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="draw an existing result and measure nothing")
    options = parser.parse_args(argv)
    small = {
        "model": "tiny", "frames": 32, "concurrency": [1, 2, 4], "requests": 8, "text_tokens": 60, "max_tokens": 8,
        "repeats": 5,
    }  # fmt: skip
    full = {
        "model": "7b", "frames": 64, "concurrency": [1, 2, 4, 8, 16, 32], "requests": 8, "text_tokens": 200,
        "max_tokens": 64, "repeats": 5,
    }  # fmt: skip
    for name, value in (small if options.small else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.max_tokens < 2:
        parser.error("--max-tokens: 2 or more, or there is no time between tokens")
    return options


def engine_options(options: argparse.Namespace, model: BenchmarkModel, cuda: bool) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`, the same for every variant.

    On a CPU the engine is eager, where `--engine-option` does not say otherwise.
    """
    budget = prefill_budget(options.frames, model, options.text_tokens)
    inside = model.stock_tokens(options.frames) + model.label_tokens(options.frames)
    prompt = inside + options.text_tokens + options.max_tokens + 64
    result: dict[str, Any] = {
        "dtype": "bfloat16" if cuda else "float32",
        "enforce_eager": options.eager or not cuda,
        "max_model_len": -(-prompt // 256) * 256,
        "max_num_batched_tokens": budget,
        "max_num_seqs": max(32, *options.concurrency),
        "limit_mm_per_prompt": {"video": 1, "image": 0},
        "mm_processor_cache_gb": 0,
        "disable_log_stats": True,
        "seed": 0,
    }
    if cuda:
        result["gpu_memory_utilization"] = options.gpu_memory_utilization
    else:
        result["block_size"] = 32
    if model.dummy:
        result["load_format"] = "dummy"
    for name in ("attention_backend", "kv_cache_dtype"):
        if getattr(options, name) is not None:
            result[name] = getattr(options, name)
    result |= options.engine_option
    return result


def environment(cuda: bool) -> dict[str, str]:
    """What the engine's process needs: the engine core in the same process, and
    the repository on the path, which makes it work from any folder and where nothing is installed."""
    settings = {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    if not cuda:
        settings |= {"TRITON_INTERPRET": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, **settings, "PYTHONPATH": os.pathsep.join(path)}


def run_job(job: dict[str, Any], work: Path, cuda: bool, timeout: int) -> dict[str, Any]:
    """Run `worker.py` on one job.

    Raises:
        RuntimeError: it failed; the message has the end of its log.
    """
    stem = work / f"{job['name']}-{'-'.join(job['parts'])}"
    job = {**job, "out": str(stem.with_suffix(".raw.json"))}
    Path(job["out"]).unlink(missing_ok=True)
    stem.with_suffix(".job.json").write_text(json.dumps(job, indent=1))
    command = [sys.executable, "-m", "benchmarks.engine.worker", str(stem.with_suffix(".job.json"))]
    log = stem.with_suffix(".log")
    with log.open("w") as out:
        try:
            code = subprocess.run(command, env=environment(cuda), stdout=out, stderr=out, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            code = None
    if code != 0 or not Path(job["out"]).exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        reason = f"took more than {timeout} s" if code is None else f"ended with {code}"
        raise RuntimeError(f"{job['name']} {reason}; the end of {log.name}:\n{tail}")
    raw: dict[str, Any] = json.loads(Path(job["out"]).read_text())
    return raw


def parts(options: argparse.Namespace) -> list[str]:
    """What a worker does, in this order."""
    if options.counts:
        return ["counts"]
    return ["serve"] if options.no_breakdown else ["serve", "breakdown"]


def job_of(variant: Variant, options: argparse.Namespace, model: BenchmarkModel, cuda: bool) -> dict[str, Any]:
    """What `worker.py` is to measure of a variant."""
    family = model.family
    return {
        "name": variant.name, "model": str(model.path), "dummy": model.dummy, "layers": model.layers,
        "frame_size": list(model.frame), "frames": variant.frames, "metok": variant.metok,
        "pruning": variant.pruning.options if variant.pruning else {},
        "whole_frames": options.frames if family.timed else None,
        "turn": family.turn, "video_token": model.video_token, "stock_tokens": model.stock_tokens(variant.frames),
        "text_tokens": options.text_tokens, "max_tokens": options.max_tokens, "videos": options.videos,
        "concurrency": options.concurrency, "requests": options.requests, "repeats": options.repeats,
        "engine": engine_options(options, model, cuda),
        "parts": parts(options),
    }  # fmt: skip


def measure(variant: Variant, options: argparse.Namespace, model: BenchmarkModel, cuda: bool) -> dict[str, Any]:
    """One variant's summary."""
    job = job_of(variant, options, model, cuda)
    return summarise(run_job(job, options.work, cuda, options.timeout), model.layers)


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every variant, write the JSON after each, draw. 1 if a variant failed."""
    options = arguments(argv)
    if options.plot is not None:
        print(*plot(json.loads(options.plot.read_text()), options.plot), sep="\n")
        return 0
    import torch

    cuda = torch.cuda.is_available()
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        model = write_model(options.model, options.work)
        chosen = variants(model, options.frames, options.variants)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    out = options.out or RESULTS / f"engine-{model.name}{'' if cuda else '-cpu'}.json"
    result: dict[str, Any] = {
        "claim": claim(model, cuda),
        "command": shlex.join(["python", "-m", "benchmarks.engine", *(sys.argv[1:] if argv is None else argv)]),
        "date": timestamp(),
        **conditions(cuda),
        "workload": {
            "model": model.name, "weights": weights(model), **stated_family(model),
            "frames": options.frames, "frame_size": list(model.frame),
            "text_tokens": options.text_tokens, "max_tokens": options.max_tokens, "concurrency": options.concurrency,
            "videos": options.videos, "aligner": "auto: the folder's own if it has one, else embedding",
            "all_videos_have_equal_length": True, "engine": engine_options(options, model, cuda),
        },
        "excluded": EXCLUDED, "not_in_the_run": not_in_the_run(model.family),
        **expected(model, options.frames), "file_decode_ms": None, "variants": {},
    }  # fmt: skip
    commit = result["commit"]
    if options.merge and out.exists():
        before = json.loads(out.read_text())
        reason = mismatch(before, result)
        if reason:
            raise SystemExit(f"error: {out} is of another run, delete it or state another --out ({reason})")
        result = continued(before, result)
    decoding: dict[int, Any] = {}
    if not options.counts:
        decoding[options.frames] = result["file_decode_ms"] or file_decode(options.clip, options.frames)
        result["file_decode_ms"] = decoding[options.frames]
    failed = False
    for variant in chosen:
        print(f"{variant.label} ({variant.frames} frames) ...", flush=True)
        entry: dict[str, Any] = {"label": variant.label, "frames": variant.frames, "metok": variant.metok}
        if variant.pruning is not None:
            entry["pruning"] = asdict(variant.pruning)
        if variant.frames not in decoding and not options.counts:
            decoding[variant.frames] = file_decode(options.clip, variant.frames)
        entry |= {"commit": commit, "date": timestamp(), "file_decode_ms": decoding.get(variant.frames)}
        try:
            entry |= measure(variant, options, model, cuda)
            if "breakdown" in entry:
                entry["request_ms"] = request_ms(entry)
            print("   " + line(entry), flush=True)
        except RuntimeError as error:
            entry["error"] = str(error)
            print(error, file=sys.stderr)
            failed = True
        add(result["variants"], variant.name, entry)
        result["ratios_to_stock"] = ratios(result["variants"])
        if model.family.pruning:
            result["ratios_to_pruning"] = ratios_to_pruning(result["variants"])
            result["notes"] = notes(result["variants"], result["expected"])
        save(result, out)
    print(*result.get("notes", []), out, sep="\n")
    if not options.no_plots and any("levels" in entry for entry in result["variants"].values()):
        print(*plot(result, out), sep="\n")
    return int(failed)


def line(entry: dict[str, Any]) -> str:
    """A variant's first level and its KV, for the terminal."""
    visual = entry["tokens"].get("visual_tokens")
    said = f"{entry['tokens']['prompt_tokens']} prompt tokens"
    if visual is not None:
        said += f", {visual['encoded']} of them visual, {entry['tokens']['mean_over_layers']:.1f} a layer on average"
    if "levels" not in entry:
        return f"{said}; {entry['kv']['requests_per_gib']:.1f} requests fit in a GiB of KV cache"
    level = entry["levels"][0]
    return (
        f"{said}; at {level['concurrency']} at a time: first token after "
        f"{level['ttft_ms']['p50']:.0f} ms ({entry['first_request']['ttft_ms']:.0f} ms in the first request after start), "
        f"then one every {level['inter_token_ms']['p50']:.1f} ms, {level['requests_per_s']:.2f} requests/s; "
        f"{entry['kv']['requests_that_fit']} requests fit in the KV cache"
    )
