"""`metok calibrate` from end to end, on the trained model and a few questions.

Its engines run in this process, one after the other, so that each start costs seconds; one test starts one as
users do.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from metok_vllm.calibrate import run, worker
from metok_vllm.calibrate.engines import Engines
from metok_vllm.calibrate.jobs import Job, Result, Told
from metok_vllm.calibrate.questions import choose
from metok_vllm.cli import main
from metok_vllm.contract.profile import read_profile
from metok_vllm.demo.model_choice import TRAINED
from metok_vllm.demo.qwen_checkpoint import build_qwen_checkpoint
from metok_vllm.frontend.fingerprint import fingerprint
from tests.support.oracle.samples import load_sample
from tests.support.quantised import quantise
from training.make_set import write_set

FRAMES = 24
ENGINE = {"block_size": 32}
FLAGS = (
    "--dtype",
    "float32",
    "--max-model-len",
    "2048",
    "--num-frames",
    str(FRAMES),
    "--samples",
    "3",
    "--answer-tokens",
    "8",
)


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set("demo", 700, 4, 3, tmp_path_factory.mktemp("videos"), frames=(16, 24))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were done."""
    jobs: list[Job] = []

    def start(self: Engines, job: Job, file: Path) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        jobs.append(job)
        gc.freeze()  # as in `harness.py`
        file.write_text(worker.run(job, lambda done: None).model_dump_json())
        cleanup_dist_env_and_memory()

    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "metok")
    monkeypatch.setattr(Engines, "_start", start)
    return jobs


def test_it_finds_a_setting_checks_it_and_goes_on_where_it_was(
    sheet: Path,
    tmp_path: Path,
    in_this_process: list[Job],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "Options", partial(run.Options, most_forwards=19))  # one engine for the cuts
    whole = fingerprint(TRAINED)
    marks = iter([whole.model_copy(update={"weights_sha256": None})])  # vLLM fetches the weights with its first engine
    monkeypatch.setattr(run, "fingerprint", lambda folder: next(marks, whole))
    out = tmp_path / "found.json"
    command = ["calibrate", str(TRAINED), "--questions", str(sheet), "--out", str(out), *FLAGS]
    command += ["--engine-option", json.dumps(ENGINE), "--force"]
    status = main(command)
    said = capsys.readouterr().out
    assert status in (0, 1), said
    first, *others = in_this_process
    assert len(others) >= 6
    assert all(one.stock is not None for job in others for one in job.asked), "stock is asked once"
    held_out = {one.video for job in others[-1:] for one in job.asked}
    searched = {one.video for one in others[0].asked}
    assert held_out.isdisjoint(searched)

    profile = read_profile(out)
    assert profile.mark == whole
    assert profile.engine["media_io_kwargs"] == {"video": {"num_frames": FRAMES}}
    assert {job.model_mark for job in others} == {whole.model_dump_json()} != {first.model_mark}
    assert profile.settings["prune_layers"][2] >= profile.horizon
    assert 3 <= profile.horizon <= 12
    assert profile.measured.questions == len(others[-1].asked)
    assert 0 < profile.measured.tokens < profile.measured.tokens_stock
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    for words in (
        "Horizon: layer",
        "asked again",
        "100.0 %",
        "fewer frames",
        "stage 1 alone",
        "paper",
        "balanced",
        "found:",
    ):
        assert words in said, words

    done = len(in_this_process)
    assert main(command) == status
    assert len(in_this_process) == done, "a second run starts no engine"
    again = capsys.readouterr().out
    assert f"0 started, {done} read again" in again
    assert read_profile(out) == profile
    assert len(first.variants) == 4


WHOLE = {"events": 1, "key_events": 1, "keep_ratio": 1, "strides": [2, 2, 2], "decode_retention": 1}
VARIANTS = (
    worker.Variant(name="again"),
    worker.Variant(name="whole", metok=WHOLE),
    worker.Variant(name="cut", metok=WHOLE | {"strides": [8, 8, 8]}),
    worker.Variant(
        name="pruned", metok={"keep_ratio": 0.5, "score_rows": "question", "frame_smoothing": 1, "decode_retention": 1}
    ),
    worker.Variant(name="without", with_video=False),
)


