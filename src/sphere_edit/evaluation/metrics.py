"""Efficacy, generalization and specificity of the deployed model, in four protocols side by side.

Every prompt has a right answer (target_new; for a neighbour its own) and a rival (target_true; for a neighbour target_new):

- *likelihood* (published: ROME, MEMIT, AlphaEdit, SPHERE on CounterFact): the mean negative log-likelihood per token of the
  right answer is lower than that of its rival;
- *strict*: every token of the right answer is the likeliest one, given the answer's tokens before it;
- *token*: the share of the right answer's tokens that are the likeliest, given those before (the authors' ZsRE numbers);
- *generated*: what the model says freely and greedily begins with the right answer (`sphere_edit.evaluation.generation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.forward import last_hidden, next_token_scores
from sphere_edit.models.generation import greedy_continuations
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.tokens import Predictions, TokenBatch, over_batches
from sphere_edit.progress import Reporter

PARTS = ("efficacy", "generalization", "specificity")
PROTOCOLS = {"": "likelihood", "_strict": "strict", "_token": "per token", "_generated": "generated"}
_DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class PromptScore:
    """One prompt of a fact.

    Attributes:
        nll_right: mean negative log-likelihood per token (nats) of the right answer.
        nll_other: of its rival.
        accuracy: share of the right answer's tokens that are the likeliest, given those before.
        said: what the model says after the prompt, where it was asked.
        begins: whether that begins with the right answer.
    """

    nll_right: float
    nll_other: float
    accuracy: float
    said: str | None = None
    begins: bool | None = None

    @property
    def prefers(self) -> bool:
        """The likelihood verdict; the same text on both sides counts as kept."""
        return self.nll_right <= self.nll_other

    @property
    def correct(self) -> bool:
        """The strict verdict."""
        return self.accuracy == 1.0


_VERDICTS: Mapping[str, Callable[[PromptScore], float | None]] = {
    "": lambda score: float(score.prefers),
    "_strict": lambda score: float(score.correct),
    "_token": lambda score: score.accuracy,
    "_generated": lambda score: None if score.begins is None else float(score.begins),
}


@dataclass(frozen=True)
class FactScores:
    """All prompts of one fact."""

    rewrite: PromptScore
    paraphrases: tuple[PromptScore, ...]
    neighbors: tuple[PromptScore, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> FactScores:
        """The scores that ``as_dict`` described."""
        return cls(
            PromptScore(**record["rewrite"]),
            tuple(PromptScore(**score) for score in record["paraphrases"]),
            tuple(PromptScore(**score) for score in record["neighbors"]),
        )

    def prompts(self) -> tuple[PromptScore, ...]:
        """Rewrite, paraphrases, neighbours, in the order of `questions`."""
        return (self.rewrite, *self.paraphrases, *self.neighbors)

    def of_part(self, part: str) -> tuple[PromptScore, ...]:
        """The prompts that efficacy, generalization or specificity is the mean of."""
        return {"efficacy": (self.rewrite,), "generalization": self.paraphrases, "specificity": self.neighbors}[part]


@dataclass(frozen=True)
class Answer:
    """What may follow a prompt: a text, or the very tokens a model said.

    ``separator`` stands between the prompt and the text (None: by the rule of older runs); ``others`` are right as well, if generated.
    """

    text: str
    ids: tuple[int, ...] | None = None
    separator: str | None = None
    others: tuple[str, ...] = field(default=(), compare=False)

    def after(self, prompt: str, encoder: Encoder) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer after it."""
        if self.ids is not None:
            return encoder.encode(prompt).ids, list(self.ids)
        tokens, start = encoder.with_target(prompt, self.text, self.separator)
        return tokens.ids[:start], tokens.ids[start:]


def complete_answers(loaded: LoadedModel, facts: Sequence[Fact]) -> list[Fact]:
    """Facts with every missing true answer filled by the model's own greedy one, as many tokens as the new target has.

    To be called with the unedited model in place: what it says is then what the edit is compared with.
    """
    encoder = Encoder(loaded.tokenizer)
    asked: list[tuple[str, str, str | None]] = []
    for fact in facts:
        if fact.target_true is None:
            asked.append((fact.filled_prompt, fact.target_new, fact.separator))
        silent = [neighbor for neighbor in fact.neighbors if neighbor.answer is None]
        asked += [(n.prompt, fact.target_new, fact.separator_of(n, fact.target_new)) for n in silent]
    if not asked:
        return list(facts)
    lengths = [max(1, len(tokens.ids) - start) for tokens, start in (encoder.with_target(*each) for each in asked)]
    prompts = [encoder.encode(prompt).ids for prompt, *_ in asked]
    said = iter(greedy_continuations(loaded, prompts, lengths))

    def answer() -> tuple[str, tuple[int, ...]]:
        ids = next(said)
        return loaded.tokenizer.decode(ids), tuple(ids)

    completed = []
    for fact in facts:
        if fact.target_true is None:
            text, ids = answer()
            fact = replace(fact, target_true=text, target_true_ids=ids)
        neighbors = []
        for neighbor in fact.neighbors:
            if neighbor.answer is None:
                text, ids = answer()
                neighbor = replace(neighbor, answer=text, answer_ids=ids)
            neighbors.append(neighbor)
        completed.append(replace(fact, neighbors=tuple(neighbors)))
    return completed


