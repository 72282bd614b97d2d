"""EMMET: equality-constrained mass editing (Gupta et al. 2024, arXiv:2403.14236)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import eye, float64

from sphere_edit.editing.ingredients import Needs, SecondMoment
from sphere_edit.editing.methods.base import LayerProblem, LayerwiseMethod, State, layers_from
from sphere_edit.editing.sources import FromTargets
from sphere_edit.numerics.linalg import factor_solve, spd_solve
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import LowRankUpdate

_FLOOR = 1e-11  # of the mean of KᵀC⁻¹K's diagonal: keeps two facts with one key from spoiling all others


class Emmet(LayerwiseMethod):
    """``ΔW = R (Kᵀ C⁻¹ K + μ I)⁻¹ Kᵀ C⁻¹``: of all ΔW with ``ΔW K = R``, the one with the least ``tr(ΔW C ΔWᵀ)``.

    Source: arXiv:2403.14236, eq. 9, with C = C0. The constraint is met exactly at μ = 0; two facts with nearly the same key
    and different residuals then ask for an enormous ΔW. By the push-through identity μ > 0 is MEMIT with λ = μ, so the
    published code's pair (mom2_update_weight w, emmet_lambda e) is μ = w · e.
    """

    name: ClassVar[str] = "emmet"
    paper: ClassVar[str] = "Gupta et al. 2024, arXiv:2403.14236"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.8, basis="current", project="after_all")
    columnwise: ClassVar[bool] = True

    ridge: float = Field(0.0, ge=0, description="μ; 0 meets the constraint exactly")
    second_moment: bool = Field(True, description="weigh directions by C0; without, C = I (mom2_adjustment)")

    @property
    def needs(self) -> Needs:
        """Optimised targets, and C0 unless it is left out."""
        return Needs(FromTargets(), self.moments)

    @property
    def moments(self) -> tuple[SecondMoment, ...]:
        """C0, unless it is left out."""
        return (SecondMoment(),) if self.second_moment else ()

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...]:
        """One layer, at 16 % of the depth (5 of 30), as ROME: a constraint met in one layer leaves the others nothing."""
        return layers_from(0.16, 1, depth)

    def solve(self, problem: LayerProblem, state: State) -> LowRankUpdate:
        """ΔW as ``R`` times ``(Kᵀ C⁻¹ K + μ I)⁻¹ Kᵀ C⁻¹``, solved in float64."""
        keys = problem.keys.double()
        weighted = keys if not self.second_moment else factor_solve(problem.statistics.factor, keys)  # C⁻¹ K
        gram = keys.T @ weighted
        lift = max(self.ridge, _FLOOR * float(gram.diagonal().mean()))
        gram = (gram + gram.T) / 2 + lift * eye(keys.shape[1], dtype=float64, device=keys.device)
        return LowRankUpdate(problem.residual.double(), spd_solve(gram, weighted.T))
