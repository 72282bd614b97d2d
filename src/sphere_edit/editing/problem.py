"""What a method is given to solve: one matrix, one batch, and what is known of the matrix's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from sphere_edit.numerics.experts import width
from sphere_edit.numerics.linalg import spd_factor

State = dict[str, Tensor]  # what a method remembers of a matrix from batch to batch
Seen = dict[str, Tensor]  # what it is told of a batch, by name; some of it is stored with the batch


class Statistics(dict[str, Tensor]):
    """What was measured of a matrix before any edit, by the ingredient's name.

    ``second_moment`` is C0 ``[d_in, d_in]``; ``null_space`` is V ``[d_in, r]`` with orthonormal columns, P = V Vᵀ. A method finds what
    its ingredients measure, and C0 wherever the guard asked for it. Of a layer of experts, whose wide matrix is what a method sees, both
    are blocks, ``[E, d_in, d_in]`` and ``[E, d_in, r]`` (`sphere_edit.numerics.experts`).
    """

    @property
    def second_moment(self) -> Tensor | None:
        """C0, where it was measured."""
        return self.get("second_moment")

    @cached_property
    def factor(self) -> Tensor:
        """Cholesky factor of C0 (`spd_factor`), float64, found once."""
        return spd_factor(self["second_moment"])

    @property
    def width(self) -> int:
        """How many inputs the matrix has."""
        return width(self["second_moment"])


@dataclass(frozen=True)
class LayerProblem:
    """One matrix, one batch: write ``residual`` at ``keys``.

    With optimised targets there is a column a fact (or a fact and context), and R is the share of v* − h that falls to this matrix. With
    gradients there is a column a target token, and R is the direction in which the loss falls, −∂loss/∂output.
    """

    weight: Tensor  # W [d_out, d_in] as it stands, float32
    keys: Tensor  # K [d_in, n]
    residual: Tensor  # R [d_out, n]
    statistics: Statistics
    given: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # what the method's ingredients give with the problem, by name
