"""What a method feeds on beside optimised targets: gradients of a loss, or the loss itself."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import count
from operator import add
from typing import ClassVar

import torch
from torch import Tensor

from sphere_edit import ranks
from sphere_edit.counting import counted
from sphere_edit.editing.answers import (
    Coded,
    LossAndGradients,
    TargetRows,
    added_up,
    coded_own,
    coded_targets,
    gradients_of,
    in_each_form,
    target_rows,
)
from sphere_edit.editing.sources import Feed, Report, Source
from sphere_edit.editing.targets import GRADIENT_SCALE
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.forward import Graph, deterministic
from sphere_edit.models.sites import module_of
from sphere_edit.models.tokens import in_order
from sphere_edit.progress import Advance


class TargetGradients(Source):
    """Keys and value gradients where the target's tokens are predicted, all matrices from one backward pass.

    A column a target token: what enters the matrix, and −∂loss/∂output, the loss being the sum over facts of the mean
    over target tokens of −log p. No subject and no template is asked for. Source: UltraEdit (arXiv:2505.14679).
    """

    stage = "gradients"

    def begin(self, facts: Sequence[Fact], advance: Advance = lambda facts: None) -> None:
        """One forward and one backward pass."""
        self._descend(coded_targets(self.encoder, in_each_form(facts)), len(facts), advance)

    def begin_back(self, facts: Sequence[Fact], advance: Advance = lambda facts: None, answers: bool = False) -> None:
        """The same towards the unedited model's own answers."""
        with self.weights.unedited():
            own = coded_own(self.loaded, self.encoder, in_each_form(facts))
        self._descend(own, len(facts), advance)

    def _descend(self, coded: Sequence[Coded], facts: int, advance: Advance) -> None:
        model, architecture = self.loaded.model, self.loaded.architecture
        modules = [module_of(model, architecture, name) for name in self.weights.names]

        def work(part: tuple[list[int], TargetRows]) -> tuple[list[float], list[Tensor], list[Tensor]]:
            chunk, rows = part
            graph = Graph(self.loaded, rows.batch, outputs_of=modules)
            losses = rows.losses(self.loaded, graph.hidden)
            gradients = torch.autograd.grad(losses.sum() * GRADIENT_SCALE, graph.shifts)
            where = (rows.predictions.rows, rows.predictions.columns)
            keys = [inputs[where].float() for inputs in graph.inputs]
            residuals = [-gradient[where].float() / GRADIENT_SCALE for gradient in gradients]
            tell(len(chunk) * facts / len(coded))
            return losses.tolist(), keys, residuals

        parts = list(target_rows(self.loaded, coded, self.max_tokens))
        with deterministic(self.loaded.device), self.loaded.quick(), ranks.told(advance) as tell:
            losses, *found = zip(*ranks.dealt(parts, work), strict=True)
        self._losses: list[float] = in_order(zip((chunk for chunk, _ in parts), losses, strict=True))
        by_matrix = ([torch.cat(several).T.contiguous() for several in zip(*chunks, strict=True)] for chunks in found)
        self._problems = list(zip(*by_matrix, strict=True))
        if not all(loss < float("inf") for loss in self._losses):
            raise SphereEditError("the model overflows on some of the facts; try --dtype float32 or bfloat16")

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """``K [d_in, m]`` and ``R [d_out, m]`` for the edited matrix number ``index``, m target tokens."""
        return self._problems[index]

    def report(self) -> Report:
        """Losses before; there is no descent that would tell of an after."""
        return Report(loss_before=self._losses)


@dataclass(frozen=True)
class FromGradients(Feed):
    """Keys and value gradients where target tokens are predicted."""

    source: ClassVar[type[Source]] = TargetGradients

    @property
    def words(self) -> str:
        """One pass for all matrices."""
        return "one backward pass"

    def columns(self, fact: Fact, encoder: Encoder, openers: int) -> int:
        """One a target token, in each form."""
        prompt, answer, separator = fact.filled_prompt, fact.target_new, fact.separator
        coded = [encoder.answered(prompt, answer, separator, form.chat, form.system) for form in fact.in_each_form()]
        return sum(len(tokens.ids) - start for tokens, start in coded)


class TargetLoss(Source):
    """The mean over facts of the mean over target tokens of −log p, as a function of the edited matrices.

    Every target token is predicted from those before it (teacher forcing), in the fact's own prompt alone. With minibatches, each
    evaluation is about the next facts of an epoch, in an order that is another one in each.
    """

    stage = "fine-tuning"

    def begin(self, facts: Sequence[Fact], advance: Advance = lambda facts: None) -> None:
        """Tokenise some facts."""
        self._take_up(coded_targets(self.encoder, in_each_form(facts)))

    def begin_back(self, facts: Sequence[Fact], advance: Advance = lambda facts: None, answers: bool = False) -> None:
        """The unedited model's own answers in place of the facts'."""
        with self.weights.unedited():
            self._take_up(coded_own(self.loaded, self.encoder, in_each_form(facts)))

    def _take_up(self, coded: Sequence[Coded]) -> None:
        self._coded = list(coded)
        size = (self.feed.minibatch if isinstance(self.feed, FromLoss) else None) or len(self._coded)
        self.rounds = -(-len(self._coded) // size)
        self._parts = self._minibatches(size)
        self._seen: list[float] = []

    def _minibatches(self, size: int) -> Iterator[list[Coded]]:
        """All facts at one time; or epoch after epoch so many, those of an epoch in an order of its own."""
        for epoch in count():
            order = list(range(len(self._coded)))
            if self.rounds > 1:
                random.Random(epoch).shuffle(order)
            for first in range(0, len(order), size):
                yield [self._coded[index] for index in order[first : first + size]]

    def objective(self, weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The loss at some values of the edited matrices, and its gradient, added up over chunks of facts."""
        part = next(self._parts)

        def work(chunk: tuple[list[int], TargetRows]) -> LossAndGradients:
            _, rows = chunk
            leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
            graph = Graph(self.loaded, rows.batch, self.weights.as_parameters(leaves))
            loss = rows.losses(self.loaded, graph.hidden).sum() / len(part)
            (loss * GRADIENT_SCALE).backward()
            return float(loss.detach()), gradients_of(leaves)

        with deterministic(self.loaded.device), self.loaded.quick():
            chunks = list(target_rows(self.loaded, part, self.max_tokens))
            losses, gradients = added_up(ranks.in_turn(chunks, work))
        total = reduce(add, losses)
        if not total < float("inf"):
            raise SphereEditError(f"fine-tuning diverged: the loss is {total}; use a smaller learning rate (lr)")
        self._seen.append(total)
        return total, {name: gradient / GRADIENT_SCALE for name, gradient in gradients.items()}

    def report(self) -> Report:
        """The loss of the first and of the last evaluation, or the mean of an epoch's."""
        ends = (self._seen[: self.rounds], self._seen[-self.rounds :])
        before, after = ([sum(losses) / len(losses)] if losses else [] for losses in ends)
        return Report(loss_before=before, loss_after=after, evaluations=[len(self._seen)])


@dataclass(frozen=True)
class FromLoss(Feed):
    """The loss of a batch as a function of its matrices, for a method that moves them all at once.

    Attributes:
        minibatch: facts that one evaluation is about; all if None.
    """

    minibatch: int | None = None
    source: ClassVar[type[Source]] = TargetLoss

    @property
    def words(self) -> str:
        """As it is, or in minibatches."""
        return "the loss" if self.minibatch is None else f"the loss, {counted(self.minibatch, 'fact')} at a time"
