"""Three KV cache groups where blocks are outermost, one block size where an operator wants another layout:
the same answers, and metadata for each kind of group, not for each group.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from tests.support.harness import Case, Engine, engine
from tests.support.oracle import assert_same
from tests.support.oracle.samples import Sample, load_sample, scene_video

ATOL = 1e-3


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return load_sample(tmp_path_factory.mktemp("model"), seed=23)


@pytest.fixture(params=["BLHNC", "LBHNC"])
def running(request: pytest.FixtureRequest, sample: Sample) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "LBHNC":
            patch.setenv("VLLM_KV_CACHE_LAYOUT", "LBHNC")
        # One layer, six, one: the two kinds of deep layers differ in block size too.
        with engine(sample, {"prune_layers": [1, 3, 7]}, max_num_batched_tokens=96, max_num_seqs=8) as started:
            assert started.core.vllm_config.cache_config.kv_cache_layout == request.param
            yield started


def test_metadata_by_kind(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    outermost = running.core.vllm_config.cache_config.kv_cache_layout == "BLHNC"
    groups = running.runner.kv_cache_config.kv_cache_groups
    sizes = [group.kv_cache_spec.block_size for group in groups]
    assert len(groups) == (3 if outermost else 8), "8 layers, the smallest kind has one"
    assert sizes == ([192, 32, 192] if outermost else [32] * 8)

    built, steps, build = [0], list[int](), CPUAttentionMetadataBuilder.build

    def counted(*args: object, **kwargs: object) -> object:
        built[0] += 1
        return build(*args, **kwargs)  # type: ignore[arg-type]

    def watch(_: Engine) -> None:
        steps.append(built[0])
        built[0] = 0

    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", counted)
    asked = [
        Case((scene_video(1, 14),), metok={"decode_retention": 0.5}, max_tokens=8),
        Case((), "No video here.", max_tokens=12),
        Case((scene_video(2, 9), scene_video(3, 5)), max_tokens=6),
        Case((scene_video(4, 6),), metok="off", max_tokens=6),
    ]
    for case, answer in zip(asked, running.run(asked, watch), strict=True):
        assert_same(running.oracle(case), answer, ATOL)
    running.check_drained()
    assert max(steps) == 3, "one metadata a kind of group"
