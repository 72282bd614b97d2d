"""One prompt, asked of the unedited and of the edited model: what each says, where the two part, and how likely answers are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from sphere_edit.evaluation.scores import Answer, score_answers
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.seam import separator_between
from sphere_edit.models.generation import generate, seeded
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.weights import EditedWeights

Piece = tuple[str, bool]  # a token's text, and whether it is not what the other model says there


@dataclass(frozen=True)
class Chance:
    """How likely an answer is after a prompt: the probability of all its tokens."""

    answer: str
    unedited: float
    edited: float


@dataclass(frozen=True)
class Compared:
    """What both models say to a prompt, token by token, and how likely some answers are to each."""

    prompt: str
    unedited: tuple[Piece, ...]
    edited: tuple[Piece, ...]
    chances: tuple[Chance, ...]

    @property
    def said(self) -> tuple[str, str]:
        """The texts alone."""
        before, after = ("".join(text for text, _ in pieces) for pieces in (self.unedited, self.edited))
        return before, after


def compare(
    loaded: LoadedModel,
    weights: EditedWeights,
    prompt: str,
    answers: Sequence[str] = (),
    new_tokens: int = 40,
    chat: bool = False,
    seed: int | None = None,
    temperature: float = 1.0,
) -> Compared:
    """Ask both models.

    Args:
        answers: how likely these are is told too.
        chat: the prompt is a message in the model's own chat.
        seed: sample with it, the same for both models; greedy where it is None.
        temperature: of sampling.
    """
    encoder = Encoder(loaded.tokenizer)
    asked = encoder.asked(prompt, chat).ids
    texts = [Answer(text, None, separator_between(prompt, text), (), chat) for text in answers]
    found = []
    for side in (weights.unedited(), nullcontext()):
        with side:
            chances = [math.exp(-loss) for loss in score_answers(loaded, prompt, texts)]
            found.append((_said(loaded, asked, new_tokens, seed, temperature), chances))
    (before, old), (after, new) = found
    told = tuple(Chance(*one) for one in zip(answers, old, new, strict=True))
    return Compared(prompt, *_apart(loaded.tokenizer, before, after), told)


def _said(loaded: LoadedModel, ids: Sequence[int], count: int, seed: int | None, temperature: float) -> list[int]:
    if seed is None:
        (row,) = generate(loaded, [ids], count)
    else:
        with seeded(loaded.device, seed):
            (row,) = generate(loaded, [ids], count, do_sample=True, temperature=temperature)
    return row[len(ids) :]


def _apart(tokenizer: Any, before: Sequence[int], after: Sequence[int]) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Both texts in pieces, each marked where the other has something else."""
    same = [set[int](), set[int]()]
    for first, second, size in SequenceMatcher(a=before, b=after, autojunk=False).get_matching_blocks():
        same[0] |= set(range(first, first + size))
        same[1] |= set(range(second, second + size))
    marked = [_pieces(tokenizer, ids, kept) for ids, kept in zip((before, after), same, strict=True)]
    return marked[0], marked[1]


def _pieces(tokenizer: Any, ids: Sequence[int], kept: set[int]) -> tuple[Piece, ...]:
    """What each token adds to the text; one that only completes a character with the next is told with it."""
    pieces: list[Piece] = []
    shown, waiting = "", False
    for at in range(len(ids)):
        text = tokenizer.decode(ids[: at + 1], skip_special_tokens=True)
        waiting = waiting or at not in kept
        if (text.endswith("�") and at + 1 < len(ids)) or text == shown:
            continue
        pieces.append((text[len(shown) :], waiting))
        shown, waiting = text, False
    return tuple(pieces)
