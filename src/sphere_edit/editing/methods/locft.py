"""Fine-tuning one matrix in epochs over all facts, in minibatches: what fine-tuning does when it is set up as usual (LocFT-BF)."""

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


class LocFineTune(JointMethod):
    """``ΔW``: Adam's path down −log p(target), epoch after epoch over all facts in minibatches ("breadth first"), in one matrix.

    Source: arXiv:2509.22072. It needs all facts in one batch (``batch_size``); with several, each is trained on alone, and later ones make
    earlier ones forgotten, as with `ft`. The paper tunes the layer for each model (22 of 32 in Llama-3-8B, 6 of 28 in Qwen2.5-7B) and appends the end
    token to each target, which here is the setting ``ends: token``.
    """

    name: ClassVar[str] = "locft"
    paper: ClassVar[str] = "LocFT-BF, arXiv:2509.22072"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.5, basis="current", project="after_all")
    dense: ClassVar[bool] = True

    lr: float = Field(5e-4, gt=0, description="Adam's learning rate; 5e-4 is published")
    epochs: int = Field(25, ge=1, description="passes over all facts at most; 25 is published")
    minibatch: int = Field(100, ge=1, description="facts in one of Adam's steps; 100 is published")
    stop_loss: float = Field(0.01, ge=0, description="stop once an epoch's mean loss is below")

    @property
    def needs(self) -> Needs:
        """The loss of some facts after others."""
        return Needs(FromLoss(self.minibatch))

    @property
    def evaluations(self) -> int:
        """Passes over all facts."""
        return self.epochs

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...]:
        """One layer, at 66 % of the depth (21 of 32), as `ft`."""
        return layers_from(0.66, 1, depth)

    def descend(self, objective: Objective, weights: Mapping[str, Tensor]) -> dict[str, Update]:
        """ΔW of every matrix after at most ``epochs`` passes, in the dtype of ``weights``."""
        moved = {name: weight.detach().clone() for name, weight in weights.items()}
        adam = torch.optim.Adam(list(moved.values()), lr=self.lr)
        for _ in range(self.epochs):
            losses = []
            for _ in range(objective.rounds):
                loss, gradients = objective(moved)
                losses.append(loss)
                for name, weight in moved.items():
                    weight.grad = gradients[name]
                adam.step()
            if sum(losses) / len(losses) < self.stop_loss:
                break
        return {name: DenseUpdate(moved[name] - weights[name]) for name in weights}
