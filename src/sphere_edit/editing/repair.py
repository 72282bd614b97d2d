"""Repair: take back what a stream of edits did to ordinary text, as far as its facts do not need it.

Methods bound what an update does to a matrix's outputs (C0, null spaces). What counts is what the model says, and part of the
harm can be undone behind the facts' backs: after the edits the same matrices descend on the divergence from the unedited model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import cycle, islice
from operator import add
from typing import Any

import torch
from torch import Tensor

from sphere_edit import ranks
from sphere_edit.counting import counted
from sphere_edit.editing.answers import (
    LossAndGradients,
    TargetRows,
    added_up,
    coded_targets,
    gradients_of,
    in_each_form,
    target_rows,
)
from sphere_edit.editing.curvature import damped_inverse, output_curvature
from sphere_edit.editing.memory import Metric, in_metric
from sphere_edit.editing.targets import GRADIENT_SCALE
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder, Ends
from sphere_edit.models.forward import Graph, deterministic
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.tokens import TokenBatch, batches_of
from sphere_edit.models.weights import EditedWeights
from sphere_edit.progress import Reporter

_FACTS_A_STEP = 10  # edited ones for each step, so that a short stream has a short repair
_RATE = 0.03  # the first step's length, as a share of ‖W − W0‖; later ones fall to zero along a cosine
_MOMENTUM = 0.8
TEXT_TOKENS = 1024  # of ordinary text in each step, padded
_PASSAGE_TOKENS = 256  # of one passage at most: what attention keeps for its backward pass grows with the square
_POSITIONS = 512  # of those, next-token distributions that are compared
_FACTS_WEIGHT = 0.3  # of their mean loss against the divergence
STEP_FACTS = 64  # of the edited ones, asked in each step
_CURVATURE_BATCHES = 8  # of text, on which the curvature by the outputs is measured
_BLOCK = 64  # positions whose two distributions exist at one time; changes memory, not results


Part = Callable[
    [Mapping[str, Tensor]], float
]  # one of a sum: its value; its gradient is left in the leaves it is given


def repair_steps(limit: int, edited: int) -> int:
    """How many steps follow so many edited facts; none after a few, which wait for the next ones."""
    return min(limit, edited // _FACTS_A_STEP)


def readable_passages(passages: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Those passages after whose first token something is said.

    Raises:
        SphereEditError: there are none.
    """
    readable = [passage for passage in passages if len(passage) > 1]
    if not readable:
        raise SphereEditError("the corpus has no passage of two tokens or more, which a repair reads; set repair: 0")
    return readable


@dataclass
class Descent:
    """What the repair saw step by step, each on other text and other facts."""

    divergences: list[float] = field(default_factory=list)  # KL(unedited ‖ edited), nats a token
    losses: list[float] = field(default_factory=list)  # of the facts asked, nats a target token

    def as_dict(self) -> dict[str, Any]:
        """For the journal."""
        return {"steps": len(self.divergences), **vars(self)}


