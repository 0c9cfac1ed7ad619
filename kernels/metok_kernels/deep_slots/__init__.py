"""Which slot of a deep KV group each token of a step owns, and how many slots each request owns."""

from metok_kernels.deep_slots.launch import deep_slots
from metok_kernels.deep_slots.reference import reference, slot_index
from metok_kernels.deep_slots.tables import PAD_SLOT, DeepGroups, SpanTables

__all__ = ["PAD_SLOT", "DeepGroups", "SpanTables", "deep_slots", "reference", "slot_index"]
