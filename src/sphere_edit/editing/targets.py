"""Optimised targets v*: one δ a fact, found by gradient descent (ROME, MEMIT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import KL_PROMPT, Encoder, fill
from sphere_edit.models.forward import UpperLayers, batches_by_length, deterministic
from sphere_edit.models.loading import LoadedModel
from sphere_edit.progress import Advance

GRADIENT_SCALE = 1024.0  # a power of two: changes no bits but those that float16 would lose


class TargetSettings(BaseModel):
    """How v* is optimised. The defaults edit SmolLM2-135M well and carry over to models without a preset."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lr: float = Field(1.0, gt=0, description="Adam's learning rate (v_lr)")
    steps: int = Field(13, ge=1, description="loss evaluations; one update fewer (v_num_grad_steps)")
    weight_decay: float = Field(1e-3, ge=0, description="weight of ‖δ‖ / ‖h‖² (v_weight_decay)")
    kl_factor: float = Field(0.0625, ge=0, description="weight of the KL divergence on '{subject} is a'")
    clamp_norm_factor: float = Field(4.0, gt=0, description="largest ‖δ‖ in units of ‖h‖")
    stop_loss: float = Field(0.05, ge=0, description="a fact is finished once its loss is below")
    compute: Literal["auto", "model", "bfloat16"] = Field(
        "auto",
        description="what the model computes with meanwhile: its own numbers, or bfloat16 (auto: where the device is faster "
        "in it); δ, Adam and the loss are float32 in any case",
    )
    tokens: int = Field(512, ge=16, description="tokens replayed at once; changes speed, memory and rounding")


@dataclass
class Targets:
    """v* of a batch of facts, and how it was found."""

    values: Tensor  # v* [d, n], float32
    deltas: Tensor  # δ [d, n], float32
    losses: list[list[float]]  # a fact's loss at every evaluation
    probabilities: list[list[float]] = field(repr=False)  # its mean target probability over templates, likewise


def optimise_targets(
    loaded: LoadedModel,
    facts: Sequence[Fact],
    templates: Sequence[str],
    layer: int,
    settings: TargetSettings,
    inside: bool = False,
    advance: Advance = lambda facts: None,
) -> Targets:
    """``v* = h + δ`` for each fact: δ at the value site of ``layer``, at the subject's last token, in every template.

    Loss (DESIGN, section 3): mean over templates of the mean over target tokens of −log p, plus kl_factor times
    KL(edited ‖ original) after the subject in "{subject} is a", plus weight_decay · ‖δ‖ / ‖h‖². Adam; ‖δ‖ clamped to
    clamp_norm_factor · ‖h‖ after each update; a fact leaves the optimisation once its loss is below stop_loss. Facts
    are independent of one another, so that batching changes nothing but rounding.

    Args:
        layer: the last edited layer L.
        inside: add δ to the MLP's output (ROME) and not to the layer's.
        advance: told of the facts done, and parts of facts.

    Raises:
        SphereEditError: a loss is not finite.
    """
    encoder = Encoder(loaded.tokenizer)
    prompts = [_FactPrompts.of(fact, templates, encoder) for fact in facts]
    sizes = [fact.replayed_tokens for fact in prompts]
    done: dict[int, _Found] = {}
    with deterministic(loaded.device):
        for chunk in batches_by_length(sizes, settings.tokens):
            descent = _Descent(loaded, [prompts[index] for index in chunk], layer, settings, inside)
            for index, result in zip(chunk, descent.run(advance), strict=True):
                done[index] = result
    order = [done[index] for index in range(len(facts))]
    for fact, found in zip(facts, order, strict=True):
        if not all(loss < float("inf") for loss in found.losses):
            raise SphereEditError(
                f"the target of record {fact.record} ('{fact.filled_prompt[:60]}') has loss {found.losses[-1]}: the model overflows "
                "on it; try --dtype float32 or bfloat16, or a smaller targets.lr"
            )
    deltas = torch.stack([found.delta for found in order], dim=1)
    values = torch.stack([found.clean for found in order], dim=1) + deltas
    return Targets(values, deltas, [found.losses for found in order], [found.probabilities for found in order])


@dataclass
class _Found:
    """One fact's descent."""

    clean: Tensor  # h [d]
    delta: Tensor  # [d]
    losses: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _FactPrompts:
    """One fact's rows: a row a template (prompt and target but for its last token), and last the KL prompt's."""

    rows: list[list[int]]
    subjects: list[int]  # subject's last token in each row
    starts: list[int]  # first target token in each template's row
    targets: list[list[int]]  # target tokens after each template

    @property
    def replayed_tokens(self) -> int:
        """Tokens in one evaluation of the loss: from the subject's last token on, padded."""
        spans = (len(row) - subject for row, subject in zip(self.rows, self.subjects, strict=True))
        return len(self.rows) * max(spans)

    @classmethod
    def of(cls, fact: Fact, templates: Sequence[str], encoder: Encoder) -> _FactPrompts:
        rows, subjects, starts, targets = [], [], [], []
        for template in templates:
            text, end = fill(template, fact)
            tokens, start = encoder.with_target(text, fact.target_new)
            rows.append(tokens.ids[:-1])
            subjects.append(tokens.last_token_of(end))
            starts.append(start)
            targets.append(tokens.ids[start:])
        kl_row, kl_subject = encoder.subject_end(*fill("{}", fact, KL_PROMPT))
        return cls([*rows, kl_row], [*subjects, kl_subject], starts, targets)


