"""Commands that take an edited model out of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sphere_edit.cli.options import Dtype, Run
from sphere_edit.cli.screen import out, reporter


def export(
    run: Run,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to create.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Numbers of the weights written. \\[default: as the run's model has them]")
    ] = Dtype.auto,
) -> None:
    """Write the edited model: the source's own files but for the edited tensors, and a model card."""
    from sphere_edit.files import refuse_existing, require_utf8
    from sphere_edit.runs.folder import RunFolder

    RunFolder.open(run)
    require_utf8(output, "a model")
    refuse_existing(output)
    import torch

    from sphere_edit.editor import opened
    from sphere_edit.exports.hf import write_hf

    numbers = None if dtype is Dtype.auto else getattr(torch, dtype.value)
    with opened(run, reporter(), only_to_read=True) as editor:
        for sentence in write_hf(editor.shipment(), output, numbers):
            reporter().say(sentence)
    out.print(f"{output} holds the model; AutoModelForCausalLM.from_pretrained('{output}') loads it.")
