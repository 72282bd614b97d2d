"""Settings for a model that nobody has tuned for, found by a short calibration on facts that ship with the package."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

from sphere_edit.editing.methods.base import Method, layers_from
from sphere_edit.editing.moments import load_corpus
from sphere_edit.editing.presets import tuned_file
from sphere_edit.editing.settings import Settings, make_settings
from sphere_edit.editing.solving import Clock
from sphere_edit.editing.sources import OptimisedTargets
from sphere_edit.editing.statistics import load_statistics
from sphere_edit.editing.targets import Targets
from sphere_edit.editor import Editor
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.heldout import HeldoutScores, score_heldout
from sphere_edit.evaluation.metrics import complete_answers, score_facts, summarise
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import sample_context_templates
from sphere_edit.facts.readers import read_facts
from sphere_edit.files import write_json
from sphere_edit.models.loading import LoadedModel
from sphere_edit.progress import Advance, Quiet, Reporter

STREAM = 200  # facts of the stream that a trial's damage is carried on to
_SPANS = ((0.05, 5), (0.13, 5), (0.2, 5), (0.13, 3), (0.3, 5))  # share of the depth at which editing begins, and layers
_STEPS = (0.5, 2.0)  # times the default step
_WEIGHTS = (0.25, 4.0)  # times the default weight of ordinary keys
_HELDOUT = 30  # passages


@dataclass(frozen=True)
class Trial:
    """One setting, all calibration facts edited with it in one batch, and what came of it.

    Attributes:
        settings: what differs from the defaults, as a settings file says it.
        strict: strict efficacy, percent; ``generalization`` strict too, ``specificity`` by likelihood.
        divergence: KL from the unedited model on held-out text, nats.
        score: harmonic mean of the three as shares and of ``exp(−KL · STREAM / facts)``, what such damage leaves of the model
            if a stream of 200 facts does as much for each.
    """

    settings: dict[str, Any]
    strict: float
    generalization: float
    specificity: float
    divergence: float
    score: float

    def __str__(self) -> str:
        said = "; ".join(f"{name} {value}" for name, value in self.settings.items())
        return (
            f"{said}: strict {self.strict:.1f} %, generalization {self.generalization:.1f} %, specificity {self.specificity:.1f} %, "
            f"KL {self.divergence:.4f}, score {self.score:.3f}"
        )


def check_tunable(given: Settings) -> Method:
    """The method, if there is something about it to tune.

    Raises:
        SphereEditError: its targets are not optimised, or ordinary keys have no weight in it.
    """
    method = given.make_method()
    if method.needs.source != "targets" or "second_moment_weight" not in type(method).model_fields:
        raise SphereEditError(
            f"tune sets layers, step and weight of second moments, which {given.method} has not; take --method frugal"
        )
    return method


def tune(loaded: LoadedModel, given: Settings, reporter: Reporter, facts: Sequence[Fact] | None = None) -> list[Trial]:
    """Try spans of layers, then λ, then the targets' step, each with the best found so far; keep the best in the cache.

    Returns:
        All trials, the best first.

    Raises:
        SphereEditError: see `check_tunable`.
    """
    method = check_tunable(given)
    known = complete_answers(loaded, list(facts or read_facts("demo").facts))
    bench = _Bench(loaded, given, known, reporter)
    depth = len(loaded.architecture.decoder_layers(loaded.model))
    default = bench.layers({})
    spans = dict.fromkeys([default, *(layers_from(share, count, depth) for share, count in _SPANS)])
    if loaded.architecture.post_norm:
        spans = dict.fromkeys(span[-1:] for span in spans)
    else:
        bench.prepare(sorted({layer for span in spans for layer in span}))
    trials = [bench.trial({"layers": list(span)}) for span in spans]
    rate = bench.editor({}).settings.targets.lr or 1.0
    weight = method.model_dump()["second_moment_weight"]
    for name, values in (
        ("options", [{"second_moment_weight": weight * factor} for factor in _WEIGHTS]),
        ("targets", [{"lr": rate * factor} for factor in _STEPS]),
    ):
        best = max(trials, key=lambda trial: trial.score)
        trials += [bench.trial({**best.settings, name: value}) for value in values]
    trials.sort(key=lambda trial: -trial.score)
    write_json(tuned_file(loaded.fingerprint, given.method), {"settings": trials[0].settings})
    return trials


def calibrate(editor: Editor) -> None:
    """Find settings for an editor's model, which later runs take too, and let it go by them."""
    editor.reporter.say(
        "No settings are known for this model: calibrating first (`sphere-edit tune`; --layers skips it)", "bold"
    )
    best = tune(editor.loaded, editor.given, editor.reporter)[0]
    editor.reporter.say(f"Best of the trials, and kept for later runs: {best}", "bold")
    editor.adopt_tuned()


