"""Stage 2 of training: the language model and the projector's last layer, on features of the frozen tower.

Usage (again the same line to resume; a larger ``--minutes`` goes on from a finished run)::

    python -m training.train_lm --tower runs/tower/tower.pt --out runs/lm --minutes 120

Wall-clock minutes, summed over restarts, set the schedule: warm-up, plateau, linear fall over the last
quarter. Every ten minutes, and when told to stop (SIGTERM), ``last.pt`` (fp32 weights, a few megabytes) and
``optim.pt`` are written; every ten minutes a held-out sample is scored too.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import fused, optim, ranks
from training.clues import CHOOSING, MEANING, SEEING, ReadOuts
from training.device import DEVICE
from training.lm import LM, LMConfig
from training.packing import (
    LESSONS,
    LONG,
    SHORT,
    Batch,
    Coder,
    Encoded,
    Pool,
    collate,
    embed,
    held_out,
    mixed_plan,
    pick,
    plan,
    stock_plan,
)
from training.questions import KINDS
from training.tokenizer import load_tokenizer
from training.tower import COMBOS, Tower, TowerConfig
from training.world import COLOURS, DIGITS, SCENES, SHAPES, WORDS

TAUGHT = (*KINDS, *LESSONS, "option")
MIXES = ((0.3, 0.4, 0.3), (0.1, 0.6, 0.3), (0.5, 0.4, 0.1), (0.0, 1.0, 0.0), (0.5, 0.5, 0.0))


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum; the next begins when exact match on training batches passes ``goal``."""

    frames: tuple[int, int]
    scenes: int
    batch: int
    grow: int  # new videos a step
    stock: float  # share of steps with the unmodified model's pooling
    goal: float


STAGES = (
    Stage((4, 20), 4, 12, 2, 0.25, 0.80),
    Stage((8, 32), 5, 10, 2, 0.25, 0.85),
    Stage((12, 64), 6, 8, 1, 0.4, 2.0),
    Stage((12, 64), 6, 8, 2, 0.6, 2.0),
)


class Model(nn.Module):
    """What stage 2 trains."""

    def __init__(self, c: LMConfig, tower: Tower) -> None:
        super().__init__()
        self.lm = LM(c)
        self.last = nn.Linear(c.hidden, c.hidden)
        self.last.load_state_dict(tower.linear_2.state_dict())
        self.newline = nn.Parameter(torch.randn(c.hidden) * c.hidden**-0.5)
        self.read_outs = ReadOuts(c.hidden)


@dataclass(frozen=True)
class Help:
    """What is learnt besides the answers, with its weight in the loss; nothing by default.

    ``tap`` is the layer (0: none) after which the words of the answer are read out too. ``clues`` weighs
    :mod:`training.clues`.
    """

    tap: int = 0
    early: float = 0.3
    clues: float = 0.0


def scores(
    model: Model, coder: Coder, batch: Batch, aid: Help = Help()
) -> tuple[Tensor, list[list[bool]], list[float]]:
    """Loss; for every question whether greedy decoding would give exactly its answer; the loss's parts.

    All the answer's tokens being the arg max behind the right prefix is the same as greedy decoding giving
    the answer.
    """
    batch = batch.to(model.newline.device)
    packed = embed(model.lm, model.last, model.newline, coder.header, batch)
    final, tapped = model.lm.hidden(packed, (aid.tap, SEEING, MEANING, CHOOSING))
    at = batch.targets >= 0
    want, weight = batch.targets[at], batch.weight[at]
    logits = model.lm.lm_head(final[at]).float()
    loss = (F.cross_entropy(logits, want, reduction="none") * weight).sum() / weight.sum()
    parts = [loss.item()]
    if aid.tap:
        words, states = batch.early[at], model.lm.read_out(tapped[aid.tap][:, packed.prefix :][at])
        guess = model.lm.lm_head(states).float().log_softmax(-1)
        each = -guess.gather(1, words.clamp(min=0)).masked_fill(words < 0, 0.0).sum(1) / (words >= 0).sum(1)
        early = (each * weight).sum() / weight.sum()
        parts.append(early.item())
        loss = loss + aid.early * early
    if aid.clues and batch.clues is not None:
        told = model.read_outs.loss(batch.clues, tapped, packed.prefix)
        parts += [part.item() for part in told]
        loss = loss + aid.clues * sum(told[1:], told[0])
    hit = torch.ones_like(batch.targets, dtype=torch.bool)
    hit[at] = logits.argmax(-1) == want
    rows, count = len(hit), len(batch.questions[0])
    return loss, hit.view(rows, count, -1).all(-1).tolist(), parts


