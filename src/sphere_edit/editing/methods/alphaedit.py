"""AlphaEdit: null-space constrained sequential editing (Fang et al. 2025, arXiv:2410.02355, eq. 14)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, eye, float64

from sphere_edit.editing.ingredients import EarlierKeys, Needs, NullSpace, SecondMoment
from sphere_edit.editing.memory import memory, recalled, with_keys, without_keys
from sphere_edit.editing.methods.base import LayerProblem, LayerwiseMethod, Seen, State, Statistics
from sphere_edit.editing.sources import FromTargets
from sphere_edit.numerics.experts import experts_of, times
from sphere_edit.numerics.linalg import NullSpaceRule, grown_solution
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import LowRankUpdate


class AlphaEdit(LayerwiseMethod):
    """``ΔW = R Kᵀ P (Kp Kpᵀ P + K Kᵀ P + L2·I)⁻¹`` with ``P = V Vᵀ`` and all earlier keys ``Kp``.

    Solved in the r coordinates of the null space: since ``P (A P + cI)⁻¹ = V (Vᵀ A V + cI)⁻¹ Vᵀ``, with k̃ = Vᵀk,

        ΔW = R K̃ᵀ (K̃p K̃pᵀ + K̃ K̃ᵀ + L2·I)⁻¹ Vᵀ,

    a symmetric positive definite system that keeps ΔW in the null space exactly. State: ``L2·I + K̃p K̃pᵀ [r, r]`` and its
    inverse, which grows by steps of rank n, so that a batch of n facts costs O(r² n).
    """

    name: ClassVar[str] = "alphaedit"
    paper: ClassVar[str] = "Fang et al. 2025, arXiv:2410.02355"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.5, basis="current", project="per_layer")
    columnwise: ClassVar[bool] = True

    l2: float = Field(20.0, gt=0, description="L2, the ridge of the solve; 10 is published")
    null_space: NullSpaceRule = Field(NullSpaceRule.MEAN, description="how the null space of C0 is chosen")
    null_space_threshold: float = Field(1.0, gt=0, description="its threshold; absolute with 0.02 is published")

    @property
    def needs(self) -> Needs:
        """Optimised targets, the null space of C0, and the keys of every batch."""
        null_space = NullSpace(self.null_space, self.null_space_threshold)
        return Needs(FromTargets(), (SecondMoment(), null_space, EarlierKeys()))

    def solve(self, problem: LayerProblem, state: State) -> LowRankUpdate:
        """ΔW as ``R`` times a right factor in the null space, solved in float64."""
        basis = _basis(problem.statistics)
        keys = times(basis.mT, problem.keys.double())
        solved = recalled(self._memory(state, basis), keys)
        return LowRankUpdate(problem.residual.double(), times(basis, grown_solution(solved, keys)).T)

    def after_batch(self, state: State, seen: Seen, statistics: Statistics) -> State:
        """Add the batch's keys to those that later batches must leave alone."""
        basis = _basis(statistics)
        return with_keys(self._memory(state, basis), times(basis.mT, seen["keys"].double()))

    def forget(self, state: State, keys: Tensor, statistics: Statistics) -> State:
        """Take superseded keys out again: what was written there is to be overwritten, not preserved."""
        return without_keys(state, times(_basis(statistics).mT, keys.double()))

    def _memory(self, state: State, basis: Tensor) -> State:
        identity = eye(basis.shape[-1], dtype=float64, device=basis.device)
        if (experts := experts_of(basis)) > 0:
            identity = identity.repeat(experts, 1, 1)
        return state or memory(self.l2 * identity, identity / self.l2)


def _basis(statistics: Statistics) -> Tensor:
    return statistics["null_space"].double()
