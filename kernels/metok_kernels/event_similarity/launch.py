"""Checks and launches of `event_similarity`."""

from __future__ import annotations

import torch

from metok_kernels.checks import FLOATS, INDEX, expect, require
from metok_kernels.event_similarity.kernel import adjacent_cosine_kernel, frame_mean_kernel
from metok_kernels.launch import Launch, ceil_div, power_of_two


def prepare(
    features: torch.Tensor, cu_frames: torch.Tensor
) -> tuple[tuple[Launch, Launch], torch.Tensor, torch.Tensor]:
    """Check the arguments of `event_similarity`; returns its launches in order and what they fill."""
    device = features.device
    expect("features", features, (None, None, None), FLOATS, device, layout="rows")
    expect("cu_frames", cu_frames, (None,), INDEX, device)
    frames, tokens, width = features.shape
    require(tokens > 0 and width > 0, f"features has shape {list(features.shape)}: its frames are empty")
    mean = torch.empty(frames, width, dtype=torch.float32, device=device)
    similarity = torch.empty(frames, dtype=torch.float32, device=device)
    block_d = min(max(power_of_two(width), 16), 128)
    means = Launch(
        frame_mean_kernel,
        (frames, ceil_div(width, block_d), 1),
        {
            "p_x": features, "p_mean": mean,
            "stride_frame": features.stride(0), "stride_token": features.stride(1),
            "tokens": tokens, "width": width,
        },
        {"BLOCK_N": 32, "BLOCK_D": block_d},
    )  # fmt: skip
    cosines = Launch(
        adjacent_cosine_kernel,
        (frames, 1, 1),
        {
            "p_mean": mean, "p_cu_frames": cu_frames, "p_similarity": similarity,
            "frames": frames, "videos": cu_frames.shape[0] - 1, "width": width,
        },
        {"BLOCK_D": min(max(power_of_two(width), 16), 1024), "BLOCK_V": 128},
    )  # fmt: skip
    return (means, cosines), mean, similarity


def event_similarity(features: torch.Tensor, cu_frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Frame vectors `f_i`, similarities `S_i = cos(f_i, f_{i+1})` of packed videos
    (docs/method.md section 1.1).

    Args:
        features: [frames, tokens, width] float, frames of all videos one after the other; frame and token
            strides are free.
        cu_frames: [videos + 1] int, cumulative frames.

    Returns:
        mean: [frames, width] float32.
        similarity: [frames] float32. At the last frame of each video +inf: there is nothing to cut after it,
            and no pair spans two videos. Norms below 1e-12 count as 1e-12.

    Cost: reads `frames * tokens * width` elements once, writes (and reads back) `4 * frames * width` bytes;
    one addition an element.
    """
    launches, mean, similarity = prepare(features, cu_frames)
    for launch in launches:
        launch.run()
    return mean, similarity
