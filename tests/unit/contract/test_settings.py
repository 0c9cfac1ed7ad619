"""Settings: every key, its default and range, what is refused and in which words."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import metok_vllm
from metok_vllm.compression.ratios import MICRO
from metok_vllm.contract.settings import (
    OF_THE_LATER_STAGES,
    SERVER_ONLY,
    MetokSettings,
    RequestSettings,
    parse_settings,
    resolve_request,
)

DEFAULTS: dict[str, Any] = {
    "preset": "paper",
    "events": 5,
    "key_events": 3,
    "key_frames": 6,
    "strides": (2, 4, 8),
    "stages": 3,
    "prune_layers": None,
    "kv_layers": None,
    "keep_ratio": 0.76,
    "decode_retention": 0.0,
    "quota": "event",
    "score_rows": "text",
    "frame_smoothing": 0.0,
    "final_keep": 0.0,
    "token_budget": None,
    "aligner": "auto",
    "aligner_model": None,
    "profile": None,
    "max_deferred_bytes": None,
    "chat_template": None,
    "status_shows_questions": False,
    "shadow_rate": 0.0,
    "videos_at_once": 24,
    "videos_waiting": 64,
    "video_memory_mib": 4096,
}
OF_A_REQUEST: dict[str, Any] = {"query": None, "report": False}

ACCEPTED: dict[str, list[Any]] = {
    "preset": ["paper", "balanced"],
    "events": [1, 1024],
    "key_events": [0, 1024],
    "key_frames": [0, 65536],
    "strides": [[1, 1, 1], (2, 4, 8), [64, 64, 64], [1, 64, 64]],
    "stages": [1, 3],
    "prune_layers": [None, [1, 2, 3], (3, 10, 19), "cheap"],
    "kv_layers": [None, [0, 1], (3, 19)],
    "keep_ratio": [0.000001, 0.5, 1, 1.0, 0.999999],
    "decode_retention": [0, 0.0, 0.123456, 1, 1.0],
    "quota": ["event", "video"],
    "score_rows": ["text", "question"],
    "final_keep": [0, 0.0, 0.123456, 1, 1.0],
    "frame_smoothing": [0, 0.0, 0.123456, 1, 1.0],
    "token_budget": [None, 1, 10**9],
    "aligner": ["auto", "dual-tower", "embedding", "none"],
    "aligner_model": [None, "google/siglip-so400m-patch14-384"],
    "profile": [None, "profile.json", "none"],
    "max_deferred_bytes": [None, 0, 10**12],
    "chat_template": [None, "template.jinja", "{{ messages }}"],
    "status_shows_questions": [True, False],
    "shadow_rate": [0, 0.001, 0.1 + 0.2, 1],
    "videos_at_once": [1, 256],
    "videos_waiting": [0, 65536],
    "video_memory_mib": [64, 1_048_576],
}

WHOLE = "input should be a valid integer"
NUMBER = "input should be a valid number"
THREE = "it takes a list of three whole numbers"
NOT_WHOLE = [(value, WHOLE) for value in (True, False, "5", 2.0, [5], {})]
NOT_A_SHARE = [(value, NUMBER) for value in (True, False, "0.5", None, [0.5], {})] + [
    (math.nan, "input should be greater than"),
    (-math.inf, "input should be greater than"),
    (math.inf, "input should be less than or equal to 1"),
    (1.000001, "input should be less than or equal to 1"),
    (0.1234567, "takes at most six decimals, not 0.1234567"),
    (1e-7, "takes at most six decimals, not 1e-07"),
    (0.1 + 0.2, "takes at most six decimals, not 0.30000000000000004"),
]
REFUSED: dict[str, list[tuple[Any, str]]] = {
    "preset": [(value, "input should be 'paper' or 'balanced'") for value in ("fast", "", 1, True, None, ["paper"])],
    "events": [*NOT_WHOLE, (None, WHOLE), (0, "greater than or equal to 1"), (1025, "less than or equal to 1024")],
    "key_events": [*NOT_WHOLE, (None, WHOLE), (-1, "greater than or equal to 0"), (1025, "less than or equal to 1024")],
    "key_frames": [*NOT_WHOLE, (-1, "greater than or equal to 0"), (65537, "less than or equal to 65536")],
    "strides": [
        *((value, THREE) for value in ([], [2], [2, 4], [2, 4, 8, 8], "248", 2, None, {"0": 2})),
        *(([2, 4, value], WHOLE) for value in (True, "8", 8.0, None)),
        *(
            (value, "from 1 to 64, none below the one before")
            for value in ([4, 2, 8], [0, 4, 8], [2, 4, 65], [-1, 1, 1])
        ),
    ],
    "stages": [(value, "input should be 1 or 3") for value in (0, 2, 4, "1", True, 1.0, None, [1])],
    "prune_layers": [
        *((value, THREE) for value in ([], [1, 2], [1, 2, 3, 4], "off", 3, {})),
        *(([1, 2, value], WHOLE) for value in (True, "3", 3.0)),
        *((value, "must rise and start at 1 or later") for value in ([0, 1, 2], [1, 1, 2], [3, 2, 1], [1, 2, 2])),
    ],
    "kv_layers": [
        *((value, "it takes a list of two whole numbers") for value in ([], [1], [1, 2, 3], "off", 3, {})),
        *(([1, value], WHOLE) for value in (True, "3", 3.0)),
        *((value, "a first layer, from 0, and a higher one") for value in ([-1, 2], [2, 2], [3, 2])),
    ],
    "keep_ratio": [*NOT_A_SHARE, (0, "greater than 0"), (0.0, "greater than 0"), (-0.5, "greater than 0")],
    "decode_retention": [*NOT_A_SHARE, (-0.000001, "greater than or equal to 0")],
    "quota": [(value, "input should be 'event' or 'video'") for value in ("frame", "", 1, True, None, ["event"])],
    "score_rows": [(value, "input should be 'text' or 'question'") for value in ("all", "", 1, True, None, ["text"])],
    "final_keep": [*NOT_A_SHARE, (-0.000001, "greater than or equal to 0")],
    "frame_smoothing": [*NOT_A_SHARE, (-0.000001, "greater than or equal to 0")],
    "token_budget": [*NOT_WHOLE, (0, "greater than or equal to 1"), (-5, "greater than or equal to 1")],
    "aligner": [(value, "input should be 'auto', 'dual-tower', 'embedding' or 'none'") for value in ("clip", None, 1)],
    "aligner_model": [(value, "input should be a valid string") for value in (3, True, ["a"])],
    "profile": [(value, "input should be a valid string") for value in (3, True, ["a"])]
    + [("", "string should have at least 1 character")],
    "max_deferred_bytes": [*NOT_WHOLE, (-1, "greater than or equal to 0")],
    "chat_template": [(value, "input should be a valid string") for value in (3, True, ["a"])],
    "status_shows_questions": [(value, "input should be a valid boolean") for value in (1, 0, "yes", "true", None)],
    "shadow_rate": [
        *((value, reason) for value, reason in NOT_A_SHARE if "decimals" not in reason),
        (-0.000001, "greater than or equal to 0"),
    ],
    "videos_at_once": [*NOT_WHOLE, (0, "greater than or equal to 1"), (257, "less than or equal to 256")],
    "videos_waiting": [*NOT_WHOLE, (-1, "greater than or equal to 0"), (65537, "less than or equal to 65536")],
    "video_memory_mib": [*NOT_WHOLE, (63, "greater than or equal to 64"), (2**20 + 1, "less than or equal to 1048576")],
    "query": [(value, "input should be a valid string") for value in (3, True, ["a"], {})]
    + [("half of \ud83d a pair", "query must be text, without unpaired surrogates")],
    "report": [(value, "input should be a valid boolean") for value in (1, 0, "yes", "true", None)],
}
REFUSALS = [(key, value, reason) for key, cases in REFUSED.items() for value, reason in cases]


def test_the_keys_and_their_defaults() -> None:
    assert MetokSettings().model_dump() == DEFAULTS
    assert parse_settings(None) == parse_settings({}) == MetokSettings()
    assert RequestSettings().model_dump() == DEFAULTS | OF_A_REQUEST


def test_the_tables_here_know_every_key() -> None:
    assert set(ACCEPTED) == set(MetokSettings.model_fields)
    assert set(REFUSED) == set(RequestSettings.model_fields)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ACCEPTED.items() for value in values])
def test_what_a_server_may_set(key: str, value: Any) -> None:
    settings = parse_settings({key: value})
    assert getattr(settings, key) == (tuple(value) if isinstance(value, list) else value)
    assert settings.model_dump() == DEFAULTS | {key: getattr(settings, key)} | (
        {"decode_retention": 1.0, "quota": "video"} if value == "balanced" else {}
    )
    if key not in SERVER_ONLY:
        of_request = resolve_request(MetokSettings(), {key: value})
        assert of_request is not None
        assert of_request.model_dump() == settings.model_dump() | OF_A_REQUEST


@pytest.mark.parametrize(("key", "value", "reason"), REFUSALS)
def test_what_is_refused(key: str, value: Any, reason: str) -> None:
    if key not in OF_A_REQUEST:
        with pytest.raises(ValueError, match=r"^METok \(additional_config\): ") as error:
            parse_settings({key: value})
        assert_one_sentence(str(error.value), key, reason)
    if key not in SERVER_ONLY:
        with pytest.raises(ValueError, match=r"^METok \(mm_processor_kwargs\): ") as error:
            resolve_request(MetokSettings(), {key: value})
        assert_one_sentence(str(error.value), key, reason)


def assert_one_sentence(message: str, key: str, reason: str) -> None:
    assert key in message
    assert reason in message
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 250


def test_a_huge_wrong_value_is_not_repeated_back() -> None:
    with pytest.raises(ValueError, match="'events' got ") as error:
        resolve_request(MetokSettings(), {"events": "9" * 100_000})
    assert_one_sentence(str(error.value), "events", WHOLE)


@pytest.mark.parametrize("key", ["event", "Events", "keep-ratio", "", "decode_retention ", "off"])
def test_an_unknown_key_is_answered_with_the_known_ones(key: str) -> None:
    with pytest.raises(ValueError, match=f"^METok \\(additional_config\\): unknown setting '{key}'; ") as error:
        parse_settings({key: 1})
    known = str(error.value).removesuffix(".").split("the settings are ")[1].split(", ")
    assert known == list(DEFAULTS)
    with pytest.raises(ValueError, match=f"^METok \\(mm_processor_kwargs\\): unknown setting '{key}'; ") as error:
        resolve_request(MetokSettings(), {key: 1})
    known = str(error.value).removesuffix(".").split("the settings are ")[1].split(", ")
    assert known == [name for name in DEFAULTS if name not in SERVER_ONLY] + list(OF_A_REQUEST)


def test_keys_must_be_strings() -> None:
    with pytest.raises(ValueError, match="'1' got 1: keys should be strings"):
        parse_settings({1: 2})


@pytest.mark.parametrize("key", OF_A_REQUEST)
def test_a_server_has_no_question(key: str) -> None:
    with pytest.raises(ValueError, match=f"unknown setting '{key}'"):
        parse_settings({key: OF_A_REQUEST[key]})


@pytest.mark.parametrize("key", SERVER_ONLY)
def test_what_belongs_to_the_server_alone(key: str) -> None:
    # Even as the server has it: a request that states it means to decide it.
    sentence = rf"^METok \(mm_processor_kwargs\): '{key}' belongs to the server; set it with --additional-config\.$"
    with pytest.raises(ValueError, match=sentence):
        resolve_request(MetokSettings(), {key: DEFAULTS[key]})


@pytest.mark.parametrize("value", ["off", "on", [], 3, True, 0.5, ["events"]])
def test_settings_are_an_object(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^METok \(additional_config\): the settings must be an object of keys"):
        parse_settings(value)
    if value != "off":
        with pytest.raises(ValueError, match=r"^METok \(mm_processor_kwargs\): 'metok' must be \"off\" or an object"):
            resolve_request(MetokSettings(), value)


@pytest.mark.parametrize("name", ["decode_retention", "final_keep"])
def test_kv_go_by_one_rule(name: str) -> None:
    """A preset's own share gives way to the window; one that is stated beside it is refused, by whomever."""
    sentence = (
        f"'{name}' has no place beside kv_layers, which says in which layers decoding keeps visual tokens: "
        "leave it out."
    )
    with pytest.raises(ValueError, match="no place") as error:
        parse_settings({"kv_layers": [1, 3], name: 0.5})
    assert str(error.value) == f"METok (additional_config): {sentence}"
    with pytest.raises(ValueError, match="no place"):
        parse_settings({"kv_layers": [1, 3], "preset": "balanced", name: 0.5})
    server = parse_settings({"kv_layers": [1, 3], name: 0})
    with pytest.raises(ValueError, match="no place") as error:
        resolve_request(server, {name: 0.5})
    assert str(error.value) == f"METok (mm_processor_kwargs): {sentence}"
    assert resolve_request(server, {name: 0}) is not None
    balanced = parse_settings({"kv_layers": [1, 3], "preset": "balanced"})
    asked = resolve_request(server, {"preset": "balanced", "stages": 3})
    for settings in (balanced, asked):
        assert settings is not None
        assert (settings.decode_retention, settings.final_keep, settings.quota) == (0, 0, "video")
    assert resolve_request(server, {"stages": 1}) is not None, "nothing is pruned, so nothing is kept by a rule"


