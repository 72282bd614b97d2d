"""Prompts with their answers as rows of tokens: facts' new answers, or the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.generation import end_tokens, greedy_continuations
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.tokens import Predictions, TokenBatch, batches_by_length

LossAndGradients = tuple[float, dict[str, Tensor]]
Coded = tuple[list[int], int]  # token ids of a prompt and its answer, and the answer's first token


def gradients_of(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What backward passes have left in some leaves."""
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def added_up(parts: Iterable[LossAndGradients]) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of the parts of a sum, and their gradients added up in the order of the parts."""
    losses: list[float] = []
    total: dict[str, Tensor] = {}
    for loss, gradients in parts:
        losses.append(loss)
        total |= {name: gradient + total[name] if name in total else gradient for name, gradient in gradients.items()}
    return losses, total


def in_each_form(facts: Sequence[Fact]) -> list[Fact]:
    """The facts, each as often as it has forms, in one of them each time."""
    return [form for fact in facts for form in fact.in_each_form()]


@dataclass(frozen=True)
class TargetRows:
    """A chunk of facts: prompt and target but for its last token, and where each target token is predicted."""

    batch: TokenBatch
    predictions: Predictions

    def losses(self, loaded: LoadedModel, hidden: Tensor) -> Tensor:
        """Mean −log p of each fact's target tokens, ``[facts]``, from the last layer's output."""
        where = self.predictions
        logits = loaded.architecture.head(loaded.model, hidden[where.rows, where.columns]).float()
        return where.means @ torch.nn.functional.cross_entropy(logits, where.tokens, reduction="none")


def coded_targets(encoder: Encoder, facts: Sequence[Fact]) -> list[Coded]:
    """Prompt and new answer of each fact, and what ends it (`Encoder.taught`); of one in several forms, the first is taken (`in_each_form`)."""
    answered = (
        encoder.answered(fact.filled_prompt, encoder.taught(fact), fact.separator, fact.chat, fact.system)
        for fact in facts
    )
    return [(tokens.ids, start) for tokens, start in answered]


def coded_own(loaded: LoadedModel, encoder: Encoder, facts: Sequence[Fact]) -> list[Coded]:
    """Prompt and the model's own answer as it stands, of as many tokens as each fact's new answer has."""
    prompts = [encoder.asked_fact(fact).ids for fact in facts]
    lengths = [len(ids) - start for ids, start in coded_targets(encoder, facts)]
    said = own_answers(loaded, prompts, lengths)
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, said, strict=True)]


def own_answers(loaded: LoadedModel, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """The model's own greedy answers as it stands, token ids, so many each; fewer where it ends its text."""
    return greedy_continuations(loaded, prompts, lengths, [end_tokens(loaded)] * len(prompts))


def target_rows(loaded: LoadedModel, coded: Sequence[Coded], max_tokens: int) -> Iterator[tuple[list[int], TargetRows]]:
    """Prompts with their answers, cut into chunks: their indices and tokens."""
    for chunk in batches_by_length([len(ids) - 1 for ids, _ in coded], max_tokens):
        chosen = [coded[index] for index in chunk]
        answers = [(number, number, start - 1, ids[start:]) for number, (ids, start) in enumerate(chosen)]
        batch = TokenBatch.of([ids[:-1] for ids, _ in chosen], loaded.device)
        yield chunk, TargetRows(batch, Predictions.of(answers, len(chunk), loaded.device))
