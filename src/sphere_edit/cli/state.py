"""The command that puts a run's weights back."""

from __future__ import annotations

from typing import Annotated

import typer

from sphere_edit.cli.options import Device, MaxMemory, Run, WhichMap, places
from sphere_edit.cli.screen import out, reporter
from sphere_edit.counting import counted


def rollback(
    run: Run,
    to: Annotated[int, typer.Option("--to", min=0, help="The batch to go back to; 0 is the original model.")],
    device: Device = None,
    device_map: WhichMap = None,
    max_memory: MaxMemory = None,
) -> None:
    """Put a run's weights back to exactly what they were after batch N."""
    from sphere_edit.editor import opened

    with opened(run, reporter(), **places(device, device_map, max_memory)) as editor:
        waiting = 0 if editor.run is None else len(editor.run.history.pending)
        editor.rollback(to)
    state = "the original model, bit for bit" if to == 0 else f"the weights as after batch {to}"
    out.print(f"{run} now stands at batch {to}: {state}. Export it, or edit on from here.")
    if waiting:
        out.print(f"{counted(waiting, 'fact')} waited, and nothing waits any more; give what you want edited again.")
