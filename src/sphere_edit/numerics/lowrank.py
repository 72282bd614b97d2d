"""The best approximation of a change by one of low rank, where it is the inputs that say what counts."""

from __future__ import annotations

import torch
from torch import Tensor


def output_directions(change: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular directions of ``ΔW C^½``: what a change does to inputs with second moment C, the strongest first.

    The approximation of rank R that is nearest to ΔW over such inputs, ``argmin E‖(ΔW − A) k‖² = ‖(ΔW − A) C^½‖²``, is the truncated SVD
    of ``ΔW C^½`` with the weight undone (Eckart and Young 1936): ``U_R U_Rᵀ ΔW C^½ C^-½ = U_R U_Rᵀ ΔW``. So neither C^½ nor its inverse
    is ever formed, and C may be singular.

    Args:
        change: ΔW ``[d_out, d_in]``.
        second_moment: C ``[d_in, d_in]``, symmetric and positive semidefinite.

    Returns:
        the singular values ``[d_out]`` and directions U ``[d_out, d_out]`` (orthonormal columns), both float64.
    """
    delta = change.double()
    moved = delta @ second_moment.double().to(delta.device) @ delta.T
    values, directions = torch.linalg.eigh((moved + moved.T) / 2)
    return values.flip(0).clamp_min(0).sqrt(), directions.flip(1)


def truncated(change: Tensor, directions: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``B [d_out, rank]`` and ``A [rank, d_in]`` (float32) with ``B A = U_R U_Rᵀ ΔW``; columns beyond d_out are zero."""
    leading = directions[:, :rank]
    left, right = leading, leading.T @ change.double()
    missing = rank - leading.shape[1]
    return (
        torch.nn.functional.pad(left, (0, missing)).float(),
        torch.nn.functional.pad(right, (0, 0, 0, missing)).float(),
    )
