"""Where the time of a request goes: spans around the parts of a model, in the benchmark's own process only.

Modules get forward hooks, `embed_multimodal` is wrapped, and METok's choice of survivors tells by itself when
it begins and ends: it is one of the stages that the engine takes the times of. Every border waits for the
GPU, which costs time itself: requests timed this way are not those that TTFT is taken from.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

PARTS = ("tower", "stage1", "shallow_layers", "scoring", "deep_layers", "rest_of_model", "outside_model")
"""In the order of a request's way. For stock vLLM `stage1` is its pooling, and there is no `scoring`."""

SCORING = "scoring"
"""The part, and METok's stage of this name: scores,
selection and the gathering of survivors, at L1, L2 and L3.
"""


class Spans:
    """Time by part.

    A part that begins inside another one stops that one's clock: the sum is the time that passed.
    """

    def __init__(self, synchronise: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._synchronise = synchronise
        self._clock = clock
        self._stack: list[str] = []
        self._last = 0.0

    def _pass(self) -> None:
        self._synchronise()
        now = self._clock()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    def enter(self, part: str) -> None:
        self._pass()
        self._stack.append(part)

    def leave(self) -> None:
        self._pass()
        self._stack.pop()

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def take(self) -> dict[str, float]:
        """Milliseconds of each of `PARTS` since the last call."""
        taken = {part: 1e3 * self.seconds.get(part, 0.0) for part in PARTS}
        self.seconds.clear()
        return taken

    def around(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """`function`, timed as `part`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.span(part):
                return function(*args, **kwargs)

        return timed

    def hook(self, module: Any, part: str) -> None:
        """Time every call of a `torch.nn.Module` as `part`."""

        def before(*_: Any) -> None:
            self.enter(part)

        def after(*_: Any) -> None:
            self.leave()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


class SpannedParts:
    """Stands where the engine's `PartTimes` stood: passes every part on to it,
    and puts a span around `SCORING`.
    """

    def __init__(self, spans: Spans, times: Any) -> None:
        self._spans = spans
        self._times = times

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What the engine opens around a part of its work."""
        with self._times.part(name), self._spans.span(name) if name == SCORING else nullcontext():
            yield


def attach(spans: Spans, model: Any, first_prune_layer: int) -> None:
    """Put spans around the parts of a LLaVA-OneVision model, stock or METok;
    both are cut at METok's first pruning layer.

    Raises:
        LookupError: METok no longer has the part that is timed here.
    """
    spans.hook(model.vision_tower, "tower")
    spans.hook(model.multi_modal_projector, "tower")
    model.embed_multimodal = spans.around(model.embed_multimodal, "stage1")
    spans.hook(model, "rest_of_model")
    for index, layer in enumerate(model.language_model.model.layers):
        spans.hook(layer, "shallow_layers" if index < first_prune_layer else "deep_layers")
    if hasattr(model, "decoder_stack"):
        from metok_vllm.contract.counters import TIMED_PARTS

        if SCORING not in TIMED_PARTS:
            raise LookupError(f"METok has no part {SCORING!r} any more: its time would be counted elsewhere")
        # Each step asks the model for its stack. What the reports read are the times behind the new ones.
        stack = model.decoder_stack
        model.decoder_stack = replace(stack, times=SpannedParts(spans, stack.times))
