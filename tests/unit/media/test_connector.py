"""The media connector: what vLLM answers with 5xx becomes a client's error; a list of frames is counted
before it is read.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import urllib.parse
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import requests
from PIL import Image
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from metok_vllm.contract.refusals import refused_counter
from metok_vllm.frontend.command_line import CONNECTOR, CONNECTOR_VARIABLE
from metok_vllm.media.connector import (
    CONNECTOR_NAME,
    MetokMediaConnector,
    check_jpeg_frames,
    client_errors,
    register_connector,
)
from metok_vllm.media.loader import VideoRequestError, register_loader
from metok_vllm.media.settings import VideoError, VideoSettings
from tests.support.clips import clip, numbered
from tests.support.server import warm

register_loader()
register_connector()


def picture(width: int = 64, height: int = 48, number: int = 0) -> str:
    buffer = io.BytesIO()
    Image.fromarray(numbered(number, width, height)).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def frames(*pictures: str) -> str:
    return "data:video/jpeg;base64," + ",".join(pictures)


def connector(**video: Any) -> MetokMediaConnector:
    return MetokMediaConnector({"video": {"video_backend": "metok", **video}})


def test_the_connector_is_vllms_under_a_name_of_its_own() -> None:
    assert CONNECTOR_NAME == CONNECTOR
    assert isinstance(MEDIA_CONNECTOR_REGISTRY.load(CONNECTOR_NAME), MetokMediaConnector)
    assert type(MEDIA_CONNECTOR_REGISTRY.load("http")) is MediaConnector


def test_videos_are_loaded_as_by_vllms_own() -> None:
    url = "data:video/mp4;base64," + base64.b64encode(clip(20)).decode()
    media, metadata = connector(num_frames=6).fetch_video(url).media
    stock, stock_metadata = (
        MediaConnector({"video": {"video_backend": "metok", "num_frames": 6}}).fetch_video(url).media
    )
    assert metadata == stock_metadata
    assert np.array_equal(media, stock)
    listed, metadata = (
        connector(fps=2, total_num_frames=30).fetch_video(frames(*[picture(number=n) for n in range(3)])).media
    )
    assert listed.shape == (3, 48, 64, 3)
    assert metadata["total_num_frames"] == 30


WRONG = {
    "data:video/mp4,abc": "base64",
    "file:///etc/passwd": "takes no files",
    "FILE:///etc/passwd": "takes no files",
    frames(picture(), "AAAA"): "not a JPEG file",
    frames(""): "not a JPEG file",
    frames(*[picture()] * 33): "a list of 33 frames and num_frames is 32",
    frames(*[picture()] * 33).replace(",", "%2C").replace("%2C", ",", 1): "a list of 33 frames",
    frames(picture(), "AA!A"): "not a JPEG file",
    "data:video/mp4;base64,AAAA!": r"holds '!', which is not base64",
    "data:video/mp4;base64,AAAAA": "cut off",
    "data:video/mp4;base64,AAAA,AAAA": "holds ','",
    "data:video/mp4;base64,": "empty",
}


def refused_videos() -> float:
    return float(refused_counter().labels("video")._value.get())


@pytest.mark.parametrize("url", WRONG, ids=range(len(WRONG)))
def test_wrong_media_are_a_clients_error_on_both_ways(url: str) -> None:
    before = refused_videos()
    with pytest.raises(VLLMValidationError, match=WRONG[url]):
        connector().fetch_video(url)
    with pytest.raises(VLLMValidationError, match=WRONG[url]):
        asyncio.run(connector().fetch_video_async(url))
    assert refused_videos() == before + (0 if url.lower().startswith("file") else 2)


SPELLINGS = {
    "wrapped at 76": lambda head, data: head + "\n".join(data[i : i + 76] for i in range(0, len(data), 76)) + "\n",
    "upper case": lambda head, data: head.upper() + data,
    "codecs": lambda head, data: head.replace(";", ";codecs=vp8,opus;") + data,
    "quoted": lambda head, data: head.replace(";", ';codecs="avc1.42E01E, mp4a.40.2";') + data,
    "percent-encoded": lambda head, data: head + urllib.parse.quote(data, safe=","),
    "for URLs, no padding": lambda head, data: head + data.replace("+", "-").replace("/", "_").replace("=", ""),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_data_url_is_read_as_the_plain_one(name: str) -> None:
    """A video, a list of frames and a picture, on both ways."""
    spell: Any = SPELLINGS[name]
    tails = (base64.b64encode(clip(20) + bytes(n)).decode() for n in range(3))
    video = next(text for text in tails if text.endswith("="))
    listed = ",".join(picture(number=n) for n in range(3))
    ours = connector(num_frames=6)
    for head, data in (("data:video/mp4;base64,", video), ("data:video/jpeg;base64,", listed)):
        expected, metadata = ours.fetch_video(head + data).media
        for media in (ours.fetch_video(spell(head, data)), asyncio.run(ours.fetch_video_async(spell(head, data)))):
            assert np.array_equal(media.media[0], expected)
            assert media.media[1] == metadata
    head, data = "data:image/jpeg;base64,", picture(number=5)
    shown = np.asarray(ours.fetch_image(head + data).media)
    assert np.array_equal(ours.fetch_image(spell(head, data)).media, shown)
    assert np.array_equal(asyncio.run(ours.fetch_image_async(spell(head, data))).media, shown)


def test_a_picture_that_is_not_base64() -> None:
    before = refused_videos()
    for url, words in (("data:image/png;base64,A!AA", "holds '!'"), ("data:image/png,AAAA", "does not state base64")):
        with pytest.raises(VLLMValidationError, match=words):
            connector().fetch_image(url)
    assert refused_videos() == before


def test_a_file_that_requests_may_name_but_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "here.mp4").write_bytes(clip(5))
    open_folder = MetokMediaConnector({"video": {"video_backend": "metok"}}, allowed_local_media_path=str(tmp_path))
    assert len(open_folder.fetch_video(f"file://{tmp_path}/here.mp4").media[0]) == 5
    with pytest.raises(VLLMValidationError, match=r"^The media file cannot be read\.$"):
        open_folder.fetch_video(f"file://{tmp_path}/gone.mp4")
    with pytest.raises(ValueError, match="must be a subpath"):
        open_folder.fetch_video(f"file://{tmp_path}/../gone.mp4")


@pytest.mark.parametrize("name", ["nobody", 7])
def test_a_loader_that_does_not_exist(name: object) -> None:
    with pytest.raises(VLLMValidationError, match="There is no video_backend"):
        connector(video_backend=name).fetch_video(frames(picture()))
    with pytest.raises(VLLMValidationError, match="There is no video_backend"):
        asyncio.run(connector(video_backend=name).fetch_video_async(frames(picture())))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_frames": 3}, "a list of 4 frames, more than 3"),
        ({"max_pixels": 64 * 48 - 1}, "frames of 64 x 48 have more than 3071 pixels"),
    ],
)
def test_limits_of_the_loader_hold_for_a_list(limits: dict[str, int], words: str) -> None:
    data = ",".join([picture()] * 4)
    check_jpeg_frames(data, -1, VideoSettings())
    with pytest.raises(VideoError, match=words):
        check_jpeg_frames(data, -1, VideoSettings(**limits))  # type: ignore[arg-type]


def test_memory_of_a_list_is_counted_before_a_frame_is_decoded() -> None:
    data = ",".join([picture(1024, 512)] * 3)  # 1.5 MiB each
    check_jpeg_frames(data, -1, VideoSettings(max_output_mib=5))
    with pytest.raises(VideoError, match="fill more than 4 MiB"):
        check_jpeg_frames(data, -1, VideoSettings(max_output_mib=4))
    with pytest.raises(VideoRequestError, match="more than 100 pixels"):
        connector(max_pixels=100).fetch_video(frames(picture()))


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ClientConnectionError("Cannot connect to host 10.0.0.7:8080"),
        aiohttp.ClientPayloadError("10.0.0.7"),
        requests.exceptions.ConnectionError("10.0.0.7"),
        TimeoutError("10.0.0.7"),
        asyncio.TimeoutError("10.0.0.7"),
        ConnectionRefusedError("10.0.0.7"),
    ],
)
def test_what_another_server_fails_at_is_told_without_its_address(error: Exception) -> None:
    with (
        pytest.raises(VLLMUnprocessableEntityError, match=r"^Failed to fetch media from URL") as raised,
        client_errors("http://x/"),
    ):
        raise error
    assert "10.0.0.7" not in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("broken"), OSError(28, "No space left on device"), KeyError("a")]
)
def test_what_is_this_servers_fault_stays_so(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, client_errors("http://x/"):
        raise error
    assert raised.value is error


ASKED = """
import os, sys
sys.argv = json_argv
from metok_vllm.frontend.command_line import apply_plugin_option
apply_plugin_option()
print(os.environ.get("VLLM_MEDIA_CONNECTOR"))
"""


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [(["--plugin", "metok"], None, CONNECTOR), (["--plugin", "metok"], "http", "http"), ([], None, "None")],
    ids=["asked for", "an operator's own", "not asked for"],
)
def test_only_a_server_with_metok_takes_it(
    tmp_path: Path, options: list[str], given: str | None, expected: str
) -> None:
    config = {"architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    env = {key: value for key, value in os.environ.items() if key != CONNECTOR_VARIABLE}
    env |= {} if given is None else {CONNECTOR_VARIABLE: given}
    script, log = tmp_path / "asked.py", tmp_path / "log"
    script.write_text(ASKED.replace("json_argv", repr(["vllm", "serve", str(tmp_path), *options])))
    assert warm.start(script, env=env, log=log).wait(60) == 0
    assert log.read_text().split()[-1] == expected
