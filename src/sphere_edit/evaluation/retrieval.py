"""Retrieval in the prompt: the facts that BM25 finds, put before each question. What one gets without editing, for comparison.

BM25 (Robertson and Zaragoza, 2009): a document d scores ``Σ_t idf(t) f (k1 + 1) / (f + k1 (1 − b + b |d| / avg|d|))`` for the words t of a query,
f being how often t stands in d and ``idf(t) = ln(1 + (N − n + 0.5) / (n + 0.5))`` for n of N documents with t; k1 = 1.5, b = 0.75.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from sphere_edit.facts.fact import Fact

_K1, _B = 1.5, 0.75
_ENDS = (".", "!", "?", "。")


class Index:
    """Documents that are found by their words, whatever the case."""

    def __init__(self, documents: Sequence[str]):
        self.documents = list(documents)
        self._counts = [Counter(_words(document)) for document in self.documents]
        self._sizes = [sum(counts.values()) for counts in self._counts]
        self._mean = sum(self._sizes) / max(1, len(self._sizes))
        self._having: dict[str, list[int]] = defaultdict(list)
        for number, counts in enumerate(self._counts):
            for word in counts:
                self._having[word].append(number)

    def scores(self, query: str) -> dict[int, float]:
        """BM25 of each document that has a word of the query, by its number."""
        found: dict[int, float] = defaultdict(float)
        for word in _words(query):
            having = self._having.get(word, ())
            rarity = math.log(1 + (len(self.documents) - len(having) + 0.5) / (len(having) + 0.5))
            for number in having:
                count = self._counts[number][word]
                norm = _K1 * (1 - _B + _B * self._sizes[number] / self._mean)
                found[number] += rarity * count * (_K1 + 1) / (count + norm)
        return found

    def nearest(self, query: str, count: int) -> list[str]:
        """The documents with the highest scores, at most so many, the best first; of equal ones the first."""
        scores = self.scores(query)
        return [
            self.documents[number] for number in sorted(scores, key=lambda number: (-scores[number], number))[:count]
        ]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def sentence(fact: Fact) -> str:
    """A fact as a sentence: its prompt, and its new answer."""
    text = f"{fact.filled_prompt}{fact.separator if fact.separator is not None else ' '}{fact.target_new}".strip()
    return text if text.endswith(_ENDS) else f"{text}."


def with_retrieved(facts: Sequence[Fact], count: int) -> list[Fact]:
    """The facts with the ``count`` sentences that BM25 finds among them put before each of their prompts, the best one last.

    Every prompt is searched for by its own text, neighbours and portability too. What is right after it, and its rival, stay.
    """
    index = Index([sentence(fact) for fact in facts])

    def before(prompt: str) -> str:
        return "\n".join([*reversed(index.nearest(prompt, count)), prompt])

    return [
        replace(
            fact,
            subject="",
            prompt=before(fact.filled_prompt),
            paraphrases=tuple(map(before, fact.paraphrases)),
            neighbors=tuple(replace(neighbor, prompt=before(neighbor.prompt)) for neighbor in fact.neighbors),
            portability=tuple(replace(probe, prompt=before(probe.prompt)) for probe in fact.portability),
        )
        for fact in facts
    ]
