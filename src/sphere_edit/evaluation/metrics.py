"""Efficacy, generalization, specificity and perplexity of the deployed model.

Every prompt is scored in two protocols side by side:

- *likelihood* (published: ROME, MEMIT, AlphaEdit, SPHERE): the mean negative log-likelihood per token of one answer is
  lower than that of the other: target_new against target_true for efficacy and generalization, the neighbour's own answer
  against target_new for specificity;
- *strict*: every token of the right answer is the likeliest one, given the tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sphere_edit.facts.fact import Fact, Neighbor
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.forward import (
    Predictions,
    TokenBatch,
    batches_by_length,
    generate,
    greedy_continuations,
    last_hidden,
    next_token_scores,
    same_length_batches,
)
from sphere_edit.models.loading import LoadedModel
from sphere_edit.progress import Reporter

_SAID_TOKENS = 12


@dataclass(frozen=True)
class PromptScore:
    """One prompt of a fact: mean negative log-likelihood per token (nats) of both answers, and the strict verdict.

    ``right`` is the answer that should win after the edit (target_new; for a neighbour its own), ``other`` the rival.
    """

    nll_right: float
    nll_other: float
    correct: bool

    @property
    def prefers(self) -> bool:
        """The likelihood verdict; the same text on both sides counts as kept."""
        return self.nll_right <= self.nll_other


@dataclass(frozen=True)
class FactScores:
    """All prompts of one fact; ``said`` is the greedy continuation of the rewrite prompt, where it was asked for."""

    rewrite: PromptScore
    paraphrases: tuple[PromptScore, ...]
    neighbors: tuple[PromptScore, ...]
    said: str | None = None

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
            record["said"],
        )


@dataclass(frozen=True)
class Answer:
    """What may follow a prompt: a text, or the very tokens a model said."""

    text: str
    ids: tuple[int, ...] | None = None

    def after(self, prompt: str, encoder: Encoder) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer after it."""
        if self.ids is not None:
            return encoder.encode(prompt).ids, list(self.ids)
        tokens, start = encoder.with_target(prompt, self.text)
        return tokens.ids[:start], tokens.ids[start:]


def complete_answers(loaded: LoadedModel, facts: Sequence[Fact]) -> list[Fact]:
    """Facts with every missing true answer filled by the model's own greedy one, as many tokens as the new target has.

    To be called with the unedited model in place: what it says is then what the edit is compared with.
    """
    encoder = Encoder(loaded.tokenizer)
    asked: list[tuple[str, str]] = []
    for fact in facts:
        if fact.target_true is None:
            asked.append((fact.filled_prompt, fact.target_new))
        asked += [(neighbor.prompt, fact.target_new) for neighbor in fact.neighbors if neighbor.answer is None]
    if not asked:
        return list(facts)
    lengths = [max(1, len(tokens.ids) - start) for tokens, start in (encoder.with_target(*pair) for pair in asked)]
    prompts = [encoder.encode(prompt).ids for prompt, _ in asked]
    said = iter(greedy_continuations(loaded, prompts, lengths))

    def answer() -> tuple[str, tuple[int, ...]]:
        ids = next(said)
        return loaded.tokenizer.decode(ids), tuple(ids)

    completed = []
    for fact in facts:
        if fact.target_true is None:
            text, ids = answer()
            fact = replace(fact, target_true=text, target_true_ids=ids)
        neighbors = tuple(n if n.answer is not None else Neighbor(n.prompt, *answer()) for n in fact.neighbors)
        completed.append(replace(fact, neighbors=neighbors))
    return completed


def score_facts(
    loaded: LoadedModel, facts: Sequence[Fact], max_tokens: int, reporter: Reporter, title: str = "evaluation"
) -> list[FactScores]:
    """Score every prompt of every fact on the model as it stands; facts must be complete (`complete_answers`)."""
    asked: list[tuple[str, Answer, Answer]] = []  # prompt, right answer, other answer
    for fact in facts:
        new = Answer(fact.target_new)
        truth = Answer(_known(fact.target_true), fact.target_true_ids)
        asked += [(prompt, new, truth) for prompt in (fact.filled_prompt, *fact.paraphrases)]
        asked += [(n.prompt, Answer(_known(n.answer), n.answer_ids), new) for n in fact.neighbors]
    pairs = {(prompt, answer): None for prompt, *answers in asked for answer in answers}
    scored = _answer_scores(loaded, list(pairs), max_tokens, reporter, title)
    verdicts = iter(
        PromptScore(scored[prompt, right][0], scored[prompt, other][0], scored[prompt, right][1])
        for prompt, right, other in asked
    )
    return [
        FactScores(
            next(verdicts),
            tuple(next(verdicts) for _ in fact.paraphrases),
            tuple(next(verdicts) for _ in fact.neighbors),
        )
        for fact in facts
    ]


