"""Settings for a model that nobody has tuned for, found by a short calibration on facts that ship with the package."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from sphere_edit.editing.batch import Clock
from sphere_edit.editing.ingredients import SecondMoment, Shape
from sphere_edit.editing.methods.base import Method
from sphere_edit.editing.moments import load_corpus
from sphere_edit.editing.presets import tuned_file
from sphere_edit.editing.settings import Settings, make_settings
from sphere_edit.editing.sources import OptimisedTargets
from sphere_edit.editing.statistics import load_statistics
from sphere_edit.editing.targets import Targets
from sphere_edit.editor import Editor
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.catalogue import DIVERGENCE, EFFICACY, GENERALIZATION, SPECIFICITY, STRICT, of_part
from sphere_edit.evaluation.heldout import HeldoutScores, score_heldout
from sphere_edit.evaluation.intervals import resampled, summarise, weighted_means
from sphere_edit.evaluation.scores import FactScores, complete_answers, score_facts
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import sample_context_templates
from sphere_edit.facts.readers import FactSet, facts_from, read_facts
from sphere_edit.files import plain_errors, write_json
from sphere_edit.models.architecture import WRITERS
from sphere_edit.models.loading import LoadedModel
from sphere_edit.progress import Advance, Quiet, Reporter
from sphere_edit.runs.measuring import Evaluator
from sphere_edit.runs.preparing import measure_ingredients
from sphere_edit.runs.selection import admit, plan_batches, readable
from sphere_edit.runs.session import Session

STREAM = 1000  # facts of the stream that a trial's damage is carried on to
_ENDS = (0.1, 0.17, 0.27, 0.34, 0.44)  # shares of the depth at which editing may end
_LAYERS = 5  # edited below each of them, that included, and fewer where there are none
_STEPS = (0.5, 2.0)  # times the default step
_WEIGHTS = (0.25, 4.0)  # times the default weight of ordinary keys
_SUMS_BYTES = 8e9  # of second moments under way at one time, if more layers than one trial's are to be measured
HELDOUT = 30  # passages
TRIALS = 2 + len(_ENDS) + len(_WEIGHTS) + len(_STEPS)  # at most
_JUDGED = (of_part(EFFICACY, STRICT), of_part(GENERALIZATION, STRICT), of_part(SPECIFICITY))


@dataclass(frozen=True, eq=False)
class Trial:
    """One setting, all calibration facts edited with it in one batch, and what came of it.

    Attributes:
        settings: what differs from the defaults, as a settings file says it.
        divergence: KL from the unedited model on held-out text, nats; infinite where it is not finite.
        parts: each fact's strict efficacy, strict generalization and specificity by likelihood, as shares ``[facts, 3]``, float64;
            NaN where it has no such prompts.
    """

    settings: dict[str, Any]
    divergence: float
    parts: Tensor

    @classmethod
    def of(cls, settings: dict[str, Any], scores: Sequence[FactScores], divergence: float | None) -> Trial:
        """From what was measured."""
        each = [summarise([score]) for score in scores]
        parts = [
            [nan if (value := found[metric.name]) is None else value / 100 for metric in _JUDGED] for found in each
        ]
        damage = inf if divergence is None else max(divergence, 0.0)
        return cls(settings, damage, torch.tensor(parts, dtype=torch.float64))

    @property
    def summary(self) -> dict[str, Any]:
        """The settings, the means of the three parts in percent, the KL divergence and the score, by name."""
        means = [None if isnan(value) else 100 * value for value in self.parts.nanmean(0).tolist()]
        named = {metric.name: mean for metric, mean in zip(_JUDGED, means, strict=True)}
        return {"settings": self.settings, **named, DIVERGENCE.name: self.divergence, "score": self.score}

    @property
    def score(self) -> float:
        """Harmonic mean of the parts' means and of ``exp(−KL · STREAM / facts)``.

        The last is what such damage leaves of the model if a stream of 1,000 facts does as much for each.
        """
        return float(self._scores(torch.ones(1, len(self.parts), dtype=torch.float64)))

    def beats(self, other: Trial) -> bool:
        """Whether it scores higher beyond noise: in 97.5 % of 1,000 resamplings of the facts, the same for both."""
        weights = resampled(range(len(self.parts)), seed=0)
        return float((self._scores(weights) > other._scores(weights)).double().mean()) >= 0.975

    def _scores(self, weights: Tensor) -> Tensor:
        """The score of each draw, given how often each fact is in it ``[draws, facts]``."""
        means = weighted_means(self.parts, weights)
        left = torch.tensor(-self.divergence * STREAM / len(self.parts), dtype=torch.float64).exp()
        shares = torch.cat([means, left.expand(len(means), 1)], dim=1)
        return 1 / (1 / shares).nanmean(1)

    def __str__(self) -> str:
        said = "; ".join(f"{name} {value}" for name, value in self.settings.items())
        found = self.summary
        parts = ", ".join(f"{metric.words} {metric.said(found[metric.name])}" for metric in _JUDGED)
        return f"{said}: {parts}, {DIVERGENCE.label} {self.divergence:.4f}, score {self.score:.3f}"


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

    Nothing is kept if nothing worked at all. The defaults give way only to what `beats` them, since they come from streams that the calibration is too short to see.

    Args:
        facts: to calibrate on; by default those that ship with the package.

    Returns:
        All trials, the chosen one first, then by score.

    Raises:
        SphereEditError: see `check_tunable`; or a fact that this model cannot read.
    """
    method = check_tunable(given)
    bench = _Bench(loaded, given, facts or read_facts("demo").facts, reporter)
    spans = bench.spans()
    bench.prepare(sorted({layer for span in spans for layer in span}))
    chosen = bench.trial({"layers": list(spans[0])})
    targets = bench.session({}).settings.targets
    rate = targets.lr or 1.0
    weight = method.model_dump()["second_moment_weight"]
    trials = [chosen]
    for values in (
        [{"layers": list(span)} for span in spans[1:]],
        bench.other_matrices(),
        [{"options": {"second_moment_weight": weight * factor}} for factor in _WEIGHTS],
        [{"targets": {"rule": targets.rule, "lr": rate * factor}} for factor in _STEPS],
    ):
        found = [bench.trial({**chosen.settings, **value}) for value in values]
        trials += found
        best = max(found, key=lambda trial: trial.score, default=chosen)
        chosen = best if best.beats(chosen) else chosen
    trials.sort(key=lambda trial: (trial is not chosen, -trial.score))
    if chosen.score == 0:
        reporter.say(
            f"None of these settings got the {len(bench.facts)} facts into the model with paraphrases and neighbours as they should be, "
            "so nothing speaks for any of them; calibrate on facts that this model can learn (tune --facts)",
            "bold red",
        )
    else:
        write_json(tuned_file(loaded.fingerprint, given.method), {"settings": chosen.settings})
    return trials


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
    with plain_errors(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{kept}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            editor.session.reporter.say("Another process is calibrating this model: waiting for what it finds", "bold")
            held = lock.acquire()
    with held:
        editor.adopt_tuned()
        if editor.session.would_calibrate:
            editor.session.reporter.say(
                "No settings are known for this model: calibrating once, on the demo facts (`sphere-edit tune`; layers, options or targets "
                "of your own skip it)",
                "bold",
            )
            chosen = tune(editor.loaded, editor.session.given, editor.session.reporter)[0]
            if chosen.score == 0:  # a second calibration would find no more
                write_json(kept, {"settings": chosen.settings})
            editor.session.reporter.say(f"Chosen, and kept for later runs: {chosen}", "bold")
            editor.adopt_tuned()


class _SharedTargets(OptimisedTargets):
    """Targets hang on the last layer and the step alone, so trials that share these share them."""

    def __init__(self, found: dict[tuple[str, float | None], Targets], *args: Any):
        super().__init__(*args)
        self.found = found

    def find(self, advance: Advance) -> None:
        """Take the targets of an earlier trial, or leave them to later ones."""
        key = self.weights.names[-1], self.settings.lr
        if key in self.found:
            advance(len(self._facts))
        else:
            super().find(advance)
            self.found[key] = self.targets
        self.targets = self.found[key]


class _Bench:
    """The model, its calibration facts and text, and what trials share: statistics, and targets of equal place and step."""

    def __init__(self, loaded: LoadedModel, given: Settings, facts: Sequence[Fact], reporter: Reporter):
        self.loaded, self.given, self.reporter = loaded, given, reporter
        session = self.session({})
        evaluator = Evaluator(loaded, session.weights, session.settings, reporter)
        checked, _ = admit(session, evaluator, facts_from(facts), skip_bad=False)
        self.facts = complete_answers(loaded, checked)
        self.templates = sample_context_templates(loaded, given.seed, given.templates)
        self.corpus = load_corpus(loaded, given.moments, given.seed, reporter)
        self.heldout = self.corpus.heldout[:HELDOUT]
        self.unedited = self._read(None)
        self._targets: dict[tuple[str, float | None], Targets] = {}

    def session(self, differs: Mapping[str, Any]) -> Session:
        """The model edited with some settings of its own; nothing is written to disk."""
        settings = make_settings(self.given.model_dump(exclude_unset=True), dict(differs))
        return Session(self.loaded, settings, None, self.reporter)

    def spans(self) -> list[tuple[int, ...]]:
        """Layers to try, the default ones first: where a model keeps its facts, and how far up it still reads them, differs."""
        default = self.session({})
        architecture = self.loaded.architecture
        having = architecture.having(self.writer)
        ends = dict.fromkeys(round(share * (len(having) - 1)) for share in _ENDS)
        spans = [tuple(default.layers), *(tuple(having[max(0, end - _LAYERS + 1) : end + 1]) for end in ends)]
        if self.one_layer:
            spans = [span[-1:] for span in spans]
        return list(dict.fromkeys(spans))

    @property
    def writer(self) -> str:
        """The role of the matrices that are edited where no trial says otherwise."""
        return self.given.matrices or self.loaded.architecture.writer

    @property
    def one_layer(self) -> bool:
        """Whether targets of these matrices can be met in one layer only."""
        architecture = self.loaded.architecture
        return any(architecture.inside(layer, self.writer) for layer in architecture.having(self.writer))

    def other_matrices(self) -> list[dict[str, Any]]:
        """Of a mixture of experts that has both, the routed experts where shared ones are the default, or the other way about."""
        architecture = self.loaded.architecture
        other = next((role for role in WRITERS if role != self.writer and role in architecture.roles), None)
        if self.given.matrices or other is None or not self.given.make_method().by_experts:
            return []
        layers = self.session({"matrices": other}).layers
        return [{"matrices": other, "layers": list(layers)}]

    def prepare(self, layers: Sequence[int]) -> None:
        """Measure the second moments of all layers that any trial may ask for, in one pass over the text, or as few as memory allows."""
        if self.one_layer:  # one layer can be edited at a time, and is measured with its trial
            return
        widest = max(Shape.of(weight).square for weight in self.session({}).weights.working.values())
        together = max(_LAYERS, int(_SUMS_BYTES / (16 * widest)))
        for first in range(0, len(layers), together):
            with tempfile.TemporaryDirectory() as folder:
                some = list(layers[first : first + together])
                session = self.session({"layers": some})
                measure_ingredients(session, [SecondMoment()], self.corpus, self.templates, Path(folder))

    def trial(self, differs: dict[str, Any]) -> Trial:
        """Edit all facts in one batch, look, and take it back."""
        session = self.session(differs)
        with self._edited(session):
            scores = score_facts(self.loaded, self.facts, session.settings.tokens_per_batch, Quiet())
            trial = Trial.of(differs, scores, self._read(self.unedited).divergence)
        self.reporter.say(str(trial))
        return trial

    @contextmanager
    def _edited(self, session: Session) -> Iterator[None]:
        """Inside, the model has all facts in it."""
        with tempfile.TemporaryDirectory() as folder:
            measure_ingredients(session, session.ingredients, self.corpus, self.templates, Path(folder))
            statistics = load_statistics(Path(folder), session.weights.names, self.loaded.device)
        shared = partial(_SharedTargets, self._targets)
        source = session.make_source(self.templates, session.settings.targets, statistics, shared)
        solver = session.make_solver(source, statistics)
        try:
            solver.write(self.facts, {name: {} for name in session.weights.names}, Clock())
            solver.deploy()
            yield
        finally:
            session.weights.reset()

    def _read(self, unedited: HeldoutScores | None) -> HeldoutScores:
        hidden = None if unedited is None else unedited.hidden
        return score_heldout(self.loaded, self.heldout, self.given.tokens_per_batch, Quiet(), unedited=hidden)
