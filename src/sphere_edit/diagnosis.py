"""What was done to a model's weights: any two compatible checkpoints, or a run, compared matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere_edit.editing.journal import RunFolder
from sphere_edit.editing.settings import make_settings
from sphere_edit.editing.solving import deployed_weight
from sphere_edit.editing.statistics import load_statistics
from sphere_edit.errors import SphereEditError
from sphere_edit.models.checkpoint import Checkpoint
from sphere_edit.models.loading import full_name
from sphere_edit.numerics.energy import (
    Bounds,
    KeyMetric,
    collateral_ratio,
    effective_rank,
    energy_bounds,
    energy_gradient,
    hyperspherical_energy,
)
from sphere_edit.numerics.linalg import squared_singular_values
from sphere_edit.numerics.projection import Sphere
from sphere_edit.progress import Reporter


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


class EditedRun:
    """The deployed weights of a run after its last batch, put together from its folder; no model is loaded."""

    def __init__(self, folder: str | Path):
        self.run = RunFolder.open(folder)
        settings = make_settings(self.run.config["settings"])
        self._method, self._sphere = settings.make_method(), settings.make_sphere()
        self._directions = settings.diagnostic_sphere().directions
        head = self.run.history.head
        if head > 0 and self.run.nearest_checkpoint(head) != head:
            raise SphereEditError(
                f"{folder} has no checkpoint of its last batch; sphere-edit edit {folder} --resume makes it"
            )
        self._working = self.run.read_checkpoint(head)[0] if head > 0 else {}
        self.base = str(self.run.config["model"]["source"])
        self.names: list[str] = list(self.run.config["matrices"])

    def weight(self, name: str, original: Tensor) -> Tensor:
        """One matrix ``[d_out, d_in]`` as the edited model runs with it; ``original`` where it was not edited."""
        if name not in self._working:
            return original
        working, sphere = self._working[name], self._sphere
        basis = original if sphere is not None and sphere.basis == "pretrained" else working
        deployed = deployed_weight(self._method, sphere, original, working, lambda: self._directions(basis))
        dtype = getattr(torch, self.run.config["model"]["dtype"])
        return deployed.to(dtype).float()

    def second_moment(self, name: str) -> Tensor | None:
        """C0 of the matrix's inputs, where the run measured it."""
        with suppress(SphereEditError):
            return load_statistics(self.run.path / "statistics", [name], torch.device("cpu"))[name].second_moment
        return None


def diagnose(
    model: str,
    against: str | None,
    layers: Sequence[int] | None,
    roles: Sequence[str] | None,
    power: int,
    eta: float,
    reporter: Reporter,
) -> Iterator[MatrixReport]:
    """Report each matrix of ``model``, and what became of it in ``against``, one at a time.

    Args:
        model: a model; or a run, whose original model is then compared with what the run made of it.
        against: a model or a run to compare with.
        layers: all by default, or those that the run edited.
        roles: matrices in each layer, by role or by their name; ``down`` by default, or what the run edited.
        power: s of HE_s.
        eta: share of the neurons' spectrum that counts as principal.

    Raises:
        SphereEditError: a model, run, layer or matrix that is not there, or two models that do not compare.
    """
    if RunFolder.exists(model):
        if against is not None:
            raise SphereEditError(f"{model} is a run, which is compared with its own original; leave out --against")
        model, against = str(RunFolder.open(model).config["model"]["source"]), model
    before = Checkpoint(model)
    after: Checkpoint | EditedRun | None = None
    if against is not None:
        after = EditedRun(against) if RunFolder.exists(against) else Checkpoint(against)
        if isinstance(after, EditedRun) and full_name(model) != after.base:
            raise SphereEditError(f"{against} edits '{after.base}', not '{model}'")
    if isinstance(after, EditedRun) and layers is None and roles is None:
        names = after.names
    else:
        names = before.names(layers, roles or ["down"])
    with reporter.bar("matrices", len(names), "matrices") as advance:
        for name in names:
            yield _compared(name, before, after, power, eta)
            advance(1)


def _compared(
    name: str, before: Checkpoint, after: Checkpoint | EditedRun | None, power: int, eta: float
) -> MatrixReport:
    weight = before.weight(name)
    state, directions = _state(name, weight, power, eta)
    if after is None:
        return MatrixReport(name, weight.shape[0], weight.shape[1], state, None)
    moment = None
    if isinstance(after, EditedRun):
        now, moment = after.weight(name, weight), after.second_moment(name)
    else:
        now = after.weight(name)
    if now.shape != weight.shape:
        raise SphereEditError(
            f"{name} is {tuple(weight.shape)} in '{before.source}' and {tuple(now.shape)} in the other; "
            "only models of one shape compare"
        )
    delta = (now - weight).double()
    keys = None if moment is None else KeyMetric.of(moment)
    afterwards, _ = _state(name, now, power, eta)
    bounds = energy_bounds(energy_gradient(weight, power), delta, keys)
    size = float(delta.norm())
    spectrum = squared_singular_values(delta)
    change = MatrixChange(
        after=afterwards,
        energy_change=afterwards.energy - state.energy,
        remainder=afterwards.energy - state.energy - bounds.first_order,
        relative_norm=size / float(weight.double().norm()),
        update_spectral_norm=float(spectrum[-1].sqrt()),
        update_effective_rank=effective_rank(spectrum) if size else 0.0,
        principal_share=float((delta @ directions).square().sum()) / size**2 if size else 0.0,
        bounds=bounds,
        collateral_ratio=None if moment is None else collateral_ratio(delta, weight, moment),
    )
    return MatrixReport(name, weight.shape[0], weight.shape[1], state, change)


def _state(name: str, weight: Tensor, power: int, eta: float) -> tuple[MatrixState, Tensor]:
    """What is said of one matrix, and its principal directions ``U [d_in, r]``."""
    if not bool(torch.isfinite(weight).all()):
        raise SphereEditError(
            f"{name} holds infinite or undefined numbers, and has no energy; choose others with --layers"
        )
    energy = hyperspherical_energy(weight, power)
    directions = Sphere(eta=eta).directions(weight)
    spectrum = squared_singular_values(weight)
    largest, rank = float(spectrum[-1].sqrt()), directions.shape[1]
    return MatrixState(energy.total, energy.per_pair, largest, effective_rank(spectrum), rank), directions
