"""A layer of experts as one wide matrix, and matrices over its inputs that are block-diagonal by expert.

The layer's output is ``Σ_e g_e W_e k_e``, g the router's weights: one matrix ``[W_1 … W_E]`` of shape ``[d_out, E · d_in]`` times the
joint key ``[g_1 k_1; …; g_E k_E]``, zero where the token is not routed. Weights and updates are held by expert, ``[E, d_out, d_in]``; keys
are columns of the wide one, ``[E · d_in, n]``; C0 and its like are ``[E, d_in, d_in]``, one block an expert, never ``[E · d_in]²``.
An ordinary matrix has no first axis. Every function here takes both, so that formulas are written once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(matrix: Tensor) -> Tensor:
    """``[W_1 … W_E] [d_out, E · d_in]`` of ``matrix [E, d_out, d_in]``; an ordinary one is given back as it is."""
    return matrix if matrix.dim() == 2 else matrix.transpose(0, 1).flatten(1).contiguous()


def by_expert(matrix: Tensor, experts: int) -> Tensor:
    """``[E, rows, d_in]`` of a wide ``matrix [rows, E · d_in]``; with 0 experts it is an ordinary one, given back as it is."""
    return matrix if not experts else matrix.unflatten(1, (experts, -1)).transpose(0, 1).contiguous()


def experts_of(matrix: Tensor) -> int:
    """How many experts a weight or a block-diagonal matrix is of; 0 for an ordinary one."""
    return len(matrix) if matrix.dim() == 3 else 0


def width(matrix: Tensor) -> int:
    """How many inputs it acts on: ``d``, or ``E · d`` of blocks ``[E, d, …]``."""
    return matrix.shape[:-1].numel()


def inputs_of(weight: Tensor) -> int:
    """How many inputs a weight has: ``d_in`` of ``[d_out, d_in]``, ``E · d_in`` of ``[E, d_out, d_in]``."""
    return weight.shape[-1] * max(1, experts_of(weight))


def times(matrix: Tensor, columns: Tensor) -> Tensor:
    """``matrix @ columns`` for ``matrix [d, r]`` and ``columns [r, n]``, or blocks ``[E, d, r]`` and ``columns [E · r, n]``."""
    if matrix.dim() == 2:
        return matrix @ columns
    return (matrix @ columns.unflatten(0, (len(matrix), -1))).flatten(0, 1)


def mean_diagonal(matrix: Tensor) -> Tensor:
    """The mean of a square matrix's diagonal, over all blocks."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean()


def identity_like(matrix: Tensor) -> Tensor:
    """``I [d, d]`` of a block's size."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