@torch.no_grad()
def evaluate(model: Model, coder: Coder, videos: list[Encoded], per_kind: int = 2) -> dict[str, float]:
    """Exact match per kind on ``videos`` with stock pooling; ``n/KIND`` counts the questions."""
    right: dict[str, list[bool]] = defaultdict(list)
    for video in videos:
        rng = random.Random(video.video.seed)
        for kinds in (SHORT, LONG):
            asked = pick(video, per_kind * len(kinds), kinds, rng)
            _, hits, _ = scores(model, coder, collate(coder, [video], [stock_plan(video.video.frames)], [asked]))
            for q, hit in zip(asked, hits[0], strict=True):
                right[q.kind].append(hit)
    return {k: sum(v) / len(v) for k, v in sorted(right.items())}


class Run:
    """State of a training run: fp32 weights and optimisers, a bf16 copy that computes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.coder = Coder(load_tokenizer(self.out))
        self.tower = load_tower(args.tower).to(DEVICE, torch.bfloat16)
        torch.manual_seed(1)
        config = LMConfig(vocab=self.coder.tok.get_vocab_size(), layers=args.layers)
        self.master = Model(config, load_tower(args.tower)).to(DEVICE)
        self.model = Model(config, load_tower(args.tower)).to(DEVICE, torch.bfloat16)
        self.optimisers = optim.build(self.master, args.lr, ("layers.", "last."))
        self.step, self.stage, self.spent, self.entered = 0, 0, 0.0, 0
        self.match: dict[str, float] = {}
        next_video, resumed = 0, (self.out / "last.pt").exists()
        if resumed:
            state = torch.load(self.out / "last.pt", map_location=DEVICE)
            self.master.load_state_dict(state["model"])
            self.step, self.stage, self.spent = state["step"], state["stage"], state["spent"]
            self.match, next_video, self.entered = state["match"], state["next"], state["entered"]
            if (self.out / "optim.pt").exists():
                for o, s in zip(self.optimisers, torch.load(self.out / "optim.pt", map_location=DEVICE), strict=True):
                    o.load_state_dict(s)
        self.pool = Pool(self.tower, next_video + ranks.RANK * 10**8, size=args.pool)
        if not resumed:  # a run that training.start made is at step 0 too, and knows its words
            self.pool.grow(64, STAGES[0].frames, STAGES[0].scenes)
            settle(self.master.last, torch.cat([v.rows for v in self.pool.videos]).to(DEVICE).float())
            align(self.master.lm, word_directions(args.tower, self.coder))
        ranks.share(self.master.parameters())
        self.publish()
        self.rng = random.Random(self.step + ranks.RANK * 10**8)
        self.held: list[Encoded] = []  # encoded on first use

    def publish(self) -> None:
        """Copy the fp32 weights into the bf16 model."""
        with torch.no_grad():
            for a, b in zip(self.model.parameters(), self.master.parameters(), strict=True):
                a.copy_(b)

    def save(self) -> None:
        """Write ``last.pt`` and ``optim.pt``; each replaces the old one at once."""
        state: dict[str, Any] = {"model": self.master.state_dict(), "config": asdict(self.master.lm.c)}
        state |= {f: getattr(self, f) for f in ("step", "stage", "spent", "match", "entered")} | {
            "next": self.pool.next
        }
        for name, what in (("last.pt", state), ("optim.pt", [o.state_dict() for o in self.optimisers])):
            torch.save(what, self.out / f"{name}.new")
            (self.out / f"{name}.new").replace(self.out / name)

    def batch(self) -> Batch:
        """A training batch of the present stage."""
        stage, rng = STAGES[self.stage], self.rng
        if self.match.get("option", 0.0) < 0.9 and rng.random() < self.args.blind:
            # Finding the letter of a word needs no video, and far fewer tokens without one.
            videos = self.pool.take(stage.batch, rng)
            asked = [pick(v, 24, ("option",), rng) for v in videos]
            return collate(self.coder, videos, [plan(0, [], set())] * len(videos), asked)
        long = rng.random() < self.args.long
        videos = self.pool.take(stage.batch, rng)
        if rng.random() < stage.stock:
            plans = [stock_plan(v.video.frames) for v in videos]
        else:
            mix = rng.choice(MIXES)
            plans = [mixed_plan(v.video.frames, mix, rng) for v in videos]
        kinds = (*LONG, "option") if long else (*SHORT, *LESSONS)
        asked = [pick(v, 8 if long else 16, kinds, rng, self.match) for v in videos]
        return collate(self.coder, videos, plans, asked)

    def train_step(self, lr: float, spent: float = 0.0, stop: bool = False) -> tuple[list[float], bool]:
        """One update; returns the parts of the loss, and whether any process was told to ``stop``.

        ``spent``, seconds, becomes the mean over the processes, as do gradients and matches: all processes
        stay alike.
        """
        batch = self.batch()
        loss, hits, parts = scores(self.model, self.coder, batch, Help(self.args.tap, clues=self.args.clues))
        loss.backward()
        for a, b in zip(self.model.parameters(), self.master.parameters(), strict=True):
            b.grad = torch.zeros_like(b) if a.grad is None else a.grad.float()
            a.grad = None
        for asked, row in zip(batch.questions, hits, strict=True):
            for q, hit in zip(asked, row, strict=True):
                self.match[q.kind] = 0.998 * self.match.get(q.kind, 0.0) + 0.002 * hit
        common = torch.tensor([spent, float(stop), *(self.match.get(kind, 0.0) for kind in TAUGHT)])
        ranks.average([common, *(p.grad for p in self.master.parameters() if p.grad is not None)])
        self.spent, stopped, *match = common.tolist()
        self.match = dict(zip(TAUGHT, match, strict=True))
        nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        optim.set_lr(self.optimisers, lr)
        for o in self.optimisers:
            o.step()
        self.publish()
        self.step += 1
        return parts, stopped > 0

    def advance(self) -> None:
        """Next stage of the curriculum once the mean match over the kinds is good enough."""
        mean = sum(self.match.values()) / max(1, len(self.match))
        old = self.step - self.entered
        if self.stage + 1 < len(STAGES) and (mean > STAGES[self.stage].goal or old > self.args.patience) and old > 100:
            self.stage, self.entered = self.stage + 1, self.step


@torch.no_grad()
def settle(last: nn.Linear, rows: Tensor, spread: float = 0.5) -> None:
    """Centre and scale the projector's output over ``rows``,
    so that visual tokens start about as large as words.
    """
    out = last(rows)
    scale = spread / (out - out.mean(0)).std()
    last.bias.sub_(out.mean(0)).mul_(scale)
    last.weight.mul_(scale)


def word_directions(tower: Path, coder: Coder) -> dict[int, Tensor]:
    """For the tokens of every word the tower can name: the direction,
    of unit RMS, by which stage 1 recognises it.

    Raises:
        ValueError: stage 1's read-out has not been trained, as in what :mod:`training.start` writes.
    """
    whole = torch.load(tower, map_location="cpu")
    if whole.get("step") == 0:
        raise ValueError(f"the read-outs in {tower} know nothing yet, and words start from them: run train_tower first")
    state = whole["model"]
    labels, signs = state["1.labels.weight"], DIGITS + WORDS
    rows = dict(zip(SHAPES + COLOURS, labels[-len(SHAPES + COLOURS) :], strict=True))
    rows |= dict(zip(signs, labels[COMBOS : COMBOS + len(signs)], strict=True))
    rows |= dict(zip(SCENES, state["1.scene.weight"], strict=True))
    units = {word: row / row.square().mean().sqrt() for word, row in rows.items()}
    return {coder.ids(text)[-1]: unit for word, unit in units.items() for text in (word, f" {word}")}


@torch.no_grad()
def align(lm: LM, directions: dict[int, Tensor], size: float = 0.5) -> None:
    """Start every word the tower can name at the direction by which stage 1's read-out recognises it.

    What LLaVA's first stage (captions, projector only) does slowly: a word and its picture begin alike.
    """
    for token, unit in directions.items():
        lm.embed_tokens.weight[token] = size * unit.to(lm.norm.device)
        lm.lm_head.weight[token] = 0.05 * unit.to(lm.norm.device)


def load_tower(path: Path) -> Tower:
    """Tower and projector of stage 1, frozen, fp32."""
    state = torch.load(path, map_location="cpu")["model"]
    tower = Tower(TowerConfig())
    tower.load_state_dict({k[2:]: v for k, v in state.items() if k.startswith("0.")})
    return tower.requires_grad_(False)


def parse() -> argparse.Namespace:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--tower", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--minutes", type=float, default=120)
    ap.add_argument("--max-steps", type=int, default=10**9)
    ap.add_argument("--lr", type=float, default=4e-3)
    ap.add_argument("--layers", type=int, default=12)
    ap.add_argument("--long", type=float, default=0.4, help="share of steps with letter and open questions")
    ap.add_argument("--blind", type=float, default=0.2, help="share of steps without a video, until options are found")
    ap.add_argument("--tap", type=int, default=8, help="also read answers out after this layer (0: no)")
    ap.add_argument("--clues", type=float, default=0.2, help="weight of training.clues (0: without)")
    ap.add_argument("--pool", type=int, default=1500)
    ap.add_argument("--patience", type=int, default=1500, help="most steps in one stage of the curriculum")
    ap.add_argument("--every", type=float, default=10, help="minutes between checkpoints")
    ap.add_argument("--compile", action="store_true", help="compile element-wise loops (needs a C++ compiler)")
    ap.add_argument("--valid", type=int, default=24, help="held-out videos of each score")
    return ap.parse_args()


def main() -> None:
    """Train until the minutes are over."""
    args = parse()
    if args.compile:
        fused.compile_all()
    ranks.start()
    run = Run(args)
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: stopped.append(got))
    began, saved = time.time() - run.spent, time.time()
    losses: list[list[float]] = []
    stop = False
    while run.step < args.max_steps and not stop:
        share = run.spent / 60 / args.minutes
        if share >= 1:
            break
        stage = STAGES[run.stage]
        missing = max(0, 200 - len(run.pool.videos))
        run.pool.grow(stage.grow + missing, stage.frames, stage.scenes)
        lr = args.lr * min(1.0, (run.step + 1) / 100) * min(1.0, max(0.02, (1 - share) / 0.25))
        parts, stop = run.train_step(lr, time.time() - began, bool(stopped))
        losses.append(parts)
        run.advance()
        if ranks.RANK:
            continue
        if run.step % 50 == 0:
            match = " ".join(f"{k}:{v:.2f}" for k, v in sorted(run.match.items()))
            mean = " ".join(f"{sum(x) / len(x):.3f}" for x in zip(*losses, strict=True))
            print(f"{run.step} s{run.stage} {run.spent:.0f}s lr {lr:.1e} loss {mean} {match}", flush=True)
            losses = []
        if time.time() - saved > 60 * args.every:
            report(run)
            saved = time.time()
    if not ranks.RANK:
        run.save() if stop else report(run)
    ranks.stop()


def report(run: Run) -> None:
    """Save, score the held-out sample, append to ``curve.jsonl``."""
    run.save()
    if not run.held:
        run.held = held_out(run.tower, "valid", 0, run.args.valid)
    figures = evaluate(run.model, run.coder, run.held, per_kind=1)
    line = {"step": run.step, "stage": run.stage, "minutes": round(run.spent / 60, 1), **figures}
    with (run.out / "curve.jsonl").open("a") as f:
        f.write(json.dumps({k: round(v, 4) for k, v in line.items()}) + "\n")
    print("VALID", json.dumps({k: round(v, 3) for k, v in line.items()}), flush=True)


if __name__ == "__main__":
    main()
