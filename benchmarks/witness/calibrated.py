"""`metok calibrate` on the second witness: a real language model that nobody here trained; it sees no label.

    python -m benchmarks.witness.calibrated                 # writes results/witness-calibrated.json

Captions are painted (`checkpoint.py`) into files without loss, and the worked examples are part of the chat
template: so all that a user runs is run. What it found is then asked about videos of another seed, where the
right answers are known.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

for name, value in {
    "TRITON_INTERPRET": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(name, value)

import av  # noqa: E402  (the environment comes first)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.common.options import positive  # noqa: E402
from benchmarks.common.paths import RESULTS, ROOT  # noqa: E402
from benchmarks.common.provenance import conditions  # noqa: E402
from benchmarks.common.stats import Bootstrap, compare  # noqa: E402
from benchmarks.witness import checkpoint  # noqa: E402
from benchmarks.witness.checkpoint import SIDE  # noqa: E402
from benchmarks.witness.model import PACKAGES  # noqa: E402
from benchmarks.witness.model import load as load_model  # noqa: E402
from benchmarks.witness.world import FRAMES, Prompt, Question, make_video  # noqa: E402
from metok_vllm.calibrate.jobs import Asked  # noqa: E402
from metok_vllm.calibrate.run import Options, run_calibrate  # noqa: E402
from metok_vllm.calibrate.worker import message  # noqa: E402
from metok_vllm.contract.profile import Profile, read_profile  # noqa: E402

KINDS = ("fact", "code", "long")
"""Of `world.KINDS` those whose prompt ends with the template: "word" begins the answer for the model."""

SEARCHED, ASKED = 2028, 2030
"""Seeds of the videos that calibration sees, and of those that the right answers are counted on.

2029 was asked once under another rule of agreement, and showed that it was too lenient (`forced.NEAR_TIE`).
"""

ENGINE: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "block_size": 32}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def template() -> str:
    """A chat template that puts the worked examples first."""
    return "{{ " + json.dumps(Prompt.beginning()) + " }}" + TEMPLATE


def write_video(frames: Any, path: Path) -> None:
    """Frames, uint8 [T, H, W, 3], one a second, each pixel as it is; whole or not at all."""
    unfinished = path.with_suffix(".part")
    with av.open(str(unfinished), "w", format="matroska") as container:
        stream: Any = container.add_stream("ffv1", rate=1)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode())
    unfinished.replace(path)


def asked_about(number: int, seed: int) -> list[Question]:
    """The questions about one video."""
    return [question for question in make_video(number, seed).questions if question.kind in KINDS]


def write_set(folder: Path, prompt: Prompt, words: torch.Tensor, seed: int, videos: int) -> Path:
    """Video files and a sheet of questions with their answers; returns the sheet.

    A file that is there stays: calibration knows it by its time, and asks all about a new one again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(videos):
        name = f"{seed}-{number}.mkv"
        if not (folder / name).is_file():
            write_video(checkpoint.paint_captions(prompt, make_video(number, seed), words), folder / name)
        lines += [
            json.dumps({"video": name, "question": one.text, "answer": one.answer, "kind": one.kind})
            for one in asked_about(number, seed)
        ]
    sheet = folder / "questions.jsonl"
    sheet.write_text("\n".join(lines) + "\n")
    return sheet


def read(sheet: Path) -> list[dict[str, str]]:
    """The lines of `write_set`."""
    return [json.loads(line) for line in sheet.read_text().splitlines()]


