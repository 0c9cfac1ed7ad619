"""Which model this is, told without reading its weights: a 15 GB checkpoint takes milliseconds.

The config is hashed whole. Of every safetensors file its size, its header (names, types and shapes) and three
short pieces of its data are hashed: a fine-tuned sister has the same header and other data. Two models that
differ in a few weights alone, outside these pieces, look the same.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from metok_vllm.contract.profile import ModelMark
from metok_vllm.frontend.reasons import reason
from metok_vllm.frontend.weight_files import INDEX, WHOLE

PIECE = 1 << 16
"""Bytes of each piece: at the start, the middle and the end of a file's data."""


def model_folder(model: str, revision: str | None) -> Path:
    """Where a checkpoint's files are on this machine: its folder, or the snapshot of a name on the hub.

    Raises:
        ValueError: there is no config.json, in one sentence.
    """
    from transformers.utils.hub import cached_file

    if Path(model).is_dir():
        return Path(model)
    try:
        found = cached_file(model, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"METok cannot read the config of {model}: {reason(error)}.") from None
    assert found is not None  # it raises where there is none
    return Path(found).parent


def fingerprint(folder: Path) -> ModelMark:
    """The mark of the checkpoint in a folder.

    Raises:
        ValueError: a file cannot be read, in one sentence.
    """
    try:
        config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        return ModelMark(config_sha256=config, weights_sha256=_weights(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"METok cannot tell which model is in {folder}: {reason(error)}.") from None


def _weights(folder: Path) -> str | None:
    """None where some of the files are not on this machine (yet), or are none of safetensors'."""
    names = [WHOLE]
    if not (folder / WHOLE).exists():
        if not (folder / INDEX).exists():
            return None
        names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    digest = hashlib.sha256()
    for name in names:
        if not (folder / name).exists():
            return None
        _add_file(digest, folder / name)
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError(f"{path.name} is no safetensors file")
        header = file.read(length)
        digest.update(f"{path.name} {size} {len(header)} ".encode())
        digest.update(header)
        start = 8 + length
        for place in (start, max(start, (start + size) // 2), max(start, size - PIECE)):
            file.seek(place)
            digest.update(file.read(PIECE))
