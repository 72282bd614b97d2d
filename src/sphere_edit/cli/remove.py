"""Commands about single facts of a run: take some back, and tell what happened to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sphere_edit.cli.edit import finish
from sphere_edit.cli.options import Device, MaxMemory, Run, TrustRemoteCode, TrustRun, WhichMap, places
from sphere_edit.cli.screen import out, reporter
from sphere_edit.counting import counted

if TYPE_CHECKING:
    from sphere_edit.editor import Editor
    from sphere_edit.runs.removal import FactName


def remove(
    run: Run,
    fact: Annotated[
        list[str] | None,
        typer.Option(
            "--fact", help="A fact's number, as `show` and `history` list it, its subject or its prompt; repeatable."
        ),
    ] = None,
    facts: Annotated[
        str | None, typer.Option("--facts", help="A file of facts, as for edit; each is found by subject and prompt.")
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Go back to the batch before them, and edit all others since then again (slow)."),
    ] = False,
    device: Device = None,
    device_map: WhichMap = None,
    max_memory: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    trust_run: TrustRun = False,
) -> None:
    """Take single facts back: their prompts give the unedited model's answers again, and the others stay."""
    from sphere_edit.facts.readers import read_facts
    from sphere_edit.runs.folder import RunFolder
    from sphere_edit.runs.removal import removable

    wanted: list[FactName] = [*(fact or ()), *(read_facts(facts).facts if facts is not None else ())]
    removable(RunFolder.open(run), wanted)  # what cannot be done is told before any model is loaded
    from sphere_edit.editor import Editor

    where = places(device, device_map, max_memory)
    editor = Editor.open(run, reporter(), trust_remote_code=trust_remote_code, trust_run=trust_run, **where)
    finish(editor, lambda: editor.remove(wanted, exact), _say_removed)


def _say_removed(editor: Editor) -> None:
    """What the prompts of the facts removed just now give."""
    from sphere_edit.reporting.results import draw
    from sphere_edit.reporting.stories import Removed

    run = editor.run
    assert run is not None
    removal = next(batch for batch in reversed(run.history.batches) if batch.removed)
    rows = tuple(row for row in Removed.of(run.history, run.facts()).rows if row.batch == removal.number)
    out.print(draw(Removed(rows)))
    missing = sum(row.returned is False for row in rows)
    if missing and removal.restored is not None:
        out.print(
            f"Moved by other facts: {counted(missing, 'prompt')} of these; the run is as if it had never had the removed ones."
        )
    elif missing:
        out.print(
            f"Without the unedited model's answer: {counted(missing, 'prompt')} of these. To have the run as if it had never had the removed "
            f"facts: rollback --to {removal.number - 1}, then remove with --exact."
        )


def history(
    run: Run,
    fact: Annotated[
        str | None, typer.Argument(help="A fact's number, subject or prompt. \\[default: the whole run]")
    ] = None,
) -> None:
    """What happened to a run, batch by batch, or to one fact: when it was written, rewritten, superseded, removed, and what the model said."""
    from sphere_edit.reporting.results import draw
    from sphere_edit.reporting.stories import Timeline, stories
    from sphere_edit.runs.folder import RunFolder

    folder = RunFolder.open(run)
    for view in [Timeline.of(folder)] if fact is None else stories(folder, fact):
        out.print(draw(view))