def continuations(
    loaded: LoadedModel, facts: Sequence[Fact], max_tokens: int, reporter: Reporter, title: str = "generation"
) -> list[str]:
    """What the model says after each fact's prompt, greedily: as many tokens as target_new has, and at least 12."""
    encoder = Encoder(loaded.tokenizer)
    prompts = [encoder.encode(fact.filled_prompt.rstrip()).ids for fact in facts]
    lengths = [max(_SAID_TOKENS, len(encoder.encode(fact.target_new).ids)) for fact in facts]
    said = [""] * len(facts)
    with reporter.bar(title, len(facts), "prompts") as advance:
        for chunk in same_length_batches([len(prompt) for prompt in prompts], max_tokens):
            rows = generate(loaded, [prompts[index] for index in chunk], max(lengths[index] for index in chunk))
            for index, row in zip(chunk, rows, strict=True):
                new = row[len(prompts[index]) :][: lengths[index]]
                said[index] = loaded.tokenizer.decode(new, skip_special_tokens=True)
            advance(len(chunk))
    return said


def _answer_scores(
    loaded: LoadedModel, pairs: Sequence[tuple[str, Answer]], max_tokens: int, reporter: Reporter, title: str
) -> dict[tuple[str, Answer], tuple[float, bool]]:
    """For each (prompt, answer): mean NLL per answer token, and whether each of them is the argmax."""
    encoder = Encoder(loaded.tokenizer)
    coded = [answer.after(prompt, encoder) for prompt, answer in pairs]
    hosts = _hosts([(*before, *answer[:-1]) for before, answer in coded])
    rows = list(hosts)
    found: dict[tuple[str, Answer], tuple[float, bool]] = {}
    with reporter.bar(title, len(pairs), "answers") as advance:
        for chunk in batches_by_length([len(row) for row in rows], max_tokens):
            hidden = last_hidden(loaded, TokenBatch.of([rows[index] for index in chunk], loaded.device))
            guests = [(row, index) for row, host in enumerate(chunk) for index in hosts[rows[host]]]
            answers = [(at, row, len(coded[index][0]) - 1, coded[index][1]) for at, (row, index) in enumerate(guests)]
            where = Predictions.of(answers, len(guests), hidden.device)
            losses, likeliest = next_token_scores(loaded, hidden[where.rows, where.columns], where.tokens)
            sizes = [len(answer) for *_, answer in answers]
            right = (likeliest == where.tokens).split(sizes)
            for (_, index), loss, hits in zip(guests, losses.split(sizes), right, strict=True):
                found[pairs[index]] = (float(loss.double().mean()), bool(hits.all()))
            advance(len(guests))
    return found


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


def perplexity(
    loaded: LoadedModel,
    passages: Sequence[Sequence[int]],
    max_tokens: int,
    reporter: Reporter,
    title: str = "perplexity",
) -> float | None:
    """exp of the mean negative log-likelihood per predicted token, over passages of token ids read one by one.

    None where the model's loss is not finite (a float16 model that overflows).
    """
    passages = [passage for passage in passages if len(passage) > 1]
    total, count = 0.0, 0
    with reporter.bar(title, sum(len(passage) for passage in passages), "tokens") as advance:
        for chunk in batches_by_length([len(passage) for passage in passages], max_tokens):
            batch = TokenBatch.of([passages[index] for index in chunk], loaded.device)
            hidden = last_hidden(loaded, batch)
            predicted = batch.mask[:, 1:].bool()
            losses, _ = next_token_scores(loaded, hidden[:, :-1][predicted], batch.ids[:, 1:][predicted])
            total += float(losses.double().sum())
            count += len(losses)
            advance(int(batch.mask.sum()))
    return math.exp(min(total / count, 700.0)) if count and math.isfinite(total) else None


def summarise(scores: Sequence[FactScores]) -> dict[str, float | None]:
    """Means over facts (of a fact's prompts first), in percent; None where no fact has such prompts.

    ``score`` is the harmonic mean of the three, in each protocol.
    """
    summary: dict[str, float | None] = {}
    for suffix, verdict in (("", "prefers"), ("_strict", "correct")):
        parts = {
            "efficacy": _mean(float(getattr(score.rewrite, verdict)) for score in scores),
            "generalization": _mean(_share(score.paraphrases, verdict) for score in scores if score.paraphrases),
            "specificity": _mean(_share(score.neighbors, verdict) for score in scores if score.neighbors),
        }
        values = [value for value in parts.values() if value is not None]
        harmonic = len(values) / sum(1 / value for value in values) if values and min(values) > 0 else 0.0
        summary |= {name + suffix: value for name, value in parts.items()} | {"score" + suffix: harmonic}
    return summary


def _share(scores: Sequence[PromptScore], verdict: str) -> float:
    return sum(getattr(score, verdict) for score in scores) / len(scores)


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return 100 * sum(numbers) / len(numbers) if numbers else None


def _known(answer: str | None) -> str:
    assert answer is not None, "complete_answers was not called"
    return answer
