"""The oracle: METok on the Hugging Face model, written from the method alone, and the judge of the engine.

`run(...)` answers one request; `assert_same(expected, observed, atol)` compares two runs of it.
"""

from tests.support.oracle.labelled import Labels
from tests.support.oracle.result import OracleResult, VideoTrace, assert_same
from tests.support.oracle.run import run
from tests.support.oracle.settings import OracleSettings

__all__ = ["Labels", "OracleResult", "OracleSettings", "VideoTrace", "assert_same", "run"]
