"""Which aligner a server has, decided at start."""

from __future__ import annotations

from metok_vllm.frontend.aligner_files import check_aligner
from metok_vllm.frontend.aligner_inputs import FOLDER, aligner_folder


def resolve_aligner(model: str, aligner: str, aligner_model: str | None) -> tuple[str, str | None]:
    """What the server's settings mean for a model: the default aligner, and the dual tower to load, if any.

    Args:
        model: name or folder of the model.
        aligner, aligner_model: the settings of these names.

    Raises:
        ValueError: a dual tower is asked for and there is none, or there is one that cannot be loaded.
    """
    tower = aligner_folder(model) or aligner_model
    if aligner == "dual-tower" and tower is None:
        raise ValueError(
            "METok: aligner 'dual-tower' needs a SigLIP or CLIP checkpoint; "
            f"set aligner_model, or put one into {FOLDER}/ in the model's folder."
        )
    if tower is not None and aligner in ("auto", "dual-tower"):
        check_aligner(tower)
        return "dual-tower", tower
    return ("embedding" if aligner == "auto" else aligner), None
