"""What commands print beside their tables: plans, the end of an edit, where things are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphere_edit import ranks
from sphere_edit.cli.screen import out, reporter
from sphere_edit.counting import counted, every
from sphere_edit.plugins import program
from sphere_edit.text import terminal

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.table import Table

    from sphere_edit.editing.settings import Settings
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
    commands = (f"show {folder}", f"export {folder} -o DIR", f"rollback {folder} --to 0")
    out.print(f"Run folder: {folder}\nReport: {folder / 'report.html'}")
    for command in commands:
        out.print(f"  {program()} {command}", soft_wrap=True)


def say_lights(folder: Path) -> None:
    """What became of a run, in three lines: did the edits take, is the rest intact, is the model still near itself."""
    from sphere_edit.reporting.lights import lights
    from sphere_edit.reporting.series import Series

    for light in lights(Series.read(folder)):
        out.print(f"{light.question:<27} {light.words}", soft_wrap=True)


def say_metrics(metrics: Mapping[str, Any], batch: str) -> None:
    """The content of ``metrics.json`` as a table."""
    from sphere_edit.reporting.results import draw
    from sphere_edit.reporting.views import Metrics

    out.print(draw(Metrics.of(metrics, f"{every(metrics['facts'], 'fact')}, after {batch}")))


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
    if editor.session.would_calibrate:
        out.print(
            "Calibration comes once for each model; layers, options or targets that you set are taken in its place."
        )
    if "sampling text" in cost.seconds:
        out.print(
            "Text is sampled once for each model, and kept; --corpus FILE takes text of yours in its place, which is quicker."
        )
    where = "" if editor.run else ", in the folder that -o names"
    out.print(f"Nothing was edited. The same command without --dry-run edits{where}.")


def say_memory(model: str, settings: Settings, trust_remote_code: bool) -> None:
    """What an edit would hold in memory at most, told by a model's configuration before its weights are loaded."""
    from sphere_edit.progress import Quiet
    from sphere_edit.runs.accounting import account_of
    from sphere_edit.runs.session import Session

    sketched = Session.sketched(model, settings, Quiet(), trust_remote_code)
    if sketched is None:
        out.print(
            "Memory is told once the model is loaded: its layout is found by running it, and no narrow copy of it could be run."
        )
        return
    account = account_of(sketched)
    said = ", ".join(
        f"{size / 1e9:.2f} GB on {device} ({account.fullest(device)})" for device, size in account.peak.items()
    )
    out.print(f"Memory at most, by the model's shapes: {said}")


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
        "method": ": ".join(filter(None, (settings.method, _flow(editor.session.method)))),
        "sphere": "off" if editor.session.sphere is None else _flow(editor.session.sphere),
        "matrices": ", ".join(editor.weights.names),
        "targets": _flow(settings.targets),
        "second moments": _flow(settings.moments),
        "seed": str(settings.seed),
        "run folder": str(editor.folder),
        **({"supersedes": counted(would_supersede(editor.run, planned), "earlier fact")} if editor.run else {}),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _flow(values: BaseModel) -> str:
    """Settings as a file of settings writes them (``--config``), on one line."""
    import yaml

    return yaml.safe_dump(values.model_dump(mode="json"), default_flow_style=True, sort_keys=False, width=10**6)[1:-2]


def _cost_table(cost: Estimate) -> Table:
    from sphere_edit.progress import duration
    from sphere_edit.reporting.results import make_table

    table = make_table("Estimate, from short trials on this machine", "", " ", left=("",), head=False)
    for stage, seconds in cost.seconds.items():
        table.add_row(stage, duration(seconds))
    table.add_row(terminal("time, all", "bold"), terminal(duration(sum(cost.seconds.values())), "bold"))
    for device, size in cost.memory.peak.items():
        table.add_row(f"memory on {device}, at most", f"{size / 1e9:.2f} GB, at: {cost.memory.fullest(device)}")
    table.add_row("disk", f"{cost.disk / 1e9:.2f} GB")
    return table
