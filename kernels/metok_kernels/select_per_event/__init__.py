"""The top `k_e` tokens of each event, in prompt order: the choice of docs/method.md section 2."""

from metok_kernels.select_per_event.launch import select_per_event
from metok_kernels.select_per_event.reference import reference

__all__ = ["reference", "select_per_event"]
