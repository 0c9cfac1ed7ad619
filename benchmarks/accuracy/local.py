"""The local runner: every method in plain PyTorch on the checkpoint,
one question at a time, what can be shared shared.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.decoder import KeyValue, Prefix
from benchmarks.accuracy.method import Entering, Policy, Reducer, Rows, Trace
from benchmarks.accuracy.video import Asked, Checkpoint, Video
from metok_vllm.compression.scoring import smooth_by_frame, text_to_visual_scores

MAX_TOKENS = 48
"""Longest answer, in tokens."""
KV_ELEMENT_BYTES = 4  # float32, as everything here is


@dataclass(frozen=True)
class Outcome:
    """One answer and what it took; None where a server does not tell."""

    text: str
    entering: int | None = None  # visual tokens that enter the language model
    after_l1: int | None = None  # left after the first dropping layer; the same where there is none
    after_l2: int | None = None
    retained: int | None = None  # most that any layer from the first dropping layer on keeps while decoding
    per_layer: float | None = None  # visual tokens computed in prefill, mean over layers
    kv_bytes: int | None = None  # held when decoding starts, text included
    seconds: float = 0.0
    tokens: tuple[int, ...] = ()


class LocalRunner:
    """Answers questions about the video that `watch` was last called with."""

    def __init__(
        self, checkpoint: Checkpoint, max_tokens: int = MAX_TOKENS, stop: frozenset[int] | None = None
    ) -> None:
        """`stop`: tokens that end an answer; None for the checkpoint's own."""
        self.checkpoint, self.max_tokens = checkpoint, max_tokens
        self.stop = checkpoint.stop if stop is None else stop
        self._shared: dict[Hashable, tuple[Entering, Prefix]] = {}

    def watch(self, video: Video) -> None:
        """Turn to another video."""
        self.video = video
        self._shared.clear()

    @torch.inference_mode()
    def answer(self, reducer: Reducer, policy: Policy, asked: Asked) -> tuple[Outcome, Trace]:
        """Answer one question greedily with a method."""
        began = time.perf_counter()
        entering, prefix = self._prefix(reducer, asked)
        last, cache, trace = self._prefill(prefix, policy, entering, asked)
        held = [policy.held(layer, trace, len(cache)) for layer in range(len(cache))]
        cache = [
            self._release(*each)
            for each in zip(cache, trace.alive, held, [len(asked.header)] * len(cache), strict=True)
        ]
        start = len(asked.header) + entering.span + len(asked.suffix)
        tokens = self._decode(last, cache, start, asked.draft)
        text = self.checkpoint.tokenizer.decode([t for t in tokens if t not in self.stop])
        return self._outcome(text, tokens, policy, trace, held, asked, time.perf_counter() - began), trace

    def _prefix(self, reducer: Reducer, asked: Asked) -> tuple[Entering, Prefix]:
        key = (reducer, asked.header, asked.seed if reducer.per_question else None)
        if key not in self._shared:
            entering = reducer.enter(self.video, asked)
            header = len(asked.header)
            rows = torch.cat([self.checkpoint.embed(asked.header), entering.rows])
            positions = torch.cat([torch.arange(header), header + entering.offsets])
            self._shared[key] = (entering, Prefix(self.checkpoint.decoder, rows, positions))
        return self._shared[key]

    def _prefill(
        self, prefix: Prefix, policy: Policy, entering: Entering, asked: Asked
    ) -> tuple[Tensor, list[KeyValue], Trace]:
        """The last row after all layers, each layer's keys and values, and which visual tokens were where."""
        decoder, header = self.checkpoint.decoder, len(asked.header)
        layers = len(decoder.layers)
        drops = policy.drops_before(layers)
        cuts = {layer: cut for cut, layer in enumerate(sorted(drops), start=1)}
        start = header + entering.span
        rows = self.checkpoint.embed(asked.suffix)
        angles = decoder.angles(torch.arange(start, start + len(rows)))
        alive = torch.arange(len(entering.rows))
        scores = torch.zeros(len(alive))
        trace, cache = Trace(entering), []
        for layer in range(layers):
            if layer in drops:
                mask = policy.keep(cuts[layer], scores, alive, entering, asked)
                kept = mask.nonzero().flatten()
                alive, trace.scores[layer] = alive[kept], scores[kept]
                prefix = prefix.keep(layer, torch.cat([torch.arange(header), header + kept]))
                scores = torch.zeros(len(alive))
            query, key, value = decoder.project(layer, rows, angles)
            before = prefix.kv(layer)
            key, value = torch.cat([before[0], key], 1), torch.cat([before[1], value], 1)
            if drops.get(layer + 1):
                scores = self._scores(query, key, header, len(alive), self._rows(policy.rows, asked))
                if policy.smoothing_micro:
                    assert entering.frame is not None
                    scores = smooth_by_frame(scores, entering.frame[alive], entering.frames, policy.smoothing_micro)
            rows = decoder.finish(layer, rows, decoder.attend(query, key, value))
            cache.append((key, value))
            trace.alive.append(alive)
        return rows[-1], cache, trace

    @staticmethod
    def _rows(whose: Rows, asked: Asked) -> Tensor:
        """The rows after the video that score, ascending, int64."""
        behind = torch.arange(len(asked.suffix))
        if whose == "last":
            return behind[-1:]
        return torch.tensor(asked.rows) if whose == "question" and asked.rows else behind

    def _scores(self, query: Tensor, key: Tensor, header: int, visual: int, rows: Tensor) -> Tensor:
        """Mean attention, float32 [visual], of `rows` of those after the video to its visual tokens."""
        keys = key.shape[1]
        order = torch.arange(keys)
        return text_to_visual_scores(
            query[:, rows].transpose(0, 1),
            key.transpose(0, 1),
            header + torch.arange(visual),
            keys - query.shape[1] + rows,
            order,
            self.checkpoint.decoder.scale,
            rows_per_block=len(rows),
        )

    @staticmethod
    def _release(cache: KeyValue, alive: Tensor, held: Tensor, header: int) -> KeyValue:
        """A layer's keys and values without the visual tokens that decoding may not see."""
        if len(held) == len(alive):
            return cache
        text = torch.arange(header + len(alive), cache[0].shape[1])
        index = torch.cat([torch.arange(header), header + torch.searchsorted(alive, held), text])
        return cache[0][:, index], cache[1][:, index]

    def _decode(self, row: Tensor, cache: list[KeyValue], start: int, draft: tuple[int, ...]) -> list[int]:
        """Greedy tokens; the first new one has position `start`.

        Of `draft`, as much is taken as greedy decoding gives: one pass checks what would be a pass a token.
        """
        tokens = [int(self.checkpoint.decoder.logits(row).argmax())]
        if tokens[0] in draft[:1] and len(draft) > 1 and tokens[0] not in self.stop:
            fed = draft[: self.max_tokens - 1]
            held = cache[0][0].shape[1]
            for following in self._step(fed, cache, start):
                if tokens[-1] in self.stop or len(tokens) > len(fed) or fed[len(tokens) - 1] != tokens[-1]:
                    break
                tokens.append(following)
            # What was fed beyond the tokens that hold was never there; layers hold different numbers of
            # tokens.
            excess = len(fed) - (len(tokens) - 1)
            if excess:
                cache[:] = [(k[:, : k.shape[1] - excess], v[:, : v.shape[1] - excess]) for k, v in cache]
            assert cache[0][0].shape[1] == held + len(tokens) - 1
        while tokens[-1] not in self.stop and len(tokens) < self.max_tokens:
            tokens += self._step(tokens[-1:], cache, start + len(tokens) - 1)
        return tokens

    def _step(self, fed: Sequence[int], cache: list[KeyValue], start: int) -> list[int]:
        """Feed tokens from position `start` on, extend the cache, and give the best token after each."""
        decoder = self.checkpoint.decoder
        rows = decoder.embedding[list(fed)]
        angles = decoder.angles(torch.arange(start, start + len(fed)))
        for layer in range(len(cache)):
            query, key, value = decoder.project(layer, rows, angles)
            key, value = torch.cat([cache[layer][0], key], 1), torch.cat([cache[layer][1], value], 1)
            cache[layer] = (key, value)
            rows = decoder.finish(layer, rows, decoder.attend(query, key, value))
        best: list[int] = decoder.logits(rows).argmax(-1).tolist()
        return best

    def _outcome(
        self,
        text: str,
        tokens: list[int],
        policy: Policy,
        trace: Trace,
        held: list[Tensor],
        asked: Asked,
        seconds: float,
    ) -> Outcome:
        decoder, layers = self.checkpoint.decoder, len(trace.alive)
        drops = sorted(policy.drops_before(layers))
        left = [len(trace.entering.rows)] + [len(trace.alive[layer]) for layer in drops]
        counts: dict[str, Any] = {
            "entering": left[0],
            "after_l1": left[min(1, len(left) - 1)],
            "after_l2": left[min(2, len(left) - 1)],
            "retained": max((len(h) for h in held[drops[0] if drops else 0 :]), default=0),
        }
        text_tokens = len(asked.header) + len(asked.suffix)
        entries = sum(len(h) for h in held) + layers * text_tokens
        return Outcome(
            text=text.strip(),
            **counts,
            per_layer=sum(len(a) for a in trace.alive) / layers,
            kv_bytes=entries * 2 * decoder.kv_heads * decoder.head_dim * KV_ELEMENT_BYTES,
            seconds=seconds,
            tokens=tuple(tokens),
        )
