from __future__ import annotations

import pytest

from metok_vllm.compression.accounting import ModelShape, VisualTokens, account, expected_visual_tokens
from metok_vllm.compression.ratios import to_micro
from metok_vllm.compression.selection import prune_layers
from metok_vllm.compression.tiers import quota, video_tokens

LONGVA_7B = ModelShape(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128)
LONGVA_TOKENS = (144, 36, 9)  # 24 x 24 grid, strides 2, 4, 8


def longva(frames: int, separators: bool = False, delta: float = 0.0) -> VisualTokens:
    return expected_visual_tokens(
        frames,
        5,
        3,
        6,
        LONGVA_TOKENS,
        separators,
        to_micro(0.76),
        stock=144 * frames,
        delta_micro=to_micro(delta),
    )


def test_one_layer_by_hand() -> None:
    shape = ModelShape(layers=2, hidden=8, intermediate=20, heads=4, kv_heads=2, head_dim=2)
    # h = 8, c = 4, m = 20, n = 10: 2 * 10 * (2 * 64 + 2 * 32 + 3 * 160) and 4 * 100 * 8.
    assert shape.linear_flops(10) == 13_440
    assert shape.attention_flops(10, "full") == 3_200
    assert shape.attention_flops(10, "causal") == 1_600
    assert shape.attention_flops(10, "none") == 0
    assert shape.layer_flops(10, "causal") == 15_040
    assert shape.kv_bytes(element_bytes=2) == 16


def test_a_request_by_hand() -> None:
    shape = ModelShape(layers=4, hidden=8, intermediate=20, heads=4, kv_heads=2, head_dim=2)
    visual = VisualTokens(stock=100, encoded=40, after_l1=20, after_l2=10, retained=5)
    a = account(shape, (1, 2, 3), text=6, visual=visual, attention="none", kv_element_bytes=2)
    token = 1344  # linear FLOPs of one token in one layer
    assert a.prefill_flops_stock.total == 4 * 106 * token
    assert a.prefill_flops_stock.visual == 4 * 100 * token
    assert a.prefill_flops.total == (46 + 26 + 16 + 6) * token
    assert a.prefill_flops.visual == (40 + 20 + 10) * token
    assert a.kv_bytes_stock.total == 4 * 106 * 16
    assert a.kv_bytes_stock.visual == 4 * 100 * 16
    assert a.kv_bytes.total == (46 + 11 + 11 + 6) * 16
    assert a.kv_bytes.visual == (40 + 5 + 5) * 16
    assert a.kv_bytes.saved_visual(a.kv_bytes_stock) == pytest.approx(1 - 50 / 400)


@pytest.mark.parametrize(
    ("window", "kept"),
    [((0, 6), [40, 40, 20, 10, 10, 0]), ((1, 4), [0, 40, 20, 10, 0, 0]), ((3, 5), [0, 0, 0, 10, 10, 0])],
)
def test_a_window_keeps_what_is_alive_in_its_layers(window: tuple[int, int], kept: list[int]) -> None:
    shape = ModelShape(layers=6, hidden=8, intermediate=20, heads=4, kv_heads=2, head_dim=2)
    visual = VisualTokens(stock=100, encoded=40, after_l1=20, after_l2=10)
    plain, a = (account(shape, (2, 3, 5), 6, visual, kv_element_bytes=2, window=w) for w in (None, window))
    assert (a.kv_bytes.visual, a.kv_bytes.total) == (sum(kept) * 16, (sum(kept) + 36) * 16)
    assert (a.prefill_flops, a.prefill_flops_stock) == (plain.prefill_flops, plain.prefill_flops_stock)
    assert a.kv_bytes_stock == plain.kv_bytes_stock
    assert plain.kv_bytes.visual == 2 * 40 * 16


