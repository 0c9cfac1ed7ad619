"""Front end of a METok model: settings, the question, exact placeholder counts. Shared by all model families.

`MetokProcessing` goes in front of a model's own multimodal processor. Whatever decides how many tokens a
video has (settings, aligner) is put under `videos_kwargs`, so that it is part of the video's hash and of no
other item's. The question decides which tokens those are. It goes beside the items (`contract/beside.py`), so
that a video keeps its name whatever is asked about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature
from vllm.inputs import MultiModalInput
from vllm.multimodal.encoder_budget import get_mm_max_toks_per_item
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    TimingContext,
)

from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.contract.admission import CompressedRange, OwnRange, PrunedRange, check_requests, forget_unsent, mark
from metok_vllm.contract.advice import fewer_frames
from metok_vllm.contract.beside import Beside
from metok_vllm.contract.budgets import bytes_per_token, deferral_limit
from metok_vllm.contract.extents import most_positions, too_far
from metok_vllm.contract.fields import EXTENT_FIELD, FRAME_TEXT_FIELD, PIXELS_FIELD, PLAN_FIELD
from metok_vllm.contract.frame_text import FrameText, text_tokens, to_field
from metok_vllm.contract.refusals import refusal, refusing
from metok_vllm.contract.server_choices import ServerChoices, server_choices
from metok_vllm.contract.settings import RequestSettings, resolve_request
from metok_vllm.contract.video_plan import VideoGrid, VideoPlan, plan_video
from metok_vllm.frontend.aligner_inputs import AlignerProcessor
from metok_vllm.frontend.item_kwargs import KEY, SCOPE, frames_of, own_kwargs, stock_kwargs
from metok_vllm.frontend.question import NO_MARKERS, TurnMarkers, fitting_markers, last_user_text, templates_markers
from metok_vllm.frontend.question_rows import question_rows
from metok_vllm.frontend.text_behind import with_text_behind
from metok_vllm.log import metok_logger

logger = metok_logger(__name__)


class _Dummy(str):
    """What vLLM's own inputs state, by which it sizes the encoder cache; no request can state it."""


