"""From scene graphs to batches: the pool of encoded videos, pooling mixes, packed questions."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from training.clues import WIDTH, Clues, meant, options, phrases, seen, sequel, when
from training.draw import draw_video
from training.lm import LM, Packed
from training.questions import ASKERS, Question, draw
from training.questions import LESSONS as LESSONS_BY_KIND
from training.questions import all_questions as ask_all
from training.seeds import seed_of
from training.tokenizer import END, START
from training.tower import STRIDES, Tower, augment, pool
from training.video_file import through_codec
from training.world import MAX_FRAMES, MIN_FRAMES, Video, make_video

SHORT = tuple(k for k in ASKERS if k != "open")
LONG = ("letter", "open")
LESSONS = tuple(LESSONS_BY_KIND)
_ROWS = {2: (0, 16), 4: (16, 20), 8: (20, 21)}  # of a frame's 21 pooled rows
LIVELY_TRAINING = 0.9  # moves and changes are the rarest things to see
SEPARATOR, HEADER = -1, -2  # in a prefix plan, beside row numbers


@dataclass
class Encoded:
    """A video and its pooled features, before the projector's last layer: ``[T * 21, H]`` bf16."""

    video: Video
    rows: Tensor
    stock: dict[str, list[Question]]
    clues: Tensor | None = None  # training's labels of the rows, see :func:`training.clues.seen`


@torch.no_grad()
def encode(tower: Tower, video: Video, crf: int | None, noise: int | None = None, lessons: bool = False) -> Encoded:
    """Draw a video, take it through mp4 of quality ``crf`` (None: not), encode and pool it at every stride.

    With ``lessons``, what only training asks and tells comes with it.

    The projector's last layer is linear and so commutes with pooling: it stays outside, and trains with the
    language model.
    """
    pixels = draw_video(video)
    if crf is not None:
        pixels = through_codec(pixels, crf)
    if noise is not None:
        pixels = augment(pixels, np.random.default_rng(noise))
    rows = pooled_rows(tower, torch.from_numpy(pixels))
    return Encoded(video, rows, ask_all(video, lessons), seen(video) if lessons else None)


@torch.no_grad()
def pooled_rows(tower: Tower, frames: Tensor) -> Tensor:
    """``uint8 [T, 64, 64, 3]`` to the 21 pooled rows of every frame, ``[T * 21, H]`` bf16."""
    frames = frames.to(tower.position_embedding.device)
    hidden = F.gelu(tower.linear_1(tower.encode(frames)))
    return torch.cat([pool(hidden, s) for s in STRIDES], dim=1).flatten(0, 1).to("cpu", torch.bfloat16)


def plan(frames: int, strides: list[int], separators: set[int]) -> list[int]:
    """Rows of the prefix: three header tokens, each frame's rows at its stride,
    separators (one at the end always).
    """
    out = [HEADER] * 3
    for t in range(frames):
        low, high = _ROWS[strides[t]]
        out += range(21 * t + low, 21 * t + high)
        if t in separators and t != frames - 1:
            out.append(SEPARATOR)
    return [*out, SEPARATOR]


def stock_plan(frames: int) -> list[int]:
    """The prefix of the unmodified model: stride 2 everywhere, one separator."""
    return plan(frames, [2] * frames, set())


def mixed_plan(frames: int, weights: tuple[float, float, float], rng: random.Random) -> list[int]:
    """A prefix with a random stride for every frame and up to six separators at random places."""
    strides = rng.choices(STRIDES, weights, k=frames)
    return plan(frames, strides, {rng.randrange(frames) for _ in range(rng.randint(0, 6))})


