"""The second witness in the real engine: SmolLM2-135M inside vLLM with METok, each answer against the oracle.

    python -m benchmarks.witness.engine                 # writes results/witness-engine.json
    python -m benchmarks.witness.engine --videos 2      # a taste

The engine takes videos, so the captions are painted (`checkpoint.py`) and the model stands in a
LLaVA-OneVision checkpoint. A frame is 3 x 3 tokens here: its caption's eight and a line end. The oracle
(`tests/support/oracle`) runs the same checkpoint in transformers. Ends with 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# The CPU build of vLLM; and the harness looks into the scheduler and the worker, so both must be in this
# process.
for name, value in {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(name, value)

import torch  # noqa: E402  (the environment comes first)
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration  # noqa: E402

from benchmarks.common.paths import RESULTS, ROOT  # noqa: E402
from benchmarks.common.provenance import commit  # noqa: E402
from benchmarks.common.stats import Bootstrap, compare  # noqa: E402
from benchmarks.witness import checkpoint  # noqa: E402
from benchmarks.witness.checkpoint import SIDE  # noqa: E402
from benchmarks.witness.model import PACKAGES  # noqa: E402
from benchmarks.witness.model import load as load_model  # noqa: E402
from benchmarks.witness.run import FITTED  # noqa: E402
from benchmarks.witness.world import FRAMES, KINDS, Prompt, Question, make_video  # noqa: E402
from metok_vllm.compression import selection  # noqa: E402
from tests.support.harness import Case, Engine, engine  # noqa: E402
from tests.support.oracle import assert_same  # noqa: E402
from tests.support.oracle.samples import Sample  # noqa: E402

LAYERS = 30
ENGINE = {"max_model_len": 1024, "max_num_batched_tokens": 1024}
TOLERANCE = 1e-3
CLOSE = 1e-5  # scores nearer than this are a tie in float32: either may come first
RETENTION = {"paper": 0.0, "balanced": 1.0}


@dataclass(frozen=True)
class Captions(Sample):
    """The checkpoint, with the witness's prompts: a case's question is a key of `asked`."""

    prompt: Prompt
    asked: dict[str, Question]

    def prompt_ids(self, question: str = "", *, videos: int = 1, images: int = 0, between: str = "") -> list[int]:
        del videos, images, between
        after = self.prompt.after(self.asked[question])
        return [*self.prompt.before(), int(self.model.config.video_token_id), *after]


def load(cache: Path, asked: dict[str, Question]) -> tuple[Captions, torch.Tensor]:
    """The checkpoint, written on first use, in transformers; and the embedding table [vocabulary, D]."""
    model, tokenizer = load_model(cache, torch.float32)
    words = model.get_input_embeddings().weight.detach().clone()
    folder = cache.parent / "checkpoint"
    checkpoint.write(model, tokenizer, folder, SIDE)
    llava: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    processor: Any = AutoProcessor  # transformers does not annotate its `from_pretrained`
    return Captions(folder, llava.eval(), processor.from_pretrained(folder), Prompt(tokenizer), asked), words


def requests(
    sample: Captions, words: torch.Tensor, videos: int, seed: int, metok: dict[str, Any] | str
) -> Iterator[Case]:
    """A request for every question; METok is told the question,
    since the prompt has worked examples before it.
    """
    for number in range(videos):
        video = make_video(number, seed)
        frames = checkpoint.paint_captions(sample.prompt, video, words)
        for question in video.questions:
            told = metok if isinstance(metok, str) else metok | {"query": question.text}
            length = len(sample.prompt.answer(question))
            yield Case((frames,), key(question), metok=told, max_tokens=length)


def key(question: Question) -> str:
    return f"{question.video} {question.kind}"


def judge(running: Engine, sample: Captions, cases: list[Case], batch: int) -> dict[str, Any]:
    """Ask all cases, `batch` at once, and hold each answer to the oracle's and to the right one."""
    right, worst, ties, differ, tokens = [], 0.0, 0, [], 0
    engine_s = oracle_s = 0.0
    for start in range(0, len(cases), batch):
        chosen = cases[start : start + batch]
        begun = time.monotonic()
        answers = running.run(chosen)
        engine_s += time.monotonic() - begun
        running.check_drained()
        for case, answer in zip(chosen, answers, strict=True):
            begun = time.monotonic()
            expected = running.oracle(case)
            oracle_s += time.monotonic() - begun
            right.append(answer.tokens == sample.prompt.answer(sample.asked[case.question]))
            tokens += len(answer.tokens)
            if expected.score_margin <= CLOSE:
                ties += 1
                continue
            worst = max(worst, difference(expected, answer))
            try:
                assert_same(expected, answer, TOLERANCE)
            except AssertionError as error:
                differ.append(f"{case.question}: {error}")
        print(f"  {len(right)} of {len(cases)} asked, {sum(right)} right, {len(differ)} differ", flush=True)
    return {
        "right": right,
        "tokens_compared": tokens,
        "ties_left_out": ties,
        "differ": differ,
        "largest_logprob_difference": worst,
        "engine_s": round(engine_s, 1),
        "oracle_s": round(oracle_s, 1),
    }


