"""The oracle's tiny checkpoints serve here too."""

from tests.support.oracle.fixtures import sample

__all__ = ["sample"]
