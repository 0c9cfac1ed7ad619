"""Lets PyPI's CUDA build of torchvision be imported beside a CPU build of torch.

`torchvision._meta_registrations` registers fake kernels for `torchvision::nms` and `torchvision::qnms`, whose
schemas the compiled extension would have declared; beside a CPU torch that extension does not load. The
schemas are declared just before that module runs, and only where they are missing, so a true CPU (or GPU)
build is untouched. Calling one of the two operators still fails, as it should.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_TARGET = "torchvision._meta_registrations"
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library = None  # a torch.library.Library drops its definitions when collected


def _declare_missing() -> None:
    global _library
    import torch

    missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if missing and _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            _library.define(schema)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == _TARGET:
            sys.meta_path.remove(self)
            _declare_missing()
        return None


def install() -> None:
    """Watch for torchvision's import.

    Called from the `.pth` file; imports neither torch nor torchvision itself.
    """
    sys.meta_path.insert(0, _Finder())
