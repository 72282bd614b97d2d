"""Hyperspherical energy of a weight matrix's neurons: value, gradient, and what a small update may do to it.

Sources: Liu et al. 2018 (arXiv:1805.09298), Qiu et al. 2023 (arXiv:2306.07280), SPHERE (arXiv:2510.01172).
A small change of energy is necessary for retention, not sufficient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_edit.numerics.experts import identity_like, mean_diagonal
from sphere_edit.numerics.linalg import spd_factor

_FLOOR = 1e-7  # distance given to neurons that coincide, so that their energy is large and not infinite
_BLOCK = 1024  # neurons taken at a time; changes memory, not results beyond rounding


@dataclass(frozen=True)
class Energy:
    """``total`` over ordered pairs, ``per_pair`` (its mean, which compares across sizes) and how many neurons count."""

    total: float
    per_pair: float
    neurons: int


def hyperspherical_energy(weight: Tensor, power: int = 1, block: int = _BLOCK) -> Energy:
    """``HE_s(W) = Σ_{i≠j} ‖ŵ_i − ŵ_j‖^-s`` over ordered pairs of neurons (rows of ``weight [d_out, d_in]``).

    ``power`` is s: 0 gives ``Σ −log‖·‖``. Works in blocks of ``block`` rows, so that no d_out × d_out matrix exists;
    computed in float64. Zero rows have no direction and are left out; rows nearer than 1e-7 count as that far apart.
    Of a layer of experts ``[E, d_out, d_in]``, whose neurons are the experts' own, it is the sum over experts.
    """
    _check_power(power)
    if weight.dim() == 3:
        return _together([hyperspherical_energy(expert, power, block) for expert in weight])
    neurons = _Neurons.of(weight)
    total = 0.0
    for rows, columns, cosines in neurons.blocks(block, upper=True):
        energy = _pair_energy(_squared_distances(cosines), power)
        if rows == columns:
            energy.fill_diagonal_(0.0)
        total += float(energy.sum()) * (1 if rows == columns else 2)
    n = len(neurons.index)
    return Energy(total, total / (n * (n - 1)) if n > 1 else 0.0, n)


def _together(energies: list[Energy]) -> Energy:
    """Of a layer of experts: no pair reaches from one expert to another."""
    total, pairs = sum(one.total for one in energies), sum(one.neurons * (one.neurons - 1) for one in energies)
    return Energy(total, total / pairs if pairs else 0.0, sum(one.neurons for one in energies))


def energy_gradient(weight: Tensor, power: int = 1, block: int = _BLOCK) -> Tensor:
    """``∇_W HE_s [d_out, d_in]`` in float64, in closed form.

    From ``‖ŵ_i − ŵ_j‖² = 2 − 2 c_ij`` with ``c_ij = ⟨ŵ_i, ŵ_j⟩``, each unordered pair counted twice, and the derivative of
    ``ŵ_i`` by ``w_i``, ``(I − ŵ_i ŵ_iᵀ) / ‖w_i‖``, which turns ``ŵ_i − ŵ_j`` into ``−(ŵ_j − c_ij ŵ_i)``:

        ∇_i = (2 s / ‖w_i‖) Σ_{j≠i} d_ij^-(s+2) (ŵ_j − c_ij ŵ_i),   with 1 in place of s where s = 0.

    Each ``∇_i`` is orthogonal to ``w_i``: the length of a neuron does not matter. Zero rows have gradient 0, and so
    have pairs nearer than 1e-7, whose energy is held constant.
    """
    _check_power(power)
    if weight.dim() == 3:
        return torch.stack([energy_gradient(expert, power, block) for expert in weight])
    neurons = _Neurons.of(weight)
    gradient = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    along = torch.zeros(len(neurons.index), dtype=torch.float64, device=weight.device)
    for rows, columns, cosines in neurons.blocks(block, upper=False):
        squared = _squared_distances(cosines)
        pull = torch.where(squared > _FLOOR**2, squared.pow(-(power + 2) / 2), torch.zeros_like(squared))
        if rows == columns:
            pull.fill_diagonal_(0.0)
        along[rows] += (pull * cosines).sum(1)
        gradient[neurons.index[rows]] += pull @ neurons.units(columns)
    for first in range(0, len(neurons.index), block):
        part = slice(first, first + block)
        index = neurons.index[part]
        tangent = gradient[index] - along[part, None] * neurons.units(part)
        gradient[index] = tangent * (2 * max(power, 1) / neurons.norms[part])[:, None]
    return gradient


@dataclass(frozen=True)
class Bounds:
    """What the energy's gradient says of an update ΔW, to first order (SPHERE, Theorems 1 and 2).

    Attributes:
        gradient_norm: ``K = ‖∇_W HE‖_F``.
        first_order: ``⟨∇_W HE, ΔW⟩``, the change of energy to first order.
        largest_change: ``K ‖ΔW‖_F ≥ |first_order|`` (Theorem 2), by Cauchy and Schwarz; equal along the gradient.
        least_forgetting: ``|first_order| / K ≤ ‖ΔW X‖_F`` for inputs with ``X Xᵀ = I`` (Theorem 1): for those
            ``‖ΔW X‖_F = ‖ΔW‖_F``, and the bound is Theorem 2 read the other way. With fewer inputs than d_in it is
            false: a ΔW orthogonal to all of them changes no output and may change the energy.
        least_response: the same for keys of second moment C: ``|first_order| / ‖∇HE C^-½‖_F ≤ ‖ΔW C^½‖_F``, since
            ``⟨∇HE, ΔW⟩ = ⟨∇HE C^-½, ΔW C^½⟩``; None without second moments.
        response: ``‖ΔW C^½‖_F`` itself, the root of the mean squared change of the outputs over such keys.
    """

    gradient_norm: float
    first_order: float
    largest_change: float
    least_forgetting: float
    least_response: float | None = None
    response: float | None = None


@dataclass(frozen=True)
class KeyMetric:
    """``C = C0 + ε I`` of a matrix's inputs, as its Cholesky factor ``[d_in, d_in]`` (``[E, d_in, d_in]``) in float64."""

    factor: Tensor

    @classmethod
    def of(cls, second_moment: Tensor, ridge: float = 0.01) -> KeyMetric:
        """From C0, with ε as ``ridge`` times its mean eigenvalue."""
        c = second_moment.double()
        c = c + ridge * mean_diagonal(c) * identity_like(c)
        return cls(spd_factor(c))


