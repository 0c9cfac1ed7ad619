"""Pool every frame by its own stride into packed tokens: docs/method.md sections 1.5 and 1.6."""

from metok_kernels.tiered_pool.launch import tiered_pool
from metok_kernels.tiered_pool.reference import Mode, pooled_grid, reference

__all__ = ["Mode", "pooled_grid", "reference", "tiered_pool"]
