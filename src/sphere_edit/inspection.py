"""What was found of a model: how it is laid out, what of it can be edited and by which method, and what that takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from sphere_edit.editing.methods import METHODS, register_installed
from sphere_edit.editing.settings import make_settings
from sphere_edit.errors import SphereEditError
from sphere_edit.models.architecture import EXPERTS, Architecture
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.sites import parameter_of
from sphere_edit.reporting.results import make_table
from sphere_edit.runs.accounting import memory_of
from sphere_edit.runs.session import Session


@dataclass(frozen=True)
class MatrixFound:
    """A matrix that some layers have, all alike.

    Attributes:
        shape: ``[d_out, d_in]``, or of experts ``[E, d_out, d_in]``.
        transposed, inside, factor, after: as `Matrix` has them.
        alone: no other layer can be edited for the same targets.
    """

    layers: tuple[int, ...]
    role: str
    path: str
    shape: tuple[int, ...]
    transposed: bool
    inside: bool
    factor: float
    after: str | None
    alone: bool


@dataclass(frozen=True)
class MethodsFound:
    """Methods that edit the same matrices by default, layers by role; or none, and why."""

    names: tuple[str, ...]
    matrices: Mapping[str, tuple[int, ...]]
    why_not: str = ""


@dataclass(frozen=True)
class Inspection:
    """A model that can be edited, as it was found.

    Attributes:
        kind: its ``config.model_type``.
        parameters: how many numbers it has.
        found: how its layout is known: by a family's ``row``, or by the ``probe``.
        depth: its decoder layers; ``silent`` are those that a text does not run through.
        whole_rows, logit_scale, logit_cap: as `Architecture` has them.
        preset: where the default method's settings come from, None for its defaults; or ``calibrates``: they are sought first.
        weights, editing: bytes of memory, of the weights alone and of an edit by the default method.
    """

    model: str
    kind: str
    built_by: str
    parameters: int
    dtype: str
    device: str
    found: str
    layers: str
    depth: int
    silent: tuple[int, ...]
    final_norm: str
    logit_scale: float
    logit_cap: float | None
    whole_rows: bool
    matrices: tuple[MatrixFound, ...]
    methods: tuple[MethodsFound, ...]
    method: str
    preset: str | None
    calibrates: bool
    chat: bool
    weights: int
    editing: int

    @classmethod
    def of(cls, session: Session) -> Inspection:
        """Of a loaded model, with the settings of the default method."""
        loaded, architecture = session.loaded, session.loaded.architecture
        parameters = list(loaded.model.parameters())
        return cls(
            model=loaded.source,
            kind=str(loaded.model.config.model_type),
            built_by=type(loaded.model).__name__,
            parameters=sum(one.numel() for one in parameters),
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=str(loaded.device),
            found=architecture.found,
            layers=architecture.layers,
            depth=len(architecture.parts),
            silent=tuple(sorted(architecture.silent)),
            final_norm=architecture.final_norm,
            logit_scale=architecture.logit_scale,
            logit_cap=architecture.logit_cap,
            whole_rows=architecture.whole_rows,
            matrices=tuple(_matrices(loaded)),
            methods=tuple(_methods(architecture)),
            method=session.method.name,
            preset=session.preset,
            calibrates=session.would_calibrate,
            chat=bool(getattr(loaded.tokenizer, "chat_template", None)),
            weights=sum(one.numel() * one.element_size() for one in parameters),
            editing=memory_of(session),
        )

    def as_content(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "remarks": list(self.remarks())}

    def remarks(self) -> Iterator[str]:
        """What a user should know of the layout, in sentences."""
        writing = [one for one in self.matrices if one.role in ("down", EXPERTS)]
        if any(one.alone for one in writing):
            yield (
                "What is written is gated or normalised before it is added to the residual stream, in a way that only its own layer can "
                "reach. So one layer is edited and not several"
            )
        if self.whole_rows:
            yield (
                "Its upper layers keep more of a text than keys and values, so targets run whole rows through them. That is slower"
            )
        if any(one.role == EXPERTS for one in writing):
            yield "Routed experts are edited as one wide matrix a layer (--matrices experts). Their router is never edited"
        if self.silent:
            yield f"A text does not run through the layers {spans(self.silent)}, so these are left alone"
        written = {layer for one in writing for layer in one.layers}
        if bare := [layer for layer in range(self.depth) if layer not in written and layer not in self.silent]:
            yield f"No matrix that can be edited was found in the layers {spans(bare)}"


def _matrices(loaded: LoadedModel) -> Iterator[MatrixFound]:
    """Every matrix that can be edited, once for all layers that have it alike and of one shape."""
    for (role, matrix), having in loaded.architecture.alike().items():
        shapes: dict[tuple[int, ...], list[int]] = {}
        for layer in having:
            shapes.setdefault(_shape(loaded, layer, role), []).append(layer)
        for shape, layers in shapes.items():
            yield MatrixFound(
                tuple(layers),
                role,
                matrix.path,
                shape,
                matrix.transposed,
                matrix.inside,
                matrix.factor,
                matrix.after,
                matrix.alone,
            )


def _shape(loaded: LoadedModel, layer: int, role: str) -> tuple[int, ...]:
    name = loaded.architecture.module_name(layer, role)
    stored = parameter_of(loaded.model, loaded.architecture, name)
    return tuple((stored.mT if loaded.architecture.matrix(layer, role).transposed else stored).shape)


def _methods(architecture: Architecture) -> Iterator[MethodsFound]:
    """What each method edits by default; those that edit the same are told together."""
    register_installed()
    alike: dict[tuple[tuple[tuple[int, str], ...], str], list[str]] = {}
    for name in METHODS:
        try:
            edited, why_not = make_settings({"method": name}).resolved_matrices(architecture), ""
        except SphereEditError as error:
            edited, why_not = (), str(error).replace(f"{name} ", "it ", 1)
        alike.setdefault((edited, why_not), []).append(name)
    for (edited, why_not), names in alike.items():
        layers: dict[str, tuple[int, ...]] = {}
        for layer, role in edited:
            layers[role] = (*layers.get(role, ()), layer)
        yield MethodsFound(tuple(names), layers, why_not)


def spans(numbers: tuple[int, ...] | list[int]) -> str:
    """Numbers in order, neighbours as a span: 0–3, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


