"""What a method is given to solve: one matrix, one batch, and what is known of the matrix's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sphere_edit.numerics.experts import width
from sphere_edit.numerics.linalg import spd_factor

State = dict[str, Tensor]  # what a method remembers of a matrix from batch to batch
Seen = dict[str, Tensor]  # what it is told of a batch, by name; some of it is stored with the batch


class Kept(dict[str, Tensor]):
    """Tensors by name. With a ``device`` they lie in CPU memory, and a copy goes to the device for whoever asks for one by its name.

    What is not asked for by name, ``items`` and ``values``, is as it lies.
    """

    def __init__(self, tensors: Mapping[str, Tensor] = MappingProxyType({}), device: torch.device | None = None):
        self.device = device
        super().__init__(tensors if device is None else {name: value.cpu() for name, value in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        found = super().__getitem__(name)
        return found if self.device is None else found.to(self.device)

    def get(self, name: str, default: Any = None) -> Any:
        """As `dict.get`."""
        if name not in self:
            return default
        return self[name]


class Statistics(Kept):
    """What was measured of a matrix before any edit, by the ingredient's name.

    ``second_moment`` is C0 ``[d_in, d_in]``; ``null_space`` is V ``[d_in, r]`` with orthonormal columns, P = V Vᵀ. A method finds what
    its ingredients measure, and C0 wherever the guard asked for it. Of a layer of experts, whose wide matrix is what a method sees, both
    are blocks, ``[E, d_in, d_in]`` and ``[E, d_in, r]`` (`sphere_edit.numerics.experts`).
    """

    def __init__(
        self, tensors: Mapping[str, Tensor] = MappingProxyType({}), device: torch.device | None = None, **named: Tensor
    ):
        super().__init__({**tensors, **named}, device)
        self._made = Kept({}, device)

    @property
    def second_moment(self) -> Tensor | None:
        """C0, where it was measured."""
        return self.get("second_moment")

    @property
    def factor(self) -> Tensor:
        """Cholesky factor of C0 (`spd_factor`), float64, found once."""
        return self.made("factor", lambda: spd_factor(self["second_moment"]))

    def made(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What follows from them and is made once; it lies where they lie."""
        if name not in self._made:
            self._made |= Kept({name: make()}, self.device)
        return self._made[name]

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
