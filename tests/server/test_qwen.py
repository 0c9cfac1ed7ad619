"""Qwen2.5-VL and Qwen2-VL behind `vllm serve`, from folders as published: files are sampled as Qwen does it,
and requests state the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from transformers.image_utils import SizeDict

from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoSettings
from tests.support.oracle import OracleResult, OracleSettings, assert_same
from tests.support.oracle import run as run_oracle
from tests.support.oracle.qwen_samples import QwenSample, load_qwen
from tests.support.oracle.samples import scene_video
from tests.support.server.asking import OPTIONS, QUESTION, chat, decided, result, user
from tests.support.server.clips import FPS, data_url, mp4
from tests.support.server.live import Server, serving

Running = tuple[Server, QwenSample]
SECONDS = 10
VIDEO = mp4(scene_video(51, FPS * SECONDS, side=112)[:, :, :84])


@pytest.fixture(scope="module", params=["qwen2.5-vl", "qwen2-vl"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    sample = load_qwen(tmp_path_factory.mktemp("model"), request.param, seed=47)
    log = tmp_path_factory.mktemp("log") / "server.log"
    named = ("--served-model-name", "tiny", "--trust-request-mm-kwargs")
    with serving(sample.path, log, "--plugin", "metok", *named, *OPTIONS) as server:
        yield server, sample


def expected(sample: QwenSample, off: bool = False, decode_retention: float = 0, **sampling: Any) -> OracleResult:
    film = decode_video(VIDEO, VideoSettings(sampling="qwen2_vl", **sampling))
    known = {"fps": film.fps, "total_num_frames": film.total_frames, "frames_indices": film.indices}
    known["duration"] = film.duration
    # Qwen2-VL reads nothing of a video's times.
    pixels = sample.pixels(film.frames if sample.kind == "qwen2-vl" else (film.frames, known))
    settings = OracleSettings(strides=sample.strides, off=off, decode_retention=decode_retention)
    ids = sample.prompt_ids(QUESTION)
    return decided(run_oracle(sample.model, ids, [pixels], None, sample.question_ids(QUESTION), settings, 12))


@pytest.mark.parametrize(
    ("stated", "sampling", "frames"),
    [
        ({}, {"fps": 2}, 2 * SECONDS),
        ({"fps": 1}, {"fps": 1}, SECONDS),
        ({"num_frames": 7}, {"num_frames": 7}, 8),
        ({"num_frames": -1}, {}, FPS * SECONDS),
    ],
)
def test_files_are_sampled_as_qwen_does(
    running: Running, stated: dict[str, Any], sampling: dict[str, Any], frames: int
) -> None:
    server, sample = running
    turn, extra = user(QUESTION, data_url(VIDEO)), {"media_io_kwargs": {"video": stated}} if stated else {}
    off = expected(sample, off=True, **sampling)
    assert off.videos is not None
    assert off.videos[0].strides == [1] * (frames // 2)
    assert_same(off, result(chat(server, [turn], "off", max_tokens=12, extra=extra)), 1e-3)
    assert_same(expected(sample, **sampling), result(chat(server, [turn], max_tokens=12, extra=extra)), 1e-3)


def test_a_request_states_the_size(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 x 3 tokens a pair, 6 may be taken: 2 x 2, since the shape of the frames holds."""
    server, sample = running
    size = {"shortest_edge": 28 * 28, "longest_edge": 6 * 28 * 28}
    extra = {"mm_processor_kwargs": {"metok": "off", "size": size}}
    answer = chat(server, [user(QUESTION, data_url(VIDEO))], max_tokens=1, extra=extra)
    tokens = answer.prompt_token_ids.count(sample.model.config.video_token_id)
    assert tokens == SECONDS * 2 * 2
    extra = {"mm_processor_kwargs": {"metok": {"decode_retention": 1}, "size": size}}
    pruned = result(chat(server, [user(QUESTION, data_url(VIDEO))], max_tokens=12, extra=extra))
    monkeypatch.setattr(sample.processor.video_processor, "size", SizeDict(**size))
    assert_same(expected(sample, fps=2, decode_retention=1), pruned, 1e-3)


def test_a_video_by_its_uuid_alone(running: Running) -> None:
    server, sample = running
    turn = user(QUESTION, data_url(VIDEO))
    turn["content"][0]["uuid"] = "a-clip"
    chat(server, [turn], max_tokens=1)
    turn["content"][0]["video_url"] = None
    assert_same(expected(sample, fps=2), result(chat(server, [turn], max_tokens=12)), 1e-3)


def test_other_kwargs_are_refused(running: Running) -> None:
    server, _ = running
    extra = {"mm_processor_kwargs": {"do_resize": False}}
    with pytest.raises(openai.BadRequestError, match="may state 'metok', 'fps', 'num_frames', 'size', not 'do_resize'"):
        chat(server, [user(QUESTION, data_url(VIDEO))], extra=extra)


def test_the_log_has_no_errors(running: Running) -> None:
    assert "ERROR" not in running[0].log.read_text(errors="replace")
