"""Frugal: the same knowledge for less change (docs/quality.md)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, cat

from sphere_edit.editing.ingredients import ContextTokens, EarlierKeys, Needs, SecondMoment
from sphere_edit.editing.memory import recalled, with_keys
from sphere_edit.editing.methods.base import LayerProblem, Seen, State, Statistics
from sphere_edit.editing.methods.memit import MemitSeq
from sphere_edit.editing.sources import FromTargets
from sphere_edit.numerics.linalg import grown_solution
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import LowRankUpdate


class Frugal(MemitSeq):
    """``ΔW = R Kᵀ (λ C0 + ρ Bp Bpᵀ + Kp Kpᵀ + ρ B Bᵀ + K Kᵀ)⁻¹`` with short targets, a key for each context, λ in units of the width.

    Differs from sequential MEMIT in four ways. Targets descend in L2, so that ‖δ‖, in whose square the damage grows, is about
    half of what Adam leaves. Each context template has a column of its own, so that ridge regression sees how a fact's keys
    vary, not their mean alone. The other tokens of every edited prompt, its context tokens B, are to stay what they are, as keys Kp of
    earlier facts are: a fact is read through them, and is forgotten when they change; a fact that is written again adds its own
    once more. And ``λ = second_moment_weight · d_in``: since E[kᵀ C0⁻¹ k] = d_in over ordinary keys, whatever the model, a key as rare as ordinary ones would get
    1 / (1 + second_moment_weight) of its residual, and rarer ones more.
    """

    name: ClassVar[str] = "frugal"
    paper: ClassVar[str] = "this project, docs/quality.md"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.5, basis="pretrained", project="per_layer")
    recheck: ClassVar[int] = 4
    repair: ClassVar[int] = 100
    one_fact_a_subject: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    targets: ClassVar[dict[str, Any]] = {"rule": "normalised", "contexts": 3}

    second_moment_weight: float = Field(
        0.5, gt=0, description="λ / d_in, how much ordinary keys count against the batch's"
    )
    bystander_weight: float = Field(
        0.1, ge=0, description="ρ, how much each other token of an edited prompt counts against its subject's"
    )

    carried: bool = Field(
        False,
        description="δ stands at the first edited layer's output, and each later layer writes what follows from it (FE, arXiv:2605.00358); "
        "else at the last one's, and each writes a share",
    )

    @property
    def needs(self) -> Needs:
        """Optimised targets, C0, and of every batch its keys in every context and its context tokens."""
        feed = FromTargets(contexts="each", values="each" if self.carried else "last")
        needs = Needs(feed, (SecondMoment(), EarlierKeys()))
        return needs.plus(ContextTokens()) if self.bystander_weight > 0 else needs

    def penalty(self, width: int) -> float:
        """λ for a matrix of ``width`` inputs."""
        return self.second_moment_weight * width

    def solve(self, problem: LayerProblem, state: State) -> LowRankUpdate:
        """ΔW as ``R`` times ``Kᵀ (λ C0 + ρ Bp Bpᵀ + Kp Kpᵀ + ρ B Bᵀ + K Kᵀ)⁻¹``, in float64."""
        columns = self._columns(problem.keys, problem.given.get("context_tokens"))
        solved = recalled(state, columns) if state else self._by_ordinary(problem.statistics, columns)
        solution = grown_solution(solved, columns)[:, : problem.keys.shape[1]]
        return LowRankUpdate(problem.residual.double(), solution.T)

    def after_batch(self, state: State, seen: Seen, statistics: Statistics) -> State:
        """Add the batch's keys and context tokens to those that later batches must leave alone."""
        return with_keys(state or self.start(statistics), self._columns(seen["keys"], seen.get("bystanders")))

    def _columns(self, keys: Tensor, context_tokens: Tensor | None) -> Tensor:
        """All that the system grows by, ``[K, √ρ B]``, float64."""
        beside = [] if context_tokens is None else [context_tokens.double() * self.bystander_weight**0.5]
        return cat([keys.double(), *beside], dim=1)
