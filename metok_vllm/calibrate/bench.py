"""From settings to what was seen of them: builds jobs for one model and one choice of questions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from metok_vllm.calibrate.engines import Engines
from metok_vllm.calibrate.jobs import Asked, Counts, Facts, Job, Told, Variant
from metok_vllm.calibrate.measure import NEEDS_VIDEO
from metok_vllm.calibrate.search import Seen
from metok_vllm.calibrate.settings import Setting, kv_groups, kv_tokens, tokens
from metok_vllm.compression.accounting import ModelShape, VisualTokens, account
from metok_vllm.contract.kv_layout import chosen_layers


@dataclass(frozen=True)
class Model:
    """What is calibrated, and how its engine is started."""

    name: str
    mark: str
    plugin: str
    engine: Mapping[str, Any]
    answer_tokens: int
    metok: Mapping[str, Any] = field(default_factory=dict)  # what every server states, beside what is searched
    vllm: str = ""

    @property
    def server(self) -> dict[str, Any]:
        """The method's defaults but for what the user states, whatever lies in the model's folder."""
        return {"profile": "none", **self.metok}


@dataclass(frozen=True)
class Row:
    """One way to answer, measured on one part of the questions."""

    name: str
    seen: Seen


@dataclass
class Bench:
    """The questions with the stock model's answers, and the engines to ask."""

    model: Model
    engines: Engines
    search: tuple[Asked, ...] = ()
    held_out: tuple[Asked, ...] = ()
    discarded: int = 0
    text_tokens: list[int] = field(default_factory=list)  # of the held-out questions' prompts
    stock_tokens: list[int] = field(default_factory=list)
    frames: float = 0.0  # of a video, mean of the held-out questions
    checked: int = 0  # settings that the held-out questions were asked under
    facts: Facts | None = None
    seen: dict[Setting, Seen] = field(default_factory=dict)  # of the presets, on the search's questions

    @property
    def known(self) -> Facts:
        assert self.facts is not None, "nothing has been asked yet"
        return self.facts

    def first_job(self, search: Sequence[Asked], held_out: Sequence[Asked]) -> Job:
        """Everybody's own answer, with the video and without; and the presets, for the held-out questions."""
        held = list(range(len(search), len(search) + len(held_out)))
        variants = [Variant(name="without", with_video=False)]
        if held:
            variants += [
                Variant(name="again", of=held),
                Variant(name="paper", metok={"preset": "paper"}),
                Variant(name="balanced", metok={"preset": "balanced"}),
            ]
        return self._job([*search, *held_out], self.model.server, variants)

    def begin(
        self, search: Sequence[Asked], held_out: Sequence[Asked], most: int, mark: Callable[[], str]
    ) -> list[Row]:
        """Ask the first job's questions and keep, of each part, at most `most` that need their video.

        Args:
            search: what the search sees.
            held_out: what it does not.
            most: questions of each.
            mark: tells the model's mark. vLLM may have fetched its weights only now.

        Returns:
            What stock and the presets do on the held-out questions.
        """
        job = self.first_job(search, held_out)
        result = self.engines.run(job)
        self._mark_again(job, mark())
        self.facts = result.facts
        asked = [
            one.model_copy(update={"stock": stock})
            for one, stock in zip((*search, *held_out), result.stock, strict=True)
        ]
        needs = [told.index for told in result.told["without"] if told.kl >= NEEDS_VIDEO]
        self.discarded = len(asked) - len(needs)
        kept = [i for i in needs if i < len(search)][:most]
        held = [i for i in needs if i >= len(search)][:most]
        self.search, self.held_out = tuple(asked[i] for i in kept), tuple(asked[i] for i in held)
        if not held:
            return []
        counts = {told.index: told.counts for told in result.told["paper"]}
        of_held = [one for one in (counts[i] for i in held) if one is not None]
        self.text_tokens = [one.text for one in of_held]
        self.stock_tokens = [one.stock for one in of_held]
        self.frames = statistics.fmean(one.frames for one in of_held)
        paper, balanced = self.presets()
        rows = [Row("METok off, asked again", self._off(_only(result.told["again"], held), self.stock_tokens))]
        for name, setting in (("paper", paper), ("balanced", balanced)):
            rows.append(Row(name, self._pruned(setting, _only(result.told[name], held))))
            self.seen[setting] = self._pruned(setting, _only(result.told[name], kept))
        return rows

    def _mark_again(self, job: Job, mark: str) -> None:
        """The mark from now on; what was done under the one before is found under this one too."""
        if mark == self.model.mark:
            return
        self.model = replace(self.model, mark=mark)
        self.engines.keep_as(job, job.model_copy(update={"model_mark": mark}))

    def presets(self) -> tuple[Setting, Setting]:
        """`paper` and `balanced`, with the paper's layers scaled to this model."""
        layers = chosen_layers(self.known.layers, None)
        balanced = Setting(layers, self.known.strides, key_events=3, keep_ratio=0.76)
        return replace(balanced, quota="event", decode_retention=0.0), balanced

    def evaluate(self, settings: Sequence[Setting]) -> list[Seen]:
        """The search's questions under settings of one engine."""
        return self._under(settings, self.search)

    def on_held_out(self, settings: Sequence[Setting]) -> list[Seen]:
        """The held-out questions under settings of one engine."""
        self.checked += len(settings)
        return self._under(settings, self.held_out)

    def fewer_frames(self, frames: int) -> Seen:
        """The held-out questions with METok off and so many sampled frames."""
        engine = {**self.model.engine}
        media = dict(engine.get("media_io_kwargs") or {})
        media["video"] = {**media.get("video", {}), "num_frames": frames, "fps": -1}
        job = self._job(self.held_out, self.model.server, [Variant(name="fewer")], {**engine, "media_io_kwargs": media})
        told = self.engines.run(job).told["fewer"]
        visual = [one.prompt_tokens - text for one, text in zip(told, self.text_tokens, strict=True)]
        return self._off(told, visual)

    def _under(self, settings: Sequence[Setting], asked: Sequence[Asked]) -> list[Seen]:
        server = {**self.model.server, **settings[0].server()}
        variants = [Variant(name=one.words(), metok=one.request()) for one in settings]
        result = self.engines.run(self._job(asked, server, variants))
        return [self._pruned(one, result.told[one.words()]) for one in settings]

    def _job(
        self,
        asked: Sequence[Asked],
        server: Mapping[str, Any],
        variants: Sequence[Variant],
        engine: Mapping[str, Any] | None = None,
    ) -> Job:
        return Job(
            model=self.model.name,
            model_mark=self.model.mark,
            plugin=self.model.plugin,
            vllm=self.model.vllm,
            engine=dict(self.model.engine if engine is None else engine),
            server=dict(server),
            answer_tokens=self.model.answer_tokens,
            asked=list(asked),
            variants=list(variants),
        )

    def _pruned(self, setting: Setting, told: Sequence[Told]) -> Seen:
        counts = [one.counts for one in told if one.counts is not None]
        layers = self.known.layers
        return Seen(
            kl=tuple(one.kl for one in told),
            harm=tuple(one.harm for one in told),
            agrees=tuple(one.agrees for one in told),
            tokens=statistics.fmean(tokens(setting, one, layers) for one in counts),
            kv=statistics.fmean(kv_tokens(setting, one, layers) for one in counts),
            flops=_share(counts, "flops"),
            kv_share=_share(counts, "kv_bytes"),
            groups=kv_groups(setting, layers),
        )

    def _off(self, told: Sequence[Told], visual: Sequence[int]) -> Seen:
        """Of a run without METok; its costs are reckoned, not reported."""
        costs = [self._dense(text, now) for text, now in zip(self.text_tokens, visual, strict=True)]
        stock = [self._dense(text, now) for text, now in zip(self.text_tokens, self.stock_tokens, strict=True)]
        return Seen(
            kl=tuple(one.kl for one in told),
            harm=tuple(one.harm for one in told),
            agrees=tuple(one.agrees for one in told),
            tokens=statistics.fmean(visual),
            kv=statistics.fmean(visual),
            flops=sum(flops for flops, _ in costs) / sum(flops for flops, _ in stock),
            kv_share=sum(kv for _, kv in costs) / sum(kv for _, kv in stock),
        )

    def _dense(self, text: int, visual: int) -> tuple[int, int]:
        n = self.known.layers
        nothing = VisualTokens(stock=visual, encoded=0, after_l1=0, after_l2=0)
        shape = ModelShape(**self.known.shape)
        costs = account(shape, (n - 2, n - 1, n), text, nothing, kv_element_bytes=self.known.element_bytes)
        return costs.prefill_flops_stock.total, costs.kv_bytes_stock.total


def _only(told: Sequence[Told], indices: Sequence[int]) -> list[Told]:
    wanted = set(indices)
    return [one for one in told if one.index in wanted]


def _share(counts: Sequence[Counts], name: str) -> float:
    return float(sum(getattr(one, name) for one in counts) / sum(getattr(one, f"{name}_stock") for one in counts))


def stage1_alone(result: Facts) -> Setting:
    """Stage 1 with every event a key event, and nothing pruned in the model."""
    n = result.layers
    return Setting((n - 2, n - 1, n), result.strides)
