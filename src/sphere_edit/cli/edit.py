"""The command that edits: a new run, more facts for a finished one, the rest of an interrupted one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sphere_edit.cli.edit_options import (
    Alpha,
    BatchSize,
    Config,
    DryRun,
    Eta,
    EvalEvery,
    EvalSample,
    Facts,
    Guard,
    Layers,
    LogTo,
    Method,
    Model,
    Output,
    Resume,
    Seed,
    Shuffle,
    Skip,
    SkipKnown,
    UseSphere,
    WhenProjected,
    WhichBasis,
    WhichMatrices,
    WhichRewordings,
    settings_of,
)
from sphere_edit.cli.layout import say_lights, say_memory, say_metrics, say_plan, say_where, write_report
from sphere_edit.cli.options import (
    Chat,
    Corpus,
    Device,
    Forms,
    Limit,
    MaxMemory,
    ModelDtype,
    Service,
    SkipBad,
    System,
    Target,
    TrustRemoteCode,
    TrustRun,
    WhichMap,
    ZsreTarget,
)
from sphere_edit.cli.screen import out, reporter, say_bad
from sphere_edit.counting import counted
from sphere_edit.errors import SphereEditError
from sphere_edit.plugins import program

if TYPE_CHECKING:
    from sphere_edit.editor import Editor
    from sphere_edit.facts.readers import FactSet
    from sphere_edit.reporting.tracking import Tracker


def edit(
    model: Model,
    facts: Facts = None,
    output: Output = None,
    method: Method = None,
    sphere: UseSphere = None,
    eta: Eta = None,
    alpha: Alpha = None,
    basis: WhichBasis = None,
    project: WhenProjected = None,
    batch_size: BatchSize = None,
    chat: Chat = None,
    forms: Forms = None,
    system: System = None,
    rewordings: WhichRewordings = None,
    layers: Layers = None,
    matrices: WhichMatrices = None,
    corpus: Corpus = None,
    device: Device = None,
    device_map: WhichMap = None,
    max_memory: MaxMemory = None,
    dtype: ModelDtype = None,
    seed: Seed = None,
    limit: Limit = None,
    skip: Skip = 0,
    shuffle: Shuffle = None,
    target: ZsreTarget = Target.answer,
    eval_every: EvalEvery = None,
    eval_sample: EvalSample = None,
    guard: Guard = None,
    config: Config = None,
    skip_bad: SkipBad = False,
    skip_known: SkipKnown = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    log: LogTo = None,
    trust_remote_code: TrustRemoteCode = False,
    trust_run: TrustRun = False,
) -> None:
    """Edit MODEL with FACTS into a new run folder; or continue a finished RUN with more FACTS."""
    said = locals()  # every option by its name
    from sphere_edit.editing.settings import PLACES, read_settings_file
    from sphere_edit.facts.readers import read_facts
    from sphere_edit.runs.admission import Act, admit

    tracker = _tracker(log)
    over = [read_settings_file(config) if config else {}, settings_of(said)]
    decision = admit(model, output, facts, resume, dry_run, over)
    if decision.act is Act.NOTHING:
        _say_finished(decision.folder, decision.batches)
        return
    more = None
    if facts is not None and decision.act is not Act.RESUME:
        more = read_facts(facts, limit=limit, skip_bad=skip_bad, zsre_target=target.value, skip=skip, shuffle=shuffle)
    if decision.act is Act.START:
        editor = _begun(model, decision.folder, over, trust_remote_code, dry_run)
    else:
        from sphere_edit.editor import Editor

        places = {name: value for part in over for name, value in part.items() if name in PLACES}
        options = {**places, "trust_remote_code": trust_remote_code, "trust_run": trust_run}
        editor = Editor.open(decision.folder, reporter(), **options)
    with _telling(editor, tracker):
        _work(editor, more, decision.act is Act.START, skip_bad, skip_known, dry_run)


def _work(editor: Editor, facts: FactSet | None, new: bool, skip_bad: bool, skip_known: bool, dry_run: bool) -> None:
    """The rest of a run; or more facts, in a plan or in earnest."""
    if facts is None:
        finish(editor, editor.resume)
    elif dry_run:
        say_plan(editor, facts, skip_bad, skip_known)
    else:
        if new:
            from sphere_edit.tuning import calibrate

            calibrate(editor, facts, skip_bad)
        finish(editor, lambda: editor.edit(facts, skip_bad, skip_known))


def _say_finished(folder: Path, batches: int) -> None:
    metrics, page = folder / "metrics.json", folder / "report.html"
    if metrics.is_file() and not (page.is_file() and page.stat().st_mtime_ns >= metrics.stat().st_mtime_ns):
        write_report(folder)  # an earlier command died before it was done with it
    out.print(f"{folder} is finished: {counted(batches, 'batch')}, nothing to resume.")


def _tracker(service: Service | None) -> Tracker | None:
    if service is None:
        return None
    from sphere_edit.reporting.tracking import Tracker

    return Tracker(service.value, reporter())


@contextmanager
def _telling(editor: Editor, tracker: Tracker | None) -> Iterator[None]:
    """Tell a logger of what the run commits meanwhile."""
    if tracker is None:
        yield
        return
    editor.watchers.append(tracker)
    try:
        yield
    finally:
        tracker.close()


def _begun(model: str, folder: Path, settings: list[dict[str, Any]], trust_remote_code: bool, dry_run: bool) -> Editor:
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
    if dry_run:
        say_memory(model, chosen, trust_remote_code)
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
            f"interrupted; {counted(head, 'batch')} committed and kept. Go on with: {program()} edit {editor.folder} --resume"
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
    say_lights(editor.folder)
    say_where(editor.folder)
    if editor.run is not None and editor.run.history.guard is not None:
        from sphere_edit.editing.guard import stopped

        say_bad("Guard", stopped(editor.run.history.guard))
        raise typer.Exit(3)
