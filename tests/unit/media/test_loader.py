"""The loader inside vLLM: the frames that vLLM's own loader picks,
its metadata, and errors that become HTTP 400.
"""

from __future__ import annotations

import base64
import gc
import io
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.media.connector import MediaConnector, merge_media_io_kwargs
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, Qwen3VLVideoBackend, VideoBackend
from vllm.multimodal.video_decoders import VideoSourceMetadata, VideoTargetMetadata

from metok_vllm.contract.settings import MetokSettings
from metok_vllm.media import decoder, in_force
from metok_vllm.media.connector import MetokMediaConnector
from metok_vllm.media.decoder import decode_video
from metok_vllm.media.in_force import LIMITS, check_video_kwargs, decode_pool, prefer_loader, set_in_force
from metok_vllm.media.loader import MetokVideoLoader, VideoRequestError, register_loader
from metok_vllm.media.sampling import sample_indices
from metok_vllm.media.settings import PoolLimits, VideoError, VideoSettings
from tests.support.clips import clip, number_of, rotated, tone

register_loader()
ASSETS = Path(__file__).parents[3] / "metok_vllm" / "demo" / "assets"
WISHES = [{"num_frames": 1}, {"num_frames": 8}, {"num_frames": 32}, {"fps": 1}, {"fps": 2, "num_frames": 20}]


@given(
    st.integers(1, 200_000),
    st.sampled_from([24.0, 25.0, 30.0, 30000 / 1001, 7.194244604316546]),
    st.one_of(st.just(-1), st.integers(1, 1024)),
    st.one_of(st.just(-1), st.floats(0.01, 60)),
)
def test_the_choice_of_frames_is_vllms(total: int, rate: float, num_frames: int, fps: float) -> None:
    source = VideoSourceMetadata(total, rate, total / rate)
    target = VideoTargetMetadata(num_frames, fps, -1)
    theirs = VideoBackend.compute_frames_index_to_sample(source, target)
    assert sample_indices(total, total / rate, num_frames, fps) == theirs


@pytest.mark.parametrize("name", ["big-buck-bunny-30s.mp4", "iscc-band-60s.mp4"])
@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_on_real_clips_frames_and_metadata_equal_those_of_vllms_loader(name: str, wish: dict[str, Any]) -> None:
    data = (ASSETS / name).read_bytes()
    frames, metadata = MetokVideoLoader.load_bytes(data, **wish)
    their_frames, their_metadata = VideoBackend.load_bytes(data, **wish)
    assert metadata.pop("video_backend") == "metok"
    assert their_metadata.pop("video_backend") == "opencv"
    assert metadata == their_metadata
    assert np.array_equal(frames, their_frames)
    assert frames.dtype == their_frames.dtype
    assert len(frames) > 0


# Not among them: mpeg-ts and videos of one frame, of which vLLM 0.32's own loader gets no frame at all.
OTHERS = {
    "mkv": clip(40, container="matroska"),
    "webm": clip(40, container="webm", codec="libvpx-vp9"),
    "avi": clip(40, container="avi", codec="mpeg4"),
    "fragments": clip(40, container_options={"movflags": "frag_keyframe+empty_moov"}),
    "uneven times": clip(40, times_ms=[*range(0, 400, 20), *range(400, 4400, 200)]),
    "odd size": clip(40, width=51, height=33, pix_fmt="yuv444p"),
    "hidden start": clip(40, shift=8, options={"bf": "0"}, container_options={"avoid_negative_ts": "disabled"}),
    "turned": rotated(clip(40), 90),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_well_formed_files_are_read_as_vllms_loader_reads_them(kind: str) -> None:
    for num_frames in (7, -1):
        frames, metadata = MetokVideoLoader.load_bytes(OTHERS[kind], num_frames=num_frames)
        their_frames, their_metadata = VideoBackend.load_bytes(OTHERS[kind], num_frames=num_frames)
        assert metadata | {"video_backend": "opencv"} == their_metadata
        assert np.array_equal(frames, their_frames)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("fps", [0.5, 2, 30])
def test_qwen3s_frames_are_those_of_vllms_loader_for_it(kind: str, fps: float) -> None:
    _, metadata = MetokVideoLoader.load_bytes(OTHERS[kind], sampling="qwen3_vl", fps=fps)
    assert metadata | {"video_backend": "opencv"} == Qwen3VLVideoBackend.load_bytes(OTHERS[kind], fps=fps)[1]


def test_a_file_without_a_rate_gets_qwen3s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "frame_rate", lambda stream, table: 0.0)
    film = decode_video(clip(60), VideoSettings(sampling="qwen3_vl", fps=2))
    assert (film.fps, len(film.indices)) == (24.0, 5)


