"""Qwen3.5 for the oracle: grids, text and positions are Qwen3-VL's; its decoder stays whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.support.oracle import qwen3
from tests.support.oracle.labelled import Labels


def labels(model: Any, pixels: qwen3.Pixels) -> Labels:
    """The text around the video's pairs; the tower adds nothing behind it."""
    return Labels(text=lambda frame, frames: pixels.text[frame])


def answer(
    model: Any, hidden: Tensor, rotary: Tensor, upcoming: int, steps: int, force_tokens: list[int] | None
) -> tuple[list[int], Tensor]:
    """Greedy tokens and log-probabilities [steps, vocabulary], by the model's own layers and caches.

    `hidden`: rows [tokens, D] of the prompt; `rotary`: their positions [3, tokens]; `upcoming`: the first one
    of the answer.
    """
    decoder, cache, tokens, rows = model.model.language_model, None, list[int](), list[Tensor]()
    places = rotary
    for step in range(steps):
        given = decoder(inputs_embeds=hidden[None], position_ids=places[:, None], past_key_values=cache, use_cache=True)
        cache = given.past_key_values
        rows.append(model.lm_head(given.last_hidden_state[0, -1]).float().log_softmax(-1))
        tokens.append(int(rows[-1].argmax()))
        fed = tokens[-1] if force_tokens is None else force_tokens[step]
        hidden = model.get_input_embeddings()(torch.tensor([fed]))
        places = torch.full((3, 1), upcoming + step)
    return tokens, torch.stack(rows)


LAYOUT = replace(qwen3.LAYOUT, labels=labels, encode_pictures=None, answer=answer)
