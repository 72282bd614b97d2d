"""SPHERE: keep an update away from the principal hyperspherical directions of the weights (arXiv:2510.01172)."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sphere_edit.numerics.linalg import keeps_precision, leading_right_directions, principal_rank
from sphere_edit.numerics.update import DenseUpdate, LowRankUpdate, Update

Delta = TypeVar("Delta", Tensor, LowRankUpdate, DenseUpdate, Update)


def rank_of(directions: Tensor) -> int:
    """How many directions there are in ``[d_in, r]``, or in all experts' ``[E, d_in, r]``, which may have columns of zeros."""
    return directions.shape[1] if directions.dim() == 2 else int(directions.any(1).sum())


def unit_rows(weight: Tensor) -> Tensor:
    """Ŵ: the neurons (rows of ``weight [d_out, d_in]``) scaled to length 1; zero rows stay zero.

    In float64, or where that takes long (`keeps_precision`) in the weight's own precision, float32 at least.
    """
    rows = weight.to(torch.promote_types(weight.dtype, torch.float32)) if keeps_precision(weight) else weight.double()
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, torch.ones_like(norms))


class Sphere(BaseModel):
    """The projection ``ΔW ← ΔW − α (ΔW U) Uᵀ`` and where it is applied.

    ``U [d_in, r]`` are the leading eigenvectors of ``ŴᵀŴ / d_out``, as many as hold the share ``eta`` of its trace.
    The d_in × d_in projector is never formed.

        Sphere(eta=0.5, alpha=0.5)(delta, weight)

    ``basis`` and ``project`` say which weights the directions come from, and when they are applied in an editing
    run; called on its own, the object uses the weight it is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    eta: float = Field(0.5, ge=0, le=1, description="share of the neurons' spectrum that counts as principal")
    alpha: float = Field(0.5, ge=0, le=1, description="how much of the update along it is taken away")
    basis: Literal["current", "pretrained"] = Field(
        "current",
        description="directions of the weights as they stand (before the update; with 'deployed', after the batch), or of "
        "those before the first edit",
    )
    project: Literal["per_layer", "after_all", "deployed"] = Field(
        "per_layer",
        description="inside the layer loop, so that later residuals see it; once all deltas are known; or on all that "
        "was changed so far, in the deployed weights alone",
    )

    def directions(self, weight: Tensor) -> Tensor:
        """``U [d_in, r]`` in float64 for ``weight [d_out, d_in]``, columns orthonormal.

        Of a layer of experts ``[E, d_out, d_in]`` each expert's own, ``[E, d_in, r]``: one with fewer than r has columns of zeros.
        """
        if weight.dim() == 3:
            return pad_sequence([self.directions(expert).T for expert in weight], batch_first=True).mT.contiguous()
        return leading_right_directions(unit_rows(weight), lambda values: principal_rank(values, self.eta))

    def __call__(self, delta: Delta, weight: Tensor) -> Delta:
        """``delta`` (a tensor ``[d_out, d_in]`` or an Update) with its principal part suppressed, same type and dtype."""
        return self.suppress(delta, self.directions(weight))

    def suppress(self, delta: Delta, directions: Tensor) -> Delta:
        """``ΔW − α (ΔW U) Uᵀ`` for known ``directions [d_in, r]``, computed in float64, returned in delta's dtype."""
        if isinstance(delta, Tensor):
            return DenseUpdate(delta.double()).without(directions, self.alpha).delta.to(delta.dtype)
        dtype = next(iter(delta.tensors().values())).dtype
        return delta.to(torch.float64).without(directions, self.alpha).to(dtype)
