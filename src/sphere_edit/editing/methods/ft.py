"""Fine-tuning on the new facts, the field's baseline (Zhu et al. 2020, arXiv:2012.00363)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sphere_edit.editing.ingredients import Needs
from sphere_edit.editing.losses import FromLoss
from sphere_edit.editing.methods.base import JointMethod, Objective, layers_from
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import DenseUpdate, Update


class FineTune(JointMethod):
    """``ΔW``: Adam's path down the mean of −log p(target) over the batch, stopped once the loss is low.

    Optionally with every entry held to ``|ΔW_ij| ≤ ε`` (FT+L). Source: arXiv:2012.00363, eq. 2, as the baseline of
    ROME (arXiv:2202.05262) and SPHERE. Unlike their code, whose steps take 64 facts each and which reads every target token
    off the prompt's last position, a step here is the whole batch's gradient, each token predicted from those before it.
    """

    name: ClassVar[str] = "ft"
    paper: ClassVar[str] = "Zhu et al. 2020, arXiv:2012.00363"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.5, basis="current", project="after_all")
    dense: ClassVar[bool] = True

    lr: float = Field(2e-3, gt=0, description="Adam's learning rate; 5e-4 is published")
    steps: int = Field(25, ge=1, description="Adam's steps at most, each on the whole batch")
    stop_loss: float = Field(0.01, ge=0, description="stop once the batch's loss is below")
    weight_decay: float = Field(0.0, ge=0, description="Adam's weight decay, on W itself")
    norm_constraint: float | None = Field(None, gt=0, description="ε, the largest change of any entry; off by default")

    @property
    def needs(self) -> Needs:
        """The loss itself."""
        return Needs(FromLoss())

    @property
    def evaluations(self) -> int:
        """One before each step and one after the last."""
        return self.steps + 1

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...]:
        """One layer, at 66 % of the depth (21 of 32)."""
        return layers_from(0.66, 1, depth)

    def descend(self, objective: Objective, weights: Mapping[str, Tensor]) -> dict[str, Update]:
        """ΔW of every matrix after at most ``steps`` of Adam, in the dtype of ``weights``."""
        moved = {name: weight.detach().clone() for name, weight in weights.items()}
        adam = torch.optim.Adam(list(moved.values()), lr=self.lr, weight_decay=self.weight_decay)
        for step in range(self.evaluations):
            loss, gradients = objective(moved)
            if loss < self.stop_loss or step == self.steps:
                break
            for name, weight in moved.items():
                weight.grad = gradients[name]
            adam.step()
            if self.norm_constraint is not None:
                for name, weight in moved.items():
                    limit = self.norm_constraint
                    weight.copy_(weights[name] + (weight - weights[name]).clamp(-limit, limit))
        return {name: DenseUpdate(moved[name] - weights[name]) for name in weights}
