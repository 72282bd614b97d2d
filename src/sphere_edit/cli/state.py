"""Commands that put a run's weights somewhere: rollback and export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sphere_edit.cli.options import Run
from sphere_edit.cli.screen import out, reporter


def rollback(
    run: Run,
    to: Annotated[int, typer.Option("--to", min=0, help="The batch to go back to; 0 is the original model.")],
) -> None:
    """Put a run's weights back to exactly what they were after batch N."""
    from sphere_edit.editor import opened

    with opened(run, reporter()) as editor:
        waiting = 0 if editor.run is None else len(editor.run.history.pending)
        editor.rollback(to)
    state = "the original model, bit for bit" if to == 0 else f"the weights as after batch {to}"
    out.print(f"{run} now stands at batch {to}: {state}. Export it, or edit on from here.")
    if waiting:
        out.print(f"{waiting} facts that were waiting are withdrawn; give them again to edit them.")


def export(
    run: Run,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to create.")],
) -> None:
    """Write the edited model: the source's own files but for the edited tensors, and a model card."""
    from sphere_edit.files import refuse_existing, require_utf8
    from sphere_edit.runs.folder import RunFolder

    RunFolder.open(run)
    require_utf8(output, "a model")
    refuse_existing(output)
    from sphere_edit.editor import opened

    with opened(run, reporter(), only_to_read=True) as editor:
        editor.save_pretrained(output)
    out.print(f"{output} holds the model; AutoModelForCausalLM.from_pretrained('{output}') loads it.")
