"""vLLM 0.33's limits on the media of one request: METok's own on a video hold beside them,
and what they refuse is counted.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Callable
from typing import Any

import pytest
from vllm import envs
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MediaConnector

from metok_vllm.contract.refusals import refused_counter
from metok_vllm.frontend.command_line import apply_plugin_option
from metok_vllm.media.connector import MetokMediaConnector, register_connector
from metok_vllm.media.loader import register_loader
from metok_vllm.media.request_limits import DECODED, DOWNLOADED, decoded_bytes, leave_room
from tests.support.clips import clip

register_loader()
register_connector()

MIB = 1 << 20
KNOWS = {DECODED: "715827880", DOWNLOADED: "256"}
"""The limits that vLLM 0.33 knows, and its defaults."""


@pytest.fixture
def of_033(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM that knows both limits, and an operator who has set nothing."""
    for name, default in KNOWS.items():
        monkeypatch.setitem(envs.environment_variables, name, lambda n=name, d=default: int(os.getenv(n, d)))
        monkeypatch.setenv(name, "")  # so that what is set here goes with the test
        monkeypatch.delenv(name)
    monkeypatch.delenv("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", raising=False)


@pytest.fixture
def of_032(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KNOWS:
        monkeypatch.delitem(envs.environment_variables, name, raising=False)
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("of_033")
@pytest.mark.parametrize(
    ("stated", "mib"),
    [(None, 2048), ({}, 2048), ({"video": {"max_output_mib": 300}}, 300), ({"video": {"max_output_mib": 9000}}, 9000)],
)
def test_one_video_of_the_largest_size_has_room(stated: Any, mib: int) -> None:
    leave_room(stated)
    assert int(os.environ[DECODED]) == mib * MIB * 4 // 3
    assert mib * MIB <= envs.VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES
    frames_of_4k = 32 * 3840 * 2160 * 3
    assert frames_of_4k > int(KNOWS[DECODED]), "stock vLLM 0.33 refuses these"
    assert (frames_of_4k <= envs.VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES) == (mib > 700)


@pytest.mark.parametrize(
    "wrong", [{"video": {"max_output_mib": "many"}}, {"video": 3}, {"video": {"max_output_mib": 0}}]
)
def test_what_is_wrong_is_left_to_the_check_at_start(wrong: Any) -> None:
    assert decoded_bytes(wrong) == decoded_bytes(None)


@pytest.mark.usefixtures("of_033")
@pytest.mark.parametrize(
    ("one_file", "request_"), [(None, None), ("100", None), ("256", None), ("900", "900"), ("0", "0")]
)
def test_one_file_of_the_largest_size_has_room(
    monkeypatch: pytest.MonkeyPatch, one_file: str | None, request_: str | None
) -> None:
    if one_file is not None:
        monkeypatch.setenv("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", one_file)
    leave_room(None)
    assert os.environ.get(DOWNLOADED) == request_


@pytest.mark.usefixtures("of_033")
def test_what_the_operator_has_set_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", "900")
    monkeypatch.setenv(DECODED, "5")
    monkeypatch.setenv(DOWNLOADED, "6")
    leave_room({"video": {"max_output_mib": 300}})
    assert (os.environ[DECODED], os.environ[DOWNLOADED]) == ("5", "6")


@pytest.mark.usefixtures("of_032")
def test_a_vllm_without_the_limits_gets_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", "900")
    leave_room(None)
    assert not set(KNOWS) & set(os.environ)


@pytest.mark.usefixtures("of_033")
@pytest.mark.parametrize("asked", [True, False])
def test_a_server_that_asks_for_metok_gets_them(checkpoint: Any, monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "http")
    argv = ["vllm", "serve", str(checkpoint), "--media-io-kwargs", '{"video": {"max_output_mib": 300}}']
    monkeypatch.setattr("sys.argv", [*argv, *(["--plugin", "metok"] if asked else [])])
    assert apply_plugin_option() is asked
    assert os.environ.get(DECODED) == (str(400 * MIB) if asked else None)


# --- refusals are counted ---

VIDEO = "data:video/mp4;base64," + base64.b64encode(clip(4)).decode()


def counted() -> float:
    (family,) = refused_counter().collect()
    return next(s.value for s in family.samples if s.labels.get("reason") == "video" and s.name.endswith("_total"))


def fetch(connector: MetokMediaConnector) -> Any:
    return connector.fetch_video(VIDEO)


def fetch_async(connector: MetokMediaConnector) -> Any:
    return asyncio.run(connector.fetch_video_async(VIDEO))


REFUSALS = {
    "decoded": ValueError(f"Request decoded media exceeds {DECODED}=1 (9216 bytes)."),
    "downloaded": VLLMUnprocessableEntityError(
        f"Failed to fetch media from URL: Request media downloads exceed {DOWNLOADED}=1 (9 bytes received)."
    ),
}
"""As vLLM 0.33 says them."""


@pytest.mark.parametrize("way", [fetch, fetch_async])
@pytest.mark.parametrize("kind", REFUSALS)
def test_what_they_refuse_is_counted_once(
    monkeypatch: pytest.MonkeyPatch, way: Callable[[MetokMediaConnector], Any], kind: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise REFUSALS[kind]

    async def refuse_async(*_: Any, **__: Any) -> None:
        raise REFUSALS[kind]

    monkeypatch.setattr(MediaConnector, "load_from_url", refuse)
    monkeypatch.setattr(MediaConnector, "load_from_url_async", refuse_async)
    before = counted()
    with pytest.raises(type(REFUSALS[kind]), match="exceed"):
        way(MetokMediaConnector({"video": {"video_backend": "metok"}}))
    assert counted() == before + 1


@pytest.mark.parametrize("way", [fetch, fetch_async])
@pytest.mark.parametrize(
    ("settings", "words"), [({"max_frames": 3}, "more than 3"), ({"no": 1}, "Unknown video setting")]
)
def test_what_the_loader_refuses_is_counted_once(
    way: Callable[[MetokMediaConnector], Any], settings: dict[str, int], words: str
) -> None:
    before = counted()
    with pytest.raises(ValueError, match=words):
        way(MetokMediaConnector({"video": {"video_backend": "metok", **settings}}))
    assert counted() == before + 1


def test_a_list_of_frames_that_is_refused_is_counted_once() -> None:
    before = counted()
    with pytest.raises(ValueError, match="not a JPEG file"):
        MetokMediaConnector({"video": {"video_backend": "metok"}}).fetch_video("data:video/jpeg;base64,AAAA")
    assert counted() == before + 1


@pytest.mark.skipif(DECODED not in envs.environment_variables, reason="vLLM 0.33 has this limit")
def test_vllm_033_refuses_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.multimodal.media.base import MediaDecodedBudget

    frames = 4 * 64 * 48 * 3
    for limit, refused in ((frames, False), (frames - 1, True)):
        monkeypatch.setenv(DECODED, str(limit))
        connector = MetokMediaConnector({"video": {"video_backend": "metok"}}, decoded_budget=MediaDecodedBudget())
        before = counted()
        if refused:
            with pytest.raises(ValueError, match=f"exceeds {DECODED}={limit}"):
                fetch(connector)
        else:
            assert fetch(connector).media[0].nbytes == frames
        assert counted() == before + refused