def energy_bounds(gradient: Tensor, delta: Tensor, keys: KeyMetric | None = None) -> Bounds:
    """The bounds for ``delta [d_out, d_in]`` at the weight whose energy has ``gradient [d_out, d_in]``, in float64."""
    g, d = gradient.double(), delta.double()
    norm, first_order = float(g.norm()), float((g * d).sum())
    least = abs(first_order) / norm if norm else 0.0
    largest = norm * float(d.norm())
    if keys is None:
        return Bounds(norm, first_order, largest, least)
    weighted = float(torch.linalg.solve_triangular(keys.factor, g.mT, upper=False).norm())  # ‖L⁻¹ Gᵀ‖ = ‖G C^-½‖
    response = float((d @ keys.factor).norm())
    return Bounds(norm, first_order, largest, least, abs(first_order) / weighted if weighted else 0.0, response)


def collateral_ratio(delta: Tensor, weight: Tensor, second_moment: Tensor) -> float:
    """``tr(ΔW C0 ΔWᵀ) / tr(W C0 Wᵀ)``: the mean squared change of a matrix's outputs over ordinary keys, relative to them.

    ``delta`` and ``weight`` are ``[d_out, d_in]``, ``second_moment`` is C0 ``[d_in, d_in]``, or all three by expert; in the dtype of C0. Of a weight without
    any output it is 0.
    """
    moved, whole = (matrix.to(second_moment.dtype) for matrix in (delta, weight))
    outputs = float(((whole @ second_moment) * whole).sum().double())
    return float(((moved @ second_moment) * moved).sum().double()) / outputs if outputs else 0.0


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of a spectrum's shares: how many directions it is as good as spread over.

    ``values`` are non-negative, such as squared singular values. Source: Roy and Vetterli 2007.
    """
    shares = values.double().clamp_min(0)
    shares = shares[shares > 0] / shares.sum()
    return float((-(shares * shares.log()).sum()).exp())


@dataclass(frozen=True)
class _Neurons:
    """The rows of a weight that have a direction; unit vectors are made block by block, so that no second matrix exists."""

    weight: Tensor  # [d_out, d_in], in its own dtype
    index: Tensor  # [n] which rows
    norms: Tensor  # [n] their lengths, float64

    @classmethod
    def of(cls, weight: Tensor) -> _Neurons:
        norms = torch.cat([part.double().norm(dim=1) for part in weight.split(_BLOCK)])
        index = (norms > 0).nonzero().flatten()
        return cls(weight, index, norms[index])

    def units(self, part: slice) -> Tensor:
        """Some neurons scaled to length 1, ``[rows, d_in]`` in float64."""
        return self.weight[self.index[part]].double() / self.norms[part, None]

    def blocks(self, size: int, upper: bool) -> Iterator[tuple[slice, slice, Tensor]]:
        """Cosines between blocks of neurons: all, or those on and above the diagonal of blocks."""
        starts = range(0, len(self.index), size)
        for first in starts:
            rows = slice(first, first + size)
            left = self.units(rows)
            for second in starts:
                if upper and second < first:
                    continue
                columns = slice(second, second + size)
                yield rows, columns, left @ (left if second == first else self.units(columns)).T


def _squared_distances(cosines: Tensor) -> Tensor:
    return (2 - 2 * cosines).clamp_min(_FLOOR**2)


def _pair_energy(squared: Tensor, power: int) -> Tensor:
    return -0.5 * squared.log() if power == 0 else squared.pow(-power / 2)


def _check_power(power: int) -> None:
    if power not in (0, 1, 2):
        raise ValueError(f"power must be 0, 1 or 2, not {power!r}")
