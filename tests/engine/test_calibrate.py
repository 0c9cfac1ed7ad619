"""`metok calibrate` from end to end, on the trained model and a few questions.

Its engines run in this process, one after the other, so that each start costs seconds;
`test_a_process_of_its_own` starts one as users do.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from metok_vllm.calibrate import run, worker
from metok_vllm.calibrate.engines import Engines
from metok_vllm.calibrate.jobs import Job
from metok_vllm.calibrate.questions import choose
from metok_vllm.cli import main
from metok_vllm.contract.profile import read_profile
from metok_vllm.demo.model_choice import TRAINED
from metok_vllm.frontend.fingerprint import fingerprint
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
    assert profile.mark == fingerprint(TRAINED)
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


def test_a_process_of_its_own(sheet: Path, tmp_path: Path) -> None:
    (asked,) = choose(None, sheet, 1, held_out=False).search
    told: list[int] = []
    job = Job(
        model=str(TRAINED),
        model_mark="",
        plugin="",
        engine={"dtype": "float32", "max_model_len": 2048, **ENGINE, "media_io_kwargs": {"video": {"num_frames": 8}}},
        server={"profile": "none", "prune_layers": [10, 11, 12]},
        answer_tokens=8,
        asked=[asked],
        variants=[
            worker.Variant(name="again"),
            worker.Variant(name="whole", metok=WHOLE),
            worker.Variant(name="cut", metok=WHOLE | {"strides": [8, 8, 8]}),
            worker.Variant(name="without", with_video=False),
        ],
    )
    result = Engines(tmp_path, told.append).run(job)
    assert sum(told) == job.requests == 5
    assert os.environ.get("VLLM_MEDIA_CONNECTOR") != "metok"
    seen: dict[str, Any] = {name: only[0] for name, only in result.told.items()}
    for name in ("again", "whole"):
        assert seen[name].agrees, "the stock model, and METok where it drops nothing"
        assert seen[name].kl < 1e-4
    assert seen["without"].kl > seen["whole"].kl
    assert seen["whole"].counts.encoded == seen["whole"].counts.stock > seen["cut"].counts.encoded
    assert seen["whole"].prompt_tokens == seen["again"].prompt_tokens
    assert (result.facts.layers, result.facts.strides, result.facts.first_layer) == (12, (2, 4, 8), 1)


WHOLE = {"events": 1, "key_events": 1, "keep_ratio": 1, "strides": [2, 2, 2], "decode_retention": 1}
