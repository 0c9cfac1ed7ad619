"""mp4 files: the right frames come back, and they are not the drawn ones bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.draw import draw_video
from training.video_file import read_mp4, through_codec, write_mp4
from training.world import make_video


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_round_trip_keeps_frames_and_adds_artefacts(tmp_path: Path) -> None:
    frames = draw_video(make_video(3))
    write_mp4(frames, tmp_path / "v.mp4")
    back = read_mp4(tmp_path / "v.mp4")
    assert back.shape == frames.shape
    assert not np.array_equal(back, frames)
    each = [psnr(a, b) for a, b in zip(frames, back, strict=True)]
    assert min(each) > 22, min(each)
    swapped = psnr(frames, back[::-1])
    assert swapped < np.mean(each) - 5, "frames came back in another order, or all look alike"


def test_quality_and_scale(tmp_path: Path) -> None:
    frames = draw_video(make_video(4, (8, 12)))
    assert psnr(frames, through_codec(frames, 18)) > psnr(frames, through_codec(frames, 30)) + 1
    write_mp4(frames, tmp_path / "big.mp4", scale=4)
    big = read_mp4(tmp_path / "big.mp4")
    assert big.shape == (len(frames), 256, 256, 3)
    small = big.reshape(len(frames), 64, 4, 64, 4, 3).mean(axis=(2, 4))
    assert psnr(frames, small) > 25
