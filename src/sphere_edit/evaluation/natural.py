"""What the model says until it stops by itself, compared whole: exact match, and ROUGE-L for answers that may be put in other words.

Published evaluations cut a model's answer to the length of the right one, which hides that it does not stop there, or that it goes on to say
something else. Here it says what a user would read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sphere_edit.evaluation.generation import continuations, said_after
from sphere_edit.evaluation.scores import FactScores, Line, PromptScore, Question, answer_ends, grouped, questions
from sphere_edit.facts.fact import Fact, folded
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.generation import until_end
from sphere_edit.models.loading import LoadedModel
from sphere_edit.progress import Reporter

# a letter of a script that sets no spaces between words is a word of its own
_ALONE = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


@dataclass(frozen=True)
class _Asked:
    """A prompt that an edit is to change, as the model gets it."""

    question: Question
    ids: list[int]
    chat: bool


def with_lines(
    loaded: LoadedModel,
    facts: Sequence[Fact],
    scores: Sequence[FactScores],
    tokens: int,
    chat: bool,
    max_tokens: int,
    reporter: Reporter,
) -> list[FactScores]:
    """The scores with what the model says, greedily and of itself, after each prompt that an edit is to change: all but the neighbours.

    It says up to so many ``tokens``, until its end of text or of turn. Of that as many lines count as the right answer has, mostly one.

    Args:
        chat: ask in a chat what is not asked in one anyway.
    """
    encoder = Encoder(loaded.tokenizer)
    asked: list[_Asked] = []
    for fact in facts:
        first = 1 + len(fact.paraphrases)
        every = questions(fact)
        for question in (*every[:first], *every[first + len(fact.neighbors) :]):
            in_chat = chat or question.chat
            ids = encoder.asked(question.prompt, in_chat, question.right.system).ids
            asked.append(_Asked(question, ids, in_chat))
    said = continuations(
        loaded, [one.ids for one in asked], [tokens] * len(asked), max_tokens, reporter, "whole answers", end=True
    )
    lines = iter([_line(loaded, encoder, one, ids) for one, ids in zip(asked, said, strict=True)])

    def told(prompts: Sequence[PromptScore]) -> list[PromptScore]:
        return [replace(score, line=next(lines)) for score in prompts]

    return [
        grouped(fact, [*told([score.rewrite, *score.paraphrases]), *score.neighbors, *told(score.portability)])
        for fact, score in zip(facts, scores, strict=True)
    ]


def _line(loaded: LoadedModel, encoder: Encoder, asked: _Asked, ids: list[int]) -> Line:
    ends = answer_ends(loaded, encoder, asked.chat)
    words = [token for token in until_end(ids, ends) if token not in ends]
    text = said_after(loaded.tokenizer, asked.ids, words, special=False)
    answer = asked.question.right
    rights = [answer.text, *(other.text for other in answer.others)]
    line = first_lines(text, max(right.strip().count("\n") for right in rights) + 1)
    exact = any(bare(line) == bare(right) for right in rights)
    return Line(line, exact, max(rouge_l(line, right) for right in rights))


def first_lines(text: str, count: int) -> str:
    """The first so many lines of what was said, without white space around them."""
    return "\n".join(text.strip().splitlines()[:count]).strip()


def bare(text: str) -> str:
    """A text without what does not make it another answer: case, runs of spaces, a full stop at its end."""
    return folded(text).rstrip(".。 ")


def rouge_l(said: str, right: str) -> float:
    r"""ROUGE-L (Lin, 2004): the harmonic mean of ``L / m`` and ``L / n``, with L the longest common subsequence of their m and n words.

    Words are runs of letters and digits, whatever their case; a letter of a script without spaces is one.
    """
    first, second = (_WORD.findall(folded(text)) for text in (said, right))
    return 2 * _common(first, second) / (len(first) + len(second)) if first and second else 0.0


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)  # of the words of `first` so far with so many of `second`
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]
