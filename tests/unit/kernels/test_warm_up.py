"""What the warm-up compiles is what is compiled ahead of time, and what the operations launch at any size."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metok_kernels.launch import Launch, recorded_launches
from metok_kernels.specialisation import Key
from metok_kernels.variants import IN_USE, Model, launches

from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.compression.tiers import TierQuota
from metok_vllm.worker import ops
from metok_vllm.worker import warm_up as module
from metok_vllm.worker.dense_attention import DenseAttention
from metok_vllm.worker.warm_up import ModelShapes, WarmUp, warm_up
from tests.support.kernels.common import few_examples

SMALL = ModelShapes(hidden=48, heads=6, kv_heads=2, head_dim=16, dtype=torch.float32, style=PoolStyle("bilinear"))


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.VARIABLE, "triton")


@pytest.fixture
def unrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are checked and recorded, and nothing runs."""
    monkeypatch.setattr(Launch, "_start", lambda launch, device: None)


def shapes_of(model: Model, dtype: torch.dtype) -> ModelShapes:
    style = PoolStyle(model.mode, model.separators)
    return ModelShapes(
        model.hidden, model.heads, model.kv_heads, model.head_dim, dtype, style, model.levels * model.hidden, model.axes
    )  # fmt: skip


@pytest.mark.usefixtures("unrun")
@pytest.mark.parametrize(("model", "dtype"), IN_USE, ids=lambda value: getattr(value, "name", str(value)))
def test_it_compiles_what_is_compiled_ahead_of_time(model: Model, dtype: torch.dtype, device: torch.device) -> None:
    compiled_ahead = {launch.key for launch in launches(model, dtype)}
    assert warm_up(shapes_of(model, dtype), device).variants == compiled_ahead


def test_it_covers_every_kernel_and_says_so(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module.logger, "info", lambda line, *values: lines.append(line % values))
    done = warm_up(SMALL, device)
    assert len({key.kernel for key in done.variants}) == 11
    assert 0 < done.seconds < 600
    assert lines == [f"METok: {len(done.variants)} kernel variants are ready, after {done.seconds:.1f} seconds"]


def test_stage_1_alone_compiles_what_it_runs_and_no_more(device: torch.device) -> None:
    model = SimpleNamespace(pool_style=SMALL.style, extra_channels=SMALL.hidden)
    alone = warm_up(ModelShapes.of_stage_1(model, SMALL.hidden, SMALL.dtype), device).variants
    names = {key.kernel for key in alone}
    every = warm_up(replace(SMALL, extra_channels=SMALL.hidden), device).variants
    assert len(names) > 1
    assert alone == {key for key in every if key.kernel in names}
    assert not any("deep" in name or "score" in name or "select" in name for name in names)


def test_stage_1_with_extra_channels_compiles_nothing_later(device: torch.device) -> None:
    """Similarities read part of wider rows then, and pooling reads all of them."""
    wide = replace(SMALL, extra_channels=2 * SMALL.hidden)
    done = warm_up(wide, device)
    features = torch.zeros(6, 3, 5, 3 * SMALL.hidden, device=device)
    tiers = torch.tensor([0, 1, 2, 2, 2, 2], device=device)
    with recorded_launches() as seen:
        ops.event_similarity(features[..., : SMALL.hidden].flatten(1, 2))
        event, separator = torch.zeros_like(tiers), torch.zeros(3 * SMALL.hidden, device=device)
        ops.pool_video(features, tiers, (1, 2, 3), TierQuota(1, 1, 1, 4), SMALL.style, separator, event)
    assert seen
    assert set(seen) <= done.variants


def test_rotary_positions_of_three_axes_compile_nothing_later(device: torch.device) -> None:
    """A step's own are part of a longer buffer; those of a deferred prompt stand alone."""
    done = warm_up(replace(SMALL, axes=3), device)
    buffer = torch.arange(3 * 34, device=device).view(3, 34)
    hidden, index = torch.zeros(11, SMALL.hidden, device=device), torch.tensor([1, 4, 10], device=device)
    for positions in (buffer[:, :11], buffer[:, 3:14], buffer[:, :11].contiguous()):
        with recorded_launches() as seen:
            rows = ops.gather(index, hidden, hidden.clone(), positions)[2]
        assert torch.equal(rows, positions[:, index])
        assert seen
        assert set(seen) <= done.variants


def test_the_cache_update_of_each_deep_layer_sees_all_layouts_and_writes_nothing(device: torch.device) -> None:
    """vLLM's own kernel may be compiled for each: strides and slots at multiples of 16 bytes, or not."""
    seen: list[tuple[Any, ...]] = []

    class Backend:
        def do_kv_cache_update(self, layer: Any, key: Any, value: Any, cache: Any, slots: torch.Tensor) -> None:
            assert key.shape == value.shape == (slots.shape[0], SMALL.kv_heads, SMALL.head_dim)
            assert (slots == -1).all()
            seen.append((cache, key.stride(0), value.stride(0), slots.data_ptr() % 16))

    layers = tuple(SimpleNamespace(impl=Backend(), kv_cache=index) for index in range(2))
    module._kv_writes(replace(SMALL, deep_layers=layers), device)
    alone = SMALL.kv_heads * SMALL.head_dim
    strides = alone + (SMALL.heads + SMALL.kv_heads) * SMALL.head_dim, alone
    assert sorted(seen) == sorted(itertools.product(range(2), strides, strides, (0, 8)))


