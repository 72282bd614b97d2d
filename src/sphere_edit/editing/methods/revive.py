"""REVIVE: edits that leave the dominant singular directions of W0 alone (Zhang et al. 2026, arXiv:2601.11042)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sphere_edit.editing.ingredients import DominantVectors, Needs
from sphere_edit.editing.methods.alphaedit import AlphaEdit
from sphere_edit.editing.methods.base import LayerProblem, State
from sphere_edit.numerics.update import LowRankUpdate, joined


class Revive(AlphaEdit):
    """AlphaEdit's ΔW without its components ``u_i v_jᵀ`` along W0's dominant singular vectors.

    With U_k ``[d_out, k]`` and V_k ``[d_in, k]``, which hold the share ``energy`` of ``‖W0‖²``:

        protect = either:  ΔW ← (I − U_k U_kᵀ) ΔW (I − V_k V_kᵀ)
        protect = both:    ΔW ← ΔW − U_k U_kᵀ ΔW V_k V_kᵀ

    No code is public. The abstract says that updates are filtered in the spectral basis of W0 so that the dominant subspace is preserved,
    not whether a component goes when one of its vectors is dominant or only when both are, nor how many vectors are: hence two readings,
    of which the former does preserve what W0 does along these vectors, and a share that was chosen here.
    """

    name: ClassVar[str] = "revive"
    paper: ClassVar[str] = "Zhang et al. 2026, arXiv:2601.11042 (our reading)"

    energy: float = Field(0.2, gt=0, lt=1, description="share of ‖W0‖² that the protected singular vectors hold")
    protect: Literal["either", "both"] = Field(
        "either", description="components that go: those with either vector dominant, or only those with both"
    )

    @property
    def needs(self) -> Needs:
        """What AlphaEdit needs, and the vectors that are protected."""
        return super().needs.plus(DominantVectors(self.energy))

    def solve(self, problem: LayerProblem, state: State) -> LowRankUpdate:
        """AlphaEdit's ΔW, filtered in float64."""
        update = super().solve(problem, state)
        outputs, inputs = problem.given["dominant_outputs"], problem.given["dominant_inputs"]
        left, right = outputs @ (outputs.T @ update.left), (update.right @ inputs) @ inputs.T
        if self.protect == "either":
            return LowRankUpdate(update.left - left, update.right - right)
        filtered = joined([update, LowRankUpdate(-left, right)])
        assert isinstance(filtered, LowRankUpdate)
        return filtered
