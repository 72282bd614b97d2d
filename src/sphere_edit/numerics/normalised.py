"""The normalised vectors nearest to wanted ones: what a norm with a weight can say, and what it must be given for it.

RMSNorm says ``w ⊙ u`` with ``u = x / rms(x)``: for x of one length, these are the points of an ellipsoid.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_STEPS = (
    200  # Newton's steps here number four to ten; near a double root, where each halves the distance, some dozens
)


def nearest_normalised(weight: Tensor, wanted: Tensor, length: Tensor) -> Tensor:
    """``u [d, n]`` (float64) with ``‖u‖ = length [n]`` of which ``weight [d] ⊙ u`` is nearest to ``wanted [d, n]``.

    The least squares on a sphere (Forsythe and Golub, 1965): ``u = w y / (w² + μ)`` with the one μ ≥ −min w² that gives
    the length. ``1 / ‖u(μ)‖`` is concave, so that Newton's method from the left of the root comes down on it without a step too far
    (Moré and Sorensen, 1983).

    Where nothing is wanted along the smallest weights, there may be no such μ: then ``μ = −min w²``, and any sign of what is left of
    the length, along one of them, is as near; the positive one is taken.
    """
    w, y, r = weight.double()[:, None], wanted.double(), length.double()
    b, gaps = w * y, w.square() - w.square().min()  # u = b / (gaps + t), t = μ + min w² ≥ 0
    t = (b.abs() / r - gaps).amax(0).clamp_min(0)  # each term alone is no longer than u: a place left of the root
    for _ in range(_MOST_STEPS):
        u = _over(b, gaps + t)
        size = u.norm(dim=0)
        slope = _over(u.square(), gaps + t).sum(0) / size.pow(3)
        moved = torch.where(size > r, t + (1 / r - 1 / size) / slope, t)
        if torch.equal(moved, t):
            break
        t = moved
    u = _over(b, gaps + t)
    left = (r.square() - u.square().sum(0)).clamp_min(0).sqrt()
    u[int(gaps.argmin())] += torch.where(t == 0, left, 0.0)
    return u * (r / u.norm(dim=0))


def _over(first: Tensor, second: Tensor) -> Tensor:
    """``first / second``, and nothing where both are zero."""
    return torch.where(first == 0, 0.0, first / second)