class _SharedTargets(OptimisedTargets):
    """Targets hang on the last layer and the step alone, so trials that share these share them."""

    def __init__(self, found: dict[tuple[int, float | None], Targets], *args: Any):
        super().__init__(*args)
        self.found = found

    def find(self, advance: Advance) -> None:
        """Take the targets of an earlier trial, or leave them to later ones."""
        key = self.layers[-1], self.settings.lr
        if key not in self.found:
            super().find(advance)
            self.found[key] = self.targets
        self.targets = self.found[key]


class _Bench:
    """The model, its calibration facts and text, and what trials share: statistics, and targets of equal place and step."""

    def __init__(self, loaded: LoadedModel, given: Settings, facts: Sequence[Fact], reporter: Reporter):
        self.loaded, self.given, self.facts, self.reporter = loaded, given, facts, reporter
        self.templates = sample_context_templates(loaded, given.seed, given.templates)
        self.corpus = load_corpus(loaded, given.moments, given.seed, reporter)
        self.heldout = self.corpus.heldout[:_HELDOUT]
        self.unedited = self._read(None)
        self._targets: dict[tuple[int, float | None], Targets] = {}

    def editor(self, differs: Mapping[str, Any]) -> Editor:
        """An editor with some settings of its own; it writes nothing to disk."""
        settings = make_settings(self.given.model_dump(exclude_unset=True), dict(differs))
        return Editor(self.loaded, settings, None, Path("tune"), self.reporter)

    def layers(self, differs: Mapping[str, Any]) -> tuple[int, ...]:
        """The layers that these settings edit."""
        return tuple(self.editor(differs).layers)

    def prepare(self, layers: Sequence[int]) -> None:
        """Measure the second moments of all layers that any trial may ask for, in one pass over the text."""
        with tempfile.TemporaryDirectory() as folder:
            self.editor({"layers": list(layers)}).measure_statistics(self.corpus, Path(folder))

    def trial(self, differs: dict[str, Any]) -> Trial:
        """Edit all facts in one batch, look, and take it back."""
        editor = self.editor(differs)
        with self._edited(editor):
            found = summarise(score_facts(self.loaded, self.facts, editor.settings.tokens_per_batch, Quiet()))
            divergence = self._read(self.unedited).divergence
        damage = math.inf if divergence is None else max(divergence, 0.0)
        strict, general, specific = (
            found[name] or 0.0 for name in ("efficacy_strict", "generalization_strict", "specificity")
        )
        left = math.exp(-damage * STREAM / len(self.facts))
        score = harmonic_mean([strict / 100, general / 100, specific / 100, left])
        trial = Trial(differs, strict, general, specific, damage, score)
        self.reporter.say(str(trial))
        return trial

    @contextmanager
    def _edited(self, editor: Editor) -> Iterator[None]:
        """Inside, the model has all facts in it."""
        with tempfile.TemporaryDirectory() as folder:
            editor.measure_statistics(self.corpus, Path(folder))
            statistics = load_statistics(Path(folder), editor.weights.names, self.loaded.device)
        source = editor.make_source(self.templates, editor.settings.targets, partial(_SharedTargets, self._targets))
        solver = editor.make_solver(source, statistics)
        try:
            solver.write(self.facts, {name: {} for name in editor.weights.names}, Clock())
            solver.deploy()
            yield
        finally:
            editor.weights.reset()
            editor.close()

    def _read(self, unedited: HeldoutScores | None) -> HeldoutScores:
        hidden = None if unedited is None else unedited.hidden
        return score_heldout(self.loaded, self.heldout, self.given.tokens_per_batch, Quiet(), unedited=hidden)
