"""Whether a checkpoint's safetensors files are there and whole, told by their headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from metok_vllm.frontend.reasons import reason

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint, in the files that transformers would read.

    safetensors compares the header with the file's size, so a file that was cut off is found without reading
    it.

    Raises:
        ValueError: a file is missing, is no safetensors file, or is not whole. The sentence's end, with the
            file's name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _file_names(folder):
        shapes.update(_header(folder, name))
    return shapes


def _file_names(folder: Path) -> list[str]:
    if (folder / WHOLE).exists():
        return [WHOLE]
    if not (folder / INDEX).exists():
        if any((folder / name).exists() for name in PICKLED):
            raise ValueError(f"its weights are pickled ({PICKLED[0]}), which can run code; convert them to {WHOLE}")
        raise ValueError(f"there is no {WHOLE} in it")
    try:
        files = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        names = sorted(str(file) for file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX} cannot be read: {reason(error)}") from None
    missing = [name for name in names if not (folder / name).exists()]
    if missing or not names:
        raise ValueError(f"{missing[0]} is missing, which {INDEX} names" if missing else f"{INDEX} names no file")
    return names


def _header(folder: Path, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / name, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118  # not a mapping
                yield tensor, tuple(file.get_slice(tensor).get_shape())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} is no whole safetensors file: {reason(error)}") from None
