"""What ``edit`` may do with a folder: start a run, continue it, resume it, or nothing. Told before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from sphere_edit.counting import counted
from sphere_edit.editing.settings import PLACES, make_settings
from sphere_edit.errors import SphereEditError
from sphere_edit.files import require_utf8
from sphere_edit.models.loading import full_name
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.preparing import default_folder
from sphere_edit.text import visible


class Act(str, Enum):
    """What is to be done with a run folder."""

    START = "start"
    CONTINUE = "continue"
    RESUME = "resume"
    NOTHING = "nothing to do"


@dataclass(frozen=True)
class Decision:
    """What is to be done, and in which folder.

    Attributes:
        act: what is to be done.
        folder: the run's folder.
        batches: how many batches of the run stand.
    """

    act: Act
    folder: Path
    batches: int = 0


def admit(
    model: str,
    output: Path | None,
    facts: str | None,
    resume: bool = False,
    dry_run: bool = False,
    settings: Sequence[dict[str, Any]] = (),
) -> Decision:
    """Decide what ``edit`` does.

    Args:
        model: a model, or the folder of a run that is to go on.
        output: the folder of the run, where the model is not one itself; one that only checks (``dry_run``) needs none.
        facts: the source of the facts to come; None where none are given.
        resume: whether an interrupted run is to go on with the facts it has.
        dry_run: whether everything is to be checked, and nothing edited.
        settings: what is set now, by the file and on the command line; a later one wins.

    Raises:
        SphereEditError: this cannot be done there.
    """
    if RunFolder.exists(model):
        if output is not None and output != Path(model):
            raise SphereEditError(f"{model} is a run, which continues in its own folder; leave out -o {output}")
        return _go_on(RunFolder.open(model), None, facts, resume, dry_run, settings)
    if output is None and not dry_run:
        raise SphereEditError("where should the run go? Give a folder: -o runs/NAME")
    if output is not None and RunFolder.exists(output):
        if not resume:
            RunFolder.refuse_taken(output)
        return _go_on(RunFolder.open(output), model, facts, resume, dry_run, settings)
    if facts is None:
        raise SphereEditError("which facts? Give a file, a data set, or 'demo'")
    method = make_settings(*settings).method  # impossible settings are told here
    require_utf8(full_name(model), "a model")
    output = output or default_folder(model, method)
    require_utf8(output, "a run")
    RunFolder.refuse_taken(output)
    return Decision(Act.START, output)


def _go_on(
    run: RunFolder,
    model: str | None,
    facts: str | None,
    resume: bool,
    dry_run: bool,
    settings: Sequence[dict[str, Any]],
) -> Decision:
    """Resume a run, or continue it with more facts; ``model`` where the command names it beside the folder."""
    folder, history = run.path, run.history
    if resume and facts is not None:
        _check_facts(run, model, facts)
    if model is not None and full_name(model) != run.config.model.source:
        raise SphereEditError(f"{folder} edits '{run.config.model.source}', not '{model}'")
    _check_settings(run, settings)
    if resume and dry_run:
        raise SphereEditError("--dry-run tells about facts to come; what waits in this run is in: sphere-edit show RUN")
    if resume:
        return Decision(Act.NOTHING if history.finished else Act.RESUME, folder, history.head)
    if facts is None:
        raise SphereEditError(f"which facts? {folder} is a run: give it more facts, or --resume what was interrupted")
    if not history.finished:
        raise SphereEditError(
            f"{folder} was interrupted with {counted(len(history.pending), 'fact')} waiting; finish it first: --resume"
        )
    return Decision(Act.CONTINUE, folder, history.head)


def _check_facts(run: RunFolder, model: str | None, facts: str) -> None:
    """Facts may be named at a resume only as in the command that began the run: by the name of their file."""
    if model is None:
        raise SphereEditError(
            f"--resume goes on with the facts {run.path} already has; give it more once it is finished"
        )
    sources = run.history.sources
    if sources and Path(visible(facts)).name not in {Path(visible(source)).name for source in sources}:
        raise SphereEditError(
            f"{run.path} has the facts of {sources[-1]}, not those of {facts}; --resume goes on with what it has. "
            f"To edit more facts: sphere-edit edit {run.path} {facts}"
        )


def _check_settings(run: RunFolder, settings: Sequence[dict[str, Any]]) -> None:
    """A run keeps its settings; only where its model lies may be another."""
    saved = make_settings(run.config.settings)
    elsewhere = [{name: value for name, value in part.items() if name not in PLACES} for part in settings]
    wanted = make_settings(run.config.settings, *elsewhere)
    changed = [name for name in type(saved).model_fields if getattr(wanted, name) != getattr(saved, name)]
    if changed:
        raise SphereEditError(
            f"a run keeps its settings; these would change: {', '.join(changed)}. Start a new run instead"
        )
