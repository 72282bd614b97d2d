"""UltraEdit: training-, subject- and memory-free lifelong editing (Gu et al. 2025, arXiv:2505.14679)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sphere_edit.editing.ingredients import Needs, SolvedProblems
from sphere_edit.editing.losses import FromGradients
from sphere_edit.editing.methods.base import (
    LayerProblem,
    LayerwiseMethod,
    Seen,
    State,
    Statistics,
    layers_from,
)
from sphere_edit.numerics.linalg import spd_solve
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import LowRankUpdate


class UltraEdit(LayerwiseMethod):
    """``ΔW = V Kᵀ (K Kᵀ + λ I)⁻¹`` with ``v = η ‖k̂‖² r̂`` for each target token, k̂ and r̂ normalised over all edits so far.

    k enters the matrix where a target token is predicted, ``r = −∂loss/∂output`` there; (k, r) is normalised entry by entry
    with the running mean and standard deviation of this batch and all before it (lifelong normalisation). The ridge
    solve takes the keys as they are. Source: arXiv:2505.14679, eqs. 3–6, and its published code.
    State: ``count [1]``, ``mean [d_in + d_out]`` and ``squares``, the sum of squared deviations from it.
    """

    name: ClassVar[str] = "ultraedit"
    paper: ClassVar[str] = "Gu et al. 2025, arXiv:2505.14679"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.5, basis="current", project="after_all")
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("gate", "up"), ("down",))

    rate: float = Field(1e-4, gt=0, description="η, the step along each normalised gradient")
    ridge: float = Field(1.0, gt=0, description="λ of the solve")

    @property
    def needs(self) -> Needs:
        """One backward pass."""
        return Needs(FromGradients(), (SolvedProblems(),))

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...]:
        """A third of the layers, from 64 % of the depth on (18–26 of 28)."""
        return layers_from(0.64, max(1, round(depth * 9 / 28)), depth)

    def solve(self, problem: LayerProblem, state: State) -> LowRankUpdate:
        """ΔW as ``V`` times ``(Kᵀ K + λ I)⁻¹ Kᵀ``, the same by the push-through identity, solved in float64."""
        keys, residual = problem.keys.double(), problem.residual.double()
        running = _merged(state, keys, residual)
        normal = torch.cat([keys, residual])
        if float(running["count"]) > 1:  # a single token has no spread to be normalised by
            deviation = (running["squares"] / (running["count"] - 1)).sqrt()
            scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
            normal = (normal - running["mean"][:, None]) / scale[:, None]
        normal_keys, normal_residual = normal.split([len(keys), len(residual)])
        values = self.rate * normal_keys.square().sum(0) * normal_residual
        gram = keys.T @ keys
        gram.diagonal().add_(self.ridge)
        return LowRankUpdate(values, spd_solve(gram, keys.T))

    def after_batch(self, state: State, seen: Seen, statistics: Statistics) -> State:
        """The running statistics with this batch in them."""
        return _merged(state, seen["keys"].double(), seen["residual"].double())


def _merged(state: State, keys: Tensor, residual: Tensor) -> State:
    """Running count, mean and squared deviations, exactly those of all columns seen so far (Chan et al. 1983)."""
    columns = torch.cat([keys, residual])
    count = torch.tensor([columns.shape[1]], dtype=columns.dtype, device=columns.device)
    mean = columns.mean(1)
    squares = (columns - mean[:, None]).square().sum(1)
    if state:
        before = {name: value.to(columns.device) for name, value in state.items()}
        total = before["count"] + count
        step = mean - before["mean"]
        squares = before["squares"] + squares + step.square() * before["count"] * count / total
        mean, count = before["mean"] + step * count / total, total
    return {"count": count, "mean": mean, "squares": squares}
