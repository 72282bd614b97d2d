"""The command for a first look."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from sphere_edit.cli.edit import working
from sphere_edit.cli.layout import say_metrics, say_where, write_report
from sphere_edit.cli.screen import out, reporter
from sphere_edit.text import terminal


def demo(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run folder; by default runs/demo-TIME.")
    ] = None,
    limit: Annotated[int, typer.Option(min=6, max=60, help="How many of the 60 demo facts.")] = 60,
) -> None:
    """Edit the embedded SmolLM2-135M with 60 demo facts in three batches, and show what it says before and after."""
    from sphere_edit.editor import Editor
    from sphere_edit.facts.readers import read_facts
    from sphere_edit.reporting.results import make_table
    from sphere_edit.reporting.words import one_line

    folder = output or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    given = read_facts("demo", limit=limit)
    editor = Editor.from_pretrained("smollm2", run=folder, reporter=reporter(), batch_size=-(-limit // 3))
    with working(editor):
        metrics = editor.edit(given)
    columns = ("prompt", "new answer", "before", "after")
    table = make_table("What the model says", *columns, left=columns)
    for number in range(0, limit, limit // 6)[:6]:  # what was said when all facts were asked, before and after
        fact, said = given.facts[number], metrics["per_fact"][number]
        before, now = (one_line(said[side]["rewrite"]["said"]) for side in ("unedited", "edited"))
        took = now.strip().startswith(fact.target_new.strip())
        table.add_row(fact.filled_prompt, fact.target_new, before, terminal(now, "green" if took else "red"))
    out.print(table)
    say_metrics(metrics, "the last batch")
    write_report(folder)
    say_where(folder)
    out.print(f"Correct a fact yourself, on a page in your browser:\n  sphere-edit studio {folder}")
