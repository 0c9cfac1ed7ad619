"""Scores mixed with their frame's mean: `frame_smoothing` of docs/method.md section 4.6."""

from metok_kernels.smooth_by_frame.launch import smooth_by_frame
from metok_kernels.smooth_by_frame.reference import reference

__all__ = ["reference", "smooth_by_frame"]