def job(sheet: Path, model: Path = TRAINED, variants: Sequence[worker.Variant] = VARIANTS, **engine: Any) -> Job:
    """One question about one video. Layers prune what a variant's `keep_ratio` says; L3 drops nothing."""
    stated = {"dtype": "float32", "max_model_len": 2048, **ENGINE, "media_io_kwargs": {"video": {"num_frames": 8}}}
    depth = json.loads((model / "config.json").read_text())["text_config"]["num_hidden_layers"]
    return Job(
        model=str(model),
        model_mark="",
        plugin="",
        engine=stated | engine,
        server={"profile": "none", "prune_layers": [depth // 3, 2 * depth // 3, depth]},
        answer_tokens=8,
        asked=list(choose(None, sheet, 1, held_out=False).search),
        variants=list(variants),
    )


def seen_by(result: Result) -> dict[str, Told]:
    return {name: only[0] for name, only in result.told.items()}


@pytest.fixture
def done_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[Job], Result]:
    """Does a job in this process."""

    def do(job: Job) -> Result:
        from vllm.distributed import cleanup_dist_env_and_memory

        gc.freeze()
        result = worker.run(job, lambda done: None)
        cleanup_dist_env_and_memory()
        return result

    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "metok")
    return do


def test_two_ranks_chunks_and_batches_see_the_same(
    sheet: Path, tmp_path: Path, done_here: Callable[[Job], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a profile found with them is the same: the search is a function of what it is told.

    The ranks run in a process of their own, as users start them.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    told: list[int] = []
    with monkeypatch.context() as patch:
        patch.delenv("VLLM_MEDIA_CONNECTOR")
        ranks = {}
        if len(cores) == 2:
            ranks = {"tensor_parallel_size": 2}
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores)))
        over = job(sheet, **ranks)
        result = Engines(tmp_path, told.append).run(over)
        assert sum(told) == over.requests == 6
        assert "VLLM_MEDIA_CONNECTOR" not in os.environ
    seen = seen_by(result)
    for name in ("again", "whole"):
        assert seen[name].agrees, "the stock model, and METok where it drops nothing"
        assert seen[name].kl < 1e-4
    whole, cut, pruned = (seen[name].counts for name in ("whole", "cut", "pruned"))
    assert whole is not None
    assert cut is not None
    assert pruned is not None
    assert pruned.encoded > pruned.after_l1 > pruned.after_l2 > 0
    assert seen["without"].kl > seen["whole"].kl
    assert whole.encoded == whole.stock > cut.encoded
    assert seen["whole"].prompt_tokens == seen["again"].prompt_tokens
    assert (result.facts.layers, result.facts.strides, result.facts.first_layer) == (12, (2, 4, 8), 1)
    for other in (done_here(job(sheet)), done_here(job(sheet, max_num_batched_tokens=96, max_num_seqs=1))):
        assert [one.tokens for one in other.stock] == [one.tokens for one in result.stock]
        for name, one in seen_by(other).items():
            alike = {"kl": pytest.approx(one.kl, abs=1e-4), "harm": pytest.approx(one.harm, abs=1e-4)}
            assert seen[name].model_dump() == one.model_dump() | alike, name


def test_another_family(sheet: Path, tmp_path: Path, done_here: Callable[[Job], Result]) -> None:
    """Qwen2.5-VL: frames in pairs, its own strides, tokens a frame by the file's size."""
    model = build_qwen_checkpoint(tmp_path / "model", "qwen2.5-vl", seed=3)
    variants = (VARIANTS[0], worker.Variant(name="whole", metok=WHOLE | {"strides": [1, 1, 1]}), VARIANTS[-1])
    result = done_here(job(sheet, model, variants))
    seen = seen_by(result)
    assert (result.facts.strides, result.facts.frame_group) == ((1, 2, 4), 2)
    whole = seen["whole"].counts
    assert whole is not None
    assert whole.encoded == whole.stock == whole.after_l2
    assert seen["again"].kl < 1e-4
    assert seen["whole"].prompt_tokens == seen["again"].prompt_tokens > seen["without"].prompt_tokens


def test_quantised_weights(
    sheet: Path, tmp_path_factory: pytest.TempPathFactory, done_here: Callable[[Job], Result]
) -> None:
    """Stock is the same quantised model: where METok drops nothing, it agrees."""
    plain = load_sample(tmp_path_factory.mktemp("model"), seed=29)
    model = quantise(plain, tmp_path_factory.mktemp("int8"), "int8")
    seen = seen_by(done_here(job(sheet, model.path, max_model_len=4096)))
    assert seen["again"].kl < 1e-4
    assert seen["whole"].agrees
    assert seen["whole"].kl < 1e-3
    assert seen["cut"].kl > seen["whole"].kl
