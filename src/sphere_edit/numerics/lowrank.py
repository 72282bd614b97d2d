"""Changes of several matrices in few directions each, shared out so that together they keep what the changes do to given inputs.

Truncating every change by itself wastes rank. Matrices that add to one residual stream mostly write the same directions, each a part of
what the facts need. At rank R they hold R directions in all, though L of them have room for L·R. So each direction is given to as many
matrices as there is room for, and these take over what the others no longer write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sphere_edit.numerics.linalg import factor_solve, spd_factor

Factors = tuple[Tensor, Tensor]  # ``B [d_out, R]`` and ``A [R, d_in]``, float32
_LEFT_OUT = 5.0  # what a direction that nobody holds costs, where one that a single matrix holds costs one
_ORDINARY = 0.5  # λ: how much ordinary inputs weigh beside the facts' keys when a matrix takes something over


@dataclass
class Shared:
    """Changes ΔW_l ``[d_out, d_in]`` of matrices whose outputs are added up, to be cut to any rank.

    With keys ``k_lf`` (row f of ``keys[l]``), the effect of the whole on row f is ``s_f = Σ_l ΔW_l k_lf``. Rows weigh ``w_f ∝ 1/‖s_f‖²``,
    so that no fact is too small to count. Directions V are the eigenvectors of ``Σ_f w_f s_f s_fᵀ``, to which the changes' effect on
    ordinary inputs is added in the same unit. Direction j is held by ``m_j`` matrices (`holders`).

    A matrix l that holds the directions ``U_l`` gets ``A_l = U_lᵀ ΔW_l + X_l``. X_l makes for its keys what the matrices without a
    direction would have written in it, an equal part each holder, and little for ordinary inputs:
    ``argmin Σ_f w_f ‖X_l k_lf − h_lf‖² + λ tr(X_l C_l X_lᵀ)``. At full rank nothing is handed over, and ``U_l A_l = ΔW_l``.

    Attributes:
        keys: by matrix ``[N, d_in]``, row f of all of them of the same text.
        ordinary: C_l ``[d_in, d_in]``, second moments of ordinary inputs; without, all inputs of the keys' size are ordinary.
    """

    changes: Mapping[str, Tensor]
    keys: Mapping[str, Tensor]
    ordinary: Mapping[str, Tensor | None]
    directions: Tensor = field(init=False)  # V [d_out, d_out], float64, the strongest first
    strengths: Tensor = field(init=False)  # the eigenvalues

    def __post_init__(self) -> None:
        self._effects = {name: self._keys(name) @ change.double().T for name, change in self.changes.items()}
        total = torch.stack(list(self._effects.values())).sum(0)
        sizes = total.square().sum(1).clamp_min(1e-30)
        self._weights = 1 / sizes / (1 / sizes).sum()
        moment = (total.T / sizes) @ total / len(total)
        for name, change in self.changes.items():
            beside = change.double() @ self._moment(name) @ change.double().T
            moment = moment + beside / sizes.mean()
        values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
        self.strengths, self.directions = values.flip(0).clamp_min(0), vectors.flip(1)
        self._factors = {name: spd_factor(self._system(name)) for name in self.changes}

    @property
    def largest(self) -> int:
        """The rank at which nothing is left out."""
        return len(self.directions)

    def factors(self, rank: int) -> dict[str, Factors]:
        """``B`` and ``A`` of every matrix; columns beyond d_out are zero."""
        counts = holders(self.strengths, len(self.changes), min(rank, self.largest))
        dealt = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        held = {name: dealt[number :: len(self.changes)] for number, name in enumerate(self.changes)}
        return {name: _padded(*self._of(name, held, counts), rank) for name in self.changes}

    def _of(self, name: str, held: Mapping[str, Tensor], counts: Tensor) -> tuple[Tensor, Tensor]:
        basis = self.directions[:, held[name]]
        handed = torch.zeros(len(self._weights), basis.shape[1], dtype=torch.float64, device=basis.device)
        for other, effect in self._effects.items():
            missing = ~torch.isin(held[name], held[other])
            handed += (effect @ basis) * (missing / counts[held[name]])
        taken = factor_solve(self._factors[name], self._keys(name).T @ (self._weights[:, None] * handed)).T
        return basis, basis.T @ self.changes[name].double() + taken

    def _system(self, name: str) -> Tensor:
        keys = self._keys(name)
        return (keys.T * self._weights) @ keys + _ORDINARY * self._moment(name)

    def _keys(self, name: str) -> Tensor:
        return self.keys[name].to(self.changes[name].device).double()

    def _moment(self, name: str) -> Tensor:
        """C of ordinary inputs."""
        found, keys = self.ordinary[name], self._keys(name)
        if found is not None:
            return found.to(keys.device).double()
        return keys.square().mean() * torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)


def holders(strengths: Tensor, matrices: int, rank: int) -> Tensor:
    """By how many matrices each direction is held, where each of them has room for ``rank``.

    A direction of strength σ² that m matrices write, a part each, costs ``σ²/m`` of ordinary inputs; one that nobody writes costs
    ``5 σ²``. The sum is least where each place goes to whoever gains most by it, since further holders gain less and less.

    Args:
        strengths: σ² of each direction, ``[d]``.

    Returns:
        integers ``[d]`` from 0 to ``matrices``, which sum up to ``matrices · rank``.
    """
    costs = torch.tensor([_LEFT_OUT, *(1 / m for m in range(1, matrices + 1))], dtype=torch.float64)
    gains = (costs[:-1] - costs[1:]).to(strengths.device)[:, None] * strengths.double()
    best = gains.flatten().sort(descending=True, stable=True).indices[: matrices * rank]
    return torch.bincount(best % len(strengths), minlength=len(strengths))


def _padded(left: Tensor, right: Tensor, rank: int) -> Factors:
    missing = rank - left.shape[1]
    pad = torch.nn.functional.pad
    return pad(left, (0, missing)).float(), pad(right, (0, 0, 0, missing)).float()
