"""Models as the engine benchmark describes them, without a folder."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engine.families import LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL, Family
from benchmarks.engine.models import BenchmarkModel


def llava(grid: int = 27, name: str = "7b", path: Path = Path("x"), dummy: bool = True) -> BenchmarkModel:
    """LLaVA-OneVision with a tower of `grid` x `grid` patches; by default the published one."""
    side = {27: 384, 7: 56}.get(grid, 14 * grid)
    return BenchmarkModel(name, path, LLAVA_ONEVISION, 28, (grid, grid), (side, side), dummy, video_token=4)


def qwen(family: Family, rows: int = 9, columns: int = 16, layers: int = 28) -> BenchmarkModel:
    """A model of Qwen2.5-VL or Qwen3-VL whose pairs of frames have so many rows and columns of tokens."""
    pixels = {QWEN2_5_VL: 28, QWEN3_VL: 32}[family]
    frame = pixels * rows, pixels * columns
    return BenchmarkModel("x", Path("x"), family, layers, (rows, columns), frame, True, video_token=514)
