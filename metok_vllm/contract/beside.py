"""What the front end tells the engine of a request with pruned videos, beside the videos' items.

Two things belong to the request and not to its videos. The **question**: with it in an item, the item's
name in vLLM's caches would change with every question, and a video could not be asked about again by its
`uuid` alone. And the **length of the prompt**: beam search sends every step as a new prompt, at its end the
answer so far, and an answer's tokens score nothing (docs/method.md section 2.2).

It travels in `SamplingParams.extra_args` (vllm/sampling_params.py), which vLLM keeps for plugins. In the
front end it hangs on the places of the items (`contract/admission.py`): vLLM passes those on as they are,
from step to step of a beam search too. The scheduler turns it back into fields of the items and into a prompt
with an answer begun, so the worker finds what it would find if the request had come in one piece.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
)

from metok_vllm.contract.fields import FRAME_TEXT_FIELD, PLAN_FIELD, QUESTION_FIELD, ROWS_FIELD, WINDOWS_FIELD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

KEY = "metok"


class Carried(dict[str, Any]):
    """What stands under `KEY`, told from what a client has put there by its type."""


@dataclass(frozen=True)
class Beside:
    """What belongs to one request and to none of its items.

    Attributes:
        prompt_tokens: length of the prompt, placeholders included.
        pruned: whether its videos are pruned, or compressed by stage 1 alone.
        question: ids of the question's tokens for the language model; empty where nothing reads them.
        windows: the question in the windows of a dual tower's text side, each of equal length; None where the
            aligner is another.
        rows: positions of the tokens whose attention scores (`score_rows`); empty where all text does.
        keep_answer: the name under which the scheduler keeps the answer for the HTTP server; empty where
            nobody will ask for it.
    """

    prompt_tokens: int
    pruned: bool = True
    question: tuple[int, ...] = ()
    windows: tuple[tuple[int, ...], ...] | None = None
    rows: tuple[int, ...] = ()
    keep_answer: str = ""

    def put(self, params: SamplingParams) -> None:
        """Hang it on a request's parameters. The caller's own dictionary is left as it is."""
        carried = Carried(
            prompt_tokens=self.prompt_tokens,
            pruned=self.pruned,
            question=list(self.question),
            windows=None if self.windows is None else [list(window) for window in self.windows],
            rows=list(self.rows),
            keep_answer=self.keep_answer,
        )
        params.extra_args = {**(params.extra_args or {}), KEY: carried}

    @classmethod
    def of(cls, params: Any) -> Beside | None:
        """What hangs on parameters, as they reach the engine; None where nothing does."""
        found = (getattr(params, "extra_args", None) or {}).get(KEY)
        if found is None:
            return None
        windows = found["windows"]
        return cls(
            found["prompt_tokens"],
            found["pruned"],
            tuple(found["question"]),
            None if windows is None else tuple(tuple(window) for window in windows),
            tuple(found["rows"]),
            found["keep_answer"],
        )

    def fields(self) -> dict[str, torch.Tensor]:
        """The fields that a pruned video's item gets of it."""
        fields = {QUESTION_FIELD: torch.tensor([len(self.question), *self.question], dtype=torch.int64)}
        if self.windows is not None:
            fields[WINDOWS_FIELD] = torch.tensor(self.windows, dtype=torch.int64)
        if self.rows:
            fields[ROWS_FIELD] = torch.tensor([len(self.rows), *self.rows], dtype=torch.int64)
        return fields


def stated_by_client(params: Any) -> bool:
    """Whether somebody else has put something under METok's key."""
    found = (getattr(params, "extra_args", None) or {}).get(KEY)
    return found is not None and not isinstance(found, Carried)


def take_back(params: Any) -> None:
    """Remove what an earlier request with the same parameters has left."""
    if KEY in (getattr(params, "extra_args", None) or {}):
        params.extra_args = {key: value for key, value in params.extra_args.items() if key != KEY} or None


def put_together(request: Request) -> None:
    """Make a request what it would be had it come in one piece, in the engine's process.

    Its videos' items get their fields. What follows the prompt of a pruned request becomes the answer so far,
    as vLLM itself resumes a request that it has preempted. Where stage 1 alone compresses, an answer is a
    prompt like any other, and the prefix cache serves it: by the names that the videos have now. Does nothing
    for a request that nothing travels with.
    """
    beside = Beside.of(request.sampling_params)
    if beside is None:
        return
    request.mm_features = with_fields(request.mm_features, beside.fields())
    if not beside.pruned:
        request.block_hashes = []  # made of the names that the items came with (vllm/v1/request.py)
        request.update_block_hashes()
        return
    begun = request.num_prompt_tokens - beside.prompt_tokens
    if begun > 0:
        assert request.prompt_token_ids is not None
        assert request.sampling_params is not None
        request._output_token_ids.extend(request.prompt_token_ids[beside.prompt_tokens :])
        request.prompt_token_ids = request.prompt_token_ids[: beside.prompt_tokens]
        request.num_prompt_tokens = beside.prompt_tokens
        request.max_tokens += begun
        params = request.sampling_params.clone()
        params.max_tokens = request.max_tokens
        request.sampling_params = params


def with_fields(
    features: Sequence[MultiModalFeatureSpec], fields: dict[str, torch.Tensor]
) -> list[MultiModalFeatureSpec]:
    """Features whose videos have these fields, under names of their own in the encoder's cache.

    A video compresses differently by another question, so the name tells them apart. It tells plans and
    the text of frames apart as well: two files that a client calls by one `uuid` may be of different lengths.
    Which rows score is no matter of the encoder.
    The items themselves stay as they are: a cache holds them.
    """
    plain = {name: _elem(name, data) for name, data in fields.items()}
    question = hashlib.sha256()
    for data in (data for field, data in fields.items() if field != ROWS_FIELD):
        question.update(f"{tuple(data.shape)}".encode() + data.numpy().tobytes())
    found: list[MultiModalFeatureSpec] = []
    for feature in features:
        item: Any = feature.data
        plan = item.get(PLAN_FIELD) if feature.modality == "video" and item is not None else None
        if plan is None or not isinstance(plan.data, torch.Tensor):
            found.append(feature)
            continue
        name = question.copy()
        name.update(plan.data.numpy().tobytes())
        text = item.get(FRAME_TEXT_FIELD)
        if text is not None and isinstance(text.data, torch.Tensor) and text.data.dtype == torch.int64:
            name.update(text.data.numpy().tobytes())
        found.append(
            replace(
                feature,
                data=MultiModalKwargsItem({**item, **plain}),
                identifier=f"{feature.identifier}/{name.hexdigest()[:32]}",
            )
        )
    return found


def _elem(name: str, data: torch.Tensor) -> MultiModalFieldElem:
    """As `frontend/processing.py` has it: the windows go to the tower, all else stays on the host."""
    return MultiModalFieldElem(data=data, field=MultiModalBatchedField(keep_on_cpu=name != WINDOWS_FIELD))
