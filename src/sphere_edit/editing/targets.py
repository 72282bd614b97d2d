"""Optimised targets v*: one δ a fact, found by gradient descent (ROME, MEMIT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from zlib import crc32

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sphere_edit import ranks
from sphere_edit.editing.descent import RULES, StepRule
from sphere_edit.editing.fact_prompts import FactPrompts
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder, Ends
from sphere_edit.models.forward import deterministic
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.replay import replay
from sphere_edit.models.tokens import Predictions, over_batches
from sphere_edit.progress import Advance

GRADIENT_SCALE = 1024.0  # a power of two: changes no bits but those that float16 would lose
_VOCABULARY_ROWS = {"cpu": 16}  # positions whose logits are normalised at one time: what stays in a processor's cache
_MANY_ROWS = 256  # on an accelerator, where each block costs the start of some kernels
_TOKENS = {"cpu": 512}  # replayed at once: what stays in a processor's cache
_MANY_TOKENS = 4096
_CAREFUL = 5  # how much smaller steps are that only bring back what an unedited model says
LONG_ANSWER = 8  # tokens beyond which an answer takes more steps
_LIKELY_LOSS = 0.1  # nats, from which on an answer counts as likely: e^−0.1 = 0.9
_TOKENS_A_ROUND = (
    5  # then, as many tokens as ``steps`` suffice for: measured on answers of 15 to 50 tokens (docs/LOG.md)
)


class TargetSettings(BaseModel):
    """How v* is optimised. The defaults edit SmolLM2-135M well and carry over to models without a preset."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rule: Literal["adam", "normalised", "polyak"] = Field(
        "adam", description="how δ steps: published methods take Adam; the others descend in L2, the norm that hurts"
    )
    lr: float | None = Field(
        None,
        gt=0,
        description="Adam's learning rate (v_lr; 1 unless given), else the longest step as a share of ‖h‖ (normalised "
        "0.1, polyak 0.35)",
    )
    steps: int = Field(
        13,
        ge=2,
        description="loss evaluations; one update fewer (v_num_grad_steps), so two at least. With normalised and polyak, more for "
        "answers of more than 8 tokens: in proportion, so many for each five",
    )
    patience: int = Field(
        3,
        ge=1,
        description="with normalised and polyak, so many times these steps for a fact whose answer is not likely by then (loss below 0.1)",
    )
    weight_decay: float = Field(1e-3, ge=0, description="weight of ‖δ‖ / ‖h‖² (v_weight_decay)")
    kl_factor: float = Field(0.0625, ge=0, description="weight of the KL divergence on '{subject} is a'")
    clamp_norm_factor: float = Field(4.0, gt=0, description="largest ‖δ‖ in units of ‖h‖")
    contexts: int | None = Field(
        None,
        ge=1,
        description="context templates in which each fact's target is optimised: its bare prompt, and so many less one of the others, "
        "by turns from fact to fact; all of them unless given",
    )
    stop_loss: float = Field(0.05, ge=0, description="a fact is finished once its loss is below")
    most_probable: int | None = Field(
        None,
        ge=1,
        description="a fact is finished too once all its target tokens were the likeliest in every template at so many evaluations",
    )
    ends: Ends = Field(
        "open",
        description="what is taught behind each answer: nothing, a full stop (stop), or the token that ends a text or a turn (token)",
    )
    compute: Literal["auto", "model", "bfloat16"] = Field(
        "auto",
        description="what the model computes with meanwhile: its own numbers, or bfloat16 (auto: where the device is faster "
        "in it); δ, Adam and the loss are float32 in any case",
    )
    tokens: int | None = Field(
        None,
        ge=16,
        description="tokens replayed at once; changes speed, memory and rounding (512 on a CPU, 4096 on an accelerator). A fact that has more alone "
        "takes less memory and a third more time for each",
    )

    def tokens_on(self, device: torch.device) -> int:
        """Tokens replayed at once there."""
        return self.tokens or _TOKENS.get(device.type, _MANY_TOKENS)

    def resolved(self, device: torch.device, fast_bfloat16: bool) -> TargetSettings:
        """These settings with what depends on the device spelled out."""
        compute = self.compute
        if compute == "auto":
            compute = "bfloat16" if fast_bfloat16 else "model"
        return self.model_copy(
            update={"lr": self.step_rule().rate, "compute": compute, "tokens": self.tokens_on(device)}
        )

    def steps_for(self, tokens: int) -> int:
        """Loss evaluations that a target of so many tokens may take: in proportion to them beyond `LONG_ANSWER`; Adam's are as published."""
        return (
            self.steps
            if self.rule == "adam"
            else self.steps * max(tokens if tokens > LONG_ANSWER else 0, _TOKENS_A_ROUND) // _TOKENS_A_ROUND
        )

    def most_steps(self, tokens: int) -> int:
        """The same for a target that is hard to find: with some patience, but for Adam's."""
        return self.steps_for(tokens) * (1 if self.rule == "adam" else self.patience)

    def carefully(self) -> TargetSettings:
        """For answers that are all but the likeliest already: smaller steps, and a fact is finished once they are, a step to spare."""
        update = {
            "lr": self.step_rule().rate / _CAREFUL,
            "steps": _CAREFUL * self.steps,
            "most_probable": 2,
            "patience": 1,
        }
        return self.model_copy(update=update)

    def templates_of(self, fact: Fact, templates: Sequence[str]) -> list[str]:
        """Those of a run's ``templates`` in which a fact's target is optimised: which, its own words say, whatever else is in its batch."""
        bare, *others = templates
        if self.contexts is None or self.contexts > len(others):
            return list(templates)
        first = crc32(fact.filled_prompt.encode())
        return [bare, *(others[(first + number) % len(others)] for number in range(self.contexts - 1))]

    def step_rule(self) -> StepRule:
        """A fresh one, for the facts that are optimised together."""
        kind = RULES[self.rule]
        return kind(self.lr or kind.default_rate)


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
    role: str | None = None,
    prompts: Sequence[FactPrompts] | None = None,
) -> Targets:
    """``v* = h + δ`` for each fact: δ at the value site of ``layer``, at the subject's last token, in every template.

    Loss (DESIGN, section 3): mean over templates, and over the fact's rewordings beside them, of the mean over target tokens of −log p, plus kl_factor times
    KL(edited ‖ original) after the subject in "{subject} is a", plus weight_decay · ‖δ‖ / ‖h‖². ‖δ‖ is clamped to
    clamp_norm_factor · ‖h‖ after each update; a fact leaves the optimisation once its loss is below stop_loss, or its target
    has been the likeliest often enough (most_probable; ENCORE, arXiv:2502.01636). Facts
    are independent of one another, so that batching changes nothing but rounding.

    Args:
        layer: the last edited layer L.
        inside: add δ to the MLP's output (ROME) and not to the layer's.
        role: of the edited matrix, whose output that is.
        advance: told of the facts done, and parts of facts.
        prompts: of each fact with the answers it is to give there, where they are not its own.

    Raises:
        SphereEditError: a loss is not finite.
    """
    encoder = Encoder(loaded.tokenizer, settings.ends)
    prompts = prompts or [FactPrompts.of(fact, settings.templates_of(fact, templates), encoder) for fact in facts]

    def descend(chunk: list[FactPrompts]) -> list[_Found]:
        return _Descent(loaded, chunk, layer, settings, inside, role).run(tell)

    with deterministic(loaded.device), loaded.quick(), ranks.told(advance) as tell:
        whole = loaded.architecture.whole_rows
        order = over_batches(
            prompts, settings.tokens_on(loaded.device), descend, lambda fact: fact.replayed_tokens(whole)
        )
    for fact, found in zip(facts, order, strict=True):
        if not all(loss < float("inf") for loss in found.losses):
            raise SphereEditError(
                f"the target of record {fact.record} ('{fact.filled_prompt[:60]}') has loss {found.losses[-1]}: the model overflows "
                "on it; try --dtype float32 or bfloat16, or a smaller targets.lr"
            )
    deltas = torch.stack([found.delta for found in order], dim=1)
    values = torch.stack([found.clean for found in order], dim=1) + deltas
    return Targets(values, deltas, [found.losses for found in order], [found.probabilities for found in order])


