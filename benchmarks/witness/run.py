"""One video of the second witness through every method, and the probe of where information moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.witness import methods
from benchmarks.witness.model import Cache, Decoder
from benchmarks.witness.world import FRAMES, WIDTH, Prompt, Video, tower_grid
from metok_vllm.compression import accounting, selection

FASTV_LAYER = 2  # FastV's own choice: the first two layers see everything
DELTAS = (0.0, 0.5, 1.0)
FITTED = (8, 16, 26)
"""Pruning layers that lie where this model needs them:
chosen on videos of seed 99, after a look at the probe.
"""


@dataclass(frozen=True)
class Budgets:
    """Visual tokens, mean over the layers, of METok's stages 2 and 3 at
    `FITTED` on stock's tokens; what others get.
    """

    mean: int  # if events had equal length
    fastv: int  # tokens after the one cut that come to `mean` on average


def budgets(layers: int) -> Budgets:
    first, second, third = FITTED
    tokens = accounting.expected_visual_tokens(
        FRAMES,
        methods.EVENTS,
        methods.KEY_EVENTS,
        methods.KEY_FRAMES,
        (WIDTH, WIDTH, WIDTH),
        False,
        methods.KEEP,
        FRAMES * WIDTH,
    )
    sums = first * tokens.encoded + (second - first) * tokens.after_l1 + (third - second) * tokens.after_l2
    cut = (sums - FASTV_LAYER * FRAMES * WIDTH) / (layers - FASTV_LAYER)
    return Budgets(round(sums / layers), round(cut))


class Witness:
    """The model with the prompt's beginning already run."""

    def __init__(self, decoder: Decoder, prompt: Prompt) -> None:
        self.decoder, self.prompt = decoder, prompt
        self.layers = len(decoder.layers)
        self.budgets = budgets(self.layers)
        with torch.no_grad():
            self.before = methods.with_rows(decoder, Cache(), decoder.embed(prompt.before()))

    @torch.no_grad()
    def frames(self, video: Video) -> Tensor:
        """Stock's rows of a video, [T, 8, D]."""
        return self.decoder.embed([t for c in video.captions for t in self.prompt.frame(c)]).view(FRAMES, WIDTH, -1)

    def shared(self, video: Video, number: int) -> dict[str, tuple[Cache, int]]:
        """Methods that ignore the question: the cache behind the video, and its visual tokens."""
        frames = self.frames(video)
        flat = frames.flatten(0, 1)
        count = round(self.budgets.mean / WIDTH)
        middle = ((torch.arange(count) + 0.5) * FRAMES / count).long()
        some = torch.randperm(len(flat), generator=torch.Generator().manual_seed(number))[: self.budgets.mean]
        chosen = {
            "stock": flat,
            "fewer-frames": frames[middle].flatten(0, 1),
            "random-tokens": flat[some.sort().values],
        }
        return {name: (methods.with_rows(self.decoder, self.before, rows), len(rows)) for name, rows in chosen.items()}

    def answer(self, video: Video, number: int) -> list[dict[str, Any]]:
        """Every question of a video by every method: token hits,
        visual tokens and visual KV rows, means over the layers.
        """
        shared = self.shared(video, number)
        grid = tower_grid(self.frames(video))
        rows = []
        for question in video.questions:
            after, answer = self.prompt.after(question), self.prompt.answer(question)
            results: dict[str, dict[str, Any]] = {}
            plain = methods.plain_hits(self.decoder, [cache for cache, _ in shared.values()], after, answer)
            for (name, (_, tokens)), hits in zip(shared.items(), plain, strict=True):
                results[name] = {"hits": hits, "tokens": tokens, "kv": tokens}
            asked = self.decoder.embed(self.prompt.ids(question.text)).detach()
            fine = methods.stage1(grid, asked, methods.FINE)
            paper = methods.stage1(grid, asked, methods.PAPER)
            layers = selection.prune_layers(self.layers)
            results |= self.pruned("stage-1", paper, after, answer, None)
            results |= self.pruned("metok", paper, after, answer, layers)
            results |= self.pruned("metok-fitted", paper, after, answer, FITTED)
            results |= self.pruned("stage-2+3-fitted", fine, after, answer, FITTED)
            random = torch.Generator().manual_seed(number)
            results |= self.pruned("random-survivors-fitted", fine, after, answer, FITTED, random, (1.0,))
            cut = methods.one_cut(FASTV_LAYER, self.budgets.fastv)
            results |= self.decoded(
                methods.prefill(self.decoder, self.before, fine, after, cut), {"fastv-like": None}, answer
            )
            rows.append({"video": number, "kind": question.kind, "methods": results})
        return rows

    def pruned(
        self,
        name: str,
        visual: methods.Visual,
        after: list[int],
        answer: list[int],
        layers: selection.PruneLayers | None,
        random: torch.Generator | None = None,
        deltas: tuple[float, ...] = DELTAS,
    ) -> dict[str, dict[str, Any]]:
        """One prefill pruned at `layers` (None: not at all), decoded with each `decode_retention` and with
        all that it left.
        """
        schedule = {} if layers is None else methods.metok_schedule(visual, layers, random)
        done = methods.prefill(self.decoder, self.before, visual, after, schedule)
        caches: dict[str, Cache | None] = {name if layers is None else f"{name} stage-2": None}
        if layers is not None:
            caches |= {f"{name} {delta:g}": methods.released(done, layers, delta) for delta in deltas}
        return self.decoded(done, caches, answer)

    def decoded(
        self, done: methods.Prefill, caches: dict[str, Cache | None], answer: list[int]
    ) -> dict[str, dict[str, Any]]:
        """Hits of one prefill decoded with several caches; None is its own."""
        held = [done.cache if cache is None else cache for cache in caches.values()]
        hits = methods.hits(self.decoder, done, held, answer)
        tokens = sum(done.tokens) / self.layers
        return {
            name: {"hits": hit, "tokens": tokens, "kv": methods.visual_rows(cache, done.video)}
            for name, cache, hit in zip(caches, held, hits, strict=True)
        }

    @torch.no_grad()
    def probe(self, video: Video, number: int) -> list[dict[str, Any]]:
        """Stock, but from layer k on no visual token exists: for all rows,
        and for the answer's rows alone.
        """
        cache = methods.with_rows(self.decoder, self.before, self.frames(video).flatten(0, 1))
        begin, text = len(cache.positions[0]), len(self.before.positions[0])
        rows = []
        for question in video.questions:
            after, answer = self.prompt.after(question), self.prompt.answer(question)
            ids = after + answer[:-1]
            positions = torch.arange(begin, begin + len(ids))
            hidden = [self.decoder.embed(ids)]
            full = Cache()
            for layer in range(self.layers):
                out, seen = self.decoder.layer(layer, hidden[-1], positions, cache)
                hidden.append(out)
                full.keys.append(seen.keys)
                full.values.append(seen.values)
                full.positions.append(seen.positions)
            is_text = [(p < text) | ((p >= begin) & (p < begin + len(after))) for p in full.positions]
            only_text = full.kept(list(is_text))
            everywhere, decoding = [], []
            for k in range(self.layers + 1):
                last = hidden[k] if k == self.layers else self.decoder.run(hidden[k], positions, self.before, k)[0]
                everywhere.append(self._compare(last[len(after) - 1 :], answer))
                if len(answer) > 1:
                    late = hidden[k][len(after) :]
                    if k < self.layers:
                        late = self.decoder.run(late, positions[len(after) :], only_text, k)[0]
                    last = torch.cat([hidden[-1][len(after) - 1 : len(after)], late])
                    decoding.append(self._compare(last, answer))
            rows.append({"video": number, "kind": question.kind, "everywhere": everywhere, "decoding": decoding})
        return rows

    def _compare(self, rows: Tensor, answer: list[int]) -> bool:
        return self.decoder.best(rows) == answer
