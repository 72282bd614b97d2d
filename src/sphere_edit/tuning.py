"""Settings for a model that nobody has tuned for, found by a short calibration on facts that ship with the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sphere_edit import ranks
from sphere_edit.counting import counted
from sphere_edit.editing.methods.base import Method
from sphere_edit.editing.presets import tuned_file
from sphere_edit.editing.settings import Settings
from sphere_edit.editor import Editor
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.readers import FactSet, read_facts
from sphere_edit.files import plain_errors, remove_dead_temporaries, write_json
from sphere_edit.models.loading import LoadedModel
from sphere_edit.progress import Reporter
from sphere_edit.runs.selection import plan_batches, readable
from sphere_edit.trials import Bench, Trial

TRIALS = 7  # of all facts, that a calibration comes to in the middle: the first looks together count as two
_STEP = 2.0  # times the default step, or less by as much
_WEIGHT = 4.0  # times the default weight of ordinary keys, or less by as much
_FURTHER = 2  # trials at most in a direction that helps
_CLEARLY = 0.9  # a part below so much of another is the weaker one
_NEAR = 0.02  # of the best score that can be had: no further trial then
_SURE = 0.995  # of resamplings of a first look's few facts, in which one span must be better for the other not to be tried on all


def check_tunable(given: Settings) -> Method:
    """The method, if there is something about it to tune.

    Raises:
        SphereEditError: its targets are not optimised, or ordinary keys have no weight in it.
    """
    method = given.make_method()
    if not method.needs.feed.at_subjects or "second_moment_weight" not in type(method).model_fields:
        raise SphereEditError(
            f"tune sets layers, step and weight of second moments, which {given.method} has not; take --method frugal"
        )
    return method


def tune(loaded: LoadedModel, given: Settings, reporter: Reporter, facts: Sequence[Fact] | None = None) -> list[Trial]:
    """Try spans of layers, a mixture's other matrices, λ, and the targets' step, and keep in the cache what is best beyond noise.

    Nothing is kept if nothing worked at all. Every span gets a first look on a part of the facts, and only those that may be the best are tried on all of them. λ and step are then
    moved to where the weaker part gains: that what is asked is written, or that the rest is kept. The defaults give way only to
    what `Trial.beats` them, since they come from streams that the calibration is too short to see.

    Args:
        facts: to calibrate on; by default those that ship with the package.

    Returns:
        The trials on all facts, the chosen one first, then by score.

    Raises:
        SphereEditError: see `check_tunable`; or a fact that this model cannot read.
    """
    method = check_tunable(given)
    bench = Bench(loaded, given, facts or read_facts("demo").facts, reporter)
    chosen = _best_span(bench)
    for other in bench.other_matrices():
        trial = bench.trial({**chosen.settings, **other})
        chosen = trial if trial.beats(chosen) else chosen
    targets = bench.session({}).settings.targets
    rate, weight = targets.lr or 1.0, method.model_dump()["second_moment_weight"]

    def weighed(power: int) -> dict[str, Any]:
        return {"options": {"second_moment_weight": weight * _WEIGHT**-power}}

    def stepped(power: int) -> dict[str, Any]:
        return {"targets": {"rule": targets.rule, "lr": rate * _STEP**power}}

    for words, changed in (("weight of ordinary keys", weighed), ("step", stepped)):
        if chosen.score >= bench.ceiling - _NEAR:
            reporter.say(f"No {words} is tried: no setting can score more than {bench.ceiling:.3f} here")
            continue
        chosen = _moved(bench, chosen, words, changed)
    trials = sorted(bench.trials, key=lambda trial: (trial is not chosen, -trial.score))
    if chosen.score == 0:
        reporter.say(
            f"None of these settings got {counted(len(bench.whole.facts), 'fact')} into the model with paraphrases and neighbours as they should "
            "be, so nothing speaks for any of them; calibrate on facts that this model can learn (tune --facts)",
            "bold red",
        )
    else:
        _keep(tuned_file(loaded.fingerprint, given.method), chosen)
    return trials


def _keep(file: Path, chosen: Trial) -> None:
    """Keep what was chosen for later runs, and clear away what a calibration that was killed left there."""
    remove_dead_temporaries(file.parent)
    write_json(file, {"settings": chosen.settings})


def _best_span(bench: Bench) -> Trial:
    """The best span on all facts; after a first look at each, only those are tried so that may be the best."""
    looks = bench.looks()
    default, best = looks[0], max(looks, key=lambda trial: trial.score)
    others = sorted((look for look in looks[1:] if look is not best), key=lambda trial: -trial.score)
    rivals = [look for look in [default, *others[:1]] if look is not best and not best.beats(look, _SURE)]
    bench.reporter.say(
        f"Guessed from {len(bench.part.facts)} of {counted(len(bench.whole.facts), 'fact')}: {_layers(best)}"
        + "".join(f", perhaps {_layers(rival)}" for rival in rivals)
    )
    first, *rest = [default, best] if default in rivals else [best]
    chosen = bench.trial(first.settings)
    for trial in [bench.trial(look.settings) for look in dict.fromkeys([*rest, *rivals]) if look is not first]:
        chosen = trial if trial.beats(chosen) else chosen
    return chosen


def _layers(trial: Trial) -> str:
    numbers = trial.settings["layers"]
    return f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]}–{numbers[-1]}"


def _moved(bench: Bench, chosen: Trial, words: str, changed: Callable[[int], dict[str, Any]]) -> Trial:
    """The trial with one setting where it is best, each step away from ``chosen`` taken only if it is better beyond noise than the last that was.

    A stream multiplies what a step costs, and the calibration sees a sixteenth of it: a step that may be luck is not worth that.
    """
    for trial in _tried_along(bench, chosen, words, changed):
        chosen = trial if trial.beats(chosen) else chosen
    return chosen


def _tried_along(bench: Bench, chosen: Trial, words: str, changed: Callable[[int], dict[str, Any]]) -> list[Trial]:
    """Trials in which one setting is moved step by step, as long as that helps.

    First to where the weaker part gains, and the other way only where that does not help and neither part is clearly the weaker.

    Args:
        changed: the setting moved so many steps; positive ones write more and keep less.
    """
    first = 1 if chosen.written <= chosen.kept else -1
    weaker, stronger = sorted((chosen.written, chosen.kept))
    found: list[Trial] = []
    for direction in (first, -first):
        best = chosen
        for power in range(1, _FURTHER + 1):
            trial = bench.trial({**chosen.settings, **changed(direction * power)})
            found.append(trial)
            if trial.score <= best.score:
                break
            best = trial
        if best is not chosen:
            break
        if weaker < _CLEARLY * stronger:
            bench.reporter.say(f"The other way, {words} is not tried: it would weaken what is weaker already")
            break
    return found


def calibrate(editor: Editor, given: FactSet, skip_bad: bool) -> None:
    """Where nothing is known of an editor's model (`Session.would_calibrate`), find settings, which later runs take too, and let it go by them.

    The facts it is to edit are checked first. Of several processes one calibrates, and the others wait for it.

    Raises:
        SphereEditError: some of the facts cannot be edited (without ``skip_bad``), or nothing could be found out.
    """
    if not editor.session.would_calibrate:
        return
    usable, _ = readable(editor.session, given.facts, skip_bad)
    plan_batches(usable, editor.settings.batch_size, skip_bad)
    kept = tuned_file(editor.loaded.fingerprint, editor.session.method.name)
    lock = FileLock(f"{kept}.lock")
    ranks.once(partial(_wait_for, lock, kept, editor.session.reporter))
    try:
        editor.adopt_tuned()
        if editor.session.would_calibrate:
            editor.session.reporter.say(
                "No settings are known for this model: calibrating once, on the demo facts (`sphere-edit tune`; layers, options or targets "
                "of your own skip it)",
                "bold",
            )
            chosen = tune(editor.loaded, editor.session.given, editor.session.reporter)[0]
            if chosen.score == 0:  # a second calibration would find no more
                _keep(kept, chosen)
            editor.session.reporter.say(f"Chosen, and kept for later runs: {chosen}", "bold")
            editor.adopt_tuned()
    finally:
        lock.release()


def _wait_for(lock: FileLock, kept: Path, reporter: Reporter) -> None:
    with plain_errors(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            reporter.say("Another process is calibrating this model: waiting for what it finds", "bold")
            lock.acquire()
