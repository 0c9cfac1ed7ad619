"""Worker-side state of a model of which some layers carry a state along instead of attending."""

from __future__ import annotations

from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from metok_vllm.worker.encoded_state import EncodedModelState


class HybridEncodedModelState(EncodedModelState, MambaHybridModelState):
    """Stage 1's part over vLLM's own for such models, which looks after the carried states."""