class _Descent:
    """Adam on the δs of one chunk of facts. Rows are laid out fact by fact, each fact with the same number of rows."""

    def __init__(
        self, loaded: LoadedModel, prompts: list[_FactPrompts], layer: int, settings: TargetSettings, inside: bool
    ):
        self.loaded, self.settings, self.prompts = loaded, settings, prompts
        self.per_fact = len(prompts[0].rows)
        rows = [row for fact in prompts for row in fact.rows]
        pivots = [position for fact in prompts for position in fact.subjects]
        self.upper = UpperLayers(loaded, rows, pivots, layer, inside)
        self.h = self.upper.value[:: self.per_fact].float()
        self.delta = torch.zeros_like(self.h, requires_grad=True)
        self.moments = (torch.zeros_like(self.h), torch.zeros_like(self.h))
        self.active = list(range(len(prompts)))
        self.kl_original: Tensor | None = None
        self._index()

    def _index(self) -> None:
        """Where logits are read, for the facts still active: columns count from the subject's last token."""
        device = self.loaded.device
        prompts = [self.prompts[index] for index in self.active]
        n, rows = len(prompts), self.per_fact
        where, tokens, weights = [], [], torch.zeros(n, 0)
        for number, fact in enumerate(prompts):
            for template, (start, target) in enumerate(zip(fact.starts, fact.targets, strict=True)):
                first = start - 1 - fact.subjects[template]
                where += [(number * rows + template, first + offset) for offset in range(len(target))]
                tokens += target
                column = torch.zeros(n, len(target))
                column[number] = 1 / (len(target) * len(fact.targets))
                weights = torch.cat([weights, column], dim=1)
        kl = [(number * rows + rows - 1, 0) for number in range(n)]
        self.rows, self.columns = torch.tensor(where + kl, device=device).T
        self.tokens = torch.tensor(tokens, device=device)
        self.weights = weights.to(device)  # [n, target positions]: means over tokens and templates as one product

    def run(self, advance: Advance) -> list[_Found]:
        steps = self.settings.steps
        found = [_Found(h, torch.empty(0)) for h in self.h]
        for step in range(1, steps + 1):
            loss, probability = self._loss()
            now = loss.detach()
            for index, value, chance in zip(self.active, now.tolist(), probability.tolist(), strict=True):
                found[index].losses.append(value)
                found[index].probabilities.append(chance)
            finished = (now < self.settings.stop_loss) | ~torch.isfinite(now)
            if step == steps:
                finished[:] = True
            for number in finished.nonzero().flatten().tolist():
                found[self.active[number]].delta = self.delta[number].detach()
            advance(len(self.active) / steps + int(finished.sum()) * (steps - step) / steps)
            if bool(finished.all()):
                break
            (gradient,) = torch.autograd.grad(loss.sum() * GRADIENT_SCALE, self.delta)
            gradient = gradient / GRADIENT_SCALE
            if bool(finished.any()):
                gradient = self._keep((~finished).nonzero().flatten(), gradient)
            self._step(gradient, step)
        return found

    def _loss(self) -> tuple[Tensor, Tensor]:
        """Each active fact's loss and mean target probability, ``[n]``."""
        n, d = self.delta.shape
        hidden = self.upper.hidden(self.delta[:, None].expand(n, self.per_fact, d).reshape(-1, d))
        if self.kl_original is None:
            self.upper.check(hidden.detach())
        read = hidden[self.rows, self.columns]
        log_probs = self.loaded.architecture.head(self.loaded.model, read).float().log_softmax(-1)
        target = log_probs[: len(self.tokens)].gather(1, self.tokens[:, None])[:, 0]
        kl_probs = log_probs[len(self.tokens) :]
        if self.kl_original is None:
            self.kl_original = kl_probs.detach()
        divergence = (kl_probs.exp() * (kl_probs - self.kl_original)).sum(-1)
        decay = self.delta.norm(dim=1) / self.h.square().sum(1)
        loss = -(self.weights @ target) + self.settings.kl_factor * divergence + self.settings.weight_decay * decay
        return loss, self.weights @ target.detach().exp()

    def _step(self, gradient: Tensor, step: int) -> None:
        """One step of Adam (β 0.9 and 0.999, ε 1e-8), then the clamp of ‖δ‖."""
        with torch.no_grad():
            first, second = self.moments
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            denominator = (second / (1 - 0.999**step)).sqrt() + 1e-8
            delta = self.delta - self.settings.lr * (first / (1 - 0.9**step)) / denominator
            limit = self.settings.clamp_norm_factor * self.h.norm(dim=1, keepdim=True)
            norm = delta.norm(dim=1, keepdim=True)
            delta = torch.where(norm > limit, delta * (limit / norm), delta)
        self.delta = delta.requires_grad_()

    def _keep(self, kept: Tensor, gradient: Tensor) -> Tensor:
        """Go on with some of the active facts only."""
        rows = (kept[:, None] * self.per_fact + torch.arange(self.per_fact, device=kept.device)).flatten()
        self.upper.keep(rows)
        self.h, self.delta = self.h[kept], self.delta.detach()[kept]
        self.moments = (self.moments[0][kept], self.moments[1][kept])
        assert self.kl_original is not None
        self.kl_original = self.kl_original[kept]
        self.active = [self.active[number] for number in kept.tolist()]
        self._index()
        return gradient[kept]
