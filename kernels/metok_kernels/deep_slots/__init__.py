"""Which slot of a deep KV group each token of a step owns, and how many slots each request owns."""

from metok_kernels.deep_slots.groups import PAD_SLOT, DeepGroups
from metok_kernels.deep_slots.launch import deep_slots, slots_at
from metok_kernels.deep_slots.reference import reference, reference_slots_at

__all__ = ["PAD_SLOT", "DeepGroups", "deep_slots", "reference", "reference_slots_at", "slots_at"]
