"""The oracle's tiny checkpoints."""

from tests.support.oracle.fixtures import sample

__all__ = ["sample"]
