"""Hidden state, residual and positions of the survivors, by one index in one launch."""

from metok_kernels.gather_rows.launch import gather_rows
from metok_kernels.gather_rows.reference import reference

__all__ = ["gather_rows", "reference"]
