from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metok_vllm.compression.scoring import smooth_by_frame, text_to_visual_scores


class Case:
    """Alive tokens with gaps in their positions: the video in the first half, text rows in the second."""

    def __init__(self, rows: int, keys: int, q_heads: int, kv_heads: int, dim: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.positions = torch.randperm(3 * keys, generator=generator)[:keys].sort().values
        self.k = torch.randn(keys, kv_heads, dim, generator=generator)
        self.q = torch.randn(rows, q_heads, dim, generator=generator)
        self.row_index = torch.randperm(keys // 2, generator=generator)[:rows].sort().values + keys - keys // 2
        self.visual = torch.randperm(keys // 2, generator=generator)[: keys // 3].sort().values
        self.scale = dim**-0.5

    def scores(self, **kwargs: Any) -> torch.Tensor:
        rows = self.positions[self.row_index]
        return text_to_visual_scores(self.q, self.k, self.visual, rows, self.positions, self.scale, **kwargs)

    def naive(self) -> torch.Tensor:
        """One row and head at a time, in float64."""
        heads = self.q.shape[1]
        group = heads // self.k.shape[1]
        total = torch.zeros(len(self.positions), dtype=torch.float64)
        for row, index in zip(self.q.double(), self.row_index.tolist(), strict=True):
            for head in range(heads):
                logits = self.k[: index + 1, head // group].double() @ row[head] * self.scale
                total[: index + 1] += logits.softmax(0)
        return (total / (heads * len(self.row_index)))[self.visual].float()


SHAPES = [(1, 9, 1, 1, 4), (7, 63, 4, 4, 8), (17, 60, 6, 2, 16), (33, 101, 14, 2, 5), (20, 64, 8, 1, 32)]


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_equal_plain_loops(shape: tuple[int, int, int, int, int]) -> None:
    case = Case(*shape)
    torch.testing.assert_close(case.scores(), case.naive(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows_per_block", [1, 3, 16, 1000])
def test_blocks_do_not_change_the_scores(rows_per_block: int) -> None:
    case = Case(33, 101, 14, 2, 5)
    torch.testing.assert_close(case.scores(rows_per_block=rows_per_block), case.naive(), rtol=1e-5, atol=1e-6)


def test_all_visible_keys_share_the_attention() -> None:
    case = Case(7, 63, 4, 2, 8)
    case.visual = torch.arange(63)
    assert case.scores().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_a_row_does_not_see_later_keys() -> None:
    q, k = torch.zeros(2, 1, 4), torch.zeros(4, 1, 4)
    scores = text_to_visual_scores(q, k, torch.arange(4), torch.tensor([11, 30]), torch.tensor([10, 11, 30, 31]), 1.0)
    # The first row halves its attention over two keys, the second one thirds it over three.
    torch.testing.assert_close(scores, torch.tensor([5 / 12, 5 / 12, 1 / 6, 0.0]))


def test_half_precision_is_scored_in_float32() -> None:
    case = Case(5, 30, 4, 2, 16)
    case.q, case.k = case.q.bfloat16(), case.k.bfloat16()
    scores = case.scores()
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, case.naive(), rtol=1e-5, atol=1e-6)


def test_no_rows_and_no_visual_tokens() -> None:
    case = Case(5, 30, 4, 2, 16)
    case.q, case.row_index = case.q[:0], case.row_index[:0]
    assert case.scores().tolist() == [0.0] * 10
    case = Case(5, 30, 4, 2, 16)
    case.visual = case.visual[:0]
    assert case.scores().shape == (0,)


def test_the_whole_matrix_never_exists() -> None:
    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    rows, keys, heads = 64, 512, 4
    case = Case(rows, keys, heads, 2, 4)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        case.scores(rows_per_block=8)
    assert 0 < largest.elements <= 8 * heads * keys < rows * heads * keys


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = Case(5, 30, 4, 2, 16)
    case.k = torch.randn(30, 3, 16)
    with pytest.raises(ValueError, match="do not fit one another"):
        case.scores()
    case = Case(5, 30, 4, 2, 16)
    case.row_index = case.row_index[:4]
    with pytest.raises(ValueError, match="exactly one position"):
        case.scores()


def test_extreme_logits_stay_finite() -> None:
    case = Case(5, 30, 4, 2, 16)
    case.scale = 1e4
    assert math.isfinite(case.scores().sum().item())


def test_a_frame_smooths_its_tokens_by_hand() -> None:
    scores, frame = torch.tensor([1.0, 3.0, 5.0, 0.0, 8.0]), torch.tensor([0, 0, 2, 3, 3])
    assert smooth_by_frame(scores, frame, 4, 500_000).tolist() == [1.5, 2.5, 5.0, 2.0, 6.0]
    assert smooth_by_frame(scores, frame, 4, 1_000_000).tolist() == [2.0, 2.0, 5.0, 4.0, 4.0]
    assert smooth_by_frame(scores, frame, 4, 0) is scores, "the default changes no bit"
