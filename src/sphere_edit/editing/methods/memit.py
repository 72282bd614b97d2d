"""MEMIT: mass editing a transformer's memory (Meng et al. 2023, arXiv:2210.07229, eq. 14)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sphere_edit.editing.methods.base import LayerProblem, Method, Needs, State
from sphere_edit.numerics.linalg import spd_solve
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import LowRankUpdate


class Memit(Method):
    """``ΔW = R Kᵀ (λ C0 + K Kᵀ)⁻¹``: ridge regression that keeps what is written at ordinary keys."""

    name: ClassVar[str] = "memit"
    paper: ClassVar[str] = "Meng et al. 2023, arXiv:2210.07229"
    needs: ClassVar[Needs] = Needs(statistics="second_moment")
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.8, basis="current", project="after_all")

    second_moment_weight: float = Field(
        1000.0,
        gt=0,
        description="λ, the weight of C0 against the batch's keys (mom2_update_weight; 15000 is published for 6B and up)",
    )

    def solve(self, problem: LayerProblem, state: State) -> LowRankUpdate:
        """ΔW as ``R`` times ``Kᵀ (λ C0 + K Kᵀ)⁻¹``, solved in float64."""
        assert problem.statistics.second_moment is not None
        keys = problem.keys.double()
        gram = self.second_moment_weight * problem.statistics.second_moment.double() + keys @ keys.T
        return LowRankUpdate(problem.residual.double(), spd_solve(gram, keys).T)
