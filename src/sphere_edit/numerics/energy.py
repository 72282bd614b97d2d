"""Hyperspherical energy of a weight matrix's neurons (arXiv:1805.09298, arXiv:2306.07280)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_edit.numerics.projection import unit_rows

_FLOOR = 1e-7  # distance given to neurons that coincide, so that their energy is large and not infinite


@dataclass(frozen=True)
class Energy:
    """``total`` over ordered pairs, ``per_pair`` (its mean, which compares across sizes) and how many neurons count."""

    total: float
    per_pair: float
    neurons: int


def hyperspherical_energy(weight: Tensor, power: int = 1, block: int = 1024) -> Energy:
    """``HE_s(W) = Σ_{i≠j} ‖ŵ_i − ŵ_j‖^-s`` over ordered pairs of neurons (rows of ``weight [d_out, d_in]``).

    ``power`` is s: 0 gives ``Σ −log‖·‖``. Works in blocks of ``block`` rows, so that no d_out × d_out matrix exists;
    computed in float64. Zero rows have no direction and are left out; rows nearer than 1e-7 count as that far apart.
    """
    if power not in (0, 1, 2):
        raise ValueError(f"power must be 0, 1 or 2, not {power!r}")
    rows = unit_rows(weight)
    rows = rows[rows.norm(dim=1) > 0]
    n = len(rows)
    total = 0.0
    for start in range(0, n, block):
        part = rows[start : start + block]
        squared = (2 - 2 * part @ rows.T).clamp_min(_FLOOR**2)
        energy = -0.5 * squared.log() if power == 0 else squared.pow(-power / 2)
        index = torch.arange(len(part), device=rows.device)
        energy[index, start + index] = 0.0
        total += float(energy.sum())
    return Energy(total, total / (n * (n - 1)) if n > 1 else 0.0, n)
