"""Videos made of words, and reading questions about them.

A frame shows one caption. Its grid, as the language model sees it in stock resolution, is one row of 8 cells:
the caption's words, then line ends. In the grid of the "tower" each word fills a block of 2 x 2 cells, so
pooling with stride 2 gives every word back exactly; stride 4 averages two neighbouring words into one row,
stride 8 four: coarse frames are blurred, as they are in a real video. (Words repeated side by side in stock
resolution would survive stride 4 unblurred, but this model cannot read them: see README.)
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FRAMES = 32
WIDTH = 8  # tokens of a caption, padded
TOWER_STRIDE = 2  # the stride that stock pools with

COLORS = ("red blue green black white pink brown gray yellow purple",)
CITIES = ("Paris London Rome Berlin Madrid Moscow Tokyo Boston Chicago Dublin",)
DIGITS = ("1 2 3 4 5 6 7 8 9",) * 3
FOODS = ("bread rice cheese fruit meat corn soup cake fish milk",)
PLACES = ("kitchen garden forest school church office market museum",)

SALES = ("books flowers chairs tables maps", "shoes watches hats coats pots", "toys lamps bags cups tools")

FACTS = {  # name: (caption, question, values); the answer is the caption
    "color": ("The car is {}.", "What color is the car?", COLORS),
    "city": ("The train goes to {}.", "Which city does the train go to?", CITIES),
    "code": ("The code is {}{}{}.", "What is the code?", DIGITS),
    "food": ("The dog eats {}.", "What does the dog eat?", FOODS),
    "place": ("The cat sleeps in the {}.", "Where does the cat sleep?", PLACES),
    "long": ("The man sells {}, {} and {}", "What does the man sell?", SALES),
}
KINDS = ("fact", "code", "long", "word")
DISTRACTORS = (
    "People walk along the street.",
    "Rain falls on the roof.",
    "Music plays on the radio.",
    "Many leaves move in the wind.",
    "Waves roll over the sand.",
)
# Worked examples of the prompt: kinds of facts that are never asked for, the same before every video.
EXAMPLE_VIDEO = ("The king is called Peter.", "The sign says garden.", "The woman reads letters, papers and cards")
EXAMPLES = (
    ("What is the king called?", "The king is called Peter."),
    ("What does the woman read?", "The woman reads letters, papers and cards"),
    ("What does the sign say?", "The sign says garden."),
)


@dataclass(frozen=True)
class Question:
    """`answer` is what must come word for word, behind `given`, the part of it that the prompt ends with."""

    video: int
    kind: str
    text: str
    given: str
    answer: str


@dataclass(frozen=True)
class Video:
    captions: tuple[str, ...]  # one a frame
    questions: tuple[Question, ...]  # one of each of KINDS


def make_video(number: int, seed: int) -> Video:
    """Six facts in random order, each shown for some frames,
    a distractor behind each: twelve scenes in 32 frames.
    """
    rng = random.Random(seed * 1_000_003 + number)
    kinds = list(FACTS)
    rng.shuffle(kinds)
    values = {k: [rng.choice(words.split()) for words in FACTS[k][2]] for k in kinds}
    caption = {k: FACTS[k][0].format(*values[k]) for k in kinds}
    scenes = [text for k in kinds for text in (caption[k], rng.choice(DISTRACTORS))]
    lengths = [2] * len(scenes)
    while sum(lengths) < FRAMES:
        lengths[rng.randrange(len(scenes))] += 1
    captions = tuple(text for text, length in zip(scenes, lengths, strict=True) for _ in range(length))

    fact, word = rng.sample([k for k in FACTS if len(values[k]) == 1], 2)
    asked = {"fact": fact, "code": "code", "long": "long"}
    questions = [Question(number, kind, FACTS[k][1], "", caption[k]) for kind, k in asked.items()]
    given = FACTS[word][0].split(" {}")[0]
    questions.append(Question(number, "word", FACTS[word][1], given, " " + values[word][0]))
    return Video(captions, tuple(questions))


class Prompt:
    """Token ids of everything around and in a video."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.line_end = self.ids("\n")
        if len(self.line_end) != 1:
            raise ValueError("the tokenizer must write a line end as one token")

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    @staticmethod
    def beginning() -> str:
        """System text and worked examples, the same for every question."""
        text = "<|im_start|>system\nAnswer the question about the video.<|im_end|>\n<|im_start|>user\n"
        text += "".join(f" {caption}\n" for caption in EXAMPLE_VIDEO) + "\n"
        for number, (question, answer) in enumerate(EXAMPLES):
            text += "<|im_start|>user\n" if number else ""
            text += f"{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        return text

    def before(self) -> list[int]:
        """Up to the video."""
        return self.ids(self.beginning() + "<|im_start|>user\n")

    def after(self, question: Question) -> list[int]:
        """From the video to the answer."""
        return self.ids(f"\n{question.text}<|im_end|>\n<|im_start|>assistant\n{question.given}")

    def answer(self, question: Question) -> list[int]:
        """What a right run generates; a sentence ends with its full stop."""
        return self.ids(question.answer)

    def frame(self, caption: str) -> list[int]:
        """The 8 tokens of a frame."""
        ids = self.ids(" " + caption)
        if len(ids) > WIDTH:
            raise ValueError(f"a caption has at most {WIDTH} tokens, unlike {caption!r}")
        return ids + self.line_end * (WIDTH - len(ids))


def tower_grid(rows: Tensor) -> Tensor:
    """What the tower would give for frames `rows` [T, 8, D]:
    every word in a block of 2 x 2 cells, [T, 2, 16, D].
    """
    wide = rows.repeat_interleave(TOWER_STRIDE, dim=1)
    return torch.stack([wide] * TOWER_STRIDE, dim=1)