def test_off() -> None:
    assert resolve_request(MetokSettings(), "off") is None
    assert resolve_request(parse_settings({"preset": "balanced", "events": 9}), "off") is None


def test_a_request_starts_from_the_server() -> None:
    server = parse_settings({"events": 7, "keep_ratio": 0.5, "decode_retention": 0.25, "prune_layers": [1, 2, 3]})
    for nothing in (None, {}):
        settings = resolve_request(server, nothing)
        assert settings is not None
        assert settings.model_dump() == server.model_dump() | OF_A_REQUEST
    settings = resolve_request(server, {"events": 2, "query": "why?", "report": True})
    assert settings is not None
    assert settings.model_dump() == server.model_dump() | {"events": 2, "query": "why?", "report": True}
    assert server.events == 7, "a request changed the server's settings"


@pytest.mark.parametrize(
    ("server", "request_", "retention"),
    [
        ({}, {}, 0.0),
        ({"preset": "paper"}, {}, 0.0),
        ({"preset": "balanced"}, {}, 1.0),
        ({"preset": "balanced", "decode_retention": 0.5}, {}, 0.5),
        ({"preset": "balanced", "decode_retention": 0}, {}, 0),
        ({}, {"preset": "balanced"}, 1.0),
        ({}, {"preset": "balanced", "decode_retention": 0.25}, 0.25),
        ({"preset": "balanced"}, {"preset": "paper"}, 0.0),
        ({"decode_retention": 0.7}, {"preset": "paper"}, 0.0),
        ({"decode_retention": 0.7}, {"preset": "balanced"}, 1.0),
        ({"preset": "balanced"}, {"decode_retention": 0.3}, 0.3),
        ({"preset": "balanced"}, {"events": 3}, 1.0),
    ],
)
def test_presets_and_retention(server: dict[str, Any], request_: dict[str, Any], retention: float) -> None:
    settings = resolve_request(parse_settings(server), request_)
    assert settings is not None
    assert settings.decode_retention == retention
    assert settings.decode_retention_micro == round(retention * MICRO)