class Repair:
    """Descent of all edited matrices on ``KL(unedited ‖ edited)`` over ordinary text, plus 0.3 times the mean loss of edited facts.

    Each step takes other text and other facts, half of these in one of the run's context templates. Gradients ∇ are taken in the metric of
    the keys that are to be left alone, ``∇ M⁻¹`` (`Method.metric`: C0, with what MEMIT's relatives remember of the facts), have a momentum,
    and get one length for all matrices together: a step is the rate times √share ‖W − W0‖, root mean square over the matrices. The rate falls
    to zero along a cosine.

    Args:
        computing: the model to differentiate, which may be a copy in another precision.
        passages: token ids of ordinary text; none of it is what held-out figures are measured on.
        metrics: M⁻¹ ``[d_in, d_in]`` of each matrix in float32, or None for one.
        max_tokens: in one pass; it takes no more than it has use for.
        ends: what is taught behind each answer (`Encoder.taught`).
        curved: take gradients in the metric of K-FAC, ``G⁻¹ ∇ M⁻¹`` (`sphere_edit.editing.curvature`).
    """

    def __init__(
        self,
        computing: LoadedModel,
        weights: EditedWeights,
        passages: Sequence[Sequence[int]],
        facts: Sequence[Fact],
        templates: Sequence[str],
        metrics: Mapping[str, Metric | None],
        max_tokens: int,
        seed: int,
        ends: Ends = "open",
        curved: bool = False,
    ):
        self.loaded, self.weights, self.facts, self.metrics = computing, weights, list(facts), metrics
        self.max_tokens = max_tokens
        self.templates, self.encoder = list(templates), Encoder(computing.tokenizer, ends)
        self.random, self.seed, self.curved = random.Random(seed), seed, curved
        rows = [list(passage[:_PASSAGE_TOKENS]) for passage in passages]
        batches = batches_of(rows, min(TEXT_TOKENS, max_tokens))
        self.batches = cycle(self.random.sample(batches, len(batches)))

    def run(self, steps: int, share: float, reporter: Reporter) -> tuple[dict[str, Tensor], Descent]:
        """Take the steps, or as many as have finite gradients; the weights themselves stay as they are.

        Args:
            share: the part of all edited facts that was edited since the last repair.

        Returns:
            Δ ``[d_out, d_in]`` of each matrix, float32, and what was seen on the way.
        """
        start = self.weights.snapshot()
        scales = {name: float((start[name] - self.weights.original(name)).norm()) for name in start}
        moved = [name for name in start if scales[name] > 0]
        change = {name: torch.zeros_like(weight) for name, weight in start.items()}
        momentum = {name: torch.zeros_like(start[name]) for name in moved}
        descent, outputs = Descent(), self._output_metrics() if self.curved and moved else {}
        bar = reporter.bar("repair", steps, "step")
        with deterministic(self.loaded.device), self.loaded.quick(), bar as advance:
            for step in range(steps if moved else 0):
                now = {name: start[name] + change[name] for name in moved}
                gradients = self.gradients(now, descent)
                seen = descent.divergences[-1], descent.losses[-1]
                finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
                if not finite or not all(map(math.isfinite, seen)):
                    descent.divergences.pop()
                    descent.losses.pop()
                    reporter.say(
                        f"The repair ends after {counted(step, 'step')}: the model overflows in {self.loaded.dtype}",
                        "yellow",
                    )
                    break
                for name, gradient in gradients.items():
                    step_here = in_metric(gradient, self.metrics[name])
                    if name in outputs:
                        step_here = outputs[name] @ step_here
                    momentum[name] = _MOMENTUM * momentum[name] + step_here
                lengths = [float(momentum[name].norm()) / scales[name] for name in moved]
                length = math.sqrt(sum(value**2 for value in lengths) / max(1, len(lengths)))
                rate = _RATE * math.sqrt(share) * (1 + math.cos(math.pi * step / steps)) / 2
                for name in moved:
                    change[name] -= momentum[name] * (rate / max(length, 1e-30))
                advance(1)
        return change, descent

    def _output_metrics(self) -> dict[str, Tensor]:
        """G⁻¹ of each matrix, on the model as it stands and some of the text (`curvature`)."""
        names = list(self.weights.names)
        found = output_curvature(self.loaded, names, list(islice(self.batches, _CURVATURE_BATCHES)), self.seed)
        return {name: damped_inverse(curvature) for name, curvature in zip(names, found, strict=True)}

    def gradients(self, weights: Mapping[str, Tensor], descent: Descent) -> dict[str, Tensor]:
        """Of the whole loss, by each of the ``weights [d_out, d_in]``; what it was goes into ``descent``."""

        def work(part: Part) -> LossAndGradients:
            leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
            return part(leaves), gradients_of(leaves)

        (divergence, *losses), total = added_up(ranks.in_turn([self._text(), *self._facts()], work))
        descent.divergences.append(divergence)
        descent.losses.append(reduce(add, losses, 0.0))
        return {name: gradient / GRADIENT_SCALE for name, gradient in total.items()}

    def _pass(self, batch: TokenBatch, weights: Mapping[str, Tensor]) -> Tensor:
        """The last layer's output with some values of the matrices."""
        return Graph(self.loaded, batch, self.weights.as_parameters(weights, self.loaded.dtype)).hidden

    def _text(self) -> Part:
        """The mean divergence at some positions of the next ordinary text."""
        batch = TokenBatch.of(next(self.batches), self.loaded.device)
        places = batch.mask.bool().flatten().nonzero().flatten().tolist()
        chosen = torch.tensor(sorted(self.random.sample(places, min(_POSITIONS, len(places)))), device=batch.ids.device)
        return partial(self._text_loss, batch, chosen)

    def _text_loss(self, batch: TokenBatch, chosen: Tensor, leaves: Mapping[str, Tensor]) -> float:
        unedited = self._pass(batch, {name: self.weights.original(name) for name in leaves}).flatten(0, 1)[chosen]
        hidden = self._pass(batch, leaves).flatten(0, 1)[chosen]
        divergence, slope = self._divergence(unedited, hidden.detach())
        hidden.backward(slope)
        return divergence

    def _divergence(self, unedited: Tensor, edited: Tensor) -> tuple[float, Tensor]:
        """Mean KL(p ‖ q) of what the head makes of ``[positions, d_model]``, and its gradient by ``edited``, scaled.

        By the logits of q the gradient is q − p.
        """
        total, slopes = 0.0, []
        head = self.loaded.architecture.head
        for ours, theirs in zip(unedited.split(_BLOCK), edited.split(_BLOCK), strict=True):
            with torch.enable_grad():
                theirs = theirs.requires_grad_()
                logits = head(self.loaded.model, theirs)
            with torch.no_grad():
                p = head(self.loaded.model, ours).float().log_softmax(-1)
                q = logits.float().log_softmax(-1)
                total += float((p.exp() * (p - q)).sum())
                outer = (q.exp() - p.exp()) * (GRADIENT_SCALE / len(edited))
            slopes.append(torch.autograd.grad(logits, theirs, outer.to(logits.dtype))[0])
        return total / len(edited), torch.cat(slopes)

    def _facts(self) -> list[Part]:
        """The mean loss of some facts, each in one context template, as a sum over batches of them."""
        some = self.random.sample(self.facts, min(STEP_FACTS, len(self.facts)))
        asked = in_each_form([_in_template(fact, self._context()) for fact in some])
        most = min(2 * TEXT_TOKENS, self.max_tokens)
        parts = target_rows(self.loaded, coded_targets(self.encoder, asked), most)
        return [partial(self._facts_loss, rows, len(asked)) for _, rows in parts]

    def _facts_loss(self, rows: TargetRows, asked: int, leaves: Mapping[str, Tensor]) -> float:
        loss = rows.losses(self.loaded, self._pass(rows.batch, leaves)).sum() / asked
        (loss * (_FACTS_WEIGHT * GRADIENT_SCALE)).backward()
        return float(loss.detach())

    def _context(self) -> str:
        """No context, or with the same chance one of the others."""
        bare, *others = self.templates
        return self.random.choice(others) if others and self.random.random() < 0.5 else bare


def _in_template(fact: Fact, template: str) -> Fact:
    lead, trail = template.split("{}", 1)
    return replace(fact, prompt=lead + fact.prompt + trail)
