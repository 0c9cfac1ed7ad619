"""What is checked where items and parameters meet: whose items they are, and prompt log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.inputs import mm_input, tokens_input
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItems, PlaceholderRange
from vllm.platforms import current_platform
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from metok_vllm.contract.admission import HOOK, Admission, OwnRange, PrunedRange, check_requests, mark
from metok_vllm.contract.beside import Beside
from metok_vllm.contract.refusals import FOREIGN_FEATURES, FRONT_END, REFUSED, no_prompt_logprobs
from tests.support.fakes import feature, plan

PLAIN = SamplingParams()
PROMPT_LOGPROBS = {
    "prompt_logprobs": SamplingParams(prompt_logprobs=1),
    "none but the token's own": SamplingParams(prompt_logprobs=0),
    "all": SamplingParams(prompt_logprobs=-1),
    "of given tokens": SamplingParams(prompt_logprob_token_ids=np.array([[1]])),
}


def items(modality: str = "video", made_here: bool = True, pruned: bool = True) -> Any:
    ranges = {modality: [PlaceholderRange(2, 5)]}
    inputs = mm_input([1] * 9, MultiModalKwargsItems({modality: []}), {modality: ["name"]}, ranges)
    if made_here:
        mark(inputs, PrunedRange if pruned else OwnRange)
    return inputs


class Cache:
    """vLLM's, as far as it is told to forget."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []

    def invalidate(self, name: str) -> None:
        self.forgotten.append(name)


@pytest.fixture
def admission() -> Admission:
    return Admission(lambda inputs, params: None)


def refused(reason: str) -> float:
    return FRONT_END.get_sample_value(f"{REFUSED}_total", {"reason": reason}) or 0


@pytest.mark.parametrize("params", PROMPT_LOGPROBS.values(), ids=PROMPT_LOGPROBS)
@pytest.mark.parametrize("alone", [True, False])
def test_log_probabilities_of_a_pruned_prompt(admission: Admission, params: Any, alone: bool) -> None:
    admission.serves_metok_alone = alone
    before = refused("prompt_logprobs")
    with pytest.raises(VLLMValidationError) as error:
        admission(items(), params)
    assert str(error.value) == f"METok: {no_prompt_logprobs()}"
    assert refused("prompt_logprobs") == before + 1


@pytest.mark.parametrize("params", [*PROMPT_LOGPROBS.values(), PLAIN, PoolingParams()])
def test_everything_else_passes(admission: Admission, params: Any) -> None:
    admission.serves_metok_alone = True
    for inputs in (tokens_input([1, 2]), items(pruned=False), items("image")):
        admission(inputs, params)


def test_a_pruned_prompt_without_log_probabilities_passes(admission: Admission) -> None:
    admission.serves_metok_alone = True
    admission(items(), PLAIN)


@pytest.mark.parametrize("modality", ["video", "image"])
def test_features_made_elsewhere(admission: Admission, modality: str) -> None:
    foreign = items(modality, made_here=False)
    admission(foreign, PLAIN)  # another model's in this process, with a processor of its own
    admission.serves_metok_alone = True
    before = refused("features")
    with pytest.raises(VLLMValidationError, match="makes the features") as error:
        admission(foreign, PLAIN)
    assert str(error.value) == f"METok: {FOREIGN_FEATURES}"
    assert refused("features") == before + 1


def test_an_item_that_was_not_sent_is_forgotten(admission: Admission) -> None:
    """Its data was handed out and goes nowhere; one that the engine has already stays known."""
    cache: Any = Cache()
    admission.caches.add(cache)
    inputs = items()
    inputs["mm_kwargs"] = {"video": [object(), None]}
    inputs["mm_hashes"] = {"video": ["new", "sent before"]}
    inputs["mm_placeholders"]["video"] *= 2
    admission(inputs, PLAIN)
    assert cache.forgotten == []
    with pytest.raises(VLLMValidationError):
        admission(inputs, PROMPT_LOGPROBS["all"])
    assert cache.forgotten == ["new"]