@pytest.mark.parametrize(
    ("server", "request_", "quota"),
    [
        ({}, {}, "event"),
        ({"preset": "paper"}, {}, "event"),
        ({"preset": "balanced"}, {}, "video"),
        ({"preset": "balanced", "quota": "event"}, {}, "event"),
        ({"preset": "balanced", "decode_retention": 0}, {}, "video"),
        ({}, {"preset": "balanced"}, "video"),
        ({}, {"preset": "balanced", "quota": "event"}, "event"),
        ({"preset": "balanced"}, {"preset": "paper"}, "event"),
        ({"quota": "video"}, {"preset": "paper"}, "event"),
        ({"quota": "video"}, {"preset": "paper", "quota": "video"}, "video"),
        ({"preset": "balanced"}, {"quota": "event"}, "event"),
        ({"quota": "video"}, {"events": 3}, "video"),
    ],
)
def test_presets_and_quota(server: dict[str, Any], request_: dict[str, Any], quota: str) -> None:
    settings = resolve_request(parse_settings(server), request_)
    assert settings is not None
    assert settings.quota == quota


@given(st.integers(1, MICRO))
def test_shares_are_exact_decimals(micro: int) -> None:
    value = micro / MICRO
    settings = parse_settings({"keep_ratio": value, "decode_retention": value})
    assert settings.keep_ratio_micro == settings.decode_retention_micro == micro
    assert type(settings.keep_ratio_micro) is int


