"""One setting that is tried: what a server is started with and what its requests state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from metok_vllm.calibrate.jobs import Counts
from metok_vllm.compression.selection import KVLayers, PruneLayers
from metok_vllm.contract.kv_layout import block_multiples, layers_by_kind
from metok_vllm.contract.kv_spec import AFTER_L1, AFTER_L2, EVERY_TOKEN, RELEASED, TEXT, TEXT_AND_RETAINED

Strides = tuple[int, int, int]


@dataclass(frozen=True)
class Setting:
    """METok's dials as far as calibration turns them; the rest are the defaults."""

    layers: PruneLayers
    strides: Strides
    events: int = 5
    key_events: int = 5
    keep_ratio: float = 1.0
    quota: str = "video"
    score_rows: str = "text"
    frame_smoothing: float = 0.0
    decode_retention: float = 1.0
    final_keep: float = 0.0
    window: KVLayers | None = None
    """The setting `kv_layers`; `decode_retention` and `final_keep` say nothing then."""

    def server(self) -> dict[str, Any]:
        """What the server states: settings alike in this share an engine."""
        return {"prune_layers": list(self.layers), **({"kv_layers": list(self.window)} if self.window else {})}

    def request(self) -> dict[str, Any]:
        """What a request states: all that is not the server's."""
        not_its = {"layers", "window"} | ({"decode_retention", "final_keep"} if self.window else set())
        stated = {key: value for key, value in vars(self).items() if key not in not_its}
        return {**stated, "strides": list(self.strides)}

    def profile(self) -> dict[str, Any]:
        """What a profile states."""
        return {**self.server(), **self.request()}

    def with_all_kv(self) -> Setting:
        """The same with the KV of all that is retained, while decoding: prefill is the same."""
        return replace(self, window=None, decode_retention=1.0)

    def words(self) -> str:
        """For a table: what differs from one setting to the next."""
        parts = [f"layers {'-'.join(map(str, self.layers))}", f"strides {'/'.join(map(str, self.strides))}"]
        if self.keep_ratio < 1:
            parts.append(f"keep {self.keep_ratio:g}")
        if self.events != 1 and self.key_events < self.events:
            parts.append(f"key events {self.key_events} of {self.events}")
        if self.score_rows != "text":
            parts.append("question rows")
        if self.frame_smoothing:
            parts.append(f"smoothing {self.frame_smoothing:g}")
        if self.window:
            parts.append(f"KV in layers {self.window[0]} to {self.window[1] - 1}")
        elif self.decode_retention < 1:
            parts.append(f"retention {self.decode_retention:g}")
        return ", ".join(parts)


def unseen_from(layer: int, finest: int) -> Setting:
    """No visual token from `layer` on, and all of them before it, as many as the stock model has."""
    layers = (layer - 2, layer - 1, layer)
    return Setting(layers, (finest, finest, finest), events=1, key_events=1)


def with_strides(setting: Setting, strides: Strides) -> Setting:
    """One stride for all frames needs no events: a separator follows each."""
    events = 1 if strides[0] == strides[2] else 5
    return replace(setting, strides=strides, events=events, key_events=events)


def tokens(setting: Setting, counts: Counts, layers: int) -> float:
    """Visual tokens that the model computes, mean over its layers."""
    l1, l2, l3 = setting.layers
    computed = l1 * counts.encoded + (l2 - l1) * counts.after_l1 + (l3 - l2) * counts.after_l2
    return (computed + (layers - l3) * counts.after_l3) / layers


def kv_tokens(setting: Setting, counts: Counts, layers: int) -> float:
    """Visual tokens that hold KV while decoding, mean over the layers, as vLLM allocates them: blocks of all
    groups are as large as the largest, so a layout that does not come out even pays for what it leaves empty.
    """
    by_kind = layers_by_kind(layers, setting.layers, setting.window)
    sides = block_multiples(by_kind)
    widest = max(count * sides[kind] for kind, count in by_kind.items() if count)
    held = {
        **{EVERY_TOKEN: counts.encoded, TEXT_AND_RETAINED: counts.retained, TEXT: counts.after_l3},
        **{RELEASED: 0, AFTER_L1: counts.after_l1, AFTER_L2: counts.after_l2},
    }
    return sum(held[kind] * widest / sides[kind] for kind, count in by_kind.items() if count) / layers


def kv_groups(setting: Setting, layers: int) -> int:
    """KV cache groups of the engine, each of which a decode step pays for."""
    return sum(count > 0 for count in layers_by_kind(layers, setting.layers, setting.window).values())
