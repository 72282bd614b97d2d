"""Eigenbases, null spaces and solves. Everything here runs in float64, whatever comes in."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

from sphere_edit.errors import SphereEditError
from sphere_edit.numerics.experts import identity_like, mean_diagonal

_LARGE = 2048
_GRAM_ROWS = 1024


def right_eigenbasis(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of ``AᵀA / n`` for ``A = rows [n, d]``, largest first, zero ones left out.

    Solved on the smaller of the two Gram matrices: for n < d the eigenvectors of ``AAᵀ`` are carried over by
    ``u = Aᵀq / √λ``, which spans the same subspace at (d/n)³ less work.

    Returns:
        ``(values [k], vectors [d, k])`` in float64 with k = rank(A); the columns are orthonormal.
    """
    a = rows.double()
    n, d = a.shape
    gram = a @ a.T if n < d else a.T @ a
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > values[0].clamp_min(0) * max(n, d) * torch.finfo(torch.float64).eps
    values, vectors = values[keep], vectors[:, keep]
    if n < d:
        vectors = a.T @ vectors / values.sqrt()
    return values / n, vectors


def keeps_precision(rows: Tensor) -> bool:
    """Whether directions of a matrix of this shape are computed in its own precision (`leading_right_directions`)."""
    return min(rows.shape) >= _LARGE


def leading_right_directions(rows: Tensor, choose: Callable[[Tensor], int]) -> Tensor:
    """The leading right singular directions of ``A = rows [n, d]``: ``U [d, r]`` in float64, orthonormal.

    As `right_eigenbasis`, but only the directions that are asked for are carried over from the smaller Gram matrix, and
    that is computed in A's own precision once both n and d reach 2048, where float64 takes twice as long: the
    subspace then differs by about 1e-6 in what is projected on it.

    Args:
        choose: how many, given all eigenvalues of ``AᵀA / n`` from the largest (float64, zero ones left out).
    """
    n, d = rows.shape
    a = rows if keeps_precision(rows) else rows.double()
    values, vectors = torch.linalg.eigh(_gram(a if n < d else a.T))
    values = values.flip(0).double().clamp_min(0)
    rounding = max(n, d) * torch.finfo(torch.float64).eps if a.dtype == torch.float64 else 32 * torch.finfo(a.dtype).eps
    real = int((values > values[0] * rounding).sum())
    count = min(choose(values[:real] / n), real)
    leading = vectors.flip(1)[:, :count] if count < n else vectors.flip(1)
    if n >= d:
        return leading.double()
    return torch.linalg.qr((a.T @ leading).double()).Q


def principal_rank(values: Tensor, eta: float) -> int:
    """``r = min(#(cumulative ratio ≤ η) + 1, rank)`` for eigenvalues sorted from the largest (DESIGN: SPHERE)."""
    ratio = values.cumsum(0) / values.sum()
    return min(int((ratio <= eta).sum()) + 1, len(values))


