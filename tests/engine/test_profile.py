"""An engine that a profile rules gives the oracle's answers: in chunks, beside others, alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from metok_vllm.contract.profile import write_profile
from metok_vllm.frontend.fingerprint import fingerprint
from tests.support.families import check, check_in_chunks
from tests.support.harness import Case, Engine, engine
from tests.support.oracle.samples import load_sample, scene_video
from tests.support.profiles import a_profile

FOUND = {
    "prune_layers": [1, 3, 4],
    "strides": [2, 2, 4],
    "key_events": 5,
    "keep_ratio": 0.6,
    "quota": "video",
    "score_rows": "question",
    "frame_smoothing": 0.25,
    "decode_retention": 0.4,
}
CASES = [Case((scene_video(900 + i, 14 + i, 4),), max_tokens=12) for i in range(3)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("model")
    sample = load_sample(folder, seed=31)
    path = folder / "found.json"
    write_profile(path, a_profile(fingerprint(Path(sample.path)), **FOUND))
    with engine(sample, {"profile": str(path)}, max_num_batched_tokens=96, max_num_seqs=4) as started:
        yield started


def test_in_chunks_and_alone(running: Engine) -> None:
    assert running.server.keep_ratio == 0.6
    check_in_chunks(running, CASES)
    check(running, CASES[:1], running.run(CASES[:1]))


def test_a_request_overrides_it(running: Engine) -> None:
    case = Case(CASES[0].videos, metok={"keep_ratio": 0.9, "quota": "event"}, max_tokens=8)
    check(running, [case], running.run([case]))