@pytest.fixture
def platform() -> Iterator[Any]:
    """vLLM's platform as it is without METok, and afterwards as it was."""
    held = vars(current_platform).pop(HOOK, None)
    yield current_platform
    vars(current_platform).pop(HOOK, None)
    if held is not None:
        setattr(current_platform, HOOK, held)


LATER = {
    "experts from behind the prompt": (SamplingParams(routed_experts_prompt_start=10), True),
    "experts from its end": (SamplingParams(routed_experts_prompt_start=9), False),
    "a row of tokens too few": (SamplingParams(prompt_logprob_token_ids=np.ones((7, 1), int)), True),
    "a row for each token": (SamplingParams(prompt_logprob_token_ids=np.ones((8, 1), int)), False),
    "rows from the third on": (
        SamplingParams(prompt_logprob_token_ids=np.ones((6, 1), int), prompt_logprob_start=2),
        False,
    ),
    "more tokens than there is room for": (SamplingParams(max_tokens=None, min_tokens=6), True),
    "as many as there is room for": (SamplingParams(max_tokens=None, min_tokens=5), False),
    "a pooling request": (PoolingParams(), False),
}


@pytest.mark.parametrize("case", LATER)
def test_an_item_of_a_request_that_vllm_refuses_later_is_forgotten(admission: Admission, case: str) -> None:
    params, is_refused = LATER[case]
    inputs, cache = items("image", made_here=False), Cache()
    inputs["mm_kwargs"] = {"image": [object()]}
    admission.caches.add(cache)  # type: ignore[arg-type]
    handed = admission.unsent.hand_out(admission.caches, inputs, room=5)
    mark(inputs, OwnRange, handed=handed)
    admission(inputs, params)
    assert cache.forgotten == (["name"] if is_refused else [])
    assert handed.names == (frozenset({"name"}) if is_refused else frozenset())


def test_the_platforms_own_check_comes_first(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(Exception):
        pass

    def own(cls: Any, inputs: Any, params: Any) -> None:
        raise Refuses

    monkeypatch.setattr(type(platform), HOOK, classmethod(own))
    assert check_requests() is check_requests() is platform.validate_request
    with pytest.raises(Refuses):
        platform.validate_request(items(), PROMPT_LOGPROBS["all"])


def test_a_mark_keeps_the_place_and_travels_as_vllms_own(admission: Admission) -> None:
    """Between processes vLLM encodes an item's place by its fields, and decodes its own class."""
    embeds = torch.tensor([True, False, True])
    inputs = items(made_here=False)
    inputs["mm_placeholders"] = {"video": [PlaceholderRange(4, 3, embeds)], "image": [PlaceholderRange(9, 1)]}
    mark(inputs, PrunedRange)
    (video,), (image,) = inputs["mm_placeholders"].values()
    assert (type(video), type(image)) == (PrunedRange, OwnRange)
    assert (video.offset, video.length, video.get_num_embeds(), video.is_embed) == (4, 3, 2, embeds)
    spec = feature(4, plan(3))
    spec.mm_position = PrunedRange(4, 3)
    (arrived,) = MsgpackDecoder(list[MultiModalFeatureSpec]).decode(MsgpackEncoder().encode([spec]))
    assert arrived.mm_position == PlaceholderRange(4, 3)


def test_an_answer_to_be_kept_is_named_where_a_video_is_compressed(admission: Admission) -> None:
    def name_of(inputs: Any) -> str | None:
        params = SamplingParams()
        admission(inputs, params)
        beside = Beside.of(params)
        return None if beside is None else beside.keep_answer

    def compressed() -> Any:
        inputs = items(made_here=False)
        mark(inputs, PrunedRange, Beside(9))
        return inputs

    assert name_of(compressed()) == ""
    names = iter(["first", "second"])
    admission.keep_answer = lambda: next(names)
    assert [name_of(one) for one in (items(), tokens_input([1, 2]), compressed(), compressed())] == [
        None, None, "first", "second",
    ]  # fmt: skip
