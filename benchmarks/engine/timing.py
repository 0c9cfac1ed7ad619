"""Where the time of a request goes: spans around the parts of a model, in the benchmark's own process only.

Modules get forward hooks, `embed_multimodal` is wrapped, and METok's pruned step tells by itself when a part
of it begins and ends. Every border waits for the GPU, which costs time itself: requests timed this way are
not those that TTFT is taken from.

In vLLM's default mode the layers are one compiled graph, and a decode step is the replay of a CUDA graph:
there is no border between two layers to stand at. Such a call is timed as a whole, as `compiled_layers`.
METok's pruned step runs its layers one by one in either mode.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

LANGUAGE_MODEL = ("shallow_layers", "scoring", "deep_layers", "compiled_layers", "rest_of_model")
"""The parts that are the language model's."""

PARTS = ("tower", "stage1", *LANGUAGE_MODEL, "outside_model")
"""In the order of a request's way. For stock vLLM `stage1` is its pooling, and there is no `scoring`."""

PRUNED_STEP = {"shallow": "shallow_layers", "scoring": "scoring", "deep": "deep_layers"}
"""METok's names for the parts of a pruned step, and those of here.

`scoring` is scores, selection and the gathering of survivors, at L1, L2 and L3.
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
    and puts a span around those of `PRUNED_STEP`.
    """

    def __init__(self, spans: Spans, times: Any) -> None:
        self._spans = spans
        self._times = times

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What the engine opens around a part of its work."""
        known = PRUNED_STEP.get(name)
        with self._times.part(name), self._spans.span(known) if known else nullcontext():
            yield


def attach(spans: Spans, model: Any, first_prune_layer: int, *, compiled: bool = False, graphs: Any = None) -> None:
    """Put spans around the parts of a LLaVA-OneVision model, stock or METok;
    both are cut at METok's first pruning layer.

    Args:
        spans: takes the times.
        model: vLLM's model, after start.
        first_prune_layer: layers below it are shallow.
        compiled: whether its layers are one compiled graph, which calls no hook of a layer.
        graphs: the model runner's `CudaGraphManager`, where it has one: a replay does not call the model.

    Raises:
        LookupError: METok no longer has the part that is timed here.
    """
    spans.hook(model.vision_tower, "tower")
    spans.hook(model.multi_modal_projector, "tower")
    model.embed_multimodal = spans.around(model.embed_multimodal, "stage1")
    spans.hook(model, "rest_of_model")
    decoder = model.language_model.model
    if compiled:
        # vLLM's decorator gives the class its `__call__`, which Python does not look for in the instance.
        kind: Any = type(decoder)
        kind.__call__ = spans.around(kind.__call__, "compiled_layers")
    else:
        for index, layer in enumerate(decoder.layers):
            spans.hook(layer, "shallow_layers" if index < first_prune_layer else "deep_layers")
    if graphs is not None:
        graphs.run_fullgraph = spans.around(graphs.run_fullgraph, "compiled_layers")
        graphs.run_pw_graph = spans.around(graphs.run_pw_graph, "rest_of_model")
    if hasattr(model, "decoder_stack"):
        from metok_vllm.contract.counters import TIMED_PARTS

        gone = sorted(set(PRUNED_STEP) - set(TIMED_PARTS))
        if gone:
            raise LookupError(f"METok has no part {', '.join(gone)} any more: its time would be counted elsewhere")
        # Each step asks the model for its stack. What the reports read are the times behind the new ones.
        stack = model.decoder_stack
        model.decoder_stack = replace(stack, times=SpannedParts(spans, stack.times))
