"""What commands print beside their tables: plans, the end of an edit, where things are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphere_edit import ranks
from sphere_edit.cli.screen import out, reporter
from sphere_edit.text import terminal

if TYPE_CHECKING:
    from rich.table import Table

    from sphere_edit.editor import Editor
    from sphere_edit.facts.fact import Fact
    from sphere_edit.facts.readers import FactSet
    from sphere_edit.planning import Estimate


def write_report(folder: Path) -> None:
    """Write the page about a run and its figures into its folder."""
    from sphere_edit.reporting.report import write_report

    ranks.once(lambda: write_report([folder], folder / "report.html", folder / "figures", reporter()))


def say_where(folder: Path) -> None:
    """Where a run is, and what can be done with it now."""
    out.print(
        f"Run folder: {folder}\nReport: {folder / 'report.html'}\n"
        f"  sphere-edit show {folder}\n  sphere-edit export {folder} -o DIR\n  sphere-edit rollback {folder} --to 0"
    )


def say_metrics(metrics: Mapping[str, Any], batch: str) -> None:
    """The content of ``metrics.json`` as a table."""
    from sphere_edit.reporting.results import draw
    from sphere_edit.reporting.views import Metrics

    out.print(draw(Metrics.of(metrics, f"All {metrics['facts']} facts, after {batch}")))


def say_plan(editor: Editor, facts: FactSet, skip_bad: bool, skip_known: bool) -> None:
    """Check everything, show what would be done and what it would cost, and do nothing."""
    from sphere_edit.files import check_room
    from sphere_edit.planning import estimate

    planned, _ = editor.check(facts, skip_bad, skip_known)
    cost = estimate(editor.session, planned, editor.run)
    out.print(_settings_table(editor, planned))
    out.print(_cost_table(cost))
    editor.close()
    check_room(editor.folder, cost.disk)
    out.print("Nothing was edited.")


def _settings_table(editor: Editor, planned: list[Fact]) -> Table:
    from sphere_edit.reporting.results import make_table
    from sphere_edit.runs.selection import would_supersede

    settings = editor.settings
    table = make_table("Settings", "", " ", left=("", " "), head=False)
    unknown = "found by calibration first" if editor.session.would_calibrate else "none: the method's defaults"
    rows = {
        "model": f"{editor.loaded.source} ({editor.model.config.model_type}, {editor.loaded.where})",
        "facts": f"{len(planned)} in batches of {settings.batch_size}",
        "preset": editor.session.preset or unknown,
        "method": f"{settings.method} {editor.session.method.model_dump(mode='json')}",
        "sphere": "off" if editor.session.sphere is None else str(editor.session.sphere.model_dump()),
        "matrices": ", ".join(editor.weights.names),
        "targets": str(settings.targets.model_dump()),
        "second moments": str(settings.moments.model_dump()),
        "seed": str(settings.seed),
        "run folder": str(editor.folder),
        **({"supersedes": f"{would_supersede(editor.run, planned)} earlier facts"} if editor.run else {}),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _cost_table(cost: Estimate) -> Table:
    from sphere_edit.progress import duration
    from sphere_edit.reporting.results import make_table

    table = make_table("Estimate, from short trials on this machine", "", " ", left=("",), head=False)
    for stage, seconds in cost.seconds.items():
        table.add_row(stage, duration(seconds))
    table.add_row(terminal("time, all", "bold"), terminal(duration(sum(cost.seconds.values())), "bold"))
    table.add_row("memory", f"{cost.memory / 1e9:.1f} GB")
    table.add_row("disk", f"{cost.disk / 1e9:.2f} GB")
    return table
