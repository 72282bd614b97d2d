"""The command that edits: a new run, more facts for a finished one, the rest of an interrupted one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sphere_edit.cli.layout import say_metrics, say_plan, say_where, write_report
from sphere_edit.cli.options import (
    Basis,
    Chat,
    Corpus,
    Device,
    Forms,
    Limit,
    Matrices,
    ModelDtype,
    Project,
    Rewordings,
    SkipBad,
    System,
    Target,
    TrustRemoteCode,
    TrustRun,
    ZsreTarget,
    given,
)
from sphere_edit.cli.screen import out, reporter, say_bad
from sphere_edit.errors import SphereEditError

if TYPE_CHECKING:
    from sphere_edit.editor import Editor


def edit(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, 'smollm2', or a RUN to continue.")],
    facts: Annotated[
        str | None,
        typer.Argument(
            help="JSON, JSONL or CSV file, 'demo', counterfact, multi_counterfact, zsre, or a hub data set (owner/name\\[/config]\\[:split])."
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
    chat: Chat = None,
    forms: Forms = None,
    system: System = None,
    rewordings: Annotated[
        Rewordings | None,
        typer.Option(
            help="auto: facts also lend one another wordings, and a chat model writes some. \\[default: given]"
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Edited layers: '4-8', '4,6' or 'gate:11-15,up:18'. \\[default: the method's]")
    ] = None,
    matrices: Annotated[
        Matrices | None,
        typer.Option(help="Of a mixture of experts: each layer's shared expert or dense MLP, or its routed experts."),
    ] = None,
    corpus: Corpus = None,
    device: Device = None,
    dtype: ModelDtype = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampled templates and text. \\[default: 0]")] = None,
    limit: Limit = None,
    skip: Annotated[int, typer.Option(help="Leave out the first N facts.")] = 0,
    shuffle: Annotated[int | None, typer.Option(help="Put the facts in a random order first, with this seed.")] = None,
    target: ZsreTarget = Target.answer,
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
    skip_bad: SkipBad = False,
    skip_known: Annotated[
        bool, typer.Option("--skip-known", help="Leave out facts whose new answer the unedited model gives already.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show settings and costs, edit nothing.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    trust_run: TrustRun = False,
) -> None:
    """Edit MODEL with FACTS into a new run folder; or continue a finished RUN with more FACTS."""
    from sphere_edit.editing.settings import read_layers, read_settings_file

    options: dict[str, Any] = {
        "method": method,
        "sphere": {
            "enabled": sphere,
            "eta": eta,
            "alpha": alpha,
            "basis": basis and basis.value,
            "project": project and project.value,
        },
        "batch_size": batch_size,
        "chat": chat,
        "forms": forms and [form.strip() for form in forms.split(",")],
        "system": system,
        "rewordings": rewordings and rewordings.value,
        "layers": None if layers is None else read_layers(layers),
        "matrices": matrices and matrices.value,
        "moments": {"corpus": corpus},
        "device": device,
        "dtype": dtype and dtype.value,
        "seed": seed,
        "evaluation": {"every": eval_every, "sample": eval_sample},
        "guard": guard,
    }
    from sphere_edit.editor import Editor
    from sphere_edit.facts.readers import read_facts
    from sphere_edit.runs.admission import Act, admit
    from sphere_edit.tuning import calibrate

    over = [read_settings_file(config) if config else {}, given(options)]
    decision = admit(model, output, facts, resume, dry_run, over)
    if decision.act is Act.NOTHING:
        metrics, page = decision.folder / "metrics.json", decision.folder / "report.html"
        if metrics.is_file() and not (page.is_file() and page.stat().st_mtime_ns >= metrics.stat().st_mtime_ns):
            write_report(decision.folder)  # an earlier command died before it was done with it
        out.print(f"{decision.folder} is finished: {decision.batches} batches, nothing to resume.")
        return
    more = None
    if facts is not None and decision.act is not Act.RESUME:
        more = read_facts(facts, limit=limit, skip_bad=skip_bad, zsre_target=target.value, skip=skip, shuffle=shuffle)
    if decision.act is Act.START:
        editor = _begun(model, decision.folder, over, trust_remote_code)
    else:
        editor = Editor.open(decision.folder, reporter(), device, trust_remote_code, trust_run=trust_run)
    if more is None:
        finish(editor, editor.resume)
    elif dry_run:
        say_plan(editor, more, skip_bad, skip_known)
    else:
        if decision.act is Act.START:
            calibrate(editor, more, skip_bad)
        finish(editor, lambda: editor.edit(more, skip_bad, skip_known))


def _begun(model: str, folder: Path, settings: list[dict[str, Any]], trust_remote_code: bool) -> Editor:
    """A model to be edited into a new folder; what can be refused before it is loaded, is."""
    from sphere_edit.editing.settings import make_settings
    from sphere_edit.editor import Editor
    from sphere_edit.facts.corpus import read_passages
    from sphere_edit.files import cache_dir, check_room

    chosen = make_settings(*settings)
    if chosen.moments.corpus is not None:
        read_passages(chosen.moments.corpus)
    for place in (folder, cache_dir()):
        check_room(place, 0)
    return Editor.from_pretrained(model, folder, chosen, reporter(), trust_remote_code)


@contextmanager
def working(editor: Editor) -> Iterator[None]:
    """Long work; an interruption says what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if editor.run is None:
            raise SphereEditError("interrupted before the first batch; nothing was edited") from None
        head = editor.run.history.head
        raise SphereEditError(
            f"interrupted; {head} batches are committed and kept. Go on with: sphere-edit edit {editor.folder} --resume"
        ) from None


def finish(
    editor: Editor, work: Callable[[], Mapping[str, Any]], shown: Callable[[Editor], None] = lambda editor: None
) -> None:
    """Do long work on a run, and tell what came of it: what is ``shown``, the metrics, where the report is, what the guard said."""
    with working(editor):
        metrics = work()
    shown(editor)
    say_metrics(metrics, f"batch {metrics['after']}")
    editor.close()
    write_report(editor.folder)
    say_where(editor.folder)
    if editor.run is not None and editor.run.history.guard is not None:
        from sphere_edit.editing.guard import stopped

        say_bad("Guard", stopped(editor.run.history.guard))
        raise typer.Exit(3)