class Coder:
    """Questions to token ids, in the chat format."""

    def __init__(self, tok: Tokenizer) -> None:
        self.tok = tok
        self.header = tok.encode(f"{START}user ").ids
        assert len(self.header) == 3
        self.cache: dict[str, list[int]] = {}
        self.ends: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text``, cached."""
        if text not in self.cache:
            self.cache[text] = self.tok.encode(text).ids
        return self.cache[text]

    def token_at(self, text: str, end: int) -> int:
        """Index of the token of ``text`` that ends at character ``end``."""
        if text not in self.ends:
            self.ends[text] = [last for _, last in self.tok.encode(text).offsets]
        return self.ends[text].index(end)

    def asked(self, q: Question) -> str:
        """What stands between the video and the answer."""
        return f"\n{q.prompt}{END}{START}assistant\n"

    def pair(self, q: Question) -> tuple[list[int], list[int]]:
        """(prompt ids after the video, answer ids with the end token)."""
        return self.ids(self.asked(q)), self.ids(f"{q.answer}{END}")


@dataclass
class Batch:
    """Everything a step needs. ``B`` videos, ``N`` questions each, of up to ``L`` tokens.

    Attributes:
        rows: ``[B, P, H]`` pooled rows (zero where the plan has none).
        kind: int64 ``[B, P]``: 0 row, 1 separator, 2 padding; the header is the first three.
        ids: int64 ``[B, N * L]`` inputs.
        targets: int64 ``[B, N * L]``, -100 where nothing is learnt.
        weight: ``[B, N * L]`` of each target.
        positions: int64 ``[B, P + N * L]``.
        early: int64 ``[B, N * L, 2]``: words that should be on the model's mind before its last layers; the
            target but where that is an option's letter, there the first two tokens of the answer that it
            stands for.
        questions: per video, the questions.
        clues: see :mod:`training.clues`; None without videos that have them.
    """

    rows: Tensor
    kind: Tensor
    ids: Tensor
    targets: Tensor
    weight: Tensor
    positions: Tensor
    early: Tensor
    questions: list[list[Question]]
    clues: Clues | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        clues = Clues(**{k: v.to(device) for k, v in vars(self.clues).items()}) if self.clues else None
        return replace(self, **tensors, clues=clues)


def collate(coder: Coder, videos: list[Encoded], plans: list[list[int]], asked: list[list[Question]]) -> Batch:
    """Pack; every video needs the same number of questions."""
    count, width = len(asked[0]), max(len(p) for p in plans)
    pairs = [[coder.pair(q) for q in qs] for qs in asked]
    length = max(len(p) + len(a) - 1 for row in pairs for p, a in row)
    b, h = len(videos), videos[0].rows.shape[1]
    rows, kind = torch.zeros(b, width, h, dtype=videos[0].rows.dtype), torch.full((b, width), 2)
    ids, targets = torch.zeros(b, count, length, dtype=torch.long), torch.full((b, count, length), -100)
    weight = torch.zeros(b, count, length)
    early = torch.full((b, count, length, 2), -100)
    positions = torch.zeros(b, width + count * length, dtype=torch.long)
    for n, (video, layout, row) in enumerate(zip(videos, plans, pairs, strict=True)):
        index = torch.tensor(layout)
        real = index >= 0
        rows[n, : len(layout)][real] = video.rows[index[real]]
        kind[n, : len(layout)] = (index == SEPARATOR).long()
        positions[n, :width] = torch.arange(width)
        positions[n, width:] = (len(layout) + torch.arange(length)).repeat(count)
        for m, (prompt, answer) in enumerate(row):
            whole = prompt + answer
            ids[n, m, : len(whole) - 1] = torch.tensor(whole[:-1])
            targets[n, m, len(prompt) - 1 : len(whole) - 1] = torch.tensor(answer)
            weight[n, m, len(prompt) - 1 : len(whole) - 1] = len(answer) ** -0.5
            early[n, m, len(prompt) - 1 : len(whole) - 1, 0] = torch.tensor(answer)
            if asked[n][m].plain:
                words = coder.ids(asked[n][m].plain)[:2]
                early[n, m, len(prompt) - 1, : len(words)] = torch.tensor(words)
    clues = _clues(coder, videos, plans, asked, width, length)
    tensors = (t.flatten(1, 2) for t in (ids, targets, weight))
    return Batch(rows, kind, *tensors, positions, early.flatten(1, 2), asked, clues)


def _clues(
    coder: Coder, videos: list[Encoded], plans: list[list[int]], asked: list[list[Question]], width: int, length: int
) -> Clues | None:
    """Labels of the visual tokens and of the phrases in the questions of a batch; see :func:`collate`."""
    index = torch.full((len(videos), width), -1)
    for n, layout in enumerate(plans):
        index[n, : len(layout)] = torch.tensor(layout)
    rows = index >= 0
    shown = [v.clues[i[r]] for v, i, r in zip(videos, index, rows, strict=True) if v.clues is not None]
    if len(shown) < len(videos):
        return None
    at, labels, options_at, right = [], [], [], []
    for n, (video, questions) in enumerate(zip(videos, asked, strict=True)):
        starts: dict[int, int] = {}
        for position, row in enumerate(plans[n]):
            if row >= 0:
                starts.setdefault(row // 21, position)
        begins = list(starts.values())
        for m, q in enumerate(questions):
            first, text = (n * len(questions) + m) * length, coder.asked(q)
            for end, things in phrases(q) if begins else ():
                at.append(first + coder.token_at(text, 1 + end))
                labels.append(meant(video.video, things, begins))
            answer, past = f"{q.answer}{END}", len(coder.ids(text))
            for begin, end, things in sequel(q) if begins else ():
                told = meant(video.video, things, begins)
                for token in range(coder.token_at(answer, begin), coder.token_at(answer, end)):
                    at.append(first + past + token)
                    labels.append(told)
            for end, is_right in options(q):
                options_at.append(first + coder.token_at(text, 1 + end))
                right.append([is_right])
    where = torch.arange(width).expand(len(videos), -1)[rows]
    return Clues(
        rows,
        torch.cat((torch.cat(shown), when(where)), dim=1),
        torch.tensor(at, dtype=torch.long),
        torch.stack(labels) if labels else torch.zeros(0, WIDTH, dtype=torch.uint8),
        torch.tensor(options_at, dtype=torch.long),
        torch.tensor(right, dtype=torch.uint8).view(-1, 1),
    )


def embed(lm: LM, last: torch.nn.Linear, newline: Tensor, header: list[int], batch: Batch) -> Packed:
    """Look up and project: the packed input of the language model."""
    vis = last(batch.rows)
    vis = torch.where((batch.kind == 1)[..., None], newline.to(vis.dtype), vis)
    head = lm.embed_tokens(torch.tensor(header, device=vis.device)).expand(len(vis), -1, -1)
    x = torch.cat((head, vis[:, len(header) :], lm.embed_tokens(batch.ids)), dim=1)
    bias = torch.zeros(batch.kind.shape, dtype=x.dtype, device=x.device)
    bias = bias.masked_fill(batch.kind == 2, torch.finfo(torch.bfloat16).min)[:, None]
    prefix = batch.kind.shape[1]
    count = len(batch.questions[0])
    return Packed(x, batch.positions, bias, prefix, count)


class Pool:
    """A rolling stock of encoded training videos; each is used several times, with new questions."""

    def __init__(self, tower: Tower, first: int, size: int = 2400, codec: float = 0.6) -> None:
        self.tower, self.next, self.codec = tower, first, codec
        self.videos: deque[Encoded] = deque(maxlen=size)

    def grow(self, count: int, frames: tuple[int, int], max_scenes: int) -> None:
        """Add ``count`` new videos, dropping the oldest beyond the pool's size."""
        for _ in range(count):
            rng = random.Random(self.next)
            video = make_video(seed_of("train", self.next), frames, max_scenes, LIVELY_TRAINING)
            crf = rng.randint(18, 28) if rng.random() < self.codec else None
            self.videos.append(encode(self.tower, video, crf, noise=self.next, lessons=True))
            self.next += 1

    def take(self, count: int, rng: random.Random) -> list[Encoded]:
        """``count`` videos of about the same length."""
        some = sorted(rng.sample(list(self.videos), min(len(self.videos), 4 * count)), key=lambda e: e.video.frames)
        start = rng.randint(0, len(some) - count)
        return some[start : start + count]


