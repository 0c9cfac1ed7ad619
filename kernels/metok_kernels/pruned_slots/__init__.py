"""Which slot of a pruned KV group each token of a step owns, and how many slots each request owns."""

from metok_kernels.pruned_slots.launch import pruned_slots
from metok_kernels.pruned_slots.reference import rank, reference
from metok_kernels.pruned_slots.tables import PAD_SLOT, PrunedGroups, SpanTables

__all__ = ["PAD_SLOT", "PrunedGroups", "SpanTables", "pruned_slots", "rank", "reference"]
