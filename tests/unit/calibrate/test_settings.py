"""What a setting costs, by hand, in layouts whose blocks come out even."""

from __future__ import annotations

from dataclasses import replace

import pytest

from metok_vllm.calibrate.jobs import Counts
from metok_vllm.calibrate.settings import Setting, kv_groups, kv_tokens, tokens
from metok_vllm.compression.selection import KVLayers

COUNTS = Counts(
    stock=300, encoded=120, after_l1=60, after_l2=40, retained=20, after_l3=0, text=9, frames=4,
    flops=1, flops_stock=2, kv_bytes=1, kv_bytes_stock=2,
)  # fmt: skip
PLAIN = Setting((2, 4, 6), (2, 4, 8))


@pytest.mark.parametrize(
    ("window", "kv", "groups"),
    [
        (None, 2 * 120 + 4 * 20, 3),
        ((0, 6), 2 * 120 + 2 * 60 + 2 * 40, 4),
        ((2, 6), 2 * 60 + 2 * 40, 4),  # nothing visual below L1
        ((0, 2), 2 * 120, 2),  # as without retention, in fewer groups
        ((4, 12), 2 * 40, 3),
    ],
)
def test_kv_is_what_the_windows_layers_hold(window: KVLayers | None, kv: int, groups: int) -> None:
    setting = replace(PLAIN, window=window)
    assert kv_tokens(setting, COUNTS, 12) == pytest.approx(kv / 12)
    assert kv_groups(setting, 12) == groups
    assert tokens(setting, COUNTS, 12) == (2 * 120 + 2 * 60 + 2 * 40) / 12


def test_server_and_request_share_a_setting_out() -> None:
    """Nobody states two rules of where decoding keeps visual tokens."""
    window = replace(PLAIN, window=(1, 5), decode_retention=0.0)
    assert window.server() == {"prune_layers": [2, 4, 6], "kv_layers": [1, 5]}
    assert not {"decode_retention", "final_keep", "window", "layers"} & window.request().keys()
    assert window.profile() == window.server() | window.request()
    assert PLAIN.server() == {"prune_layers": [2, 4, 6]}
    assert PLAIN.request()["decode_retention"] == 1
    assert window.with_all_kv() == PLAIN
    assert window.words() == "layers 2-4-6, strides 2/4/8, KV in layers 1 to 4"
