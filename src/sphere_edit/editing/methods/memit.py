"""MEMIT: mass editing a transformer's memory, without and with a memory of its own edits."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, cholesky_inverse

from sphere_edit.editing.ingredients import EarlierKeys, Needs, SecondMoment
from sphere_edit.editing.memory import Metric, memory, metric_of, recalled, with_keys, without_keys
from sphere_edit.editing.methods.base import LayerProblem, LayerwiseMethod, Seen, State, Statistics
from sphere_edit.editing.sources import FromTargets
from sphere_edit.numerics.linalg import factor_solve, grown_solution
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import LowRankUpdate


class Memit(LayerwiseMethod):
    """``ΔW = R Kᵀ (λ C0 + K Kᵀ)⁻¹``: ridge regression that keeps what is written at ordinary keys.

    Source: arXiv:2210.07229, eq. 14.
    """

    name: ClassVar[str] = "memit"
    paper: ClassVar[str] = "Meng et al. 2023, arXiv:2210.07229"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.8, basis="current", project="after_all")
    columnwise: ClassVar[bool] = True

    second_moment_weight: float = Field(
        1000.0, gt=0, description="λ, the weight of C0 against the batch's keys (mom2_update_weight)"
    )

    @property
    def needs(self) -> Needs:
        """Optimised targets and C0."""
        return Needs(FromTargets(), (SecondMoment(),))

    def solve(self, problem: LayerProblem, state: State) -> LowRankUpdate:
        """ΔW as ``R`` times ``Kᵀ (λ C0 + K Kᵀ)⁻¹``, in float64; C0 is factored once for all batches."""
        keys = problem.keys.double()
        solved = self._by_ordinary(problem.statistics, keys)
        return LowRankUpdate(problem.residual.double(), grown_solution(solved, keys).T)

    def _by_ordinary(self, statistics: Statistics, columns: Tensor) -> Tensor:
        """``(λ C0)⁻¹ columns``, by the factor of C0; no inverse is made."""
        return factor_solve(statistics.factor, columns) / self.penalty(statistics.width)

    def penalty(self, width: int) -> float:
        """λ for a matrix of ``width`` inputs."""
        return self.second_moment_weight


class MemitSeq(Memit):
    """``ΔW = R Kᵀ (λ C0 + Kp Kpᵀ + K Kᵀ)⁻¹``: MEMIT that counts all earlier edits' keys Kp among those to be preserved.

    Source: the sequential baseline of AlphaEdit (arXiv:2410.02355) and its published code. State: ``λ C0 + Kp Kpᵀ [d_in, d_in]``
    and its inverse, which grows by steps of rank n.
    """

    name: ClassVar[str] = "memit_seq"
    paper: ClassVar[str] = "Meng et al. 2023, arXiv:2210.07229; sequential form: Fang et al. 2025, arXiv:2410.02355"

    @property
    def needs(self) -> Needs:
        """Optimised targets, C0, and the keys of every batch."""
        return super().needs.plus(EarlierKeys())

    def solve(self, problem: LayerProblem, state: State) -> LowRankUpdate:
        """ΔW as ``R`` times ``Kᵀ (λ C0 + Kp Kpᵀ + K Kᵀ)⁻¹``, in float64."""
        if not state:
            return super().solve(problem, state)
        keys = problem.keys.double()
        return LowRankUpdate(problem.residual.double(), grown_solution(recalled(state, keys), keys).T)

    def after_batch(self, state: State, seen: Seen, statistics: Statistics) -> State:
        """Add the batch's keys to those that later batches must leave alone."""
        return with_keys(state or self.start(statistics), seen["keys"])

    def start(self, statistics: Statistics) -> State:
        """The memory before any edit: λ C0 and its inverse."""
        factor = statistics.factor
        weight = self.penalty(statistics.width)
        return memory(weight * (factor @ factor.mT), cholesky_inverse(factor) / weight)

    def metric(self, state: State, statistics: Statistics) -> Metric | None:
        """The inverse of all that is to be left alone, in units of C0⁻¹."""
        return metric_of(state or self.start(statistics), self.penalty(statistics.width))

    def forget(self, state: State, keys: Tensor, statistics: Statistics) -> State:
        """Take superseded keys out again: what was written there is to be overwritten, not preserved."""
        return without_keys(state, keys)