class MetokProcessing(BaseMultiModalProcessor[Any]):
    """Mixed in before a model's processor class."""

    pool_style: PoolStyle
    video_token: str
    _has_warned = False
    _has_warned_of_rows = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._admission = check_requests()

    # --- what a family states ---

    def video_grid(self, frames: int, fields: Mapping[str, Any], item: int) -> VideoGrid:
        """What the tower will make of a video.

        Args:
            frames: of the video.
            fields: what the stock processor has made of all videos.
            item: which of them this is.
        """
        raise NotImplementedError

    def stock_video_tokens(self, grid: VideoGrid) -> int:
        """Visual tokens that the stock model takes for a video."""
        raise NotImplementedError

    def video_extent(self, grid: VideoGrid, fields: Mapping[str, Any], item: int) -> float | None:
        """Positions that a video takes on its longest rotary axis, METok on or off.

        None where a token takes one. Arguments as of `frame_text`.
        """
        return None

    allowed_kwargs: tuple[str, ...] = ()
    """Keys of `mm_processor_kwargs` that a request may state beside METok's own. No others: some reshape what
    the tower gets, and stock vLLM's worker ends on them.
    """

    def check_kwargs(self, kwargs: Mapping[str, object]) -> None:
        """Refuse values of `allowed_kwargs` that the stock processor or the tower would fail on.

        Raises:
            ValueError: in one sentence.
        """

    def aligner_frames(self, videos: Any, grid: VideoGrid, fields: Mapping[str, Any], item: int) -> Any:
        """Of a video's frames [F, ...] those that a dual tower looks at: one for each of the grid's T.

        Args:
            videos: the request's, as vLLM has parsed them.
            grid: what `video_grid` gave.
            fields: as of `video_grid`.
            item: likewise.
        """
        return frames_of(videos, item)

    def text_behind(self, frames: int, metadata: Mapping[str, Any]) -> str:
        """What the model was trained to read right behind a video, as when its frames are; mostly nothing.

        Args:
            frames: of the video.
            metadata: what vLLM's loaders say of it (`vllm/multimodal/video.py: create_hf_metadata`).
        """
        return ""

    reads_text_behind = False
    """Whether `text_behind` is to be asked."""

    def frame_text(self, grid: VideoGrid, fields: Mapping[str, Any], item: int) -> Sequence[FrameText]:
        """Text that labels the frames inside the video's placeholders, METok on or off: one entry a frame.

        Empty where the model's videos have none. Arguments as of `video_grid`, and what that gave.
        """
        return ()

    def video_placeholder(self, target: Sequence[int]) -> Sequence[int]:
        """What stands in a prompt for one visual token of a video, as token ids.

        Args:
            target: what stands there for the whole video before; most models read that as one token, too.
        """
        return target

    stock_lays_text = False
    """Whether the stock processor writes `frame_text` into the prompt. METok off, it does so here too."""

    # --- the server ---

    @cached_property
    def _server(self) -> ServerChoices:
        return server_choices(self.info.get_hf_config())

    @cached_property
    def _aligner_processor(self) -> AlignerProcessor:
        assert self._server.tower is not None
        return AlignerProcessor(self._server.tower)

    @cached_property
    def _markers(self) -> tuple[TurnMarkers, ...]:
        template = self._server.settings.chat_template
        return templates_markers(self.info.get_tokenizer(), self.info.ctx.model_config, template)

    @cached_property
    def _not_text(self) -> tuple[str, ...]:
        """Strings in a prompt that the user did not write."""
        processor, tokenizer = self.info.get_hf_processor(), self.info.get_tokenizer()
        placeholders = {getattr(processor, name, None) for name in ("image_token", "video_token")}
        return tuple(sorted({*placeholders, *tokenizer.all_special_tokens} - {None}, key=len, reverse=True))

    @cached_property
    def _encoder_tokens(self) -> int:
        """Tokens of the longest item that the encoder cache takes, as vLLM sizes it.

        As `MultiModalBudget` does (vllm/multimodal/encoder_budget.py), which wants vLLM's whole
        configuration. It processes a dummy of every kind of item, so it is asked for only where a request may
        not fit.
        """
        with_embeddings = self.info.ctx.model_config.get_multimodal_config().enable_mm_embeds
        limits = self.info.allowed_mm_limits
        items = [name for name in self.info.supported_mm_limits if with_embeddings or limits.get(name, 0) > 0]
        profiled = get_mm_max_toks_per_item(self, dict.fromkeys(items, 1), None)
        return max(self._server.encoder_tokens, *profiled.values())

    # --- one request ---

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Dummy inputs with METok off: the most tokens that a request may ask for."""
        return replace(super().get_dummy_inputs(*args, **kwargs), hf_processor_mm_kwargs={KEY: _Dummy("off")})

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        stated = kwargs.pop(KEY, None)
        with refusing("setting"):
            settings = resolve_request(self._server.settings, stated)
        if others := ", ".join(map(repr, sorted(set(kwargs) - set(self.allowed_kwargs)))):
            # They reshape what the tower gets: with "do_resize" off its worker fails, and the engine with it.
            may = (
                "'metok' alone" if not self.allowed_kwargs else f"{KEY!r}, {', '.join(map(repr, self.allowed_kwargs))}"
            )
            raise refusal("setting", f"METok (mm_processor_kwargs): a request may state {may}, not {others:.80}.")
        with refusing("setting"):
            self.check_kwargs(kwargs)
        videos = inputs.mm_data_items.get("video")
        aligner, question = "none", ""
        if videos is not None and len(videos):
            if isinstance(videos, EmbeddingItems | DictEmbeddingItems):
                raise refusal(
                    "embeddings", "METok: precomputed video embeddings are not supported; send the video itself."
                )
            if settings is not None:
                aligner = self._aligner(settings)
                if aligner != "none":  # what it does not read need not tell results apart
                    question = settings.query if settings.query is not None else self._question(inputs.prompt)
            kwargs[SCOPE] = {KEY: self._hashed(settings, aligner)}
        self._check_places(inputs)
        inputs = replace(inputs, hf_processor_mm_kwargs=kwargs)
        if isinstance(stated, _Dummy):
            return self._made(inputs, timing_ctx)
        if self.reads_text_behind and videos is not None:
            inputs = replace(inputs, prompt=self._with_text_behind(inputs.prompt, videos))
        result = self._made(inputs, timing_ctx)
        pruned = settings is not None and settings.stages == 3
        try:
            self._check_prompt(result, pruned)
        except ValueError:
            forget_unsent(self._admission.caches, result)
            raise
        length = len(result["prompt_token_ids"])
        room = int(self.info.ctx.model_config.max_model_len) - length
        if room <= 0 or not self._is_in_vocabulary(result["prompt_token_ids"]):
            forget_unsent(self._admission.caches, result)  # vLLM refuses it by itself, and later
        handed = self._admission.unsent.hand_out(self._admission.caches, result, room)
        if settings is None:
            mark(result, OwnRange, None, handed)
            return result
        beside = self._beside(length, pruned, aligner, question)
        if pruned and settings.score_rows == "question":
            beside = replace(beside, rows=self._question_rows(result, videos, settings.query))
        mark(result, PrunedRange if pruned else CompressedRange, beside, handed)
        return result

    def _made(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """The request's items, each with its data unless the engine has been sent that."""
        if inputs.cache is not None:
            self._admission.caches.add(inputs.cache)
        self._check_named(inputs)
        result = super().apply(inputs, timing_ctx)
        relied_on = self._admission.unsent.relied_on(result)
        if not relied_on:
            return result
        # Another request has their data, and may be dropped or come later than this one: make them again.
        forget_unsent(self._admission.caches, result)
        for name in relied_on:
            for cache in self._admission.caches:
                cache.invalidate(name)
        self._check_named(inputs)
        return super().apply(inputs, timing_ctx)

    def _check_named(self, inputs: ProcessorInputs) -> None:
        """Refuse an item that is named by a `uuid` alone where its data is not there."""
        missing = {
            modality: [i for i in range(len(items)) if items.get(i) is None]
            for modality, items in inputs.mm_data_items.items()
        }
        if not any(missing.values()):
            return
        if inputs.cache is None:
            raise refusal(
                "uuid",
                "METok: this server keeps no images and videos (--mm-processor-cache-gb 0), so a uuid alone names "
                "nothing; send the data with it.",
            )
        hashes = self._get_mm_hashes(inputs)
        for modality, indices in missing.items():
            for i in indices:
                if not inputs.cache.is_cached_item(hashes[modality][i]):
                    uuid: Any = (inputs.mm_uuid_items or {})[modality][i]
                    settings = " with these settings" if modality == "video" else ""
                    raise refusal(
                        "uuid",
                        f"METok: this server has no {modality} of uuid {str(uuid)!r:.80}{settings}, or has it no "
                        "longer; send the data with it once more.",
                    )

    def _aligner(self, settings: RequestSettings) -> str:
        aligner = self._server.aligner if settings.aligner == "auto" else settings.aligner
        if aligner == "dual-tower" and self._server.tower is None:
            raise refusal("setting", "METok (mm_processor_kwargs): this server has no dual tower; use another aligner.")
        return aligner

    def _hashed(self, settings: RequestSettings | None, aligner: str) -> dict[str, object]:
        """All that decides what is made of the request's videos in this process, as plain data.

        The question and its rows go beside them.
        """
        if settings is None:
            return {"off": True}
        return {**settings.model_dump(mode="json", exclude={"query", "score_rows"}), "aligner": aligner}

    def _beside(self, prompt_tokens: int, pruned: bool, aligner: str, question: str) -> Beside:
        # The aligner "embedding" reads the ids; so does the status page, where the operator lets it show
        # questions of pruned requests.
        needed = aligner == "embedding" or (pruned and self._server.settings.status_shows_questions)
        ids = self.info.get_tokenizer().encode(question, add_special_tokens=False) if needed else []
        windows = None
        if aligner == "dual-tower":
            windows = tuple(map(tuple, self._aligner_processor.windows(question).tolist()))
        return Beside(prompt_tokens, pruned, tuple(ids), windows)

    def _question_rows(self, result: MultiModalInput, videos: Any, query: str | None) -> tuple[int, ...]:
        """Positions of the question's own tokens in the processed prompt; empty where they cannot be told."""
        ranges = result["mm_placeholders"]
        if not ranges.get("video"):
            return ()
        ids, tokenizer = result["prompt_token_ids"], self.info.get_tokenizer()
        items = sorted((one.offset, one.length) for of_kind in ranges.values() for one in of_kind)
        markers = fitting_markers(tokenizer.decode(list(ids), skip_special_tokens=False), self._markers)
        # What the model reads behind a video is not the user's.
        own = [self._text_behind(videos, i) for i in range(len(videos))] if self.reads_text_behind else []
        last = max(one.offset + one.length for one in ranges["video"])
        rows = question_rows(ids, items, last, tokenizer, markers, (*own, *self._not_text), query)
        if not rows and not self._has_warned_of_rows:
            self._has_warned_of_rows = True
            logger.warning(
                "METok: which of a prompt's tokens are the question's could not be told, so all text behind its videos "
                "scores them, as with score_rows 'text'. This is said once."
            )
        return rows

    def _question(self, prompt: Sequence[int]) -> str:
        text = self.info.get_tokenizer().decode(list(prompt), skip_special_tokens=False)
        markers = fitting_markers(text, self._markers)
        if markers is None:
            markers = NO_MARKERS
            if self._markers and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "METok: a prompt was not rendered with this server's chat template, so all its text is taken for "
                    "the question; a request can state its question as 'query'. This is said once."
                )
        return last_user_text(text, markers, self._not_text)

    def _with_text_behind(self, prompt: Sequence[int], videos: Any) -> list[int]:
        """The prompt with `text_behind` after the place of each video."""
        processor: Any = self.info.get_hf_processor()
        texts = [self._text_behind(videos, i) for i in range(len(videos))]
        return with_text_behind(prompt, processor.video_token_id, texts, self.info.get_tokenizer())

    def _text_behind(self, videos: Any, item: int) -> str:
        if videos.get(item) is None:
            raise refusal(
                "uuid",
                "METok: this model reads when a video's frames are, which a uuid alone does not say; send the data "
                "with it.",
            )
        metadata = videos.metadata[item] if isinstance(videos.metadata, list) else videos.metadata
        return self.text_behind(videos.get_num_frames(item), metadata or {})

    def _is_in_vocabulary(self, ids: Sequence[int]) -> bool:
        """As vLLM will ask (vllm/renderers/base.py: `validate_token_ids`)."""
        most: Any = self.info.get_tokenizer().max_token_id
        return not ids or (min(ids) >= 0 and max(ids) <= max(most, self.info.ctx.model_config.get_vocab_size() - 1))

    def _check_places(self, inputs: ProcessorInputs) -> None:
        """Refuse a prompt without a place for each of its items: cut short (`truncate_prompt_tokens`), or
        written by hand. vLLM takes it for a fault of its own, an assertion.
        """
        processor = self.info.get_hf_processor()
        text: str | None = None
        for modality, items in inputs.mm_data_items.items():
            placeholder = getattr(processor, f"{modality}_token", None)
            if placeholder is None or not len(items):
                continue
            if text is None:
                text = self.info.get_tokenizer().decode(list(inputs.prompt), skip_special_tokens=False)
            if text.count(placeholder) < len(items):
                raise ValueError("METok: the prompt has lost the place of a video or an image; do not truncate it.")

    def _check_prompt(self, result: MultiModalInput, is_pruned: bool) -> None:
        """Refuse what could never be served, while it still is a clear answer to the client."""
        config = self.info.ctx.model_config
        ranges = result["mm_placeholders"].get("video", [])
        length = len(result["prompt_token_ids"])
        if not ranges:
            return
        longest = max(r.get_num_embeds() for r in ranges)
        # Of a prompt beyond max_model_len vLLM says so itself, and nothing else would help.
        if length < config.max_model_len and longest > self._server.encoder_tokens and longest > self._encoder_tokens:
            raise refusal(
                "video",
                f"METok: a video of {longest} tokens does not fit the encoder cache of {self._encoder_tokens}: start "
                f"the server with --max-num-batched-tokens {longest} or more, or {fewer_frames()}.",
            )
        if not is_pruned:
            return
        last = max(r.offset + r.length for r in ranges)
        behind = [r for items in result["mm_placeholders"].values() for r in items if r.offset >= last]
        if sum(r.length for r in behind) == length - last:
            raise refusal(
                "no_text",
                "METok: a prompt needs text behind its last video, since that text decides what is kept of it.",
            )
        if self._server.step_tokens < length < config.max_model_len:
            limit = deferral_limit(config)
            needed = length * bytes_per_token(config)
            if needed > limit:
                raise refusal(
                    "deferral",
                    f"METok: a prompt of {length} tokens takes {needed} bytes to defer and max_deferred_bytes is {limit}: "
                    "start the server with more, by --additional-config "
                    f"""'{{"metok": {{"max_deferred_bytes": {needed}}}}}', or {fewer_frames()}.""",
                )

    # --- the items ---

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        stated = own_kwargs(hf_kwargs)
        processed = super()._apply_hf_processor_main(mm_items, stock_kwargs(hf_kwargs))
        videos = mm_items.get("video")
        if stated is not None and videos is not None and len(videos):
            processed.update(self._video_fields(videos, processed, stated))
        return processed

    def _video_fields(self, videos: Any, processed: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
        settings = None if stated.get("off") else RequestSettings.model_validate(stated)
        aligner = "none" if settings is None else settings.aligner
        grids = [self.video_grid(len(frames_of(videos, i)), processed, i) for i in range(len(videos))]
        texts = [self.frame_text(grid, processed, i) for i, grid in enumerate(grids)]
        if settings is None and self.stock_lays_text:
            texts = [() for _ in grids]  # all placeholders are visual
        with refusing("setting"):
            plans = [
                plan_video(grid, self.pool_style, self.stock_video_tokens(grid), settings, aligner, text_tokens(text))
                for grid, text in zip(grids, texts, strict=True)
            ]
        fields: dict[str, Any] = {PLAN_FIELD: torch.stack([plan.to_tensor() for plan in plans])}
        if any(texts):
            fields[FRAME_TEXT_FIELD] = [to_field(text) for text in texts]
        extents = [self.video_extent(grid, processed, i) for i, grid in enumerate(grids)]
        if stated_extents := [extent for extent in extents if extent is not None]:
            most = most_positions(self.info.ctx.model_config)
            for extent in stated_extents:
                if not extent <= most:  # what is not a number neither
                    raise refusal("video", f"METok: the request has a video {too_far(extent, most)}")
            fields[EXTENT_FIELD] = torch.tensor([int(extent) for extent in stated_extents])
        if aligner == "dual-tower":
            dtype: Any = self.info.ctx.model_config.dtype
            seen = (self.aligner_frames(videos, grid, processed, i) for i, grid in enumerate(grids))
            fields[PIXELS_FIELD] = [self._aligner_processor.pixels(frames, dtype) for frames in seen]
        return fields

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        stocks = stock_kwargs(hf_processor_mm_kwargs)
        stock = super()._get_mm_fields_config(hf_inputs, stocks)  # type: ignore[safe-super]  # a mixin
        return {
            **stock,
            PLAN_FIELD: MultiModalFieldConfig.batched("video", keep_on_cpu=True),
            FRAME_TEXT_FIELD: MultiModalFieldConfig.batched("video", keep_on_cpu=True),
            EXTENT_FIELD: MultiModalFieldConfig.batched("video", keep_on_cpu=True),
            PIXELS_FIELD: MultiModalFieldConfig.batched("video"),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        # A mixin: the family's own class comes next in the method resolution order.
        stocks = stock_kwargs(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, stocks, out_mm_kwargs)  # type: ignore[safe-super]

        def placeholders(stock: Any) -> Any:
            def replacement(item_idx: int) -> Any:
                data: Any = out_mm_kwargs["video"][item_idx][PLAN_FIELD].data
                plan = VideoPlan.from_tensor(data)
                if self.stock_lays_text and not plan.compressed:
                    return stock.replacement(item_idx)
                return [*self.video_placeholder(stock.target)] * plan.tokens

            return replacement

        return [
            PromptReplacement(modality="video", target=update.target, replacement=placeholders(update))
            if update.modality == "video"
            else update
            for update in updates
        ]