@given(st.floats(0, 1, exclude_min=True))
def test_a_share_is_taken_as_it_prints_or_refused(value: float) -> None:
    exact = Decimal(str(value)) * MICRO
    if exact == int(exact):
        assert parse_settings({"keep_ratio": value}).keep_ratio_micro == exact
    else:
        with pytest.raises(ValueError, match="at most six decimals"):
            parse_settings({"keep_ratio": value})


@pytest.mark.parametrize("key", OF_THE_LATER_STAGES)
def test_stage_1_alone_has_no_use_for_the_keys_of_the_others(key: str) -> None:
    why = f"with stages 1 nothing is pruned inside the model, so '{key}' has no effect: leave it out"
    value = ACCEPTED[key][-1]
    with pytest.raises(ValueError, match=f"{why}, or let stages be 3."):
        parse_settings({"stages": 1, key: value})
    assert parse_settings({"stages": 3, key: value})
    if key in SERVER_ONLY:
        return
    with pytest.raises(ValueError, match=f"{why}, or let stages be 3."):
        resolve_request(MetokSettings(), {"stages": 1, key: value})
    with pytest.raises(ValueError, match=rf"{why}\.$"):  # it cannot have 3
        resolve_request(MetokSettings(stages=1), {key: value})
    # What a server of all stages says of them is no contradiction: other requests use it.
    request_ = resolve_request(parse_settings({key: value}), {"stages": 1})
    assert request_ is not None
    assert request_.stages == 1


