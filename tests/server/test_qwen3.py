"""Qwen3-VL behind `vllm serve`, from a folder as published: files are sampled as Qwen3-VL does it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest

from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoSettings
from tests.support.oracle import OracleResult, OracleSettings, assert_same
from tests.support.oracle import run as run_oracle
from tests.support.oracle.qwen3_samples import Qwen3Sample, load_qwen3
from tests.support.oracle.samples import picture, scene_video
from tests.support.server.asking import OPTIONS, QUESTION, chat, decided, result, user
from tests.support.server.clips import data_url, mp4, png_url
from tests.support.server.live import Server, serving

Running = tuple[Server, Qwen3Sample]
RATE, FRAMES = 7, 68
VIDEO = mp4(scene_video(51, FRAMES, side=128)[:, :, :96], RATE)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    sample = load_qwen3(tmp_path_factory.mktemp("model"), "qwen3-vl", seed=49)
    log = tmp_path_factory.mktemp("log") / "server.log"
    named = ("--served-model-name", "tiny", "--trust-request-mm-kwargs")
    with serving(sample.path, log, "--plugin", "metok", *named, *OPTIONS) as server:
        yield server, sample


def expected(
    sample: Qwen3Sample,
    off: bool = False,
    videos: int = 1,
    image: Any = None,
    stages: Literal[1, 3] = 3,
    force: list[int] | None = None,
    **sampling: Any,
) -> OracleResult:
    film = decode_video(VIDEO, VideoSettings(sampling="qwen3_vl", **sampling))
    metadata = {"fps": film.fps, "total_num_frames": film.total_frames, "frames_indices": film.indices}
    # Where all frames are there, transformers samples from them, as behind vLLM's own loader.
    sent = (film.frames, {**metadata, "duration": film.duration, "do_sample_frames": len(film.indices) == FRAMES})
    settings = OracleSettings(strides=sample.strides, off=off, stages=stages)
    steps = 12 if force is None else len(force)
    ids = sample.prompt_ids(QUESTION, videos=videos, images=0 if image is None else 1)
    pictures = None if image is None else sample.image_inputs([image])
    pixels = [sample.pixels(sent)] * videos
    asked = sample.question_ids(QUESTION)
    return decided(run_oracle(sample.model, ids, pixels, pictures, asked, settings, steps, force_tokens=force))


@pytest.mark.parametrize(
    ("stated", "sampling", "pairs"),
    [
        ({}, {"fps": 2}, 10),  # 19 frames
        ({"fps": 1}, {"fps": 1}, 5),  # 9 frames
        ({"num_frames": 6}, {"num_frames": 6}, 3),
        ({"num_frames": -1}, {}, 10),
    ],
)
def test_files_are_sampled_and_labelled_as_qwen3_does(
    running: Running, stated: dict[str, Any], sampling: dict[str, Any], pairs: int
) -> None:
    server, sample = running
    turn, extra = user(QUESTION, data_url(VIDEO)), {"media_io_kwargs": {"video": stated}} if stated else {}
    off = expected(sample, off=True, **sampling)
    assert off.videos is not None
    assert off.videos[0].strides == [1] * pairs
    assert_same(off, result(chat(server, [turn], "off", max_tokens=12, extra=extra)), 1e-3)
    assert_same(expected(sample, **sampling), result(chat(server, [turn], max_tokens=12, extra=extra)), 1e-3)


def test_text_and_images(running: Running) -> None:
    server, sample = running
    assert_same(expected(sample, videos=0, fps=2), result(chat(server, [user(QUESTION)], max_tokens=12)), 1e-3)
    image = picture(5, 96, 128)
    turn = user(QUESTION)
    turn["content"].insert(0, {"type": "image_url", "image_url": {"url": png_url(image)}})
    answer = result(chat(server, [turn], max_tokens=12))
    assert_same(expected(sample, videos=0, image=image, fps=2), answer, 1e-3)
    turn["content"].insert(1, {"type": "video_url", "video_url": {"url": data_url(VIDEO)}})
    assert_same(expected(sample, image=image, fps=2), result(chat(server, [turn], max_tokens=12)), 1e-3)


def test_a_video_by_its_uuid_alone(running: Running) -> None:
    server, sample = running
    turn = user(QUESTION, data_url(VIDEO))
    turn["content"][0]["uuid"] = "a-clip"
    chat(server, [turn], max_tokens=1)
    turn["content"][0]["video_url"] = None
    assert_same(expected(sample, fps=2), result(chat(server, [turn], max_tokens=12)), 1e-3)


def test_wrong_requests_are_answered_in_a_sentence(running: Running) -> None:
    server, _ = running
    turn = user(QUESTION, data_url(VIDEO))
    with pytest.raises(openai.BadRequestError, match="may state 'metok', 'fps', 'num_frames', 'size', not 'do_resize'"):
        chat(server, [turn], extra={"mm_processor_kwargs": {"do_resize": False}})
    still = user(QUESTION, data_url(mp4(scene_video(3, 1, side=64), RATE)))
    with pytest.raises(openai.BadRequestError, match=r"METok: this model takes videos of 2 frames or more, not of 1\."):
        chat(server, [still])


def test_the_log_has_no_errors(running: Running) -> None:
    assert "ERROR" not in running[0].log.read_text(errors="replace")
