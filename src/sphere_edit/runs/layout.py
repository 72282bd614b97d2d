"""The layout of a model as a run keeps it in its ``config.json``, to be compared with what is found when the run is opened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from pydantic import BaseModel, ConfigDict

from sphere_edit.models.architecture import Architecture, LayerParts, Matrix

_CLOSE = 1e-2  # relative: factors are measured, and other devices and dtypes round otherwise


class LayoutMatrix(BaseModel):
    """A matrix that some layers have alike (`sphere_edit.models.architecture.Matrix`)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    layers: list[int]
    role: str
    path: str
    transposed: bool = False
    experts: bool = False
    inside: bool = False
    factor: float = 1.0
    after: str | None = None

    @classmethod
    def of(cls, layers: Sequence[int], role: str, matrix: Matrix) -> LayoutMatrix:
        """Of the matrix ``role`` of these layers."""
        return cls(layers=list(layers), role=role, **asdict(matrix))

    def matrix(self) -> Matrix:
        """As the model has it."""
        return Matrix(**{field.name: getattr(self, field.name) for field in fields(Matrix)})

    def told(self) -> str:
        """In words."""
        stored = "transposed" if self.transposed else "plain"
        return f"{self.role} ({stored}, × {self.factor:g}{', target inside' if self.inside else ''})"

    def is_as(self, other: LayoutMatrix) -> bool:
        """Whether the two lie and act alike, whatever their layers."""
        same = self.role == other.role and self.matrix() == replace(other.matrix(), factor=self.factor)
        return same and math.isclose(self.factor, other.factor, rel_tol=_CLOSE)


class Layout(BaseModel):
    """What was found of a model (`sphere_edit.models.architecture.Architecture`)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    found: str
    layers: str
    final_norm: str
    logit_scale: float = 1.0
    logit_cap: float | None = None
    whole_rows: bool = False
    silent: list[int] = []
    matrices: list[LayoutMatrix]

    @classmethod
    def of(cls, architecture: Architecture) -> Layout:
        """Of a loaded model."""
        return cls(
            found=architecture.found,
            layers=architecture.layers,
            final_norm=architecture.final_norm,
            logit_scale=architecture.logit_scale,
            logit_cap=architecture.logit_cap,
            whole_rows=architecture.whole_rows,
            silent=sorted(architecture.silent),
            matrices=[LayoutMatrix.of(layers, role, matrix) for (role, matrix), layers in architecture.alike().items()],
        )

    def architecture(self) -> Architecture:
        """The model, as far as the last layer that has a matrix."""
        parts: list[dict[str, Matrix]] = [{} for _ in range(1 + max(max(one.layers) for one in self.matrices))]
        for one in self.matrices:
            for layer in one.layers:
                parts[layer][one.role] = one.matrix()
        return Architecture(
            layers=self.layers,
            final_norm=self.final_norm,
            parts=tuple(map(LayerParts, parts)),
            logit_scale=self.logit_scale,
            logit_cap=self.logit_cap,
            whole_rows=self.whole_rows,
            silent=frozenset(self.silent),
            found=self.found,
        )

    def differing(self, now: Layout, names: Sequence[str]) -> str | None:
        """What of another layout is not as it is here, in words, where it concerns the matrices ``names``; None where all is."""
        for name, words in _WORDS.items():
            then, found = getattr(self, name), getattr(now, name)
            numbers = isinstance(then, float) and isinstance(found, float)
            if not (math.isclose(then, found, rel_tol=_CLOSE) if numbers else then == found):
                return f"{words} {found} and not {then}"
        for name in names:
            ours, theirs = self._matrix(name), now._matrix(name)
            if ours is not None and (theirs is None or not ours.is_as(theirs)):
                return f"{name} is {'not there' if theirs is None else theirs.told()} and not {ours.told()}"
        return None

    def _matrix(self, name: str) -> LayoutMatrix | None:
        """The matrix of a full name."""
        number, _, path = name.removeprefix(f"{self.layers}.").partition(".")
        return next((one for one in self.matrices if one.path == path and int(number) in one.layers), None)


_WORDS = {
    "layers": "its layers are at",
    "final_norm": "its final norm is",
    "logit_scale": "its logits are scaled by",
    "logit_cap": "its logits are squeezed to ±",
    "whole_rows": "its targets run whole rows:",
    "silent": "the layers that a text does not run through are",
}