@dataclass(frozen=True)
class Question:
    """A prompt of a fact with its right answer and the rival."""

    prompt: str
    right: Answer
    other: Answer


def questions(fact: Fact) -> list[Question]:
    """All prompts of a complete fact: its own, its paraphrases, its neighbours."""
    new, truth = fact.target_new, _known(fact.target_true)
    asked = []
    for prompt in (fact.filled_prompt, *fact.paraphrases):
        right = Answer(new, None, fact.separator_after(prompt, new), fact.answers)
        rival = Answer(truth, fact.target_true_ids, fact.separator_after(prompt, truth))
        asked.append(Question(prompt, right, rival))
    for neighbor in fact.neighbors:
        answer = _known(neighbor.answer)
        right = Answer(answer, neighbor.answer_ids, fact.separator_of(neighbor, answer), neighbor.answers)
        asked.append(Question(neighbor.prompt, right, Answer(new, None, fact.separator_of(neighbor, new))))
    return asked


def score_facts(
    loaded: LoadedModel, facts: Sequence[Fact], max_tokens: int, reporter: Reporter, title: str = "evaluation"
) -> list[FactScores]:
    """Score every prompt of every fact on the model as it stands; facts must be complete (`complete_answers`)."""
    asked = [questions(fact) for fact in facts]
    pairs = {
        (question.prompt, answer): None
        for several in asked
        for question in several
        for answer in (question.right, question.other)
    }
    scored = _answer_scores(loaded, list(pairs), max_tokens, reporter, title)

    def score(question: Question) -> PromptScore:
        right, accuracy = scored[question.prompt, question.right]
        return PromptScore(right, scored[question.prompt, question.other][0], accuracy)

    return [grouped(fact, map(score, several)) for fact, several in zip(facts, asked, strict=True)]


def grouped(fact: Fact, scores: Iterable[PromptScore]) -> FactScores:
    """The scores of a fact's `questions`, told apart."""
    rewrite, *rest = scores
    cut = len(fact.paraphrases)
    return FactScores(rewrite, tuple(rest[:cut]), tuple(rest[cut:]))


def _answer_scores(
    loaded: LoadedModel, pairs: Sequence[tuple[str, Answer]], max_tokens: int, reporter: Reporter, title: str
) -> dict[tuple[str, Answer], tuple[float, float]]:
    """For each (prompt, answer): mean NLL per answer token, and the share of them that are the argmax."""
    encoder = Encoder(loaded.tokenizer)
    coded = [answer.after(prompt, encoder) for prompt, answer in pairs]
    hosts = _hosts([(*before, *answer[:-1]) for before, answer in coded])
    with reporter.bar(title, len(pairs), "answers") as advance:

        def read(chunk: list[tuple[int, ...]]) -> Iterator[list[tuple[float, float]]]:
            hidden = last_hidden(loaded, TokenBatch.of(chunk, loaded.device))
            guests = [(row, index) for row, host in enumerate(chunk) for index in hosts[host]]
            answers = [(at, row, len(coded[index][0]) - 1, coded[index][1]) for at, (row, index) in enumerate(guests)]
            where = Predictions.of(answers, len(guests), hidden.device)
            losses, likeliest = next_token_scores(loaded, hidden[where.rows, where.columns], where.tokens)
            sizes = [len(answer) for *_, answer in answers]
            right = (likeliest == where.tokens).split(sizes)
            scores = iter(
                (float(loss.double().mean()), float(hits.double().mean()))
                for loss, hits in zip(losses.split(sizes), right, strict=True)
            )
            advance(len(guests))
            return ([next(scores) for _ in hosts[host]] for host in chunk)

        scored = over_batches(list(hosts), max_tokens, read)
    return {
        pairs[index]: score
        for guests, scores in zip(hosts.values(), scored, strict=True)
        for index, score in zip(guests, scores, strict=True)
    }


