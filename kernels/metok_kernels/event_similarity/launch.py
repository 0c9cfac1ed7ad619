"""Checks and launches of `event_similarity`."""

from __future__ import annotations

import torch

from metok_kernels.checks import FLOATS, expect, require
from metok_kernels.event_similarity.kernel import adjacent_cosine_kernel, frame_mean_kernel
from metok_kernels.launch import Launch, ceil_div, power_of_two


def prepare(features: torch.Tensor) -> tuple[tuple[Launch, Launch], torch.Tensor, torch.Tensor]:
    """Check the argument of `event_similarity`; returns its launches in order and what they fill."""
    device = features.device
    expect("features", features, (None, None, None), FLOATS, device, layout="rows")
    frames, tokens, width = features.shape
    require(tokens > 0 and width > 0, f"features has shape {list(features.shape)}: its frames are empty")
    mean = torch.empty(frames, width, dtype=torch.float32, device=device)
    similarity = torch.empty(max(frames - 1, 0), dtype=torch.float32, device=device)
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
        (similarity.shape[0], 1, 1),
        {"p_mean": mean, "p_similarity": similarity, "width": width},
        {"BLOCK_D": min(max(power_of_two(width), 16), 1024)},
    )
    return (means, cosines), mean, similarity


def event_similarity(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Frame vectors `f_i` and similarities `S_i = cos(f_i, f_{i+1})` of one video
    (docs/method.md section 1.1).

    Args:
        features: [frames, tokens, width] float; frame and token strides are free.

    Returns:
        mean: [frames, width] float32.
        similarity: [frames - 1] float32. Norms below 1e-12 count as 1e-12.

    Raises TypeError or ValueError for another dtype or shape, and for frames without tokens.
    Cost: reads `frames * tokens * width` elements once, writes (and reads back) `4 * frames * width` bytes;
    one addition an element.
    """
    launches, mean, similarity = prepare(features)
    for launch in launches:
        launch.run()
    return mean, similarity
