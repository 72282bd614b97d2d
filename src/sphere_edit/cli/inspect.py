"""The command that says what was found of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sphere_edit.cli.options import Device, Json, ModelDtype, TrustRemoteCode, given
from sphere_edit.cli.screen import out
from sphere_edit.errors import SphereEditError

if TYPE_CHECKING:
    from rich.table import Table

    from sphere_edit.inspection import Inspection, MatrixFound, MethodsFound


def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file or 'smollm2'.")],
    device: Device = None,
    dtype: ModelDtype = None,
    json_file: Json = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say how a model is laid out, which of its matrices can be edited, by which methods, and what that takes."""
    from sphere_edit.editing.settings import make_settings
    from sphere_edit.files import check_room, write_json
    from sphere_edit.inspection import Inspection
    from sphere_edit.progress import Quiet
    from sphere_edit.runs.folder import RunFolder
    from sphere_edit.runs.session import Session

    if json_file is not None:
        check_room(json_file.absolute().parent, 0)
    if RunFolder.exists(model):
        raise SphereEditError(
            f"{model} is a run; sphere-edit show {model} says what it did, and its config.json what was found"
        )
    settings = make_settings(given({"device": device, "dtype": dtype and dtype.value}))
    found = Inspection.of(Session.load(model, settings, Quiet(), trust_remote_code))
    for table in _tables(found):
        out.print(table)
    for sentence in found.remarks():
        out.print(f"{sentence}.")
    if json_file is not None:
        write_json(json_file, found.as_content())


def _tables(found: Inspection) -> Iterator[Table]:
    from sphere_edit.inspection import spans
    from sphere_edit.reporting.results import make_table

    whole = make_table("Model", "", " ", left=("", " "), head=False)
    for name, value in _facts(found):
        whole.add_row(name, value)
    yield whole
    columns = ("role", "layers", "matrix", "shape", "writes into")
    matrices = make_table("What can be edited", *columns, left=columns)
    for one in found.matrices:
        matrices.add_row(one.role, spans(one.layers), one.path, _shape(one), _written(one))
    yield matrices
    methods = make_table("By which methods", "edited by default", "methods", left=("edited by default", "methods"))
    for group in found.methods:
        methods.add_row(_edited(group), ", ".join(group.names))
    yield methods


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
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


def _shape(one: MatrixFound) -> str:
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
    from sphere_edit.inspection import spans

    if group.why_not:
        return f"nothing: {group.why_not}"
    return ", ".join(f"{role}:{spans(layers)}" for role, layers in group.matrices.items())
