"""MEMIT: mass editing a transformer's memory, without and with a memory of its own edits."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from sphere_edit.editing.methods.base import (
    LayerProblem,
    LayerwiseMethod,
    Needs,
    Seen,
    State,
    Statistics,
    with_keys,
    without_keys,
)
from sphere_edit.numerics.linalg import spd_solve
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import LowRankUpdate


class Memit(LayerwiseMethod):
    """``ΔW = R Kᵀ (λ C0 + K Kᵀ)⁻¹``: ridge regression that keeps what is written at ordinary keys.

    Source: arXiv:2210.07229, eq. 14.
    """

    name: ClassVar[str] = "memit"
    paper: ClassVar[str] = "Meng et al. 2023, arXiv:2210.07229"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.8, basis="current", project="after_all")

    second_moment_weight: float = Field(
        1000.0, gt=0, description="λ, the weight of C0 against the batch's keys (mom2_update_weight)"
    )

    @property
    def needs(self) -> Needs:
        """Optimised targets and C0."""
        return Needs(statistics="second_moment")

    def solve(self, problem: LayerProblem, state: State) -> LowRankUpdate:
        """ΔW as ``R`` times ``Kᵀ (λ C0 + Kp Kpᵀ + K Kᵀ)⁻¹``, solved in float64; without a state there is no Kp."""
        assert problem.statistics.second_moment is not None
        keys = problem.keys.double()
        gram = self.second_moment_weight * problem.statistics.second_moment.double() + keys @ keys.T
        if state:
            gram += state["previous"].to(gram.device)
        return LowRankUpdate(problem.residual.double(), spd_solve(gram, keys).T)


class MemitSeq(Memit):
    """``ΔW = R Kᵀ (λ C0 + Kp Kpᵀ + K Kᵀ)⁻¹``: MEMIT that counts all earlier edits' keys Kp among those to be preserved.

    Source: the sequential baseline of AlphaEdit (arXiv:2410.02355) and its published code. State: ``Kp Kpᵀ [d_in, d_in]``.
    """

    name: ClassVar[str] = "memit_seq"
    paper: ClassVar[str] = "Meng et al. 2023, arXiv:2210.07229; sequential form: Fang et al. 2025, arXiv:2410.02355"

    @property
    def needs(self) -> Needs:
        """Optimised targets, C0, and the keys of every batch."""
        return Needs(statistics="second_moment", remembers="keys")

    def after_batch(self, state: State, seen: Seen, statistics: Statistics) -> State:
        """Add the batch's keys to those that later batches must leave alone."""
        return with_keys(state, seen["keys"])

    def forget(self, state: State, keys: Tensor, statistics: Statistics) -> State:
        """Take superseded keys out again: what was written there is to be overwritten, not preserved."""
        return without_keys(state, keys)
