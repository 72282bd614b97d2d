"""The command line. Every mistake of a user ends in one sentence and status 2, never in a traceback."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sphere_edit._version import __version__
from sphere_edit.errors import SphereEditError

if TYPE_CHECKING:
    from sphere_edit.editor import Editor
    from sphere_edit.facts.readers import FactSet

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Change facts inside an open-weight language model, batch after batch, and keep the model.\n\n"
    "A first look: [bold]sphere-edit demo[/bold]. Your own facts: a JSONL file with one object a line,\n\n"
    '[dim]{"subject": "Big Ben", "prompt": "{} stands in the city of", "target_new": "Vienna"}[/dim]\n\n'
    "then: check what would happen, edit, look, and ship or go back:\n\n"
    "  [bold]sphere-edit edit smollm2 facts.jsonl -o runs/first --dry-run[/bold]\n\n"
    "  [bold]sphere-edit edit smollm2 facts.jsonl -o runs/first[/bold]\n\n"
    "  [bold]sphere-edit show runs/first[/bold]\n\n"
    "  [bold]sphere-edit export runs/first -o edited-model[/bold]\n\n"
    "  [bold]sphere-edit rollback runs/first --to 0[/bold]",
)
out = Console()
err = Console(stderr=True)


class Basis(str, Enum):
    """Which weights SPHERE takes its directions from."""

    current = "current"
    pretrained = "pretrained"


class Project(str, Enum):
    """When SPHERE is applied."""

    per_layer = "per_layer"
    after_all = "after_all"
    deployed = "deployed"


class Dtype(str, Enum):
    """Numbers the model computes with; edits are made on float32 masters in any case."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def main() -> None:
    """Run the command line; turn mistakes into sentences."""
    try:
        app()
    except SphereEditError as error:
        _fail(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _fail(
            "the device ran out of memory. What was committed is kept; a new run with smaller targets.tokens or "
            "tokens_per_batch (in --config) or --dtype bfloat16 needs less"
        )


def _fail(message: str) -> None:
    err.print(f"[bold red]Error:[/bold red] {_escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(2)


def _version(value: bool) -> None:
    if value:
        out.print(f"sphere-edit {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run folder; by default runs/demo-TIME.")
    ] = None,
    limit: Annotated[int, typer.Option(min=6, max=60, help="How many of the 60 demo facts.")] = 60,
) -> None:
    """Edit the embedded SmolLM2-135M with 60 demo facts in three batches, and show what it says before and after."""
    import time

    from sphere_edit.editor import Editor
    from sphere_edit.facts.readers import read_facts
    from sphere_edit.reporting.results import make_table, metrics_table, one_line

    folder = output or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    given = read_facts("demo", limit=limit)
    editor = Editor.from_pretrained("smollm2", run=folder, reporter=_reporter(), batch_size=-(-limit // 3))
    shown = given.facts[:: limit // 6][:6]
    before = [editor.generate(fact.filled_prompt, 6) for fact in shown]
    metrics = _work(editor, lambda: editor.edit(given))
    columns = ("prompt", "new answer", "before", "after")
    table = make_table("What the model says", *columns, left=columns)
    for fact, said in zip(shown, before, strict=True):
        now = editor.generate(fact.filled_prompt, 6)
        took = now.strip().startswith(fact.target_new.strip())
        colour = "green" if took else "red"
        table.add_row(
            fact.filled_prompt,
            fact.target_new,
            _escape(one_line(said)),
            f"[{colour}]{_escape(one_line(now))}[/{colour}]",
        )
    out.print(table)
    out.print(
        metrics_table(
            metrics["unedited"],
            metrics["edited"],
            f"All {metrics['facts']} facts, after the last batch",
            metrics["intervals"],
        )
    )
    _write_report(folder)
    _say_where(folder)


@app.command()
def edit(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, 'smollm2', or a RUN to continue.")],
    facts: Annotated[
        str | None,
        typer.Argument(
            help="JSON, JSONL or CSV file, 'demo', counterfact, multi_counterfact, zsre, or a hub data set (owner/name[:split])."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Run folder to create.")] = None,
    method: Annotated[
        str | None, typer.Option(help="Editing method; sphere-edit methods lists them. \\[default: frugal]")
    ] = None,
    sphere: Annotated[
        bool | None, typer.Option("--sphere/--no-sphere", help="SPHERE projection. \\[default: on]")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Share of the spectrum that is principal. \\[default: 0.5]")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="How much of the update along it is taken away. \\[default: the method's]")
    ] = None,
    basis: Annotated[
        Basis | None, typer.Option(help="Weights the directions come from. \\[default: the method's]")
    ] = None,
    project: Annotated[Project | None, typer.Option(help="When to project. \\[default: the method's]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Facts in one batch. \\[default: 100]")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Edited layers: '4-8', '4,6' or 'gate:11-15,up:18'. \\[default: the method's]")
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Text for the second moments: .txt, .jsonl or a hub data set. \\[default: the model's own]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … \\[default: what is there]")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Numbers the model computes with. \\[default: its own]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampled templates and text. \\[default: 0]")] = None,
    limit: Annotated[int | None, typer.Option(help="Take only the first N facts.")] = None,
    skip: Annotated[int, typer.Option(help="Leave out the first N facts.")] = 0,
    shuffle: Annotated[int | None, typer.Option(help="Put the facts in a random order first, with this seed.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Evaluate after every N batches too.")] = None,
    eval_sample: Annotated[
        int | None, typer.Option(help="There, ask for N past facts at most, a fixed random sample. \\[default: all]")
    ] = None,
    guard: Annotated[
        bool | None,
        typer.Option("--guard/--no-guard", help="Stop before a batch that would harm the model. \\[default: off]"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any setting of the API; the command line wins.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out records that cannot be used.")] = False,
    skip_known: Annotated[
        bool, typer.Option("--skip-known", help="Leave out facts whose new answer the unedited model gives already.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show settings and costs, edit nothing.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Edit MODEL with FACTS into a new run folder; or continue a finished RUN with more FACTS."""
    given: dict[str, Any] = {
        "method": method,
        "sphere": {
            "enabled": sphere,
            "eta": eta,
            "alpha": alpha,
            "basis": basis and basis.value,
            "project": project and project.value,
        },
        "batch_size": batch_size,
        "layers": None if layers is None else _layers(layers),
        "moments": {"corpus": corpus},
        "device": device,
        "dtype": dtype and dtype.value,
        "seed": seed,
        "evaluation": {"every": eval_every, "sample": eval_sample},
        "guard": guard,
    }
    chosen = {"limit": limit, "skip": skip, "shuffle": shuffle, "skip_bad": skip_bad}
    wish = _Wish(facts, _given(given), config, chosen, skip_known, resume, dry_run, trust_remote_code)
    from sphere_edit.runs.folder import RunFolder

    if RunFolder.exists(model):
        if output is not None and output != Path(model):
            raise SphereEditError(f"{model} is a run, which continues in its own folder; leave out -o {output}")
        _edit_more(None, Path(model), wish)
    elif output is None:
        raise SphereEditError("where should the run go? Give a folder: -o runs/NAME")
    elif RunFolder.exists(output):
        if not resume:
            raise SphereEditError(
                f"{output} holds a run already; add --resume to go on with it, or choose another folder"
            )
        _edit_more(model, output, wish)
    else:
        _edit_new(model, output, wish)


@dataclass(frozen=True)
class _Wish:
    """What a user wants of ``edit``, beside the model and the folder."""

    facts: str | None
    options: dict[str, Any]
    config: Path | None
    chosen: dict[str, Any]  # which of the facts, as for read_facts
    skip_known: bool
    resume: bool
    dry_run: bool
    trust_remote_code: bool


def _edit_new(model: str, folder: Path, wish: _Wish) -> None:
    if wish.facts is None:
        raise SphereEditError("which facts? Give a file, a data set, or 'demo'")
    from sphere_edit.editing.settings import make_settings, read_settings_file
    from sphere_edit.facts.readers import read_facts

    settings = make_settings(read_settings_file(wish.config) if wish.config else {}, wish.options)
    given = read_facts(wish.facts, **wish.chosen)
    if settings.moments.corpus is not None:
        from sphere_edit.editing.moments import read_passages

        read_passages(settings.moments.corpus)  # a corpus that cannot be read is told before the model is loaded
    from sphere_edit.editor import Editor
    from sphere_edit.files import cache_dir
    from sphere_edit.planning import check_room
    from sphere_edit.runs.folder import RunFolder
    from sphere_edit.tuning import calibrate

    RunFolder.refuse_taken(folder)
    for place in (folder, cache_dir()):
        check_room(place, 0)
    editor = Editor.from_pretrained(model, folder, settings, _reporter(), wish.trust_remote_code)
    if wish.dry_run:
        _plan(editor, given, wish.chosen["skip_bad"], wish.skip_known)
        return
    calibrate(editor, given, wish.chosen["skip_bad"])
    _finish(editor, lambda: editor.edit(given, wish.chosen["skip_bad"], wish.skip_known))


def _edit_more(model: str | None, folder: Path, wish: _Wish) -> None:
    from sphere_edit.editing.settings import make_settings, read_settings_file
    from sphere_edit.facts.readers import read_facts
    from sphere_edit.runs.folder import RunFolder

    run = RunFolder.open(folder)
    history = run.history
    from sphere_edit.models.loading import full_name

    if wish.resume and wish.facts is not None:
        if model is None:
            raise SphereEditError(
                f"--resume goes on with the facts {folder} already has; give it more once it is finished"
            )
        sources = history.sources
        if sources and Path(wish.facts).name not in {
            Path(source).name for source in sources
        }:  # not the command that began it
            raise SphereEditError(
                f"{folder} has the facts of {sources[-1]}, not those of {wish.facts}; --resume goes on with what it has. To edit more facts: "
                f"sphere-edit edit {folder} {wish.facts}"
            )
    if model is not None and full_name(model) != run.config.model.source:
        raise SphereEditError(f"{folder} edits '{run.config.model.source}', not '{model}'")
    saved = make_settings(run.config.settings)
    wanted = make_settings(run.config.settings, read_settings_file(wish.config) if wish.config else {}, wish.options)
    changed = [name for name in type(saved).model_fields if getattr(wanted, name) != getattr(saved, name)]
    if set(changed) - {"device"}:
        raise SphereEditError(
            f"a run keeps its settings; these would change: {', '.join(changed)}. Start a new run instead"
        )
    if wish.dry_run and wish.resume:
        raise SphereEditError("--dry-run tells about facts to come; what waits in this run is in: sphere-edit show RUN")
    if not wish.resume and wish.facts is None:
        raise SphereEditError(f"which facts? {folder} is a run: give it more facts, or --resume what was interrupted")
    if not wish.resume and not history.finished:
        raise SphereEditError(
            f"{folder} was interrupted with {len(history.pending)} facts waiting; finish it first: --resume"
        )
    if wish.resume and history.finished:
        out.print(f"{folder} is finished: {history.head} batches, nothing to resume.", highlight=False)
        return
    given = None if wish.resume or wish.facts is None else read_facts(wish.facts, **wish.chosen)
    from sphere_edit.editor import Editor

    editor = Editor.open(folder, _reporter(), wish.options.get("device"), wish.trust_remote_code)
    if wish.dry_run and given is not None:
        _plan(editor, given, wish.chosen["skip_bad"], wish.skip_known)
        return
    _finish(
        editor,
        lambda: editor.resume() if given is None else editor.edit(given, wish.chosen["skip_bad"], wish.skip_known),
    )


@app.command()
def methods() -> None:
    """List the editing methods: what each needs, its options with defaults and meaning, its source; and the presets."""
    from sphere_edit.reporting.methods import method_tables

    for table in method_tables():
        out.print(table)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model as for edit, or a run folder.")],
    facts: Annotated[str, typer.Argument(help="Facts to ask for, as for edit.")],
    limit: Annotated[int | None, typer.Option(help="Take only the first N facts.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out records that cannot be used.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Numbers a model computes with.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the scores of every fact to this file.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Score facts on a model, or on the edited model of a run beside the unedited one."""
    from sphere_edit.facts.readers import read_facts
    from sphere_edit.files import write_json
    from sphere_edit.runs.folder import RunFolder

    given = read_facts(facts, limit=limit, skip_bad=skip_bad)
    from sphere_edit.editor import Editor
    from sphere_edit.planning import check_room
    from sphere_edit.reporting.results import metrics_table, single_table

    is_run = RunFolder.exists(model)
    if is_run and dtype is not None:
        raise SphereEditError(f"{model} is a run, which keeps its dtype; leave out --dtype")
    if json_file is not None:
        check_room(json_file.absolute().parent, 0)
    if is_run:
        editor = Editor.open(model, _reporter(), device, trust_remote_code)
    else:
        options = _given({"device": device, "dtype": dtype and dtype.value})
        editor = Editor.from_pretrained(model, None, None, _reporter(), trust_remote_code, **options)
    result = editor.evaluate(given, skip_bad)
    summary = result.summary()
    title = f"{model}, {len(result.facts)} facts"
    out.print(
        metrics_table(summary["unedited"], summary["edited"], title)
        if is_run
        else single_table(summary["edited"], title)
    )
    if json_file is not None:
        scores = zip(result.facts, result.unedited, result.edited, strict=True)
        rows = [{"fact": f.as_dict(), "unedited": u.as_dict(), "edited": e.as_dict()} for f, u, e in scores]
        write_json(json_file, {**summary, "facts": rows} if is_run else {"model": summary["edited"], "facts": rows})


@app.command()
def ability(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model as for edit, or a run folder.")],
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lm-evaluation-harness: boolq,rte,…")],
    task_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with task definitions (lm-eval YAML), or with data of the tasks that ship."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many documents of each task.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Numbers a model computes with.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """General ability of a model; or of a run's model before and after its edits, kept in the run."""
    from sphere_edit.files import write_json
    from sphere_edit.planning import check_room
    from sphere_edit.runs.folder import RunFolder

    if json_file is not None:
        check_room(json_file.absolute().parent, 0)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise SphereEditError("which tasks? Give their names: --tasks boolq,rte")
    from sphere_edit.editor import Editor
    from sphere_edit.evaluation.ability import AbilityTasks
    from sphere_edit.reporting.results import ability_table

    found = AbilityTasks(names, task_dir, limit)
    if is_run := RunFolder.exists(model):
        if dtype is not None:
            raise SphereEditError(f"{model} is a run, which keeps its dtype; leave out --dtype")
        editor = Editor.open(model, _reporter(), device, trust_remote_code)
    else:
        options = _given({"device": device, "dtype": dtype and dtype.value})
        editor = Editor.from_pretrained(model, None, None, _reporter(), trust_remote_code, **options)
    scores = editor.ability(found)
    editor.close()
    out.print(ability_table(scores, model))
    if json_file is not None:
        write_json(json_file, scores)
    if is_run:
        _write_report(Path(model))


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
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
    out.print(
        f"[bold]{run}[/bold]: {config.model.source}, {config.method}, {projection}",
        highlight=False,
    )
    out.print(
        f"started {config.created}, layers {config.layers}, {config.corpus.origin}; "
        f"{history.head} batches, {len(history.edited)} facts edited, {len(history.superseded)} superseded, "
        f"{len(history.withdrawn)} withdrawn; {state}",
        highlight=False,
    )
    if history.batches:
        out.print(batches_table(history.batches))
        out.print(f"Time by stage: {timings([*history.batches, *history.final_rechecks])}", highlight=False)
        memory = max((batch.peak_memory or 0 for batch in history.batches), default=0)
        if memory:
            out.print(f"Peak memory: {memory / 1e9:.1f} GB", highlight=False)
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


@app.command()
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
    write_report(runs, page, folder, _reporter())
    out.print(f"{page} and {folder}", highlight=False, soft_wrap=True)


@app.command()
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
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write all numbers to this file.")] = None,
) -> None:
    """Hyperspherical energy of each weight matrix, and what an edit did to it; reads one matrix at a time."""
    import csv
    import io

    from sphere_edit.diagnosis import diagnose
    from sphere_edit.files import write_json, write_text
    from sphere_edit.planning import check_room
    from sphere_edit.reporting.energy import energy_tables

    for file in (json_file, csv_file):
        if file is not None:
            check_room(file.absolute().parent, 0)
    numbers = None if layers is None else _layers(layers)
    if isinstance(numbers, dict):
        raise SphereEditError(f"--layers takes numbers such as 4-8 here, not '{layers}'; name matrices with --modules")
    roles = None if modules is None else [name.strip() for name in modules.split(",")]
    reports = list(diagnose(model, against, numbers, roles, power, eta, _reporter()))
    for table in energy_tables([report.as_dict() for report in reports], power, eta):
        out.print(table)
    if json_file is not None:
        write_json(json_file, [report.as_dict() for report in reports])
    if csv_file is not None:
        text = io.StringIO()
        rows = [report.as_row() for report in reports]
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_text(csv_file, text.getvalue())


@app.command()
def rollback(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[int, typer.Option("--to", min=0, help="The batch to go back to; 0 is the original model.")],
) -> None:
    """Put a run's weights back to exactly what they were after batch N."""
    from sphere_edit.editor import opened

    with opened(run, _reporter()) as editor:
        waiting = 0 if editor.run is None else len(editor.run.history.pending)
        editor.rollback(to)
    state = "the original model, bit for bit" if to == 0 else f"the weights as after batch {to}"
    out.print(f"{run} now stands at batch {to}: {state}. Export it, or edit on from here.", highlight=False)
    if waiting:
        out.print(f"{waiting} facts that were waiting are withdrawn; give them again to edit them.", highlight=False)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to create.")],
) -> None:
    """Write the edited model as a plain Hugging Face folder: weights, tokenizer, generation config, model card."""
    from sphere_edit.files import refuse_existing
    from sphere_edit.runs.folder import RunFolder

    RunFolder.open(run)
    refuse_existing(output)
    from sphere_edit.editor import opened

    with opened(run, _reporter()) as editor:
        editor.save_pretrained(output)
    out.print(f"{output} holds the model; AutoModelForCausalLM.from_pretrained('{output}') loads it.", highlight=False)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file or 'smollm2'.")],
    facts: Annotated[
        str,
        typer.Option(help="File or data set to calibrate on, with paraphrases and neighbours: some dozens of facts."),
    ] = "demo",
    method: Annotated[str | None, typer.Option(help="Method whose settings are sought. \\[default: frugal]")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Text for the second moments: .txt, .jsonl or a hub data set. \\[default: the model's own]"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the settings to this YAML file too, for edit --config.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings to start from.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … \\[default: what is there]")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Numbers the model computes with. \\[default: its own]")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Find layers, step and weights for a model; later runs take them by themselves, before any published ones."""
    import yaml

    from sphere_edit.editing.settings import make_settings, read_settings_file
    from sphere_edit.facts.readers import read_facts
    from sphere_edit.files import write_text
    from sphere_edit.models.loading import load_model
    from sphere_edit.planning import check_room
    from sphere_edit.reporting.results import trials_table
    from sphere_edit.tuning import check_tunable
    from sphere_edit.tuning import tune as find

    moments = corpus and {"corpus": corpus}
    options = _given({"method": method, "device": device, "dtype": dtype and dtype.value, "moments": moments})
    if output is not None:
        check_room(output.absolute().parent, 0)
    given = make_settings(read_settings_file(config) if config else {}, options)
    check_tunable(given)
    calibration = read_facts(facts)
    loaded = load_model(model, given.device, given.dtype, trust_remote_code)
    trials = find(loaded, given, _reporter(), calibration.facts)
    out.print(trials_table([trial.summary for trial in trials], given.method))
    if trials[0].score == 0:
        raise SphereEditError(
            "nothing was chosen, and nothing kept; calibrate on facts that this model can learn: --facts"
        )
    chosen = make_settings(given.model_dump(exclude_unset=True), {"method": given.method}, trials[0].settings)
    best = yaml.safe_dump(chosen.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    out.print(
        f"Chosen, and taken by later runs of {given.method} on this model unless you say otherwise:", style="bold"
    )
    out.print(best.rstrip(), highlight=False, markup=False)
    if output is not None:
        write_text(output, best)


@app.command()
def bench(
    config: Annotated[Path, typer.Argument(help="YAML file: models, data, methods, variants, seeds, settings.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the bench. \\[default: runs/<name of the file>]")
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Run nothing; make the table of what is finished.")] = False,
) -> None:
    """Run a whole matrix of methods, data, variants and seeds, or go on with it; ends with the paper's table and a report."""
    from rich.markdown import Markdown

    from sphere_edit.bench import Bench, write_results

    matrix = Bench.read(config, output)
    try:
        if not table:
            matrix.execute(_reporter())
    except KeyboardInterrupt:
        raise SphereEditError(
            f"interrupted; every committed batch is kept. Go on with: sphere-edit bench {config} -o {matrix.folder}"
        ) from None
    written = write_results(matrix, _reporter())
    table_text = (matrix.folder / "table.md").read_text("utf-8")
    if out.is_terminal:
        out.print(Markdown(table_text))
    else:  # where nobody sees columns, nothing is cut to fit them
        out.print(table_text, highlight=False, markup=False, soft_wrap=True)
    for name, reason in matrix.failures.items():
        err.print(f"[bold red]Failed:[/bold red] {_escape(name)}: {_escape(reason)}", highlight=False, soft_wrap=True)
    out.print("\n".join(map(str, written)), highlight=False, markup=False, soft_wrap=True)
    if matrix.failures:
        raise typer.Exit(3)


# --- helpers ------------------------------------------------------------------------------------------------------


def _reporter() -> Any:
    from sphere_edit.progress import RichReporter

    return RichReporter(err)


def _work(editor: Editor, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do long work; an interruption says what is kept and how to go on."""
    try:
        return work()
    except KeyboardInterrupt:
        if editor.run is None:
            raise SphereEditError("interrupted before the first batch; nothing was edited") from None
        head = editor.run.history.head
        raise SphereEditError(
            f"interrupted; {head} batches are committed and kept. Go on with: sphere-edit edit {editor.folder} --resume"
        ) from None


def _finish(editor: Editor, work: Callable[[], dict[str, Any]]) -> None:
    from sphere_edit.reporting.results import metrics_table

    metrics = _work(editor, work)
    out.print(
        metrics_table(
            metrics["unedited"],
            metrics["edited"],
            f"All {metrics['facts']} facts, after batch {metrics['after']}",
            metrics["intervals"],
        )
    )
    editor.close()
    _write_report(editor.folder)
    _say_where(editor.folder)
    if editor.run is not None and editor.run.history.guard is not None:
        from sphere_edit.editing.guard import stopped

        err.print(f"[bold red]Guard:[/bold red] {stopped(editor.run.history.guard)}", highlight=False, soft_wrap=True)
        raise typer.Exit(3)


def _write_report(folder: Path) -> None:
    from sphere_edit.reporting.report import write_report

    write_report([folder], folder / "report.html", folder / "figures", _reporter())


def _say_where(folder: Path) -> None:
    out.print(
        f"Run folder: {folder}\nReport: {folder / 'report.html'}\n"
        f"  sphere-edit show {folder}\n  sphere-edit export {folder} -o DIR\n  sphere-edit rollback {folder} --to 0",
        highlight=False,
        markup=False,
    )


def _plan(editor: Editor, given: FactSet, skip_bad: bool, skip_known: bool) -> None:
    """Check everything, show what would be done and what it would cost, and do nothing."""
    from sphere_edit.planning import check_room, estimate
    from sphere_edit.progress import duration
    from sphere_edit.reporting.results import make_table
    from sphere_edit.runs.selection import would_supersede

    planned, _ = editor.check(given, skip_bad, skip_known)
    cost = estimate(editor.session, planned, editor.run)
    settings, facts = editor.settings, len(planned)
    table = make_table("Settings", "", " ", left=("", " "), head=False)
    unknown = "found by calibration first" if editor.session.would_calibrate else "none: the method's defaults"
    rows = {
        "model": f"{editor.loaded.source} ({editor.model.config.model_type}, {editor.loaded.device})",
        "facts": f"{facts} in batches of {settings.batch_size}",
        "preset": editor.preset or unknown,
        "method": f"{settings.method} {editor.method.model_dump(mode='json')}",
        "sphere": "off" if editor.sphere is None else str(editor.sphere.model_dump()),
        "matrices": ", ".join(editor.weights.names),
        "targets": str(settings.targets.model_dump()),
        "second moments": str(settings.moments.model_dump()),
        "seed": str(settings.seed),
        "run folder": str(editor.folder),
        **({"supersedes": f"{would_supersede(editor.run, planned)} earlier facts"} if editor.run else {}),
    }
    for name, value in rows.items():
        table.add_row(name, _escape(value))
    out.print(table)
    costs = make_table("Estimate, from short trials on this machine", "", " ", left=("",), head=False)
    for stage, seconds in cost.seconds.items():
        costs.add_row(stage, duration(seconds))
    costs.add_row("[bold]time, all[/bold]", f"[bold]{duration(sum(cost.seconds.values()))}[/bold]")
    costs.add_row("memory", f"{cost.memory / 1e9:.1f} GB")
    costs.add_row("disk", f"{cost.disk / 1e9:.2f} GB")
    out.print(costs)
    editor.close()
    check_room(editor.folder, cost.disk)
    out.print("Nothing was edited.")


def _layers(text: str) -> list[int] | dict[str, list[int]]:
    """'4-8', '4,6', or by role, each of which holds until the next one: 'gate:11-15,up:18-24,30'."""
    found: dict[str, list[int]] = {}
    role = ""
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:([a-z_]+)\s*:)?\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise SphereEditError(f"--layers takes numbers such as 4-8, 4,6,8 or gate:11-15,up:18-24, not '{text}'")
        role = match[1] or role
        first, last = int(match[2]), int(match[3] or match[2])
        found.setdefault(role, []).extend(range(first, last + 1))
    if "" in found and len(found) > 1:
        raise SphereEditError(f"--layers '{text}': name the role of the first layers too, as in gate:11-15,up:18-24")
    return found.get("", found)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """What the user said; the rest is left to the settings' own defaults."""
    found = {name: _given(value) if isinstance(value, dict) else value for name, value in options.items()}
    return {name: value for name, value in found.items() if value is not None and value != {}}


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