def test_do_sample_frames_is_set_where_all_frames_were_taken() -> None:
    data = clip(10)
    assert MetokVideoLoader.load_bytes(data)[1]["do_sample_frames"] is True
    assert MetokVideoLoader.load_bytes(data, num_frames=4)[1]["do_sample_frames"] is False


def media_io(**video: Any) -> VideoMediaIO:
    """vLLM's media reader as the server makes it from the "video" part of --media-io-kwargs."""
    return VideoMediaIO(ImageMediaIO(), **video)


def test_vllm_chooses_the_loader_by_key_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(50)
    frames, metadata = media_io(video_backend="metok").load_bytes(data)
    assert metadata["video_backend"] == "metok"
    assert len(frames) == 32  # vLLM's own default
    assert [number_of(frame) for frame in frames] == metadata["frames_indices"]
    assert media_io().load_bytes(data)[1]["video_backend"] == "opencv"
    monkeypatch.setenv("VLLM_VIDEO_LOADER_BACKEND", "metok")
    frames, metadata = media_io(num_frames=-1, fps=5, max_frames=10).load_bytes(data)
    assert metadata["video_backend"] == "metok"
    assert len(frames) == 10


def test_registering_twice_is_harmless() -> None:
    register_loader()
    register_loader()
    assert isinstance(VIDEO_LOADER_REGISTRY.load("metok"), MetokVideoLoader)


def test_prefer_loader_sets_the_default_and_respects_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_VIDEO_LOADER_BACKEND", raising=False)
    kwargs: dict[str, dict[str, Any]] = {}
    prefer_loader(kwargs)
    assert kwargs == {"video": {"video_backend": "metok"}}
    theirs = {"video": {"video_backend": "opencv", "backend": "torchcodec"}}
    prefer_loader(theirs)
    assert theirs == {"video": {"video_backend": "opencv", "backend": "torchcodec"}}
    monkeypatch.setenv("VLLM_VIDEO_LOADER_BACKEND", "opencv")
    by_environment: dict[str, dict[str, Any]] = {"video": {"num_frames": 4}}
    prefer_loader(by_environment)
    assert by_environment == {"video": {"num_frames": 4}}


QWEN = {"sampling": "qwen2_vl", "fps": 2, "num_frames": -1}


@pytest.mark.parametrize(
    ("operator", "request_", "frames"),
    [
        ({}, {}, 20),  # ten seconds
        ({}, {"fps": 1}, 10),  # vLLM passes 32 frames then, which must not count
        ({}, {"fps": 4}, 40),
        ({}, {"num_frames": 9}, 8),
        ({}, {"num_frames": -1}, 50),
        ({"fps": 0.1}, {}, 4),
        ({"num_frames": 12}, {}, 12),
        ({"num_frames": 12}, {"fps": 3}, 30),
        ({"sampling": "uniform"}, {}, 20),
    ],
)
def test_a_models_own_sampling(
    monkeypatch: pytest.MonkeyPatch, operator: dict[str, Any], request_: dict[str, Any], frames: int
) -> None:
    monkeypatch.delenv("VLLM_VIDEO_LOADER_BACKEND", raising=False)
    kwargs = {"video": dict(operator)}
    prefer_loader(kwargs, QWEN)
    merged = VideoMediaIO.merge_kwargs(kwargs["video"], request_)
    loaded, metadata = media_io(**merged).load_bytes(clip(50, rate=5)).media
    assert len(loaded) == len(metadata["frames_indices"]) == frames
    assert metadata["total_num_frames"] == 50


def test_another_loader_keeps_its_own_sampling() -> None:
    theirs = {"video": {"video_backend": "opencv"}}
    prefer_loader(theirs, QWEN)
    assert theirs == {"video": {"video_backend": "opencv"}}


