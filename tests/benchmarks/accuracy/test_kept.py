"""What a method shows of the things asked about, on a video whose one thing stands in a known place."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.accuracy.data import Item
from benchmarks.accuracy.kept import asked_about, cells_of, whole_tokens
from benchmarks.accuracy.methods import PAIRS, chosen, methods
from benchmarks.accuracy.video import Checkpoint
from metok_vllm.demo.model_choice import TRAINED
from training.draw import draw_video
from training.questions import all_questions
from training.world import Video, make_video

SEED = 5


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(TRAINED)


@pytest.fixture(scope="module")
def graph() -> Video:
    return make_video(SEED)


def test_a_thing_is_where_it_was_drawn(graph: Video) -> None:
    """Painted away, a thing leaves other pixels only in its own cells and their neighbours,
    and only while it is there.
    """
    thing = next(i for i in graph.items if i.kind == "shape")
    cells = cells_of(graph, thing)
    assert cells.shape == (graph.frames, 16)
    assert cells.any(1).nonzero()[0].tolist() == list(range(thing.start, thing.end))
    rest = tuple(i for i in graph.items if i is not thing)
    without = draw_video(Video(graph.seed, graph.frames, graph.scenes, rest, graph.counted))
    changed = (draw_video(graph) != without).any(-1).reshape(graph.frames, 4, 16, 4, 16).any((2, 4)).reshape(-1, 16)
    assert (changed & cells).any(1).tolist() == cells.any(1).tolist()
    assert not (cells & ~changed).any()


@pytest.mark.parametrize(
    "name", ["stock", "frames = average", "random = average", "evs = average", "vidcom2 = kv", "metok stage 1"]
)
def test_whole_tokens_are_those_that_enter(checkpoint: Checkpoint, graph: Video, name: str) -> None:
    video = checkpoint.encode("drawn", draw_video(graph))
    asked = checkpoint.ask(Item(0, TRAINED, "What was the word?", (), "cat", "word", None))
    method = next(m for m in chosen(methods(checkpoint), [name]) if m.name == name)
    entering = method.reducer.enter(video, asked)
    whole = whole_tokens(method.reducer, video, asked, entering)
    rows = {tuple(row) for row in entering.rows.numpy().round(4).tolist()}
    stock = video.pooled().numpy().round(4)
    assert 0 < whole.sum() < len(entering.rows)
    for frame, cell in np.argwhere(whole):
        assert tuple(stock[frame, cell].tolist()) in rows
    if name != "metok stage 1":
        assert whole.sum() == len(entering.rows) - 1  # all but the separator


def test_questions_are_about_their_things(graph: Video) -> None:
    stock = all_questions(graph)
    assert all(asked_about(q)[0].name in q.text for q in stock["colour"] + stock["move"])
    assert [asked_about(q) for q in stock["open"] if q.text.startswith("List")] in ([], [[]])
    assert {len(asked_about(q)) for q in stock["order"]} <= {2}


def test_what_is_compared_with_each_other_is_among_the_methods(checkpoint: Checkpoint) -> None:
    assert {name for pair in PAIRS for name in pair} <= {m.name for m in methods(checkpoint)}