def difference(expected: Any, answer: Any) -> float:
    """The largest difference of a stated log-probability,
    over the steps up to the first token that differs.
    """
    worst = 0.0
    for row, given, ours, theirs in zip(
        expected.logprobs, answer.logprobs, expected.tokens, answer.tokens, strict=True
    ):
        worst = max(worst, *(abs(row[token].item() - value) for token, value in given.items()))
        if ours != theirs:
            break
    return worst


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.witness.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--videos", type=int, default=25, help="each has one question of every kind")
    parser.add_argument("--seed", type=int, default=2027, help="of the videos; benchmarks.witness reports on seed 2026")
    parser.add_argument("--batch", type=int, default=8, help="requests in the engine at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs/witness/packages", help="packages and weights")
    parser.add_argument("--out", type=Path, default=RESULTS / "witness-engine.json")
    options = parser.parse_args(arguments)
    if min(options.videos, options.batch, options.threads) < 1:
        parser.error("--videos, --batch and --threads are at least 1")
    return options


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    asked = {key(q): q for n in range(options.videos) for q in make_video(n, options.seed).questions}
    sample, words = load(options.cache, asked)
    found: dict[str, Any] = {}
    for name, layers in (("fitted", FITTED), ("own", selection.prune_layers(LAYERS))):
        with engine(sample, {"prune_layers": list(layers)}, **ENGINE) as running:
            settings: dict[str, Any] = {f"{p} {layers}": {"decode_retention": d} for p, d in RETENTION.items()}
            for label, metok in (({"off": "off"} if name == "fitted" else {}) | settings).items():
                print(label, flush=True)
                cases = list(requests(sample, words, options.videos, options.seed, metok))
                found[label] = judge(running, sample, cases, options.batch)
    report(found, [q.kind for q in asked.values()], [q.video for q in asked.values()], options)
    return 1 if any(entry["differ"] for entry in found.values()) else 0


def report(found: dict[str, Any], kinds: list[str], videos: list[int], options: argparse.Namespace) -> None:
    """Write the JSON and print a line for each method."""
    import numpy as np

    boot, names = Bootstrap(videos), np.array(kinds)
    slices = {"all": np.ones(len(kinds), dtype=np.bool_)} | {kind: names == kind for kind in KINDS}
    right = {label: np.array(entry.pop("right")) for label, entry in found.items()}
    for label, entry in found.items():
        entry["accuracy"] = compare(boot, right[label], None if label == "off" else right["off"], slices)
        share, kept = entry["accuracy"]["all"]["accuracy"], entry["largest_logprob_difference"]
        print(f"{label:24}{100 * share:6.1f} % right, logprobs within {kept:.1e}, {len(entry['differ'])} differ")
    result = {
        "command": "python -m benchmarks.witness.engine " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "packages": list(PACKAGES),
        "torch": torch.__version__,
        "dtype": "float32",
        "seed": options.seed,
        "videos": options.videos,
        "questions": len(kinds),
        "frames": FRAMES,
        "stock_visual_tokens": FRAMES * SIDE * SIDE + 1,
        "tolerance": TOLERANCE,
        "methods": found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
