"""InternVL3 behind `vllm serve`, in Hugging Face format and from a folder as its authors publish it: there
the config is read by the code beside it, and the template knows nothing of pictures and videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoSettings
from tests.support.oracle import OracleResult, OracleSettings, assert_same
from tests.support.oracle import run as run_oracle
from tests.support.oracle.internvl_chat import load_internvl_chat
from tests.support.oracle.internvl_samples import InternVLSample, load_internvl
from tests.support.oracle.samples import picture, scene_video
from tests.support.server.asking import OPTIONS, QUESTION, chat, decided, result, user
from tests.support.server.clips import data_url, mp4, png_url
from tests.support.server.live import Server, serving

Running = tuple[Server, InternVLSample]
VIDEO = mp4(scene_video(51, 45, side=128)[:, :, :96], 7)


# How each format is loaded, and the flag of stock vLLM for it.
FORMATS: dict[str, tuple[Callable[..., InternVLSample], tuple[str, ...]]] = {
    "internvl": (load_internvl, ()),
    "internvl-chat": (load_internvl_chat, ("--trust-remote-code",)),
}


@pytest.fixture(scope="module", params=FORMATS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    load, flags = FORMATS[request.param]
    sample = load(tmp_path_factory.mktemp("model"), seed=49)
    log = tmp_path_factory.mktemp("log") / "server.log"
    named = ("--served-model-name", "tiny", "--trust-request-mm-kwargs", *flags)
    with serving(sample.path, log, "--plugin", "metok", *named, *OPTIONS) as server:
        yield server, sample


def expected(sample: InternVLSample, off: bool = False, videos: int = 1, image: Any = None) -> OracleResult:
    """Of the frames that METok's loader takes by default: 32, from the first to the last."""
    frames = decode_video(VIDEO, VideoSettings(num_frames=32)).frames
    assert len(frames) == 32
    ids = sample.as_read(sample.prompt_ids(QUESTION, videos=videos, images=0 if image is None else 1))
    pictures = None if image is None else sample.image_inputs([image])
    settings, question = OracleSettings(strides=sample.strides, off=off), sample.question_ids(QUESTION)
    return decided(run_oracle(sample.model, ids, [sample.pixels(frames)] * videos, pictures, question, settings, 12))


def test_a_file_is_answered_as_the_oracle_does(running: Running) -> None:
    server, sample = running
    turn = user(QUESTION, data_url(VIDEO))
    assert_same(expected(sample, off=True), result(chat(server, [turn], "off", max_tokens=12)), 1e-3)
    assert_same(expected(sample), result(chat(server, [turn], max_tokens=12)), 1e-3)


def test_text_images_and_a_video_by_its_uuid_alone(running: Running) -> None:
    server, sample = running
    assert_same(expected(sample, videos=0), result(chat(server, [user(QUESTION)], max_tokens=12)), 1e-3)
    image, turn = picture(5, 96, 128), user(QUESTION)
    turn["content"].insert(0, {"type": "image_url", "image_url": {"url": png_url(image)}})
    assert_same(expected(sample, videos=0, image=image), result(chat(server, [turn], max_tokens=12)), 1e-3)
    turn["content"].insert(1, {"type": "video_url", "video_url": {"url": data_url(VIDEO)}, "uuid": "a-clip"})
    both = expected(sample, image=image)
    assert_same(both, result(chat(server, [turn], max_tokens=12)), 1e-3)
    turn["content"][1]["video_url"] = None
    assert_same(both, result(chat(server, [turn], max_tokens=12)), 1e-3)


def test_other_kwargs_are_answered_in_a_sentence(running: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="a request may state 'metok' alone, not 'max_dynamic_patch'"):
        chat(running[0], [user(QUESTION, data_url(VIDEO))], extra={"mm_processor_kwargs": {"max_dynamic_patch": 1}})


def test_the_log_has_no_errors(running: Running) -> None:
    assert "ERROR" not in running[0].log.read_text(errors="replace")
