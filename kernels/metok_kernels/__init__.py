"""Triton kernels of METok: everything token-sized that the method adds to a forward pass.

One package an operation, each with three modules: `kernel` (Triton), `launch` (checks shapes, dtypes and
devices, then launches) and `reference` (plain torch, computed in float32, same signature: the truth the
tests compare against, and what runs where Triton has no device).

    from metok_kernels.select_per_event import select_per_event

Needs torch and triton, nothing else. Kernels read `b_*` for block values, `p_*` for pointers, `o_*` for
offsets and `m_*` for masks; every address is computed in int64. "Packed" means that several videos or
requests lie one after the other, with cumulative lengths `cu_*` of shape `[items + 1]`, starting at 0.
No launcher reads from the device: sizes needed for a grid are arguments, and are upper bounds.
"""