def typical_length(vectors: Tensor) -> float:
    """The mean length of ``vectors [d, n]`` without the longest twentieth: NAS's anchor μ (arXiv:2602.02543, published code)."""
    lengths = vectors.norm(dim=0).sort().values
    return float(lengths[: max(1, math.ceil(0.95 * len(lengths)))].mean())


def anchored(targets: Targets, outputs: Tensor, anchor: float) -> Targets:
    r"""Targets whose v\*, taken as the MLP's output, is ``anchor`` long: with ``outputs = v0 [d, n]``, ``δ ← μ (v0 + δ) / ‖v0 + δ‖ − v0``.

    One that was longer than 2 μ is given up: δ = 0. Source: NAS (arXiv:2602.02543), its published code.
    """
    wished = outputs + targets.deltas
    lengths = wished.norm(dim=0)
    deltas = wished * (anchor / lengths) - outputs
    deltas = torch.where(lengths > 2 * anchor, torch.zeros_like(deltas), deltas)
    return replace(targets, values=targets.values - targets.deltas + deltas, deltas=deltas)


@dataclass
class _Found:
    """One fact's descent."""

    clean: Tensor  # h [d]
    delta: Tensor  # [d]
    losses: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Evaluation:
    """The loss of each active fact, and what its gradient is made from."""

    loss: Tensor  # [n]
    probability: Tensor  # [n] mean over target tokens and templates
    surest: Tensor  # [n] whether every target token is the likeliest, in every template
    logits: Tensor  # [target positions + n, V], to be differentiated; the last n are the KL prompts'
    normaliser: Tensor  # [target positions + n], log Σ exp of each row of them, float32
    target: Tensor  # [target positions], log p of each target token
    kl_log_probs: Tensor  # [n, V]
    divergence: Tensor  # [n], KL(edited ‖ original)


