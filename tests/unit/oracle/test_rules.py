"""The oracle's rules against cases worked by hand from docs/method.md."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support.oracle import settings as rules
from tests.support.oracle import stage1, stage2
from tests.support.oracle.settings import OracleSettings
from tests.support.oracle.stage2 import Video


@pytest.mark.parametrize(
    ("similarities", "events", "expected"),
    [
        ([0.9, 0.2, 0.8, 0.3, 0.5, 0.95], 3, [(0, 2), (2, 4), (4, 7)]),
        ([0.9, 0.2, 0.8, 0.3, 0.5, 0.95], 1, [(0, 7)]),
        ([0.5, 0.5, 0.5], 2, [(0, 1), (1, 4)]),  # equal: the lower index is cut
        ([0.9, 0.8], 5, [(0, 1), (1, 2), (2, 3)]),  # fewer frames than events
        ([], 5, [(0, 1)]),
    ],
)
def test_events_are_cut_at_the_lowest_similarities(similarities, events, expected):
    assert stage1.cut_events(similarities, events) == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (28, (3, 10, 19)),
        (24, (3, 9, 16)),  # 2.57, 8.57, 16.29
        (14, (2, 5, 10)),  # 1.5 and 9.5 round to even
        (42, (4, 15, 28)),  # 4.5 and 28.5 round to even
        (8, (1, 3, 5)),
        (4, (1, 2, 3)),  # 0 and 1 are raised
        (3, (1, 2, 3)),  # the third lies after the last layer
    ],
)
def test_pruning_layers_by_depth(layers, expected):
    assert rules.prune_layers(OracleSettings(), layers) == expected


@pytest.mark.parametrize(("stated", "layers"), [(None, 2), ((0, 1, 2), 8), ((2, 2, 3), 8), ((1, 2, 9), 8)])
def test_impossible_pruning_layers_are_refused(stated, layers):
    with pytest.raises(ValueError, match="pruning layers"):
        rules.prune_layers(OracleSettings(prune_layers=stated), layers)


@pytest.mark.parametrize(
    ("ratio", "length", "is_key", "stage", "expected"),
    [
        (0.76, 50, True, 1, 38),  # 38.0 exactly
        (0.76, 51, True, 2, 39),  # 38.76
        (0.76, 50, False, 1, 19),
        (0.76, 1, False, 1, 1),  # 0.38
        (0.76, 50, False, 2, 0),
        (0.07, 100, True, 1, 7),  # in binary floating point 0.07 * 100 is above 7
        (0.1, 30, True, 1, 3),
        (1.0, 7, False, 1, 4),
        (0.0, 7, True, 1, 0),
    ],
)
def test_how_many_tokens_an_event_keeps(ratio, length, is_key, stage, expected):
    assert rules.keep_count(OracleSettings(keep_ratio=ratio), length, is_key, stage) == expected


@pytest.mark.parametrize(("share", "survivors", "expected"), [(0, 9, 0), (0.5, 5, 3), (0.07, 100, 7), (1, 9, 9)])
def test_how_many_tokens_are_retained(share, survivors, expected):
    assert rules.retained_count(OracleSettings(decode_retention=share), survivors) == expected


@pytest.mark.parametrize(
    ("frames", "counts", "percent"),
    [
        (32, (18, 14, 0), 67),  # sizes 7 7 6 6 6
        (64, (18, 33, 13), 42),  # sizes 13 13 13 13 12
        (128, (18, 72, 38), 30),  # sizes 26 26 26 25 25
    ],
)
def test_quotas_give_the_shares_the_paper_reports(frames, counts, percent):
    """Section 5: 67, 42 and 30 % of 144 tokens a frame stay at 32, 64 and 128 frames of 24 x 24 patches."""
    assert rules.quotas(OracleSettings(), frames, 24) == counts
    tokens = sum(n * rules.frame_tokens(24, s) for n, s in zip(counts, (2, 4, 8), strict=True))
    assert round(100 * tokens / (144 * frames)) == percent


@pytest.mark.parametrize(
    ("budget", "counts"),
    [
        (None, (8, 4, 0)),  # sizes 3 3 2 2 2: 8 x 16 + 4 x 4 + 5 separators = 149 tokens
        (149, (8, 4, 0)),
        (148, (7, 5, 0)),  # one step either way is enough: from s1 to s2 first
        (101, (4, 8, 0)),
        (100, (3, 9, 0)),
        (53, (0, 12, 0)),
        (52, (0, 11, 1)),
        (17, (0, 0, 12)),
    ],
)
def test_a_token_budget_lowers_the_quotas(budget, counts):
    assert rules.quotas(OracleSettings(token_budget=budget), 12, 7) == counts


def test_a_budget_below_the_coarsest_video_is_refused():
    with pytest.raises(ValueError, match="17"):
        rules.quotas(OracleSettings(token_budget=16), 12, 7)


def test_frames_take_strides_by_class_then_relevance():
    relevance = [0.1, 0.9, 0.5, 0.7, 0.2]
    ranked = stage1.rank_frames(relevance, [(0, 3), (3, 5)], [0], key_frames=1)
    assert [(lower, frame) for lower, _, frame in ranked] == [(0, 1), (1, 3), (1, 2), (1, 0), (2, 4)]
    assert stage1.assign_strides(ranked, (1, 3, 1), (2, 4, 8)) == [4, 2, 4, 4, 8]  # the plain rule of 1.5
    assert stage1.assign_strides(ranked, (2, 1, 2), (2, 4, 8)) == [
        8,
        2,
        4,
        2,
        8,
    ]  # other sizes than planned for


def test_key_events_prefer_the_lower_index_among_equals():
    assert stage1.pick_key_events([0.2, 0.9, 0.2, 0.2], 2) == [0, 1]
    assert stage1.pick_key_events([0.2, 0.9], 3) == [0, 1]


def test_pooling_reads_between_the_patches_as_the_model_does():
    ramp = torch.arange(3.0).repeat(3, 1).unsqueeze(-1)  # [3, 3, 1], value = column
    assert stage1.pool(None, ramp, 1).flatten().tolist() == [0, 1, 2] * 3
    assert stage1.pool(None, ramp, 2).flatten().tolist() == [0.25, 1.75] * 2  # samples at (i + 0.5) * 1.5 - 0.5
    assert stage1.pool(None, ramp, 8).flatten().tolist() == [1.0]


def test_alignment_none_compares_a_frame_with_its_own_event():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    relevance = stage1.align(None, vectors, [(0, 2), (2, 3)], [], "none", None)
    torch.testing.assert_close(relevance, torch.tensor([0.5**0.5, 0.5**0.5, 1.0]))


def test_alignment_embedding_takes_the_mean_word():
    words = torch.nn.Embedding.from_pretrained(torch.tensor([[9.0, 9.0], [4.0, 0.0], [0.0, 2.0]]))
    model = SimpleNamespace(get_input_embeddings=lambda: words)
    relevance = stage1.align(model, torch.tensor([[1.0, 0.0], [2.0, 1.0]]), [(0, 2)], [1, 2], "embedding", None)
    torch.testing.assert_close(relevance, torch.tensor([2 / 5**0.5, 1.0]))  # the text is (2, 1)
    assert stage1.align(model, torch.ones(1, 2), [(0, 1)], [], "embedding", None).tolist() == [0.0]


def test_alignment_dual_tower_joins_windows_by_their_maximum():
    tower = SimpleNamespace(
        get_image_features=lambda pixel_values: SimpleNamespace(pooler_output=pixel_values),
        get_text_features=lambda input_ids: SimpleNamespace(pooler_output=input_ids.float()),
    )
    towers = (tower, torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3, -7], [-9, 4]]))
    relevance = stage1.align(None, torch.zeros(2, 5), [(0, 2)], [], "dual-tower", towers)
    torch.testing.assert_close(relevance, torch.tensor([1.0, 0.6]))  # the text is (3, 4)


def test_scores_average_heads_and_the_rows_after_the_video():
    attention = torch.tensor(
        [
            [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]],
            [[1.0, 0.0, 0.0], [0.1, 0.9, 0.0], [0.4, 0.0, 0.6]],
        ]
    )
    torch.testing.assert_close(stage2.score(attention, [1, 2]), torch.tensor([0.3, 0.4, 0.3]))
    assert stage2.score(attention, []).tolist() == [0, 0, 0]


def test_text_rows_are_the_text_after_the_video_only():
    is_text = [True, False, False, True, False, True, False, False, True]
    first = Video(1, [0, 0], [0], [1, 2])
    second = Video(6, [0, 0], [0], [6, 7])
    assert stage2.text_rows(first, is_text) == [3, 5, 8]
    assert stage2.text_rows(second, is_text) == [8]


def test_survivors_are_the_best_of_each_event_in_order():
    settings = OracleSettings(keep_ratio=0.5)
    video = Video(10, [0, 0, 0, 1, 1, 1, 1], [1], list(range(10, 17)))
    scores = dict(zip(range(10, 17), [0.1, 0.3, 0.3, 0.2, 0.05, 0.4, 0.2], strict=True))
    video.alive = stage2.keep(video, scores, settings, 1)
    assert video.alive == [11, 13, 15]  # ceil(3 / 4) of event 0, ceil(4 / 2) of event 1; ties keep the lower
    assert stage2.keep(video, scores, settings, 2) == [15]


def test_retained_tokens_are_the_best_of_the_request():
    scores = {4: 0.1, 5: 0.4, 20: 0.4, 21: 0.2, 22: 0.4}
    assert stage2.retain(scores, OracleSettings(decode_retention=0.4)) == [5, 20]
    assert stage2.retain(scores, OracleSettings()) == []
