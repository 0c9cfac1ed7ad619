"""Half precision in the engine: exact counts, nothing left behind,
and log-probabilities near those of float32.
"""

from __future__ import annotations

import pytest

from tests.support.coarse import check_near
from tests.support.harness import Case, engine
from tests.support.oracle.samples import load_sample, scene_video

NEAR = {"bfloat16": 0.6, "float16": 0.15}
"""Of the log-probabilities of the chosen tokens.

Wide, since a rounded score may choose another of two near equals.
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path_factory: pytest.TempPathFactory, dtype: str) -> None:
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=29)
    asked = [
        Case((scene_video(1, 9),), metok={"decode_retention": 0.5}, max_tokens=4),
        Case((scene_video(2, 12), scene_video(3, 8)), metok={"decode_retention": 1}, max_tokens=4),
        Case((scene_video(2, 5),), metok="off", max_tokens=4),
    ]
    with engine(sample, dtype=dtype, max_num_batched_tokens=64, max_num_seqs=8) as running:
        check_near(running, asked, pruned=2, near=NEAR[dtype])