def test_an_unknown_sampling_is_refused() -> None:
    with pytest.raises(VideoError, match=r"sampling must be one of uniform, qwen2_vl, qwen3_vl, not 'fast'\."):
        prefer_loader({"video": {"video_backend": "metok", "sampling": "fast"}})


def test_wrong_keys_are_refused_at_the_start_and_in_a_request() -> None:
    with pytest.raises(VideoError, match="Unknown video setting 'frame_recovery'"):
        prefer_loader({"video": {"video_backend": "metok", "frame_recovery": True}})
    with pytest.raises(VideoRequestError, match="Unknown video setting 'frame_recovery'"):
        media_io(video_backend="metok", frame_recovery=True).load_bytes(clip(2))
    assert check_video_kwargs({"video_backend": "metok", "fps": 2, "threads": 1}).fps == 2


def test_vllms_own_limit_on_pixels_holds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "1000")
    with pytest.raises(VideoRequestError, match="64 x 48 have more than 1000 pixels"):
        MetokVideoLoader.load_bytes(clip(2))


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what holds in this process, for one test."""
    monkeypatch.setattr(in_force, "_in_force", in_force._InForce())

    def chooses(video: dict[str, Any], **settings: Any) -> None:
        set_in_force({"video": dict(video)}, MetokSettings(**settings))

    return chooses


@pytest.mark.parametrize("name", LIMITS)
def test_a_request_may_lower_a_limit_and_never_raise_it(operator: Callable[..., None], name: str) -> None:
    operator({name: 7})
    data = clip(2)
    refused = f"may lower the video setting {name}, not raise it; on this server it is 7"
    with pytest.raises(VideoRequestError, match=refused):
        MetokVideoLoader.load_bytes(data, **{name: 8})
    said = ""
    try:
        MetokVideoLoader.load_bytes(data, **{name: 6})
    except VideoRequestError as error:
        said = str(error)  # a limit of six pixels, say, refuses the video itself
    assert "may lower" not in said


def test_where_nobody_has_set_a_limit_the_default_is_the_most(operator: Callable[..., None]) -> None:
    operator({})
    defaults = VideoSettings()
    for name in LIMITS:
        with pytest.raises(VideoRequestError, match=f"on this server it is {getattr(defaults, name)}"):
            MetokVideoLoader.load_bytes(clip(2), **{name: getattr(defaults, name) + 1})


def test_limits_are_those_of_a_list_of_frames_too(operator: Callable[..., None]) -> None:
    operator({"max_frames": 2})
    connector = MetokMediaConnector({"video": {"video_backend": "metok", "max_frames": 3}})
    with pytest.raises(VideoRequestError, match="may lower the video setting max_frames"):
        connector.fetch_video("data:video/jpeg;base64,AAAA")


def test_a_request_cannot_choose_another_loader(operator: Callable[..., None]) -> None:
    operator({})
    url = data_url(clip(3))
    with pytest.raises(VLLMValidationError, match="reads videos with video_backend 'metok'"):
        MetokMediaConnector({"video": {"video_backend": "opencv"}}).fetch_video(url)
    operator({"video_backend": "opencv"})
    frames, metadata = MetokMediaConnector({"video": {"video_backend": "opencv"}}).fetch_video(url).media
    assert (len(frames), metadata["video_backend"]) == (3, "opencv")


def test_the_pool_is_as_large_as_the_operator_says(operator: Callable[..., None]) -> None:
    operator({}, videos_at_once=3, videos_waiting=5, video_memory_mib=77)
    pool = decode_pool()
    assert pool.limits == PoolLimits(at_once=3, waiting=5, memory_mib=77)
    operator({}, videos_at_once=3, videos_waiting=5, video_memory_mib=77)
    assert decode_pool() is pool
    operator({}, videos_at_once=2, videos_waiting=5, video_memory_mib=77)
    assert decode_pool() is not pool


@pytest.fixture(scope="module", params=[MediaConnector, MetokMediaConnector])
def server(request: pytest.FixtureRequest) -> TestClient:
    """A web server with a real media connector, vLLM's or METok's, its error handlers, and nothing behind."""
    connector = request.param
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    init_exception_handler(app)

    @app.post("/ask")
    async def ask(request: Request) -> dict[str, Any]:
        body = await request.json()
        defaults = {"video": {"video_backend": "metok", "num_frames": 4}}
        kwargs = merge_media_io_kwargs(defaults, body.get("media_io_kwargs"))
        _, metadata = await connector(kwargs).fetch_video_async(body["url"])
        return dict(metadata)

    return TestClient(app, raise_server_exceptions=False)


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    """`data` as the OpenAI client sends it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_a_good_video_gets_200_whatever_its_mime_type(server: TestClient) -> None:
    for kind in ("video/mp4", "application/octet-stream", "image/png", "nonsense"):
        answer = server.post("/ask", json={"url": data_url(clip(20), kind)})
        assert answer.status_code == 200
        assert answer.json()["frames_indices"] == [0, 6, 12, 19]


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("empty", data_url(b"")),
        ("text", data_url(b"hello there, this is not a video")),
        ("sound", data_url(tone())),
        ("cut off", data_url(clip(30)[:900])),
        ("flipped", data_url(bytes(byte ^ 255 for byte in clip(30)))),
        ("not base64", "data:video/mp4;base64,%%%"),
        ("video that says it is jpeg frames", data_url(clip(5), "video/jpeg")),
    ],
)
def test_a_bad_video_gets_400_with_one_sentence(server: TestClient, name: str, url: str) -> None:
    answer = server.post("/ask", json={"url": url})
    assert answer.status_code == 400, name
    error = answer.json()["error"]
    assert error["type"] == "BadRequestError"
    assert "\n" not in error["message"]
    assert "Errno" not in error["message"]