def pick(
    video: Encoded, count: int, kinds: tuple[str, ...], rng: random.Random, match: Mapping[str, float] | None = None
) -> list[Question]:
    """``count`` questions; a question may come twice where the video has too few.

    Kinds are drawn evenly. In training, ``match`` tells how well each kind is answered by now: the worse, the
    more often it is drawn. Options are then first asked of kinds that can be answered without, and half of
    the sentences that do not tell of one thing after another are drawn anew: those that do resist most.
    """
    out: list[Question] = []
    match = match or {}
    weights = [1.15 - match.get(kind, 1.0) for kind in kinds]
    known = [kind for kind, share in match.items() if share > 0.8] if match.get("letter", 1.0) < 0.8 else []
    while len(out) < count:
        q = draw(video.video, rng.choices(kinds, weights)[0], rng, video.stock, known)
        if match and q is not None and q.kind == "open" and not q.told and rng.random() < 0.5:
            continue
        if q is not None:
            out.append(q)
    return out


def held_out(tower: Tower, split: str, first: int, count: int) -> list[Encoded]:
    """Held-out videos of full length, all of them through mp4 at the default quality, no noise."""
    videos = (make_video(seed_of(split, i), (MIN_FRAMES, MAX_FRAMES)) for i in range(first, first + count))
    return [encode(tower, v, crf=23) for v in videos]