def test_a_server_of_stage_1_has_no_others() -> None:
    server = parse_settings({"stages": 1})
    for stated in (None, {}, {"events": 2}, {"stages": 1}):
        request_ = resolve_request(server, stated)
        assert request_ is not None
        assert request_.stages == 1
    assert resolve_request(server, "off") is None
    with pytest.raises(
        ValueError, match=r"this server was started with stages 1, so no request can have the others\.$"
    ):
        resolve_request(server, {"stages": 3})
    with pytest.raises(ValueError, match=r"'stages' got .*: input should be 1 or 3"):
        resolve_request(server, {"stages": "1"})


def test_stage_1_alone_has_no_report() -> None:
    with pytest.raises(
        ValueError, match="a report is about pruning, and with stages 1 there is none: leave out report"
    ):
        resolve_request(MetokSettings(), {"stages": 1, "report": True})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        MetokSettings().events = 3  # type: ignore[misc]


def test_settings_survive_the_way_to_other_processes() -> None:
    settings = parse_settings({"prune_layers": [1, 2, 3], "strides": [1, 2, 3], "keep_ratio": 1})
    assert MetokSettings.model_validate(settings.model_dump()) == settings
    assert MetokSettings.model_validate_json(settings.model_dump_json()) == settings


def test_enable_checks_at_once() -> None:
    arguments = metok_vllm.enable(events=3, preset="balanced")
    assert arguments["additional_config"] == {"metok": {"events": 3, "preset": "balanced"}}
    with pytest.raises(ValueError, match=r"^METok \(enable\): unknown setting 'evnts'; the settings are preset, "):
        metok_vllm.enable(evnts=3)
    with pytest.raises(ValueError, match=r"^METok \(enable\): 'events' got 0: "):
        metok_vllm.enable(events=0)
