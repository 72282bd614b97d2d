"""A weight update ΔW: thin factors where the mathematics gives them, dense otherwise.

Of a layer of experts (`sphere_edit.numerics.experts`) an update is by expert: ``[E, d_out, d_in]`` where an ordinary one is
``[d_out, d_in]``, and ``right [E, n, d_in]`` with one ``left`` for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_edit.numerics.experts import by_expert, wide


@dataclass(frozen=True)
class LowRankUpdate:
    """``ΔW = left @ right`` with ``left [d_out, n]`` and ``right [n, d_in]``, n the number of facts or tokens."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """ΔW as one ``[d_out, d_in]`` tensor."""
        return self.left @ self.right

    def added_to(self, weight: Tensor) -> Tensor:
        """``weight + ΔW`` in the dtype and on the device of ``weight``; the same bits for the same inputs."""
        left, right = (factor.to(weight.device, weight.dtype) for factor in (self.left, self.right))
        return torch.addmm(weight, left, right) if right.dim() == 2 else weight + left @ right

    def by_expert(self, experts: int) -> LowRankUpdate:
        """An update ``[d_out, E · d_in]`` of the wide matrix, by expert; with 0 experts it stays as it is."""
        return LowRankUpdate(self.left, by_expert(self.right, experts))

    def wide(self) -> LowRankUpdate:
        """The other way about."""
        return LowRankUpdate(self.left, wide(self.right))

    def times(self, matrix: Tensor) -> Tensor:
        """``ΔW @ matrix`` for ``matrix [d_in, r]``, never forming ΔW."""
        return self.left @ (self.right @ matrix)

    def without(self, basis: Tensor, alpha: float) -> LowRankUpdate:
        """``ΔW − α (ΔW U) Uᵀ`` for ``U = basis [d_in, r]`` with orthonormal columns: only ``right`` changes."""
        return LowRankUpdate(self.left, self.right - alpha * (self.right @ basis) @ basis.mT)

    def share(self, columns: Sequence[int]) -> LowRankUpdate:
        """The part of ``ΔW = Σ left_j right_j`` that some of the columns j make; the shares of all columns add up to ΔW."""
        chosen = list(columns)
        return LowRankUpdate(self.left[:, chosen], self.right[..., chosen, :])

    def negative(self) -> LowRankUpdate:
        """−ΔW."""
        return LowRankUpdate(-self.left, self.right)

    def norm(self) -> float:
        """‖ΔW‖_F from the two n × n Gram matrices, in float64."""
        left, right = self.left.double(), self.right.double()
        squared = ((left.T @ left) * (right @ right.mT)).sum()
        return float(squared.clamp_min(0).sqrt())

    def to(self, dtype: torch.dtype) -> LowRankUpdate:
        """The same update with both factors cast, and laid out as they are stored and read back."""
        return LowRankUpdate(self.left.to(dtype).contiguous(), self.right.to(dtype).contiguous())

    def tensors(self) -> dict[str, Tensor]:
        """What to store: ``left`` and ``right``."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True)
class DenseUpdate:
    """``ΔW = delta [d_out, d_in]``, for methods whose update has no small rank (RECT, fine-tuning)."""

    delta: Tensor

    def dense(self) -> Tensor:
        """ΔW itself."""
        return self.delta

    def added_to(self, weight: Tensor) -> Tensor:
        """``weight + ΔW`` in the dtype and on the device of ``weight``."""
        return weight + self.delta.to(weight.device, weight.dtype)

    def by_expert(self, experts: int) -> DenseUpdate:
        """An update ``[d_out, E · d_in]`` of the wide matrix, by expert; with 0 experts it stays as it is."""
        return DenseUpdate(by_expert(self.delta, experts))

    def wide(self) -> DenseUpdate:
        """The other way about."""
        return DenseUpdate(wide(self.delta))

    def times(self, matrix: Tensor) -> Tensor:
        """``ΔW @ matrix`` for ``matrix [d_in, r]``."""
        return self.delta @ matrix

    def without(self, basis: Tensor, alpha: float) -> DenseUpdate:
        """``ΔW − α (ΔW U) Uᵀ`` for ``U = basis [d_in, r]`` with orthonormal columns."""
        return DenseUpdate(self.delta - alpha * (self.delta @ basis) @ basis.mT)

    def norm(self) -> float:
        """‖ΔW‖_F, in float64."""
        return float(self.delta.double().norm())

    def to(self, dtype: torch.dtype) -> DenseUpdate:
        """The same update, cast."""
        return DenseUpdate(self.delta.to(dtype).contiguous())

    def tensors(self) -> dict[str, Tensor]:
        """What to store: ``delta``."""
        return {"delta": self.delta}


Update = LowRankUpdate | DenseUpdate
PARTS = ("left", "right", "delta")  # what ``tensors()`` of any of them may name


def update_from(tensors: dict[str, Tensor]) -> Update:
    """The update that ``tensors()`` described."""
    if "delta" in tensors:
        return DenseUpdate(tensors["delta"])
    return LowRankUpdate(tensors["left"], tensors["right"])


def joined(updates: Sequence[Update]) -> Update:
    """The sum of some updates of one matrix, as factors side by side where all of them have factors."""
    if len(updates) == 1:
        return updates[0]
    if all(isinstance(update, LowRankUpdate) for update in updates):
        parts = [update.tensors() for update in updates]
        return LowRankUpdate(
            torch.cat([part["left"] for part in parts], dim=1), torch.cat([part["right"] for part in parts], dim=-2)
        )
    return DenseUpdate(torch.stack([update.dense() for update in updates]).sum(0))
