"""Commands that measure a model or a run: eval, ability, energy."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sphere_edit.cli.layout import write_report
from sphere_edit.cli.options import (
    Device,
    Dtype,
    Json,
    Limit,
    MaxMemory,
    ModelDtype,
    ModelOrRun,
    SkipBad,
    Target,
    TrustRemoteCode,
    WhichMap,
    ZsreTarget,
    given,
    places,
)
from sphere_edit.cli.screen import FAILED, out, reporter, say_bad
from sphere_edit.counting import counted
from sphere_edit.errors import SphereEditError
from sphere_edit.text import csv_cell

if TYPE_CHECKING:
    from sphere_edit.editor import Editor


def evaluate(
    model: ModelOrRun,
    facts: Annotated[str, typer.Argument(help="Facts to ask for, as for edit.")],
    limit: Limit = None,
    target: ZsreTarget = Target.answer,
    skip_bad: SkipBad = False,
    device: Device = None,
    device_map: WhichMap = None,
    max_memory: MaxMemory = None,
    dtype: ModelDtype = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the scores of every fact to this file.")
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="Status 4 if the metric is below: efficacy_strict=98; repeatable."),
    ] = None,
    fail_over: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="Status 4 if it is above: perplexity_ratio=1.1; repeatable."),
    ] = None,
    junit_file: Annotated[
        Path | None, typer.Option("--junit", help="Write what became of the limits to this file, as JUnit XML.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score facts on a model, or on the edited model of a run beside the unedited one; and hold them against limits."""
    from sphere_edit.evaluation.limits import judge, needs_text, read_limits
    from sphere_edit.facts.readers import read_facts
    from sphere_edit.files import check_room, write_json, write_text
    from sphere_edit.reporting.junit import junit
    from sphere_edit.reporting.results import draw
    from sphere_edit.reporting.views import Metrics
    from sphere_edit.runs.folder import RunFolder

    limits = read_limits(fail_under or (), fail_over or ())
    if junit_file is not None and not limits:
        raise SphereEditError("--junit says what became of limits; set some with --fail-under or --fail-over")
    if needs_text(limits) and not RunFolder.exists(model):
        raise SphereEditError(
            f"limits to perplexity are for runs, which keep the text it is measured on; {model} is none"
        )
    asked = read_facts(facts, limit=limit, skip_bad=skip_bad, zsre_target=target.value)
    for file in (json_file, junit_file):
        if file is not None:
            check_room(file.absolute().parent, 0)
    editor = _opened(model, places(device, device_map, max_memory), dtype, trust_remote_code, only_to_read=True)
    is_run = editor.run is not None
    result = editor.evaluate(asked, skip_bad, needs_text(limits))
    summary = result.summary()
    verdicts = judge(limits, summary)
    title = f"{model}, {counted(len(result.facts), 'fact')}"
    out.print(draw(Metrics.of(summary if is_run else {"edited": summary["edited"]}, title)))
    if json_file is not None:
        scores = zip(result.facts, result.unedited, result.edited, strict=True)
        rows = [{"fact": f.as_dict(), "unedited": u.as_dict(), "edited": e.as_dict()} for f, u, e in scores]
        judged = {"limits": [verdict.as_dict() for verdict in verdicts]} if limits else {}
        sides = summary if is_run else {"model": summary["edited"]}
        write_json(json_file, {**sides, **judged, "facts": rows})
    if junit_file is not None:
        write_text(junit_file, junit(title, verdicts))
    broken = [verdict for verdict in verdicts if not verdict.kept]
    for verdict in broken:
        say_bad("Limit", verdict.words)
    if broken:
        raise typer.Exit(FAILED)
    if limits:
        out.print(
            f"{counted(len(limits), 'limit')} kept: {'; '.join(verdict.words for verdict in verdicts)}", soft_wrap=True
        )


