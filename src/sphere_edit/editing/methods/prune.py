"""PRUNE: perturbation-restrained sequential editing (Ma et al. 2024, arXiv:2405.16821)."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from sphere_edit.editing.methods.memit import Memit
from sphere_edit.numerics.linalg import clamp_spectrum, spectral_norm
from sphere_edit.numerics.projection import Sphere


class Prune(Memit):
    """MEMIT's ΔW, and the model runs with ``W0 + F(W − W0)``: F draws in the accumulated update's largest singular values.

    A singular value ``σ > σmax(W0)`` becomes ``log_b σ − log_b σmax + σmax``. Source: arXiv:2405.16821, eq. 6. Editing goes
    on from W itself, so that a restraint is never applied to what was restrained before. Where ``σmax < 1 / ln b`` the
    formula would enlarge values just above σmax; those keep their size, for a restraint must not amplify.
    """

    name: ClassVar[str] = "prune"
    paper: ClassVar[str] = "Ma et al. 2024, arXiv:2405.16821"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.8, basis="pretrained", project="deployed")

    log_base: float = Field(
        math.e, gt=1, description="b, the base of the logarithm: e in SPHERE's code, down to 1.2 in PRUNE's"
    )

    def deploy(self, original: Tensor, working: Tensor) -> Tensor:
        """``W0 + F(W − W0)`` in float32, both ``[d_out, d_in]``."""
        change = working.double() - original.double()
        restrained = clamp_spectrum(change, spectral_norm(original), self.log_base)
        return working if restrained is change else (original.double() + restrained).to(working.dtype)
