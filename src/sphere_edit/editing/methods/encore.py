"""ENCORE: early stopping and a norm constraint (Gupta et al. 2025, arXiv:2502.01636)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import cholesky_inverse

from sphere_edit.editing.memory import memory, recalled
from sphere_edit.editing.methods.base import LayerProblem, State, Statistics
from sphere_edit.editing.methods.memit import MemitSeq
from sphere_edit.numerics.linalg import grown_solution, spd_factor
from sphere_edit.numerics.update import LowRankUpdate


class Encore(MemitSeq):
    """``ΔW = R Kᵀ (λ C0 + μ I + Kp Kpᵀ + K Kᵀ)⁻¹``, with targets that stop once they are the likeliest answer.

    The ridge μ holds down ‖ΔW‖. A target is finished when all its tokens were the likeliest in every template at two
    evaluations; the published code counts to a number of tokens that fits answers of one token only, and leaves out the bare
    prompt. Kp are keys measured after their batch, as elsewhere here, where the published code keeps those before it.
    """

    name: ClassVar[str] = "encore"
    paper: ClassVar[str] = "Gupta et al. 2025, arXiv:2502.01636"
    targets: ClassVar[dict[str, Any]] = {"most_probable": 2}

    ridge: float = Field(20.0, gt=0, description="μ, the weight of ‖ΔW‖² (20 and 10 are published)")

    def solve(self, problem: LayerProblem, state: State) -> LowRankUpdate:
        """ΔW as ``R`` times ``Kᵀ (λ C0 + μ I + Kp Kpᵀ + K Kᵀ)⁻¹``, in float64."""
        keys = problem.keys.double()
        solved = recalled(state or self.start(problem.statistics), keys)
        return LowRankUpdate(problem.residual.double(), grown_solution(solved, keys).T)

    def start(self, statistics: Statistics) -> State:
        """The memory before any edit: λ C0 + μ I and its inverse."""
        factor = statistics.factor
        system = self.penalty(statistics.width) * (factor @ factor.mT)
        system.diagonal(dim1=-2, dim2=-1).add_(self.ridge)
        return memory(system, cholesky_inverse(spd_factor(system)))
