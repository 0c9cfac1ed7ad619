"""Ids of requests: the client's out of the engine's by vLLM's own rule, and what is stored and shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

from metok_vllm.contract.request_ids import LONGEST, client_id, key, printable, shown

DISABLED = "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"
ANY = st.text(st.characters(codec=None, exclude_categories=()), max_size=300)
HOSTILE = ["a\nINFO forged", "\x1b[2J", "z\ud800", "\u202eevil", "\u2028", "\x00", "x" * 10_000_000, "\ud83d" * 200]


def in_the_engine(client: str, samples: int) -> list[str]:
    """What vLLM makes of an id, for each sample of the request."""
    request: Any = SimpleNamespace(request_id=client, external_req_id=None, params=SamplingParams(n=samples))
    InputProcessor.assign_request_id(request)
    if samples == 1:
        return [request.request_id]
    parent = ParentRequest(request)
    return [parent.get_child_info(index)[0] for index in range(samples)]


@given(rest=ANY, samples=st.sampled_from([1, 2, 12]))
def test_the_client_finds_its_own_id(rest: str, samples: int) -> None:
    client = f"chatcmpl-{rest}"
    assert {client_id(engine) for engine in in_the_engine(client, samples)} == {client}


@pytest.mark.parametrize("samples", [1, 3])
def test_an_id_that_looks_like_the_engines_is_not_another_clients(samples: int) -> None:
    (alice, *_) = in_the_engine("chatcmpl-alice", 1)
    assert {client_id(engine) for engine in in_the_engine(alice, samples)} == {alice} != {"chatcmpl-alice"}


@pytest.mark.parametrize("samples", [1, 3])
def test_without_random_digits(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    monkeypatch.setenv(DISABLED, "1")
    client = "chatcmpl-alice-0123abcd"
    assert {client_id(engine) for engine in in_the_engine(client, samples)} == {client}


@given(one=ANY)
def test_what_is_shown_is_short_and_on_one_line(one: str) -> None:
    text = shown(one)
    assert len(text) <= LONGEST
    assert text.isprintable()
    text.encode()
    assert shown(text) == text


@pytest.mark.parametrize("one", HOSTILE)
def test_hostile_ids(one: str) -> None:
    assert shown(one) != one
    assert len(shown(one)) <= LONGEST
    assert shown(one).isprintable()
    assert len(key(one)) == 64


def test_two_ids_never_look_or_count_the_same() -> None:
    long = [f"{'x' * 200}{i}" for i in range(50)]
    for name in (shown, key):
        assert len({name(one) for one in [*long, *HOSTILE]}) == len(long) + len(HOSTILE)


def test_ordinary_text_is_left_alone() -> None:
    for text in ("", "chatcmpl-1", "Ünïcode 視頻 <b>", "a b"):
        assert printable(text) is text
    assert printable("a\n\x1b\u202e\ud800") == r"a\n\x1b\u202e\ud800"