def test_dense_attention_runs_in_all_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    attention = ops.causal_attention

    def noted(query: Any, key: Any, value: Any, lengths: Any, starts: Any, longest: int, *rest: Any) -> None:
        assert starts.tolist() == [0, *itertools.accumulate(lengths)]
        assert starts.dtype == torch.int32
        assert longest == max(lengths)
        assert sum(lengths) == len(query) == len(key)
        seen.append((key.stride(0), value.stride(0)))
        attention(query, key, value, lengths, starts, longest, *rest)

    monkeypatch.setattr(ops, "causal_attention", noted)
    layer = SimpleNamespace(dense=DenseAttention("CPU_ATTN"))
    module._attention(replace(SMALL, deep_layers=(layer, layer)), torch.device("cpu"))
    assert len(set(seen)) == len(seen) == 4


def test_a_cpu_with_torch_operations_has_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.VARIABLE, "auto")
    monkeypatch.setattr(module, "logger", None)
    for operation in ("scores", "smooth", "select", "gather", "event_similarity", "pool_video"):
        monkeypatch.setattr(ops, operation, None)
    assert warm_up(SMALL, torch.device("cpu")) == WarmUp(0.0, frozenset())


@pytest.mark.parametrize("change", [{"hidden": 56}, {"head_dim": 18}, {"dtype": torch.bfloat16, "head_dim": 12}])
def test_a_model_whose_rows_are_not_aligned_is_refused(change: dict[str, Any], device: torch.device) -> None:
    with pytest.raises(ValueError, match="a hidden size that is a multiple of 16 and heads of a multiple of 16 bytes"):
        warm_up(replace(SMALL, **change), device)


def test_keys_have_two_variants_where_their_layouts_differ(device: torch.device) -> None:
    """A row of one KV head of 24 is no multiple of 16, and the six heads that a projection makes are."""
    shapes = replace(SMALL, heads=4, kv_heads=1, head_dim=24, dtype=torch.bfloat16)
    kernels = [key.kernel for key in warm_up(shapes, device).variants]
    assert kernels.count("partial_lse_kernel") == kernels.count("column_sum_kernel") == 2
    kernels = [key.kernel for key in warm_up(replace(shapes, heads=2, kv_heads=2), device).variants]
    assert kernels.count("partial_lse_kernel") == 1


@pytest.mark.usefixtures("unrun")
@few_examples
@given(
    frames=st.integers(1, 9),
    side=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rows=st.integers(1, 40),
    alive=st.integers(0, 60),
    offset=st.integers(0, 7),
    strides=st.sampled_from([(1, 2, 4), (2, 4, 8), (3, 5, 7)]),
    style=st.builds(PoolStyle, st.sampled_from(["average", "bilinear"]), st.sampled_from(["event", "row", "none"])),
)
def test_operations_at_any_size_launch_nothing_else(
    frames: int,
    side: tuple[int, int],
    rows: int,
    alive: int,
    offset: int,
    strides: tuple[int, int, int],
    style: PoolStyle,
    device: torch.device,
) -> None:
    """The functions of `worker/ops.py`, on slices that start anywhere."""
    shapes = replace(SMALL, style=style)
    ready = warm_up(shapes, device).variants
    with recorded_launches() as seen:
        features = torch.randn(frames + offset, *side, shapes.hidden, device=device)[offset:]
        ops.event_similarity(features.flatten(1, 2))
        tiers = torch.arange(frames, device=device) % 3
        quota = TierQuota(1, *(int((tiers == tier).sum()) for tier in range(3)))
        event = torch.zeros(frames, dtype=torch.int64, device=device)
        separator = None if style.separators == "none" else torch.randn(shapes.hidden, device=device)
        ops.pool_video(features, tiers, strides, quota, style, separator, event)

        count = alive + rows
        positions = torch.arange(offset + count, device=device)[offset:]
        together = torch.randn(offset + count, 10, shapes.head_dim, device=device)[offset:]
        query = torch.randn(rows + offset, shapes.heads, shapes.head_dim, device=device)[offset:]
        values = ops.scores(query, together[:, 6:8], positions[:alive] - offset, positions[alive:], positions, 0.25)
        ops.scores(query, together[:, 6:8].contiguous(), positions[:alive] - offset, positions[alive:], positions, 1)

        frame = torch.arange(offset + alive, device=device)[offset:] // 3
        ops.smooth(values, frame - frame[:1], max(alive, 1), 500_000)
        lengths = torch.tensor([0, offset, alive, alive // 2], device=device)[2:]
        chosen = ops.select(torch.cat([values, values[: alive // 2]]), lengths, lengths // 2, alive // 2 + alive // 4)
        hidden = torch.randn(offset + 2 * count, shapes.hidden, device=device)[offset:]
        ops.gather(chosen[1:], hidden, hidden.clone(), torch.arange(offset + 2 * count, device=device)[offset:])
    assert seen <= ready, different(seen, ready)
    assert {"frame_mean_kernel", "tiered_pool_kernel", "partial_lse_kernel"} <= {key.kernel for key in seen}


def different(seen: set[Key], ready: frozenset[Key]) -> str:
    """Which kernels were launched in a variant that was not ready, and in which."""
    return "\n".join(map(str, sorted(seen - ready, key=str)))