def _hosts(rows: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """Which rows have to be run, and for each the indices of the rows that it begins with, its own included.

    What a causal model computes at a position depends on what stands before it alone, so a row that begins another one
    need not be run: two answers of one token each after a prompt are both read off the prompt.
    """
    hosts: dict[tuple[int, ...], list[int]] = {}
    host: tuple[int, ...] = ()
    for index in sorted(range(len(rows)), key=lambda index: rows[index], reverse=True):
        row = rows[index]
        if host[: len(row)] != row:  # in this order a row comes right after those that it begins
            host = row
        hosts.setdefault(host, []).append(index)
    return hosts


def summarise(scores: Sequence[FactScores]) -> dict[str, float | None]:
    """Means over facts (of a fact's prompts first), in percent, by part and protocol; None where nothing was measured.

    ``score`` is the harmonic mean of the three parts, in each protocol.
    """
    values = _values(scores)
    return _named(_means(values, torch.ones(1, len(values), dtype=values.dtype))[0])


def intervals(
    scores: Sequence[FactScores], facts: Sequence[Hashable] | None = None, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile bootstrap intervals, over facts, of what `summarise` says, from 1,000 draws.

    ``facts`` names the fact of each score, where several are of one fact (runs with several seeds): it is drawn with all of them.
    """
    values = _values(scores)
    return _spans(_means(values, resampled(range(len(scores)) if facts is None else facts, seed)))


def difference_intervals(
    before: Sequence[FactScores],
    after: Sequence[FactScores],
    facts: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile bootstrap intervals of the change from ``before`` to ``after``, paired: the same facts in the same order."""
    if len(before) != len(after):
        raise ValueError(f"paired scores must be of the same facts, not {len(before)} and {len(after)}")
    weights = resampled(range(len(before)) if facts is None else facts, seed)
    return _spans(_means(_values(after), weights) - _means(_values(before), weights))


def resampled(facts: Sequence[Hashable], seed: int) -> Tensor:
    """How often each score is in each of 1,000 draws of the bootstrap over facts ``[draws, scores]``, float64."""
    numbers = {fact: number for number, fact in enumerate(dict.fromkeys(facts))}
    weights = torch.zeros(_DRAWS, len(numbers), dtype=torch.float64)
    if numbers:
        drawn = torch.randint(len(numbers), (_DRAWS, len(numbers)), generator=torch.Generator().manual_seed(seed))
        weights.scatter_add_(1, drawn, torch.ones_like(weights))
    return weights[:, [numbers[fact] for fact in facts]]


def _spans(means: Tensor) -> dict[str, tuple[float, float] | None]:
    """The middle 95 % of each column of ``means [draws, 16]``."""
    low, high = means.nanquantile(torch.tensor([0.025, 0.975], dtype=means.dtype), dim=0)
    lows, highs = _named(low), _named(high)
    return {
        name: None if (first := lows[name]) is None or (last := highs[name]) is None else (first, last) for name in lows
    }


def _values(scores: Sequence[FactScores]) -> Tensor:
    """Each fact's share of prompts that went well ``[facts, 12]``: three parts in each of four protocols; NaN for none."""
    rows = [
        [_share(score.of_part(part), verdict) for verdict in _VERDICTS.values() for part in PARTS] for score in scores
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(_VERDICTS) * len(PARTS))


def _share(scores: Sequence[PromptScore], verdict: Callable[[PromptScore], float | None]) -> float:
    verdicts = [value for score in scores if (value := verdict(score)) is not None]
    return sum(verdicts) / len(verdicts) if verdicts else math.nan


def _means(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted means of columns in percent ``[draws, 16]``, NaN left out, with each protocol's harmonic mean after its parts."""
    means = 100 * weighted_means(values, weights)
    parts = means.reshape(len(weights), len(_VERDICTS), len(PARTS))
    known = parts.isfinite()
    harmonic = known.sum(-1) / torch.where(known, 1 / parts, 0.0).sum(-1)
    harmonic = torch.where(known.any(-1), harmonic, torch.nan)
    return torch.cat([parts, harmonic[..., None]], dim=-1).flatten(1)


def weighted_means(values: Tensor, weights: Tensor) -> Tensor:
    """Means ``[draws, columns]`` of ``values [scores, columns]`` with ``weights [draws, scores]``; what is NaN does not count."""
    there = values.isfinite().to(values.dtype)
    return (weights @ values.nan_to_num()) / (weights @ there)


def _named(means: Tensor) -> dict[str, float | None]:
    names = [f"{part}{suffix}" for suffix in _VERDICTS for part in (*PARTS, "score")]
    return {name: None if math.isnan(value) else value for name, value in zip(names, means.tolist(), strict=True)}


def _known(answer: str | None) -> str:
    assert answer is not None, "complete_answers was not called"
    return answer
