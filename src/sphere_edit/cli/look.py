"""Commands that read a run: show, report; and methods, which reads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sphere_edit.cli.options import Run
from sphere_edit.cli.screen import out, reporter
from sphere_edit.text import terminal


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
    from sphere_edit.editing.guard import stopped
    from sphere_edit.reporting.results import (
        ability_table,
        batches_table,
        facts_table,
        make_table,
        metrics_table,
        number,
        percent,
        timings,
    )
    from sphere_edit.runs.folder import METRICS, RunFolder

    folder = RunFolder.open(run)
    history, config = folder.history, folder.config
    sphere = config.sphere
    projection = (
        f"SPHERE η {sphere.eta:g}, α {sphere.alpha:g}, {sphere.basis}, {sphere.project}" if sphere else "no SPHERE"
    )
    ended = "finished" if history.guard is None else stopped(history.guard)
    state = ended if history.finished else f"interrupted, {len(history.pending)} facts waiting (--resume)"
    out.print(terminal(str(run), "bold"), f": {config.model.source}, {config.method}, {projection}", sep="")
    out.print(
        f"started {config.created}, layers {config.layers}, {config.corpus.origin}; "
        f"{history.head} batches, {len(history.edited)} facts edited, {len(history.superseded)} superseded, "
        f"{len(history.withdrawn)} withdrawn; {state}",
    )
    if history.batches:
        out.print(batches_table(history.batches))
        out.print(f"Time by stage: {timings([*history.batches, *history.final_rechecks])}")
        memory = max((batch.peak_memory or 0 for batch in history.batches), default=0)
        if memory:
            out.print(f"Peak memory: {memory / 1e9:.1f} GB")
    if history.evaluations:
        table = make_table(
            "Evaluations",
            "after batch",
            "facts asked",
            "efficacy",
            "strict",
            "generalization",
            "strict",
            "specificity",
            "strict",
            "perplexity",
        )
        for evaluation in history.evaluations:
            cells = [
                percent(evaluation.summary[f"{name}{kind}"])
                for name in ("efficacy", "generalization", "specificity")
                for kind in ("", "_strict")
            ]
            table.add_row(str(evaluation.after), str(evaluation.facts), *cells, number(evaluation.perplexity))
        out.print(table)
    if (run / METRICS).is_file():
        content = folder.metrics()
        title = f"After batch {content['after']}"
        out.print(metrics_table(content["unedited"], content["edited"], title, content["intervals"]))
        if "ability" in content["edited"]:
            scores = {when: content[when].get("ability", {}) for when in ("unedited", "edited")}
            out.print(ability_table(scores, f"after batch {content['after']}"))
        if facts:
            out.print(facts_table(content["per_fact"], min(facts, len(content["per_fact"]))))


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