def test_what_passes_l3_is_computed_and_kept_from_there_up() -> None:
    shape = ModelShape(layers=6, hidden=8, intermediate=20, heads=4, kv_heads=2, head_dim=2)
    without, some = (VisualTokens(100, 40, 20, 10, retained=5, after_l3=passed) for passed in (0, 3))
    a, b = (account(shape, (1, 2, 4), 6, visual, attention="none", kv_element_bytes=2) for visual in (without, some))
    assert b.prefill_flops.total - a.prefill_flops.total == 2 * 3 * 1344, "two layers from L3 up"
    assert b.kv_bytes.visual - a.kv_bytes.visual == 2 * 3 * 16
    with pytest.raises(ValueError, match="only ever get fewer"):
        VisualTokens(100, 40, 20, 10, retained=5, after_l3=11)


def test_the_papers_figures_hold_together_at_64_frames() -> None:
    """docs/method.md section 5: 64 frames, 200 text tokens, LongVA-7B."""
    linear = account(LONGVA_7B, prune_layers(28), 200, longva(64), attention="none")
    causal = account(LONGVA_7B, prune_layers(28), 200, longva(64), attention="causal")
    assert 100 * linear.prefill_flops.saved(linear.prefill_flops_stock) == pytest.approx(79.5, abs=0.1)
    assert 100 * causal.prefill_flops.saved(causal.prefill_flops_stock) == pytest.approx(81.3, abs=0.1)
    assert 100 * causal.kv_bytes.saved(causal.kv_bytes_stock) == pytest.approx(93.4, abs=0.1)
    # And within a point of what the paper prints.
    assert 100 * causal.prefill_flops.saved(causal.prefill_flops_stock) == pytest.approx(80.6, abs=1)
    assert 100 * causal.kv_bytes.saved(causal.kv_bytes_stock) == pytest.approx(93.5, abs=1)


@pytest.mark.parametrize(("frames", "percent"), [(32, 67), (64, 42), (128, 30)])
def test_visual_tokens_after_stage_one(frames: int, percent: int) -> None:
    visual = longva(frames)
    assert round(100 * visual.encoded / visual.stock) == percent
    assert visual.encoded == video_tokens(quota(frames, 5, 3, 6), LONGVA_TOKENS, separators=False)


def test_visual_kv_kept_is_the_shallow_share_of_stage_one() -> None:
    """docs/method.md section 3: `(L1 / L) * stage-1 ratio`."""
    for frames in (8, 64, 200):
        visual = longva(frames, separators=True)
        a = account(LONGVA_7B, prune_layers(28), 200, visual)
        kept = a.kv_bytes.visual / a.kv_bytes_stock.visual
        assert kept == pytest.approx(3 / 28 * visual.encoded / visual.stock)


def test_every_expected_encoding_has_the_exact_count() -> None:
    for frames in range(1, 300):
        q = quota(frames, 5, 3, 6)
        assert longva(frames, separators=True).encoded == video_tokens(q, LONGVA_TOKENS, separators=True)


def test_retaining_everything_keeps_the_survivors_of_l2() -> None:
    visual = longva(64, delta=1.0)
    assert visual.retained == visual.after_l2 > 0
    assert longva(64, delta=0.5).retained == -(-visual.after_l2 // 2)
    paper = account(LONGVA_7B, prune_layers(28), 200, longva(64))
    balanced = account(LONGVA_7B, prune_layers(28), 200, visual)
    assert balanced.prefill_flops == paper.prefill_flops
    assert balanced.kv_bytes.visual - paper.kv_bytes.visual == 16 * visual.after_l2 * LONGVA_7B.kv_bytes(2)


def test_a_text_request_saves_nothing() -> None:
    a = account(LONGVA_7B, prune_layers(28), 200, VisualTokens(0, 0, 0, 0))
    assert a.prefill_flops == a.prefill_flops_stock
    assert a.prefill_flops.visual == 0
    assert a.kv_bytes.saved(a.kv_bytes_stock) == a.kv_bytes.saved_visual(a.kv_bytes_stock) == 0.0


@pytest.mark.parametrize(
    "tokens", [(9, 5, 6, 3, 0), (9, 5, 3, 4, 0), (9, 5, 4, 3, 4), (9, 5, 4, 3, -1), (-1, 5, 4, 3, 0)]
)
def test_tokens_that_come_back_are_refused(tokens: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="only ever get fewer"):
        VisualTokens(*tokens)
