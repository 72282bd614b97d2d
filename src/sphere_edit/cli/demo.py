"""The command for a first look."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sphere_edit.cli.edit import finish
from sphere_edit.cli.screen import out, reporter
from sphere_edit.plugins import program
from sphere_edit.text import terminal

if TYPE_CHECKING:
    from sphere_edit.editor import Editor
    from sphere_edit.facts.fact import Fact

_ROWS = 6  # of the table


def demo(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run folder; by default runs/demo-TIME.")
    ] = None,
    limit: Annotated[int, typer.Option(min=_ROWS, max=60, help="How many of the 60 demo facts.")] = 60,
) -> None:
    """Edit the embedded SmolLM2-135M with 60 demo facts in three batches, and show what it says before and after."""
    from sphere_edit.editor import Editor
    from sphere_edit.facts.readers import read_facts

    folder = output or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    given = read_facts("demo", limit=limit)
    editor = Editor.from_pretrained("smollm2", run=folder, reporter=reporter(), batch_size=-(-limit // 3))
    finish(editor, lambda: editor.edit(given), partial(_say_before_and_after, given.facts))
    out.print(f"Correct a fact yourself, on a page in your browser:\n  {program()} studio {folder}", soft_wrap=True)


def _say_before_and_after(facts: Sequence[Fact], editor: Editor) -> None:
    """What was said at some facts' prompts before any was edited, and when all had been."""
    from sphere_edit.reporting.results import make_table
    from sphere_edit.reporting.words import one_line

    columns = ("prompt", "new answer", "before", "after")
    table = make_table("What the model says", *columns, left=columns)
    scored = list(zip(facts, editor.metrics()["per_fact"], strict=True))
    for fact, said in scored[:: len(scored) // _ROWS][:_ROWS]:
        before, now = (one_line(said[side]["rewrite"]["said"]) for side in ("unedited", "edited"))
        took = now.strip().startswith(fact.target_new.strip())
        table.add_row(fact.filled_prompt, fact.target_new, before, terminal(now, "green" if took else "red"))
    out.print(table)
