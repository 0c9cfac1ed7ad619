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
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, finalize

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import PlaceholderRange
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams

from metok_vllm.contract.advice import where_settings_go
from metok_vllm.contract.beside import KEY, Beside, stated_by_client, take_back
from metok_vllm.contract.refusals import FOREIGN_FEATURES, Reason, count_refused, no_prompt_logprobs

if TYPE_CHECKING:
    from vllm.inputs import EngineInput, MultiModalInput
    from vllm.multimodal.cache import BaseMultiModalProcessorCache

HOOK = "validate_request"


class OwnRange(PlaceholderRange):
    """Where an item stands that METok's processor has made. Among processes it travels as its base class.

    Attributes:
        beside: what the request carries to the engine beside its items; None where that is nothing.
        handed: what of the request the engine has not been sent yet.
    """

    beside: Beside | None = None
    handed: Handed | None = None


class CompressedRange(OwnRange):
    """Where a video stands that METok compresses."""


class PrunedRange(CompressedRange):
    """Where one stands that it prunes, too."""


def mark(
    inputs: MultiModalInput,
    video: type[OwnRange],
    beside: Beside | None = None,
    handed: Handed | None = None,
) -> None:
    """Say of every item that METok's processor has made it, and of videos what is done to them.

    Args:
        video: what a video's place becomes.
        beside: what the request carries to the engine; hangs on the places, which vLLM passes on.
        handed: the items' data, until they are sent; lives as long as the places do.
    """

    def own(one: PlaceholderRange, modality: str) -> OwnRange:
        place = (video if modality == "video" else OwnRange)(one.offset, one.length, one.is_embed)
        # A frozen class of vLLM's. What is no field of it does not travel among processes.
        object.__setattr__(place, "beside", beside)
        object.__setattr__(place, "handed", handed)
        return place

    inputs["mm_placeholders"] = {
        modality: [own(one, modality) for one in ranges] for modality, ranges in inputs["mm_placeholders"].items()
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
    _forget(caches, _names(inputs, with_data=True))


class Handed:
    """The data of one request's items, from where they are made until the engine is sent them.

    In between the client may go away, and vLLM then drops the request without a word to its cache. When this
    is dropped with it, unsent, the cache forgets the items.
    """

    def __init__(self, caches: Iterable[BaseMultiModalProcessorCache], names: Iterable[str], room: int) -> None:
        self.names = frozenset(names)
        self.room = room
        """Tokens that may follow the request's prompt."""
        self._forget = finalize(self, _forget, caches, self.names)
        self._forget.atexit = False

    def sent(self) -> None:
        """The engine is sent the request now."""
        self.names = frozenset()
        self._forget.detach()


def _forget(caches: Iterable[BaseMultiModalProcessorCache], names: Iterable[str]) -> None:
    for cache in caches:
        for name in names:
            cache.invalidate(name)


class Unsent:
    """All that has been handed out in this process and not been sent."""

    def __init__(self) -> None:
        self._all: WeakSet[Handed] = WeakSet()
        self._lock = Lock()  # items are made in one thread, and sent in another

    def hand_out(self, caches: Iterable[BaseMultiModalProcessorCache], inputs: MultiModalInput, room: int) -> Handed:
        """Note the data in a request that has just been processed; `room` tokens may follow its prompt."""
        handed = Handed(caches, _names(inputs, with_data=True), room)
        with self._lock:
            self._all.add(handed)
        return handed

    def relied_on(self, inputs: MultiModalInput) -> frozenset[str]:
        """Items that a request comes without, and that no engine has been sent yet."""
        missing = frozenset(_names(inputs, with_data=False))
        if not missing:
            return missing
        with self._lock:
            return missing.intersection(name for handed in self._all for name in handed.names)


def _names(inputs: MultiModalInput, with_data: bool) -> list[str]:
    """Names of the items that come with their data, or of those that come without."""
    found: list[str] = []
    for modality, items in inputs["mm_kwargs"].items():
        names = inputs["mm_hashes"][modality]
        found += [name for item, name in zip(items, names, strict=False) if (item is not None) == with_data]
    return found


class Admission:
    """The check in front of a platform's own."""

    def __init__(self, platforms_own: Callable[[Any, Any], None]) -> None:
        self._platforms_own = platforms_own
        self.caches: WeakSet[BaseMultiModalProcessorCache] = WeakSet()  # of the processors in this process
        self.unsent = Unsent()
        self.keep_answer: Callable[[], str] = str  # under which name, of a request with a compressed video
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
        if stated_by_client(params):
            raise _refused("setting", f"'{KEY}' in vllm_xargs is METok's own; {where_settings_go()}.")
        take_back(params)
        if processed_inputs["type"] != "multimodal":
            return
        ranges = [one for ranges in processed_inputs["mm_placeholders"].values() for one in ranges]
        if self.serves_metok_alone and not all(isinstance(one, OwnRange) for one in ranges):
            raise _refused("features", FOREIGN_FEATURES)
        if asks_for_prompt_logprobs(params) and any(isinstance(one, PrunedRange) for one in ranges):
            forget_unsent(self.caches, processed_inputs)
            raise _refused("prompt_logprobs", no_prompt_logprobs())
        handed = {one.handed for one in ranges if isinstance(one, OwnRange) and one.handed is not None}
        if any(refused_later(params, len(processed_inputs["prompt_token_ids"]), one.room) for one in handed):
            forget_unsent(self.caches, processed_inputs)
        else:
            for one in handed:
                one.sent()
        beside = next((one.beside for one in ranges if isinstance(one, CompressedRange)), None)
        if beside is not None:
            replace(beside, keep_answer=self.keep_answer()).put(params)


def refused_later(params: Any, prompt_len: int, room: int) -> bool:
    """Whether vLLM refuses the request after this check, for its parameters.

    As `InputProcessor.process_inputs` does (vllm/v1/engine/input_processor.py): its items then never reach
    the engine. For its prompt: `frontend/processing.py`.

    Args:
        params: `SamplingParams` or `PoolingParams`.
        prompt_len: tokens of the prompt.
        room: tokens that may follow it.
    """
    if not isinstance(params, SamplingParams):
        return False
    if not 0 <= params.routed_experts_prompt_start <= prompt_len:
        return True
    if params.prompt_logprob_token_ids is not None:
        rows = max(prompt_len - 1 - (params.prompt_logprob_start or 0), 0)
        if len(params.prompt_logprob_token_ids) != rows:
            return True
    return params.max_tokens is None and params.min_tokens > room


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