def ability(
    model: ModelOrRun,
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lm-evaluation-harness: boolq,rte,…")],
    task_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with task definitions (lm-eval YAML), or with data of the tasks that ship."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many documents of each task.")] = None,
    device: Device = None,
    device_map: WhichMap = None,
    max_memory: MaxMemory = None,
    dtype: ModelDtype = None,
    json_file: Json = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """General ability of a model; or of a run's model before and after its edits, kept in the run."""
    from sphere_edit.files import check_room, write_json

    if json_file is not None:
        check_room(json_file.absolute().parent, 0)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise SphereEditError("which tasks? Give their names: --tasks boolq,rte")
    from sphere_edit.evaluation.ability import AbilityTasks
    from sphere_edit.reporting.results import draw
    from sphere_edit.reporting.views import Abilities

    if task_dir is not None and any(task_dir.glob("*.yaml")):
        reporter().say(f"Definitions of tasks in {task_dir} can run code on this machine", "yellow")
    chosen = AbilityTasks(names, task_dir, limit)
    editor = _opened(model, places(device, device_map, max_memory), dtype, trust_remote_code)
    scores = editor.ability(chosen)
    editor.close()
    out.print(draw(Abilities.of(scores, model)))
    if json_file is not None:
        write_json(json_file, scores)
    if editor.run is not None:
        write_report(editor.folder)


def energy(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_RUN", help="A model as for edit; or a run, compared with its original.")
    ],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL_OR_RUN", help="What became of the model: another model, or a run.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers, as 4-8 or 4,6. \\[default: all, or those that the run edited]")
    ] = None,
    modules: Annotated[
        str | None, typer.Option(help="Matrices by role (down,up) or by their own name. \\[default: down]")
    ] = None,
    power: Annotated[int, typer.Option(min=0, max=2, help="s of the energy HE_s.")] = 1,
    eta: Annotated[float, typer.Option(min=0, max=1, help="Share of the neurons' spectrum that is principal.")] = 0.5,
    json_file: Json = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write all numbers to this file.")] = None,
) -> None:
    """Hyperspherical energy of each weight matrix, and what an edit did to it; reads one matrix at a time."""
    from sphere_edit.diagnosis import diagnose
    from sphere_edit.editing.settings import read_layers
    from sphere_edit.files import check_room, write_json, write_text
    from sphere_edit.reporting.energy import energy_tables

    for file in (json_file, csv_file):
        if file is not None:
            check_room(file.absolute().parent, 0)
    numbers = None if layers is None else read_layers(layers)
    if isinstance(numbers, dict):
        raise SphereEditError(f"--layers takes numbers such as 4-8 here, not '{layers}'; name matrices with --modules")
    roles = None if modules is None else [name.strip() for name in modules.split(",")]
    reports = list(diagnose(model, against, numbers, roles, power, eta, reporter()))
    for table in energy_tables([report.as_dict() for report in reports], power, eta):
        out.print(table)
    if json_file is not None:
        write_json(json_file, [report.as_dict() for report in reports])
    if csv_file is not None:
        text = io.StringIO()
        rows = [{name: csv_cell(value) for name, value in report.as_row().items()} for report in reports]
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_text(csv_file, text.getvalue())


def _opened(
    model: str, where: Mapping[str, Any], dtype: Dtype | None, trust_remote_code: bool, only_to_read: bool = False
) -> Editor:
    """A model, or a run's model before and after its edits."""
    from sphere_edit.editor import Editor
    from sphere_edit.runs.folder import RunFolder

    if not RunFolder.exists(model):
        options = given({"dtype": dtype and dtype.value})
        return Editor.from_pretrained(model, None, None, reporter(), trust_remote_code, **where, **options)
    if dtype is not None:
        raise SphereEditError(f"{model} is a run, which keeps its dtype; leave out --dtype")
    return Editor.open(model, reporter(), trust_remote_code=trust_remote_code, only_to_read=only_to_read, **where)
