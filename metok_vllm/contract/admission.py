"""What is checked where a request's items and its sampling parameters first meet, on every way into vLLM.

Some requests are wrong only as a whole: log-probabilities of a prompt, where the prompt holds a pruned video.
The multimodal processor sees the items and no parameters; FastAPI sees a body that may name videos in a dozen
ways. Both meet in `InputProcessor.process_inputs` (vllm/v1/engine/input_processor.py). All routes of the HTTP
server, `vllm run-batch`, beam search and `vllm.LLM` pass it, before the engine hears of the request, and an
error there is HTTP 400. It asks one hook: `Platform.validate_request` (vllm/platforms/interface.py), with the
processed inputs and the parameters. vLLM has that hook for platforms, and there is no other. So METok stands
in front of the platform's own, which it calls first. This is the one attribute of a vLLM object that METok
replaces, and only in a process that builds METok's processor.

What the processor has made is told by its placeholders: they are passed on as they are, also where vLLM's
cache has the item's data already and sends none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import PlaceholderRange
from vllm.platforms import current_platform

from metok_vllm.contract.refusals import FOREIGN_FEATURES, Reason, count_refused, no_prompt_logprobs

if TYPE_CHECKING:
    from vllm.inputs import EngineInput, MultiModalInput
    from vllm.multimodal.cache import BaseMultiModalProcessorCache

HOOK = "validate_request"


class OwnRange(PlaceholderRange):
    """Where an item stands that METok's processor has made. Among processes it travels as its base class."""


class PrunedRange(OwnRange):
    """Where a video stands that METok prunes."""


def mark(inputs: MultiModalInput, pruned: bool) -> None:
    """Say of every item that METok's processor has made it, and of videos whether they are pruned."""
    inputs["mm_placeholders"] = {
        modality: [
            (PrunedRange if pruned and modality == "video" else OwnRange)(one.offset, one.length, one.is_embed)
            for one in ranges
        ]
        for modality, ranges in inputs["mm_placeholders"].items()
    }


def asks_for_prompt_logprobs(params: Any) -> bool:
    """Whether parameters ask for log-probabilities of the prompt's tokens, in any of vLLM's ways."""
    names = ("prompt_logprobs", "prompt_logprob_token_ids")
    return any(getattr(params, name, None) is not None for name in names)


def forget_unsent(caches: Iterable[BaseMultiModalProcessorCache], inputs: Any) -> None:
    """Make the front end's caches forget the items of a request that is refused after they were processed.

    A cache takes an item whose data it has handed out for one that the engine has
    (vllm/multimodal/cache/lru.py). The next request with that item would be sent without the data, and end
    with an error.
    """
    for modality, items in inputs["mm_kwargs"].items():
        for item, name in zip(items, inputs["mm_hashes"][modality], strict=False):
            if item is not None:
                for cache in caches:
                    cache.invalidate(name)


class Admission:
    """The check in front of a platform's own."""

    def __init__(self, platforms_own: Callable[[Any, Any], None]) -> None:
        self._platforms_own = platforms_own
        self.caches: WeakSet[BaseMultiModalProcessorCache] = WeakSet()  # of the processors in this process
        self.serves_metok_alone = False  # else another model's items may pass here, made by its own processor

    def __call__(self, processed_inputs: EngineInput, params: Any) -> None:
        """Check one request.

        Args:
            processed_inputs: of any type, text and multimodal items processed.
            params: `SamplingParams` or `PoolingParams`.

        Raises:
            VLLMValidationError: one sentence; HTTP 400.
        """
        self._platforms_own(processed_inputs, params)
        if processed_inputs["type"] != "multimodal":
            return
        ranges = [one for ranges in processed_inputs["mm_placeholders"].values() for one in ranges]
        if self.serves_metok_alone and not all(isinstance(one, OwnRange) for one in ranges):
            raise _refused("features", FOREIGN_FEATURES)
        if asks_for_prompt_logprobs(params) and any(isinstance(one, PrunedRange) for one in ranges):
            forget_unsent(self.caches, processed_inputs)
            raise _refused("prompt_logprobs", no_prompt_logprobs())


def _refused(reason: Reason, sentence: str) -> VLLMValidationError:
    count_refused(reason)
    return VLLMValidationError(f"METok: {sentence}")


def check_requests() -> Admission:
    """Have every request of this process checked from now on. May be called again."""
    present = getattr(current_platform, HOOK)
    if isinstance(present, Admission):
        return present
    admission = Admission(present)
    setattr(current_platform, HOOK, admission)
    return admission
