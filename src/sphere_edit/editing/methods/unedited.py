"""The model as it is, for a row beside methods: with retrieval in the prompt, or with nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from sphere_edit.editing.ingredients import Needs
from sphere_edit.editing.losses import FromLoss
from sphere_edit.editing.methods.base import JointMethod, Objective
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import LowRankUpdate, Update


class Unedited(JointMethod):
    """``ΔW = 0``: the facts are taken up and asked, and nothing is edited; what ``evaluation.retrieval`` is measured with.

    Source: none; a control.
    """

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = "a control"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.5, basis="pretrained", project="after_all")

    @property
    def needs(self) -> Needs:
        """Nothing that would have to be measured."""
        return Needs(FromLoss())

    @property
    def evaluations(self) -> int:
        """The loss is not asked for."""
        return 0

    def descend(self, objective: Objective, weights: Mapping[str, Tensor]) -> dict[str, Update]:
        """An update of rank 0 for each matrix."""
        return {
            name: LowRankUpdate(weight.new_zeros(weight.shape[-2], 0), weight[..., :0, :])
            for name, weight in weights.items()
        }
