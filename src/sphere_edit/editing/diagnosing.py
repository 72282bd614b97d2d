"""What was done to a weight matrix: its energy and spectrum before and after, and what first-order theory says of the change.

Sources: SPHERE (arXiv:2510.01172), Theorems 1 and 2; `sphere_edit.numerics.energy`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict  # typing's own has no types at run time before Python 3.12

from sphere_edit.editing.batch import Written
from sphere_edit.editing.problem import Statistics
from sphere_edit.errors import SphereEditError
from sphere_edit.models.identity import tensor_bytes
from sphere_edit.models.weights import EditedWeights
from sphere_edit.numerics.energy import (
    Bounds,
    Energy,
    KeyMetric,
    collateral_ratio,
    effective_rank,
    energy_bounds,
    energy_gradient,
    hyperspherical_energy,
)
from sphere_edit.numerics.experts import experts_of, inputs_of, wide
from sphere_edit.numerics.linalg import squared_singular_values
from sphere_edit.numerics.projection import Sphere, rank_of
from sphere_edit.numerics.update import Update


@dataclass(frozen=True)
class EnergyChange:
    """What became of a matrix's hyperspherical energy from ``before`` to ``after``.

    Attributes:
        gradient: ``∇HE [d_out, d_in]`` at the weight before, float64.
        before, after: the energies.
        bounds: what the gradient says of the change to first order.
    """

    gradient: Tensor
    before: Energy
    after: Energy
    bounds: Bounds

    @property
    def change(self) -> float:
        """ΔHE."""
        return self.after.total - self.before.total

    @classmethod
    def of(
        cls, before: Tensor, after: Tensor, keys: KeyMetric | None, power: int = 1, known: Energy | None = None
    ) -> EnergyChange:
        """From two weights ``[d_out, d_in]``; ``known`` is the energy before, where it is known."""
        gradient = energy_gradient(before, power)
        bounds = energy_bounds(gradient, after - before, keys)
        first = hyperspherical_energy(before, power) if known is None else known
        return cls(gradient, first, hyperspherical_energy(after, power), bounds)


# --- a batch of a run ---------------------------------------------------------------------------------------------


class MatrixEntry(TypedDict):
    """What a batch did to one edited matrix, as the journal says it.

    ``first_order`` changes are ⟨∇HE, ΔW⟩ at the weights before the batch: of the deployed change, of ΔW with and without SPHERE,
    and of the parts of the two that lie along the principal directions. Energies, drifts and the collateral ratio are of the
    deployed weights.
    """

    sha256: str  # of the working weight after the batch
    update_norm: float
    relative_norm: float  # ‖ΔW‖ / ‖W‖
    principal_norm_before: float  # ‖ΔW U‖ as solved
    principal_norm: float  # and as written
    principal_rank: int
    energy: float
    energy_per_pair: float
    energy_drift: float  # relative to the unedited matrix
    energy_change: float
    first_order: float
    first_order_solved: float
    first_order_solved_principal: float
    first_order_update: float
    first_order_update_principal: float
    gradient_norm: float
    largest_change: float
    least_forgetting: float
    least_response: float | None
    response: float | None
    relative_drift: float  # ‖W − W0‖ / ‖W0‖
    collateral_ratio: float | None  # tr((W − W0) C0 (W − W0)ᵀ) / tr(W0 C0 W0ᵀ)
    expert_norms: NotRequired[list[float]]  # of a layer of experts, the length of each one's part of the update


class BatchDiagnosis:
    """Tells what batches do to the edited matrices, keeping what does not change from one to the next."""

    def __init__(self, weights: EditedWeights, statistics: Mapping[str, Statistics]):
        self._weights, self._statistics = weights, statistics
        self._energies: dict[
            str, dict[str, Energy]
        ] = {}  # by matrix and hash: of the unedited one and the last one seen

    def entry(self, name: str, written: Written, deployed: Tensor, directions: Tensor) -> MatrixEntry:
        """What the journal says of one matrix.

        Args:
            written: the batch, which stands in the model by now.
            deployed: what the model ran with before it ``[d_out, d_in]``.
            directions: SPHERE's ``U [d_in, r]``.
        """
        update, solved = written.updates[name], written.solved[name]
        original, now = self._weights.original(name), self._weights.deployed(name)
        moment = self._statistics[name].second_moment
        unedited, before = self._energy(name, original), self._energy(name, deployed)
        change = EnergyChange.of(deployed, now, self._metric(name, moment), known=before)
        self._energies[name] = {_hash(original): unedited, _hash(now): change.after}
        gradient, bounds = change.gradient, change.bounds
        along = gradient @ directions
        solved_along, update_along = (part.to(torch.float64).times(directions) for part in (solved, update))
        return {
            "sha256": self._weights.digest(name),
            "update_norm": update.norm(),
            "relative_norm": _share(update.norm(), written.before[name]),
            "principal_norm_before": float(solved_along.norm()),
            "principal_norm": float(update_along.norm()),
            "principal_rank": rank_of(directions),
            "energy": change.after.total,
            "energy_per_pair": change.after.per_pair,
            "energy_drift": change.after.total / unedited.total - 1 if unedited.total else 0.0,
            "energy_change": change.change,
            "first_order": bounds.first_order,
            "first_order_solved": float((gradient * solved.dense()).sum()),
            "first_order_solved_principal": float((along * solved_along).sum()),
            "first_order_update": float((gradient * update.dense()).sum()),
            "first_order_update_principal": float((along * update_along).sum()),
            "gradient_norm": bounds.gradient_norm,
            "largest_change": bounds.largest_change,
            "least_forgetting": bounds.least_forgetting,
            "least_response": bounds.least_response,
            "response": bounds.response,
            "relative_drift": _share(float((now - original).double().norm()), original),
            "collateral_ratio": None if moment is None else collateral_ratio(now - original, original, moment),
            **_of_experts(update),
        }

    def _metric(self, name: str, moment: Tensor | None) -> KeyMetric | None:
        if moment is None:
            return None
        return KeyMetric(self._statistics[name].made("metric", lambda: KeyMetric.of(moment).factor))

    def _energy(self, name: str, weight: Tensor) -> Energy:
        """A matrix's energy; that of the weights before a batch is mostly that of those after the last one."""
        known, key = self._energies.setdefault(name, {}), _hash(weight)
        if key not in known:
            known[key] = hyperspherical_energy(weight)
        return known[key]