def dominant_vectors(matrix: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The leading singular vectors of ``matrix [m, n]``, as many as hold a ``share`` of ``‖matrix‖²`` (`principal_rank`).

    Returns:
        ``(left [m, r], right [n, r])`` in float64, orthonormal: bases of the two spans, not pairs u_i, v_i.
    """
    right = leading_right_directions(matrix, lambda values: principal_rank(values, share))
    return torch.linalg.qr(matrix.double() @ right).Q, right


def _gram(a: Tensor) -> Tensor:
    """``A Aᵀ [n, n]`` of a wide ``a [n, d]``, its lower blocks mirrored."""
    n = len(a)
    gram = torch.empty(n, n, dtype=a.dtype, device=a.device)
    for first in range(0, n, _GRAM_ROWS):
        after = min(first + _GRAM_ROWS, n)
        gram[first:after, first:] = a[first:after] @ a[first:].T
        gram[after:, first:after] = gram[first:after, after:].T
    return gram


def spd_factor(matrix: Tensor) -> Tensor:
    """Cholesky factor ``L [d, d]`` (float64) of a symmetric positive semidefinite ``matrix = L Lᵀ``, or of each block ``[E, d, d]``.

    A singular matrix (fewer tokens seen than it has rows) is lifted by the smallest multiple of its mean diagonal,
    from 1e-12 up, that makes it positive definite; blocks are lifted together, as the matrix that they make up.

    Raises:
        SphereEditError: it holds NaN or infinite numbers, or is far from semidefinite.
    """
    a = matrix.double()
    if not bool(torch.isfinite(a).all()):
        raise _not_finite()
    scale = mean_diagonal(a)
    lift = 0.0
    for exponent in range(-12, 0):
        factor, failed = torch.linalg.cholesky_ex(a + lift * scale * identity_like(a))
        if not bool(failed.any()):
            return factor
        lift = 10.0**exponent
    raise SphereEditError("the linear system for the weight update is not positive definite, not even nearly")


def spd_solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix⁻¹ right`` for a symmetric positive semidefinite ``matrix [d, d]`` and ``right [d, n]``; see `spd_factor`."""
    return factor_solve(spd_factor(matrix), right)


def factor_solve(factor: Tensor, right: Tensor) -> Tensor:
    """``(L Lᵀ)⁻¹ right`` for a lower triangular ``factor [d, d]`` and ``right [d, n]``, in float64.

    Or for blocks ``[E, d, d]`` and ``right [E · d, n]``.
    """
    b = right.double()
    if not bool(torch.isfinite(b).all()):
        raise _not_finite()
    if factor.dim() == 2:
        return torch.cholesky_solve(b, factor)
    return torch.cholesky_solve(b.unflatten(0, (len(factor), -1)), factor).flatten(0, 1)


def _not_finite() -> SphereEditError:
    return SphereEditError(
        "the linear system for the weight update holds NaN or infinite numbers; "
        "check the model's weights and, for a float16 model, that its activations do not overflow"
    )


def grown_solution(solved: Tensor, keys: Tensor) -> Tensor:
    """``(B + K Kᵀ)⁻¹ K`` from ``solved = B⁻¹ K [d, n]`` and ``keys = K [d, n]``: Woodbury, O(d n²) instead of O(d³).

    With more keys than dimensions, from ``(I + B⁻¹ K Kᵀ)⁻¹ B⁻¹ K`` instead, O(d² n).
    """
    d, n = keys.shape
    if n > d:
        return torch.linalg.solve(torch.eye(d, dtype=keys.dtype, device=keys.device) + solved @ keys.T, solved)
    return spd_solve(capacitance(solved, keys), solved.T).T


def grown_inverse(inverse: Tensor, keys: Tensor) -> Tensor:
    """``(B + K Kᵀ)⁻¹`` from ``inverse = B⁻¹ [d, d]`` by steps of rank d at most, O(d² n) in all; stays symmetric."""
    for part in keys.split(len(keys), dim=1):
        solved = inverse @ part
        half = torch.linalg.solve_triangular(spd_factor(capacitance(solved, part)), solved.T, upper=False)
        inverse = inverse - half.T @ half
    return inverse


def capacitance(solved: Tensor, keys: Tensor) -> Tensor:
    """``I + Kᵀ B⁻¹ K``, made symmetric."""
    inner = keys.T @ solved
    return (inner + inner.T) / 2 + torch.eye(len(inner), dtype=inner.dtype, device=inner.device)


def squared_singular_values(matrix: Tensor) -> Tensor:
    """σ² of ``matrix``, from the smallest, in float64: eigenvalues of the smaller Gram matrix."""
    a = matrix.double()
    gram = a @ a.T if a.shape[0] < a.shape[1] else a.T @ a
    return torch.linalg.eigvalsh(gram).clamp_min(0)


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value of ``matrix``, in float64."""
    return float(squared_singular_values(matrix)[-1].sqrt())


def clamp_spectrum(matrix: Tensor, limit: float, base: float) -> Tensor:
    """``matrix [m, n]`` (float64) with every singular value σ > limit replaced by ``log_b σ − log_b limit + limit``.

    A value that this would enlarge stays as it is. With all σ ≤ limit the matrix itself is returned. Source: PRUNE
    (arXiv:2405.16821, eq. 6). Only the singular vectors to be changed are formed, from the smaller Gram matrix.
    """
    a = matrix.double()
    wide = a.shape[0] < a.shape[1]
    values, vectors = torch.linalg.eigh(a @ a.T if wide else a.T @ a)
    sigma = values.clamp_min(0).sqrt()
    large = sigma > limit
    if not bool(large.any()):
        return matrix
    u, s = vectors[:, large], sigma[large]
    shrunk = ((s.log() - math.log(limit)) / math.log(base) + limit).minimum(s)
    factor = shrunk / s - 1
    return a + (u * factor) @ (u.T @ a) if wide else a + (a @ u * factor) @ u.T


class NullSpaceRule(str, Enum):
    """How small an eigenvalue of C0 must be for its direction to count as unused.

    ``mean``: below ``threshold`` times the mean eigenvalue tr(C0)/d, the same for a model of any scale.
    ``quantile``: among the smallest ``threshold`` share of all directions.
    ``absolute``: below ``threshold`` itself, as published (2e-2).
    """

    MEAN = "mean"
    QUANTILE = "quantile"
    ABSOLUTE = "absolute"


def null_space(second_moment: Tensor, rule: NullSpaceRule, threshold: float) -> Tensor:
    """Orthonormal basis ``V [d, r]`` (float64) of the directions that keys hardly use; ``P = V Vᵀ``.

    Source: AlphaEdit (arXiv:2410.02355, section 3.2), with eigenvectors of ``C0 [d, d]`` below a threshold. Of blocks ``[E, d, d]`` the
    rule is that of the whole matrix, and the basis is ``[E, d, r]``: an expert with fewer directions than r has columns of zeros.
    """
    values, vectors = torch.linalg.eigh(second_moment.double())
    if rule is NullSpaceRule.QUANTILE:
        order = values.flatten().argsort(stable=True).argsort(stable=True).view_as(values)
        unused = order < round(threshold * values.numel())
    else:
        unused = values < (threshold * float(values.mean()) if rule is NullSpaceRule.MEAN else threshold)
    count = int(unused.sum(-1).max())
    if count == 0:
        raise SphereEditError(
            f"no direction of the keys is unused under the null-space rule '{rule.value}' with threshold {threshold:g} "
            f"(eigenvalues of C0 run from {values.min():.3g} to {values.max():.3g}); raise the threshold"
        )
    return vectors[..., :count] * unused[..., None, :count]