class _Descent:
    """Descent on the δs of one chunk of facts. Rows are laid out fact by fact."""

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: list[FactPrompts],
        layer: int,
        settings: TargetSettings,
        inside: bool,
        role: str | None = None,
    ):
        self.loaded, self.settings, self.prompts = loaded, settings, prompts
        rows = [row for fact in prompts for row in fact.rows]
        pivots = [position for fact in prompts for position in fact.subjects]
        self.upper = replay(loaded, rows, pivots, layer, inside, role, settings.tokens_on(loaded.device))
        self.active = list(range(len(prompts)))
        self.block = _VOCABULARY_ROWS.get(loaded.device.type, _MANY_ROWS)
        self._index()
        self.h = self.upper.value[self.first_rows].float()
        self.delta = torch.zeros_like(self.h, requires_grad=True)
        self.rule = settings.step_rule()
        self.sure = torch.zeros(len(prompts), dtype=torch.int32, device=self.h.device)  # evaluations with a sure target
        self.kl_original: Tensor | None = None

    def _index(self) -> None:
        """Which rows are whose, and where logits are read: columns count from the subject's last token."""
        prompts, device = [self.prompts[index] for index in self.active], self.loaded.device
        answers, kl_rows, first_rows = [], [], []
        owners: list[int] = []
        for number, fact in enumerate(prompts):
            first_rows.append(len(owners))
            kl_rows.append(len(owners) + fact.kl_row)
            for row, (start, target) in enumerate(zip(fact.starts, fact.targets, strict=True)):
                answers.append((number, len(owners) + row, start - 1 - fact.subjects[row], target))
            owners += [number] * len(fact.rows)
        self.predictions = Predictions.of(answers, len(prompts), device)
        self.kl_rows, self.first_rows, self.owners = (
            torch.tensor(numbers, device=device) for numbers in (kl_rows, first_rows, owners)
        )

    def run(self, advance: Advance) -> list[_Found]:
        found = [_Found(h, torch.empty(0)) for h in self.h]
        usual, most = (
            torch.tensor([limit(fact.answer_tokens) for fact in self.prompts])
            for limit in (self.settings.steps_for, self.settings.most_steps)
        )
        for step in range(1, int(most.max()) + 1):
            evaluation = self._evaluate()
            now = evaluation.loss
            for index, value, chance in zip(self.active, now.tolist(), evaluation.probability.tolist(), strict=True):
                found[index].losses.append(value)
                found[index].probabilities.append(chance)
            finished = (now < self.settings.stop_loss) | ~torch.isfinite(now)
            self.sure += evaluation.surest.int()
            if self.settings.most_probable:
                finished |= self.sure >= self.settings.most_probable
            limits = most[self.active]
            late = (usual[self.active] <= step).to(finished.device)
            finished |= (late & (now < _LIKELY_LOSS)) | (limits <= step).to(finished.device)
            for number in finished.nonzero().flatten().tolist():
                found[self.active[number]].delta = self.delta[number].detach()
            done = torch.where(finished.cpu(), limits - step + 1, 1) / limits
            advance(float(done.sum()))
            if bool(finished.all()):
                break
            gradient = self._gradient(evaluation)
            if bool(finished.any()):
                kept = (~finished).nonzero().flatten()
                gradient, now = self._keep(kept, gradient), now[kept]
            self._step(gradient, now)
        return found

    def _evaluate(self) -> _Evaluation:
        """Run the upper layers and the head with the δs as they stand."""
        hidden = self.upper.hidden(self.delta.index_select(0, self.owners))
        if self.kl_original is None:
            self.upper.check(hidden.detach())
        where, settings = self.predictions, self.settings
        rows = torch.cat([where.rows, self.kl_rows])
        columns = torch.cat([where.columns, torch.zeros_like(self.kl_rows)])
        read = hidden[rows, columns]
        logits = self.loaded.architecture.head(self.loaded.model, read)
        with torch.no_grad():
            normaliser = torch.cat([block.float().logsumexp(-1) for block in logits.split(self.block)])
            m = len(where.tokens)
            target = logits[torch.arange(m, device=logits.device), where.tokens].float() - normaliser[:m]
            kl_log_probs = logits[m:].float() - normaliser[m:, None]
            if self.kl_original is None:
                self.kl_original = kl_log_probs
            divergence = (kl_log_probs.exp() * (kl_log_probs - self.kl_original)).sum(-1)
            decay = self.delta.norm(dim=1) / self.h.square().sum(1)
            loss = -(where.means @ target) + settings.kl_factor * divergence + settings.weight_decay * decay
            probability = where.means @ target.exp()
            wrong = torch.cat([block.argmax(-1) for block in logits[:m].split(self.block)]) != where.tokens
            surest = where.means @ wrong.float() == 0
        return _Evaluation(loss, probability, surest, logits, normaliser, target, kl_log_probs, divergence)

    def _gradient(self, evaluation: _Evaluation) -> Tensor:
        """The loss's gradient by each fact's δ, ``[n, d]``.

        By the logits it is written out, which takes fewer passes over the vocabulary than autograd: for a target token of
        weight w in its mean, ``w (p − e_target)``; for KL(p ‖ q), ``p ⊙ (log p − log q − KL)``.
        """
        where, settings, logits = self.predictions, self.settings, evaluation.logits
        m, shares = len(where.tokens), where.means.sum(0) * GRADIENT_SCALE
        slope = torch.empty_like(logits)
        with torch.no_grad():
            for first in range(0, m, self.block):
                block = slice(first, min(first + self.block, m))
                log_probs = logits[block].float() - evaluation.normaliser[block, None]
                slope[block] = log_probs.exp_().mul_(shares[block, None])
            # in float32, for 1 - p must not be lost where p is all but 1
            right = (evaluation.target.exp() - 1) * shares
            slope[torch.arange(m, device=slope.device), where.tokens] = right.to(slope.dtype)
            assert self.kl_original is not None
            surplus = evaluation.kl_log_probs - self.kl_original - evaluation.divergence[:, None]
            slope[m:] = evaluation.kl_log_probs.exp() * surplus * (settings.kl_factor * GRADIENT_SCALE)
        (gradient,) = torch.autograd.grad(logits, self.delta, slope)
        delta = self.delta.detach()
        decay = delta / (delta.norm(dim=1, keepdim=True) * self.h.square().sum(1, keepdim=True)).clamp_min(1e-30)
        return gradient / GRADIENT_SCALE + settings.weight_decay * decay

    def _step(self, gradient: Tensor, loss: Tensor) -> None:
        """One step, then the clamp of ‖δ‖."""
        with torch.no_grad():
            size = self.h.norm(dim=1, keepdim=True)
            delta = self.delta + self.rule.move(gradient, loss, size)
            limit = self.settings.clamp_norm_factor * size
            norm = delta.norm(dim=1, keepdim=True)
            delta = torch.where(norm > limit, delta * (limit / norm), delta)
        self.delta = delta.requires_grad_()

    def _keep(self, kept: Tensor, gradient: Tensor) -> Tensor:
        """Go on with some of the active facts only."""
        self.upper.keep(torch.isin(self.owners, kept).nonzero().flatten())
        self.h, self.delta = self.h[kept], self.delta.detach()[kept]
        self.rule.keep(kept)
        self.sure = self.sure[kept]
        assert self.kl_original is not None
        self.kl_original = self.kl_original[kept]
        self.active = [self.active[number] for number in kept.tolist()]
        self._index()
        return gradient[kept]
