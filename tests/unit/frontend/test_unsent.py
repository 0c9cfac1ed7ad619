"""Items by name: what vLLM's cache in the front end may take for sent, and what a uuid alone finds.

The cache is vLLM's own for two processes: it hands an item's data out once, and then takes it for sent.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.multimodal.processing import ProcessorInputs, TimingContext
from vllm.sampling_params import SamplingParams

from metok_vllm.contract.admission import check_requests
from tests.support.oracle.samples import scene_video

PROMPT = "<|im_start|>user\n<video>{}<|im_end|>\n<|im_start|>assistant\n"


class FrontEnd:
    """A processor and the cache in front of an engine in another process."""

    def __init__(self, config: Any) -> None:
        from vllm.multimodal import MULTIMODAL_REGISTRY

        self.processor: Any = MULTIMODAL_REGISTRY.create_processor(config.model_config)
        self.cache: Any = LruKeyReplicatedSenderCache(config.model_config)

    def make(self, question: str = "What is it?", seed: int | None = 1, uuid: str | None = None, **more: Any) -> Any:
        """A request about one video, made as for the engine; without its data where `seed` is None."""
        info = self.processor.info
        video = None if seed is None else scene_video(seed, 6)
        ids = info.get_tokenizer().encode(PROMPT.format(question), add_special_tokens=False)
        items = info.parse_mm_data({"video": [video]}, validate=False)
        uuids = None if uuid is None else {"video": [uuid]}
        inputs = ProcessorInputs(ids, items, uuids, **{"cache": self.cache, **more})
        return self.processor.apply(inputs, TimingContext(enabled=False))


def send(made: Any) -> None:
    check_requests()(made, SamplingParams())


def has_data(made: Any) -> bool:
    return made["mm_kwargs"]["video"][0] is not None


@pytest.fixture
def front(make_config: Callable[..., Any]) -> FrontEnd:
    return FrontEnd(make_config())


def test_what_was_sent_is_not_sent_again(front: FrontEnd) -> None:
    first = front.make()
    assert has_data(first)
    send(first)
    assert not has_data(front.make("And another question?"))
    del first
    gc.collect()
    assert not has_data(front.make())


def test_what_was_dropped_is_sent_again(front: FrontEnd) -> None:
    dropped = front.make()
    assert has_data(dropped)
    del dropped
    gc.collect()
    assert has_data(front.make())


def test_nobody_relies_on_what_is_still_to_be_sent(front: FrontEnd) -> None:
    first = front.make()
    second = front.make("And another question?")
    assert has_data(first)
    assert has_data(second)
    send(second)
    del first  # dropped, so the name is forgotten once more: that costs a copy, and no answer
    gc.collect()
    assert has_data(front.make())


def test_a_prompt_that_vllm_refuses_later(front: FrontEnd) -> None:
    limit = front.processor.info.ctx.model_config.max_model_len
    send(front.make("word " * limit))
    assert has_data(front.make())


def test_the_question_is_no_part_of_the_name(front: FrontEnd) -> None:
    first, second = front.make("One?"), front.make("Two?")
    assert first["mm_hashes"] == second["mm_hashes"]
    one, two = (made["mm_placeholders"]["video"][0].beside for made in (first, second))
    assert one.question != two.question
    assert one.prompt_tokens == len(first["prompt_token_ids"])


def test_a_uuid_alone(front: FrontEnd) -> None:
    send(front.make(uuid="mine"))
    send(front.make("Another?", seed=None, uuid="mine"))
    with pytest.raises(ValueError, match="has no video of uuid 'yours' with these settings"):
        front.make(seed=None, uuid="yours")
    with pytest.raises(ValueError, match="has no video of uuid 'mine' with these settings"):
        front.make(seed=None, uuid="mine", hf_processor_mm_kwargs={"metok": "off"})


def test_a_uuid_alone_where_nothing_is_kept(front: FrontEnd) -> None:
    with pytest.raises(ValueError, match=r"keeps no images and videos .* send the data"):
        front.make(seed=None, uuid="mine", cache=None)
