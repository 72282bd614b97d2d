"""Commands that take an edited model out of its run."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sphere_edit.cli.options import Dtype, Run, TrustRemoteCode
from sphere_edit.cli.screen import out, reporter
from sphere_edit.errors import SphereEditError

Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to create.")]


class Form(str, Enum):
    """How an edited model leaves its run."""

    hf = "hf"
    delta = "delta"


def export(
    run: Run,
    output: Output,
    form: Annotated[
        Form, typer.Option("--as", help="hf: the whole model. delta: the change alone, for sphere-edit apply.")
    ] = Form.hf,
    dtype: Annotated[
        Dtype, typer.Option(help="Numbers of the weights written. \\[default: as the run's model has them]")
    ] = Dtype.auto,
) -> None:
    """Write the edited model, or what was changed in it, to a new folder with a card and a manifest."""
    from sphere_edit.runs.folder import RunFolder

    folder = RunFolder.open(run)
    if dtype is not Dtype.auto and form is not Form.hf:
        raise SphereEditError(f"--dtype is for --as hf; as {form.value} the numbers are those of the run")
    _check_output(output)
    import torch

    from sphere_edit.editor import opened
    from sphere_edit.exports.delta import write_delta
    from sphere_edit.exports.hf import write_hf

    numbers = None if dtype is Dtype.auto else getattr(torch, dtype.value)
    with opened(run, reporter(), only_to_read=True) as editor:
        shipment = editor.shipment()
        match form:
            case Form.hf:
                told = write_hf(shipment, output, numbers)
                said = f"the model; AutoModelForCausalLM.from_pretrained('{output}') loads it"
            case Form.delta:
                told = write_delta(shipment, folder, output)
                said = f"the change; sphere-edit apply {output} BASE -o DIR makes the whole model of it"
    _say(told)
    out.print(f"{output} holds {said}.", soft_wrap=True)


def apply(
    delta: Annotated[Path, typer.Argument(help="What export --as delta wrote.")],
    base: Annotated[
        str, typer.Argument(help="The original model, as for edit; its weights must have the delta's hash.")
    ],
    output: Output,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Add a delta to its original model: the bits of the whole export, without the run."""
    from sphere_edit.exports.manifest import read_manifest

    read_manifest(delta)
    _check_output(output)
    from sphere_edit.exports.delta import apply_delta

    _say(apply_delta(delta, base, output, reporter(), trust_remote_code))
    out.print(f"{output} holds the model; AutoModelForCausalLM.from_pretrained('{output}') loads it.", soft_wrap=True)


def _check_output(output: Path) -> None:
    """Refuse, before anything is loaded, a folder that cannot be made."""
    from sphere_edit.files import check_room, refuse_existing, require_utf8

    require_utf8(output, "a model")
    refuse_existing(output)
    check_room(output.absolute().parent, 0)


def _say(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        reporter().say(sentence)
