"""LLaVA-Video in its authors' format behind `vllm serve`, METok on and off: it reads when its frames are."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.support.oracle import OracleResult, OracleSettings, assert_same
from tests.support.oracle import run as run_oracle
from tests.support.oracle.originals import OriginalSample, load_original, time_instruction
from tests.support.oracle.samples import picture, scene_video
from tests.support.server.asking import OPTIONS, QUESTION, ask, chat, decided, result, user
from tests.support.server.clips import FPS, data_url, mp4, png_url, seen
from tests.support.server.live import Server, serving

Running = tuple[Server, OriginalSample]
VIDEO = mp4(scene_video(51, 22))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    sample = load_original(tmp_path_factory.mktemp("model"), "llava-video", seed=41)
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(
        sample.path, log, "--plugin", "metok", "--trust-request-mm-kwargs", "--served-model-name", "tiny", *OPTIONS
    ) as server:
        yield server, sample


def expected(sample: OriginalSample, off: bool, steps: int = 24) -> OracleResult:
    frames = seen(VIDEO)
    question = f"{time_instruction([i / FPS for i in range(len(frames))], len(frames) / FPS)}\n{QUESTION}"
    ids = sample.prompt_ids(question, videos=1)
    settings = OracleSettings(off=off)
    asked = sample.question_ids(QUESTION)
    return decided(run_oracle(sample.model, ids, [sample.pixels(frames)], None, asked, settings, steps))


def test_a_video_file_is_answered_as_the_oracle_answers(running: Running) -> None:
    server, sample = running
    for metok in (None, "off"):
        assert_same(expected(sample, off=metok == "off"), result(ask(server, VIDEO, metok)), 1e-3)


def test_text_and_pictures(running: Running) -> None:
    server, sample = running
    text = run_oracle(sample.model, sample.prompt_ids(videos=0), [], None, [], OracleSettings(), 12)
    assert_same(text, result(ask(server, None, max_tokens=12)), 1e-3)
    shown = picture(3, 90, 60)
    seen_by = sample.image_inputs([shown])
    pictured = run_oracle(sample.model, sample.prompt_ids(videos=0, images=1), [], seen_by, [], OracleSettings(), 12)
    turn = {**user(QUESTION)}
    turn["content"] = [{"type": "image_url", "image_url": {"url": png_url(shown)}}, *turn["content"]]
    assert_same(pictured, result(chat(server, [turn], max_tokens=12)), 1e-3)


def test_the_log_has_no_errors(running: Running) -> None:
    assert "ERROR" not in running[0].log.read_text(errors="replace")


def test_a_video_by_its_uuid_alone(running: Running) -> None:
    """Its frames' times are in its data, which a model that reads them needs again."""
    server, sample = running
    turn = user(QUESTION, data_url(VIDEO))
    turn["content"][0]["uuid"] = "a-clip"
    first = result(chat(server, [turn]))
    turn["content"][0]["video_url"] = None
    assert_same(expected(sample, off=False), first, 1e-3)
    with pytest.raises(openai.BadRequestError, match="which a uuid alone does not say; send the data with it"):
        chat(server, [turn])