def test_a_video_without_a_place_gets_503_that_says_try_again(operator: Callable[..., None]) -> None:
    operator({}, videos_at_once=1, videos_waiting=0)
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    init_exception_handler(app)

    @app.post("/ask")
    async def ask(request: Request) -> int:
        connector = MetokMediaConnector({"video": {"video_backend": "metok"}})
        return len((await connector.fetch_video_async((await request.json())["url"])).media[0])

    client = TestClient(app, raise_server_exceptions=False)
    pool = decode_pool()
    place = pool.places.ask(1)
    answer = client.post("/ask", json={"url": data_url(clip(5))})
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "The server is decoding 1 videos and 0 wait: try again later."
    pool.places.give_back(place)
    assert client.post("/ask", json={"url": data_url(clip(5))}).json() == 5
    assert pool.places.used == 0


def test_frames_in_a_list_count_as_long_as_they_are_used(operator: Callable[..., None]) -> None:
    operator({}, video_memory_mib=64)
    buffer = io.BytesIO()
    Image.new("RGB", (640, 480)).save(buffer, "JPEG")
    url = "data:video/jpeg;base64," + ",".join([base64.b64encode(buffer.getvalue()).decode()] * 4)
    connector = MetokMediaConnector({"video": {"video_backend": "metok"}})
    loaded = connector.fetch_video(url)
    assert decode_pool().memory.used == 4 * 640 * 480 * 3 == loaded.media[0].nbytes
    del loaded
    gc.collect()
    assert decode_pool().memory.used == 0
    with pytest.raises(ValueError, match="same shape"):
        connector.fetch_video(url + "," + base64.b64encode(small_jpeg()).decode())
    assert decode_pool().memory.used == 0


def small_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("video", [{"num_frames": 0}, {"num_frames": "x"}, {"fps": []}, {"fsp": 1}, {"threads": -1}])
def test_absurd_settings_in_a_request_get_400(server: TestClient, video: dict[str, Any]) -> None:
    answer = server.post("/ask", json={"url": data_url(clip(5)), "media_io_kwargs": {"video": video}})
    assert answer.status_code == 400
    assert "video setting" in answer.json()["error"]["message"]


def test_other_frames_of_the_same_video_have_another_hash() -> None:
    """vLLM keys its caches on the file and the metadata:
    two samplings of one file must differ, equal ones not.
    """
    data, hashes = clip(60), []
    for num_frames in (8, 9, 8):
        video = media_io(video_backend="metok", num_frames=num_frames).load_bytes(data)
        items = MultiModalDataParser().parse_mm_data({"video": [video]})["video"]
        hashes.append(MultiModalHasher.hash_kwargs("sha256", video=items.get_item_for_hash(0)))
    assert hashes[0] == hashes[2] != hashes[1]
