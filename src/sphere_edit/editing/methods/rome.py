"""ROME: rank-one model editing, with one averaged key everywhere (R-ROME)."""

from __future__ import annotations

from typing import ClassVar

from sphere_edit.editing.ingredients import Needs
from sphere_edit.editing.methods.emmet import Emmet
from sphere_edit.editing.sources import FromTargets
from sphere_edit.numerics.projection import Sphere


class Rome(Emmet):
    """``ΔW = (v* − W k) (C⁻¹ k)ᵀ / (kᵀ C⁻¹ k)`` fact by fact: `Emmet` for one key, δ at the MLP's output.

    Source: Meng et al. 2022, arXiv:2202.05262, eq. 2. The published code took ``v* − W k`` and the divisor at the clean
    prompt's key and the direction at the averaged one, which makes single edits explode; here k is the averaged key in all
    three places (R-ROME, Gupta et al. 2024, arXiv:2403.07175). The facts of a batch are written one after another, each with
    its target found on the weights that the ones before it left.
    """

    name: ClassVar[str] = "rome"
    paper: ClassVar[str] = "Meng et al. 2022, arXiv:2202.05262; R-ROME: Gupta et al. 2024, arXiv:2403.07175"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.5, basis="current", project="per_layer")
    max_batch: ClassVar[int | None] = 1

    @property
    def needs(self) -> Needs:
        """Optimised targets at the MLP's output, and C0 unless it is left out."""
        return Needs(FromTargets(site="mlp"), self.moments)
