"""Commands that read a run: show, report; and methods, which reads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sphere_edit.cli.options import Run
from sphere_edit.cli.screen import out, reporter


def methods() -> None:
    """List the editing methods: what each needs, its options with defaults and meaning, its source; and the presets."""
    from sphere_edit.reporting.methods import method_tables

    for table in method_tables():
        out.print(table)


def show(
    run: Run,
    facts: Annotated[int, typer.Option(min=0, help="How many facts to list, failures first.")] = 5,
) -> None:
    """What a run's journal says: settings, batches, facts, metrics, timings."""
    from sphere_edit.reporting.results import draw
    from sphere_edit.reporting.views import of_run

    for view in of_run(run, facts):
        out.print(draw(view))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run folder, or several to compare.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page. \\[default: report.html in the first run]")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the figures as PNG and SVG. \\[default: figures beside the page]")
    ] = None,
) -> None:
    """One HTML page about a run, or several side by side, and its figures; needs no network to be read."""
    from sphere_edit.reporting.report import write_report

    page = output or runs[0] / "report.html"
    folder = figures or page.parent / "figures"
    write_report(runs, page, folder, reporter())
    out.print(f"{page} and {folder}", soft_wrap=True)