@contextmanager
def running(model: Path, frames: int, server: dict[str, Any]) -> Iterator[Any]:
    """vLLM with METok on the witness."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    import metok_vllm

    llm = LLM(
        str(model),
        **ENGINE,
        **metok_vllm.enable(**server),
        enforce_eager=True,
        disable_log_stats=True,
        allowed_local_media_path="/",
        media_io_kwargs={"video": {"num_frames": frames}},
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def right(llm: Any, prompt: Prompt, sheet: Path, metok: Any) -> list[bool]:
    """Whether each answer of the sheet comes word for word, greedily."""
    from vllm import SamplingParams

    rows = read(sheet)
    wanted = [prompt.ids(row["answer"]) for row in rows]
    messages = [message(Asked(video=str(sheet.parent / row["video"]), question=row["question"]), True) for row in rows]
    params = [SamplingParams(temperature=0, max_tokens=len(ids)) for ids in wanted]
    outputs = llm.chat(messages, params, use_tqdm=False, mm_processor_kwargs={"metok": metok})
    return [list(output.outputs[0].token_ids) == ids for output, ids in zip(outputs, wanted, strict=True)]


def compared(prompt: Prompt, model: Path, sheet: Path, profile: Path) -> dict[str, list[bool]]:
    """Right answers of stock, of what was found, of as many tokens in fewer frames, and of the presets."""
    found = read_profile(profile)
    with running(model, FRAMES, {"profile": str(profile)}) as llm:
        answers = {"off": right(llm, prompt, sheet, "off"), "found": right(llm, prompt, sheet, {})}
    with running(model, FRAMES, {"profile": "none"}) as llm:
        answers |= {preset: right(llm, prompt, sheet, {"preset": preset}) for preset in ("paper", "balanced")}
    fewer = as_few_frames(found)
    with running(model, fewer, {"profile": "none"}) as llm:
        answers[f"fewer frames, {fewer}"] = right(llm, prompt, sheet, "off")
    return answers


def as_few_frames(found: Profile) -> int:
    """Frames whose tokens are as many as the found setting's, mean of the layers."""
    return max(1, round(FRAMES * found.measured.tokens / found.measured.tokens_stock))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.witness.calibrated",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--samples", type=positive, default=32, help="questions to search on, and as many held out")
    parser.add_argument("--target", type=float, default=0.93, help="share of the held-out answers that must agree")
    parser.add_argument("--videos", type=positive, default=50, help="whose right answers are counted")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/witness", help="packages, weights and videos")
    parser.add_argument("--out", type=Path, default=RESULTS / "witness-calibrated.json")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    began = time.monotonic()
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", "metok")  # reads FFV1
    language, tokenizer = load_model(options.folder / "packages", torch.float32)
    words = language.get_input_embeddings().weight.detach().clone()
    model, prompt = options.folder / "calibrated" / "model", Prompt(tokenizer)
    checkpoint.write(language, tokenizer, model, SIDE)
    (model / "chat_template.jinja").write_text(template())
    del language
    searched = -(-3 * options.samples // len(KINDS))  # half again as many, for two parts
    sheets = [
        write_set(options.folder / "calibrated" / str(seed), prompt, words, seed, videos)
        for seed, videos in ((SEARCHED, searched), (ASKED, options.videos))
    ]
    longest = max(len(prompt.ids(row["answer"])) for row in read(sheets[0]))  # it babbles on behind its answer
    profile = options.folder / "calibrated" / "profile.json"
    console = Console(record=True, width=150)
    status = run_calibrate(
        Options(
            model=str(model),
            questions=sheets[0],
            target=options.target,
            out=profile,
            samples=options.samples,
            answer_tokens=longest,
            engine={**ENGINE, "media_io_kwargs": {"video": {"num_frames": FRAMES}}},
            force=True,  # what came nearest is counted too
        ),
        console,
    )
    text = console.export_text().replace(f"{ROOT}/", "")
    said = [line.rstrip() for line in text.splitlines() if line.strip()]
    answers = compared(prompt, model, sheets[1], profile)
    report(answers, said, status, read_profile(profile), sheets[1], options, (time.monotonic() - began) / 60)
    return 0


def report(
    answers: dict[str, list[bool]],
    said: list[str],
    status: int,
    profile: Profile,
    sheet: Path,
    options: argparse.Namespace,
    minutes: float,
) -> None:
    """Write the JSON and print a line for each way to answer."""
    rows = read(sheet)
    kinds = np.array([row["kind"] for row in rows])
    videos = sorted({row["video"] for row in rows})
    boot = Bootstrap([videos.index(row["video"]) for row in rows])
    slices = {"all": np.ones(len(rows), dtype=np.bool_)} | {kind: kinds == kind for kind in KINDS}
    found = {}
    for name, each in answers.items():
        other = None if name == "off" else np.array(answers["off"])
        found[name] = compare(boot, np.array(each), other, slices)
        print(f"{name:24}{100 * found[name]['all']['accuracy']:6.1f} % right")
    result = {
        "command": "python -m benchmarks.witness.calibrated " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        **conditions(),
        "packages": list(PACKAGES),
        "seeds": {"searched": SEARCHED, "asked": ASKED},
        "questions": {"searched": options.samples, "held_out": options.samples, "asked": len(rows)},
        "frames": FRAMES,
        "passed": status == 0,
        "said": said,
        "profile": profile.model_dump(mode="json"),
        "right": found,
        "minutes": minutes,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
