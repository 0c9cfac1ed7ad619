"""Frame vectors and how much each frame resembles the next: docs/method.md section 1.1."""

from metok_kernels.event_similarity.launch import event_similarity
from metok_kernels.event_similarity.reference import reference

__all__ = ["event_similarity", "reference"]
