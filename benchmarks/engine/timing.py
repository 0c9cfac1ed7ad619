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

TOWERS = ("vision_tower", "multi_modal_projector", "visual")
"""What makes visual tokens of pixels, as vLLM's models call it: LLaVA's two, Qwen's one with its merger."""

LANGUAGE_MODEL = ("shallow_layers", "scoring", "deep_layers", "compiled_layers", "rest_of_model")
"""The parts that are the language model's."""

OUTSIDE = ("scheduling", "preparation", "sampling", "outside_model")
"""The parts that are no model's: vLLM's scheduler, the batch's inputs and attention metadata, logits and
sampling, and what is left of a step.
"""

PARTS = ("tower", "stage1", *LANGUAGE_MODEL, *OUTSIDE)
"""In the order of a request's way. For stock vLLM `stage1` is its pooling or its own pruning, and there is no
`scoring`.
"""

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


def attach_step(spans: Spans, scheduler: Any, runner: Any) -> None:
    """Put spans around the parts of an engine's step: what vLLM's scheduler and V2 model runner do in it."""
    scheduler.schedule = spans.around(scheduler.schedule, "scheduling")
    scheduler.update_from_output = spans.around(scheduler.update_from_output, "scheduling")
    runner.execute_model = spans.around(runner.execute_model, "preparation")
    runner.sample_tokens = spans.around(runner.sample_tokens, "sampling")
    if runner.cudagraph_manager is not None:  # a replay does not call the model
        graphs = runner.cudagraph_manager
        graphs.run_fullgraph = spans.around(graphs.run_fullgraph, "compiled_layers")
        graphs.run_pw_graph = spans.around(graphs.run_pw_graph, "rest_of_model")


def attach(spans: Spans, model: Any, first_prune_layer: int, *, compiled: bool = False) -> None:
    """Put spans around the parts of a model, stock or METok; both are cut at METok's first pruning layer.

    Args:
        spans: takes the times.
        model: vLLM's model, after start.
        first_prune_layer: layers below it are shallow.
        compiled: whether its layers are one compiled graph, which calls no hook of a layer.

    Raises:
        LookupError: the model's tower is not known here, METok no longer has a part that is timed here, or
            vLLM's decoder is compiled otherwise.
    """
    towers = [getattr(model, name) for name in TOWERS if hasattr(model, name)]
    if not towers:
        raise LookupError(f"{type(model).__name__} has no {' or '.join(TOWERS)}: its tower would be counted elsewhere")
    for tower in towers:
        spans.hook(tower, "tower")
    model.embed_multimodal = spans.around(model.embed_multimodal, "stage1")
    spans.hook(model, "rest_of_model")
    decoder = model.language_model.model
    if compiled:
        # vLLM's decorator gives the class its `__call__`, which Python does not look for in the instance.
        kind: Any = type(decoder)
        if "__call__" not in vars(kind):
            raise LookupError(f"vLLM no longer compiles {kind.__name__} by its class's __call__")
        kind.__call__ = spans.around(kind.__call__, "compiled_layers")
    else:
        for index, layer in enumerate(decoder.layers):
            spans.hook(layer, "shallow_layers" if index < first_prune_layer else "deep_layers")
    if hasattr(model, "decoder_stack"):
        from metok_vllm.contract.counters import TIMED_PARTS

        gone = sorted(set(PRUNED_STEP) - set(TIMED_PARTS))
        if gone:
            raise LookupError(f"METok has no part {', '.join(gone)} any more: its time would be counted elsewhere")
        # Each step asks the model for its stack. What the reports read are the times behind the new ones.
        stack = model.decoder_stack
        model.decoder_stack = replace(stack, times=SpannedParts(spans, stack.times))
