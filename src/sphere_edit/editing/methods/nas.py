"""NAS: every target as long as such targets are on the unedited model (Liu et al. 2026, arXiv:2602.02543)."""

from __future__ import annotations

from typing import ClassVar

from sphere_edit.editing.ingredients import Needs, TargetLength
from sphere_edit.editing.methods.alphaedit import AlphaEdit


class Nas(AlphaEdit):
    """AlphaEdit's ΔW for targets that, as the MLP's output, are scaled to one length μ (`editing.targets.anchored`).

    Edited weights make for longer outputs, these for longer targets, and so on: the published explanation of sudden collapse.
    μ is the mean length of the targets of the package's demo facts on the unedited model, without the longest twentieth; the published code
    takes some hundred facts of the data set. A target longer than 2 μ is not written.
    """

    name: ClassVar[str] = "nas"
    paper: ClassVar[str] = "Liu et al. 2026, arXiv:2602.02543"

    @property
    def needs(self) -> Needs:
        """What AlphaEdit needs, and the length of its targets on the unedited model."""
        return super().needs.plus(TargetLength())