# --- drawn ---------------------------------------------------------------------------------------------------------


def tables(found: Inspection) -> Iterator[Table]:
    """What was found, drawn: the model, its matrices, and which methods edit them."""
    whole = make_table("Model", "", " ", left=("", " "), head=False)
    for name, value in _whole(found):
        whole.add_row(name, value)
    yield whole
    columns = ("role", "layers", "matrix", "shape", "writes into")
    matrices = make_table("What can be edited", *columns, left=columns)
    for one in found.matrices:
        matrices.add_row(one.role, spans(one.layers), one.path, _shape_said(one), _written(one))
    yield matrices
    methods = make_table("By which methods", "edited by default", "methods", left=("edited by default", "methods"))
    for group in found.methods:
        methods.add_row(_edited(group), ", ".join(group.names))
    yield methods


def _whole(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "model", found.model
    yield "type", f"{found.kind} ({found.built_by})"
    yield "parameters", f"{found.parameters:,} in {found.dtype}, on {found.device}"
    how = "known of its family" if found.found == "row" else "found by running it"
    yield "layers", f"{found.depth} at {found.layers}, {how}"
    yield "final norm", found.final_norm
    yield "logits", _logits(found)
    replayed = "whole rows" if found.whole_rows else "from the subject on"
    yield "targets run", f"{replayed} through the upper layers"
    origin = found.preset or ("found by calibration, before the first edit" if found.calibrates else "the defaults")
    yield f"settings of {found.method}", origin
    yield "chat template", "yes" if found.chat else "none"
    yield (
        "memory",
        f"{_memory(found.weights)} of weights; {_memory(found.editing)} in all for an edit by {found.method}",
    )


def _logits(found: Inspection) -> str:
    scale = "as the output embedding gives them" if found.logit_scale == 1 else f"× {found.logit_scale:g}"
    return scale if found.logit_cap is None else f"{scale}, squeezed to ± {found.logit_cap:g}"


def _shape_said(one: MatrixFound) -> str:
    *experts, rows, columns = one.shape
    size = f"{rows} × {columns}" + (", stored transposed" if one.transposed else "")
    return f"{experts[0]} experts of {size}" if experts else size


def _written(one: MatrixFound) -> str:
    if one.role not in ("down", "experts"):
        return "the inner part of the MLP"
    way = [] if one.after is None else [f"through {one.after}"]
    way += ["gated or normalised on the way"] if one.alone else []
    way += [] if one.factor == 1 else [f"× {one.factor:g}"]
    return ", ".join(["the residual stream", *way])


def _memory(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _edited(group: MethodsFound) -> str:
    if group.why_not:
        return f"nothing: {group.why_not}"
    return ", ".join(f"{role}:{spans(layers)}" for role, layers in group.matrices.items())
