"""How much the text after a video attends to each of its tokens: docs/method.md section 2's `a_n`."""

from metok_kernels.text_to_visual_scores.launch import text_to_visual_scores
from metok_kernels.text_to_visual_scores.reference import reference

__all__ = ["reference", "text_to_visual_scores"]