def _hash(weight: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(weight)).hexdigest()


class _Experts(TypedDict, total=False):
    expert_norms: list[float]


def _of_experts(update: Update) -> _Experts:
    """How far the update goes in each expert; nothing for a matrix of no experts."""
    delta = update.dense()
    return {"expert_norms": delta.double().flatten(1).norm(dim=1).tolist()} if experts_of(delta) else {}


def _share(length: float, weight: Tensor) -> float:
    """A length relative to ``‖weight‖``; 0 of a matrix that is nothing but zeros."""
    whole = float(weight.double().norm())
    return length / whole if whole else 0.0


# --- any two checkpoints ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixState:
    """One matrix: its hyperspherical energy and its spectrum."""

    energy: float
    energy_per_pair: float
    spectral_norm: float
    effective_rank: float  # of its squared singular values
    principal_rank: int  # directions that hold the share η of its neurons' spectrum


@dataclass(frozen=True)
class MatrixChange:
    """What became of one matrix."""

    after: MatrixState
    energy_change: float
    remainder: float  # of energy_change, beyond its first order
    relative_norm: float  # ‖ΔW‖ / ‖W‖
    update_spectral_norm: float
    update_effective_rank: float
    principal_share: float  # ‖ΔW U‖² / ‖ΔW‖²
    bounds: Bounds
    collateral_ratio: float | None  # tr(ΔW C0 ΔWᵀ) / tr(W C0 Wᵀ)


@dataclass(frozen=True)
class MatrixReport:
    """One matrix before and, where there is something to compare with, after."""

    name: str
    rows: int
    columns: int
    before: MatrixState
    change: MatrixChange | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def as_row(self) -> dict[str, Any]:
        """Plain values in one flat row, for CSV."""
        record = self.as_dict()
        change = record.pop("change") or {}
        bounds, after = change.pop("bounds", {}), change.pop("after", {})
        row = {"name": self.name, "rows": self.rows, "columns": self.columns}
        row |= {f"before_{name}": value for name, value in record["before"].items()}
        row |= {f"after_{name}": value for name, value in after.items()}
        return row | change | bounds


def compared(
    name: str, weight: Tensor, now: Tensor | None, moment: Tensor | None, power: int, eta: float
) -> MatrixReport:
    """A matrix ``weight [d_out, d_in]``, and what became of it in ``now``, where there is one.

    Args:
        moment: C0 of its inputs, where it is known.
        power: s of HE_s.
        eta: share of the neurons' spectrum that counts as principal.

    Raises:
        SphereEditError: one of the weights is not finite.
    """
    energy = _energy(name, weight, power)
    state, directions = _state(weight, energy, eta)
    if now is None:
        return MatrixReport(name, weight.shape[-2], inputs_of(weight), state, None)
    _energy_is_defined(name, now)
    change = EnergyChange.of(weight, now, None if moment is None else KeyMetric.of(moment), power, energy)
    afterwards, _ = _state(now, change.after, eta)
    delta = (now - weight).double()
    size = float(delta.norm())
    spectrum = squared_singular_values(wide(delta))
    found = MatrixChange(
        after=afterwards,
        energy_change=change.change,
        remainder=change.change - change.bounds.first_order,
        relative_norm=_share(size, weight),
        update_spectral_norm=float(spectrum[-1].sqrt()),
        update_effective_rank=effective_rank(spectrum) if size else 0.0,
        principal_share=float((delta @ directions).square().sum()) / size**2 if size else 0.0,
        bounds=change.bounds,
        collateral_ratio=None if moment is None else collateral_ratio(delta, weight, moment),
    )
    return MatrixReport(name, weight.shape[-2], inputs_of(weight), state, found)


def _energy(name: str, weight: Tensor, power: int) -> Energy:
    _energy_is_defined(name, weight)
    return hyperspherical_energy(weight, power)


def _energy_is_defined(name: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise SphereEditError(
            f"{name} holds infinite or undefined numbers, and has no energy; choose others with --layers"
        )


def _state(weight: Tensor, energy: Energy, eta: float) -> tuple[MatrixState, Tensor]:
    """What is said of one matrix, and its principal directions ``U [d_in, r]``."""
    directions = Sphere(eta=eta).directions(weight)
    spectrum = squared_singular_values(wide(weight))
    largest, rank = float(spectrum[-1].sqrt()), rank_of(directions)
    return MatrixState(energy.total, energy.per_pair, largest, effective_rank(spectrum), rank), directions
