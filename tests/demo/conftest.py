"""The oracle's tiny checkpoints serve here too."""

from tests.oracle.conftest import sample

__all__ = ["sample"]
