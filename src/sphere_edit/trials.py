"""One setting tried: calibration facts edited in one batch, looked at, and taken back; and what trials share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf, isnan, nan
from typing import Any

import torch
from torch import Tensor

from sphere_edit.counting import counted
from sphere_edit.editing.batch import Clock
from sphere_edit.editing.ingredients import SecondMoment, Shape
from sphere_edit.editing.moments import load_corpus
from sphere_edit.editing.problem import Statistics
from sphere_edit.editing.settings import Settings, make_settings
from sphere_edit.editing.sources import OptimisedTargets
from sphere_edit.editing.targets import Targets
from sphere_edit.evaluation.catalogue import DIVERGENCE, EFFICACY, GENERALIZATION, SPECIFICITY, STRICT, of_part
from sphere_edit.evaluation.heldout import HeldoutScores, score_heldout
from sphere_edit.evaluation.intervals import resampled, summarise, weighted_means
from sphere_edit.evaluation.scores import FactScores, complete_answers, score_facts
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import context_templates
from sphere_edit.facts.readers import facts_from
from sphere_edit.files import temporary_folder
from sphere_edit.models.architecture import WRITERS
from sphere_edit.models.loading import LoadedModel
from sphere_edit.progress import Advance, Quiet, Reporter
from sphere_edit.runs.measuring import Evaluator
from sphere_edit.runs.preparing import measure_ingredients
from sphere_edit.runs.selection import admit
from sphere_edit.runs.session import Session

STREAM = 1000  # facts of the stream that a trial's damage is carried on to
HELDOUT = 30  # passages
_POSITIONS = (
    1024  # in them, spread evenly, whose distributions are compared: the head of a large vocabulary is most of a model
)
_LAYERS = 5  # edited below each end of a span, that included, and fewer where there are none
_ENDS = (0.1, 0.17, 0.27, 0.34, 0.44)  # shares of the depth at which editing may end
_SUMS_BYTES = 8e9  # of second moments under way at one time, if more layers than one trial's are to be measured
_SCREENED = 15  # facts, about, of a first look at each span; with fewer than twice as many, it is of all
_REACHES = 0.5  # times the best probability that targets get: a span of less is not edited
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
        return float(self._scores(self._once))

    @property
    def kept(self) -> float:
        """Harmonic mean of specificity and of what damage leaves of the model."""
        return float(self._scores(self._once, [2, 3]))

    @property
    def written(self) -> float:
        """Harmonic mean of strict efficacy and strict generalization."""
        return float(self._scores(self._once, [0, 1]))

    @property
    def _once(self) -> Tensor:
        """One draw, in which each fact is once."""
        return torch.ones(1, len(self.parts), dtype=torch.float64)

    def beats(self, other: Trial, sure: float = 0.975) -> bool:
        """Whether it scores higher beyond noise: in so many of 1,000 resamplings of the facts, the same for both."""
        weights = resampled(range(len(self.parts)), seed=0)
        return float((self._scores(weights) > other._scores(weights)).double().mean()) >= sure

    def _scores(self, weights: Tensor, shares: Sequence[int] = (0, 1, 2, 3)) -> Tensor:
        """The score of each draw, given how often each fact is in it ``[draws, facts]``; or the harmonic mean of some of its shares."""
        return 1 / (1 / self._shares(weights)[:, list(shares)]).nanmean(1)

    def _shares(self, weights: Tensor) -> Tensor:
        """The three parts and what damage leaves, ``[draws, 4]``."""
        means = weighted_means(self.parts, weights)
        left = torch.tensor(-self.divergence * STREAM / len(self.parts), dtype=torch.float64).exp()
        return torch.cat([means, left.expand(len(means), 1)], dim=1)

    def __str__(self) -> str:
        said = "; ".join(f"{name} {value}" for name, value in self.settings.items())
        found = self.summary
        parts = ", ".join(f"{metric.words} {metric.said(found[metric.name])}" for metric in _JUDGED)
        return f"{said}: {parts}, {DIVERGENCE.label} {self.divergence:.4f}, score {self.score:.3f}"


@dataclass(frozen=True)
class _Target:
    """Of one fact, a column of each of `Targets`."""

    value: Tensor
    delta: Tensor
    losses: list[float]
    probabilities: list[float]


class _SharedTargets(OptimisedTargets):
    """A fact's target hangs on the place of δ and the step alone, so trials that share these share it."""

    def __init__(self, found: dict[tuple[Any, ...], _Target], *args: Any):
        super().__init__(*args)
        self.found = found

    def find(self, advance: Advance) -> None:
        """Take the targets of earlier trials, and leave to later ones what is found now."""
        if self._back is not None:  # targets of another kind
            super().find(advance)
            return
        forms, place = self._forms, (self.weights.names[-1], self._target_layer, self._inside, self.settings.lr)
        missing = [form for form in dict.fromkeys(forms) if (place, form) not in self.found]
        if missing:
            self._forms = missing
            super().find(advance)
            self._forms, self._reader = forms, None
            new = self.targets
            columns = zip(new.values.T, new.deltas.T, new.losses, new.probabilities, strict=True)
            for form, column in zip(missing, columns, strict=True):
                self.found[(place, form)] = _Target(*column)
        advance(len(forms) - len(missing))
        known = [self.found[(place, form)] for form in forms]
        self.targets = Targets(
            torch.stack([target.value for target in known], 1),
            torch.stack([target.delta for target in known], 1),
            [target.losses for target in known],
            [target.probabilities for target in known],
        )


@dataclass(frozen=True)
class _Sample:
    """Facts and held-out text that trials are judged by, and what the unedited model makes of the text."""

    facts: list[Fact]
    heldout: list[list[int]]
    unedited: HeldoutScores


class Bench:
    """The model, its calibration facts and text, and what trials share: statistics, and targets of equal place and step."""

    def __init__(self, loaded: LoadedModel, given: Settings, facts: Sequence[Fact], reporter: Reporter):
        self.loaded, self.given, self.reporter = loaded, given, reporter
        session = self.session({})
        evaluator = Evaluator(loaded, session.weights, session.settings, reporter)
        checked, _ = admit(session, evaluator, facts_from(facts), skip_bad=False)
        self.templates = context_templates(loaded, given.seed, given.templates)
        self.corpus = load_corpus(loaded, given.moments, given.seed, reporter)
        self.whole = self._sample(complete_answers(loaded, checked), self.corpus.heldout[:HELDOUT])
        every = len(checked) // _SCREENED
        self.part = self.whole
        if every > 1:
            self.part = self._sample(self.whole.facts[::every], self.whole.heldout[::every])
        self._targets: dict[tuple[Any, ...], _Target] = {}
        self._tried: dict[tuple[str, int], Trial] = {}
        having = loaded.architecture.having(self.writer)
        alone = any(loaded.architecture.alone(layer, self.writer) for layer in having)
        self._lone = session.method.needs.feed.one_layer(alone)

    def _sample(self, facts: list[Fact], heldout: list[list[int]]) -> _Sample:
        return _Sample(facts, heldout, self._read(heldout))

    def _read(self, heldout: list[list[int]], unedited: HeldoutScores | None = None) -> HeldoutScores:
        """Held-out text on the model as it stands, compared with the unedited one."""
        before = None if unedited is None else unedited.hidden
        return score_heldout(
            self.loaded, heldout, self.given.tokens_per_batch, Quiet(), unedited=before, positions=_POSITIONS
        )

    def session(self, differs: Mapping[str, Any]) -> Session:
        """The model edited with some settings of its own; nothing is written to disk."""
        settings = make_settings(self.given.model_dump(exclude_unset=True), dict(differs))
        return Session(self.loaded, settings, None, self.reporter)

    @cached_property
    def ceiling(self) -> float:
        """The best score that can be had: every fact written, nothing else changed."""
        scores = score_facts(self.loaded, self.whole.facts, self.given.tokens_per_batch, Quiet())
        unedited = Trial.of({}, scores, 0.0)
        return replace(unedited, parts=torch.cat([torch.ones(len(scores), 2), unedited.parts[:, 2:]], 1)).score

    def spans(self) -> list[tuple[int, ...]]:
        """Layers to try, the default ones first: where a model keeps its facts, and how far up it still reads them, differs.

        Of a model that one layer is edited in by default, the last of each span alone.
        """
        default = tuple(self.session({}).layers)
        having = self.loaded.architecture.having(self.writer)
        ends = dict.fromkeys(round(share * (len(having) - 1)) for share in _ENDS)
        spans = [tuple(having[max(0, end - _LAYERS + 1) : end + 1]) for end in ends]
        if len(default) == 1:
            spans = [span[-1:] for span in spans]
        return list(dict.fromkeys([default, *spans]))

    @property
    def writer(self) -> str:
        """The role of the matrices that are edited where no trial says otherwise."""
        return self.given.matrices or self.loaded.architecture.writer

    def other_matrices(self) -> list[dict[str, Any]]:
        """Of a mixture of experts that has both, the routed experts where shared ones are the default, or the other way about."""
        architecture = self.loaded.architecture
        other = next((role for role in WRITERS if role != self.writer and role in architecture.roles), None)
        if self.given.matrices or other is None or not self.given.make_method().by_experts:
            return []
        layers = self.session({"matrices": other}).layers
        return [{"matrices": other, "layers": list(layers)}]

    def looks(self) -> list[Trial]:
        """A trial of each span on a part of the facts, the default one first, but for those where no target can be reached.

        Where one layer is the default though several can be edited, spans are looked at too that end at the best one, by score or else by
        reach, and at the next.
        """
        spans = self.spans()
        several = len(spans[0]) == 1 and not self._lone
        asked = {layer for span in spans for layer in (self._below(span[0]) if several else span)}
        self._measure(sorted(asked))
        reached = {span: self.reach({"layers": list(span)}) for span in spans}
        most = max(reached.values())
        spans = [span for span in spans if span == spans[0] or reached[span] >= _REACHES * most]
        for span in reached.keys() - set(spans):
            self.reporter.say(
                f"layers {list(span)}: not edited, for targets there get {reached[span]:.2f} of probability, elsewhere {most:.2f}"
            )
        looks = [self.trial({"layers": list(span)}, self.part) for span in spans]
        if several:
            *_, (end,) = max((look.score, reached[span], span) for look, span in zip(looks, spans, strict=True))
            for last in [end, *sorted(span[0] for span in reached if span[0] > end)[:1]]:
                below = self._below(last)
                if len(below) > 1:
                    looks.append(self.trial({"layers": below}, self.part))
        return looks

    def _below(self, end: int) -> list[int]:
        """The layers of a span that ends there."""
        return [layer for layer in self.loaded.architecture.having(self.writer) if layer <= end][-_LAYERS:]

    def reach(self, differs: dict[str, Any]) -> float:
        """How likely targets at a span's place of δ make the answers of a part of the facts, in the mean."""
        session = self.session(differs)
        source = self._source(session, {})
        with self.reporter.bar(source.stage, len(self.part.facts), "fact") as advance:
            source.begin(self.part.facts, advance)
        found = source.targets.probabilities
        return sum(values[-1] for values in found) / len(found)

    def _measure(self, layers: Sequence[int]) -> None:
        """Measure the second moments of layers that trials may ask for, in one pass over the text, or as few as memory allows."""
        if self._lone:  # one layer can be edited at a time, and is measured with its trial
            return
        widest = max(Shape.of(weight).square for weight in self.session({}).weights.working.values())
        together = max(_LAYERS, int(_SUMS_BYTES / (16 * widest)))
        for first in range(0, len(layers), together):
            with temporary_folder() as folder:
                some = list(layers[first : first + together])
                session = self.session({"layers": some})
                measure_ingredients(session, [SecondMoment()], self.corpus, self.templates, folder)

    @property
    def trials(self) -> list[Trial]:
        """Those on all facts so far."""
        return [trial for (_, facts), trial in self._tried.items() if facts == len(self.whole.facts)]

    def trial(self, differs: dict[str, Any], sample: _Sample | None = None) -> Trial:
        """Edit all facts in one batch, or those of a sample, look, and take it back; the same is not tried twice."""
        sample = sample or self.whole
        known = json.dumps(differs, sort_keys=True), len(sample.facts)
        if known not in self._tried:
            session = self.session(differs)
            with self._edited(session, sample.facts):
                scores = score_facts(self.loaded, sample.facts, session.settings.tokens_per_batch, Quiet())
                read = self._read(sample.heldout, sample.unedited)
            self._tried[known] = Trial.of(differs, scores, read.divergence)
            part = "" if sample is self.whole else f"first look, {counted(len(sample.facts), 'fact')}: "
            self.reporter.say(f"{part}{self._tried[known]}")
        return self._tried[known]

    def _source(self, session: Session, statistics: Mapping[str, Statistics]) -> OptimisedTargets:
        shared = partial(_SharedTargets, self._targets)
        source = session.make_source(self.templates, session.settings.targets, statistics, shared)
        assert isinstance(source, OptimisedTargets)
        return source

    @contextmanager
    def _edited(self, session: Session, facts: Sequence[Fact]) -> Iterator[None]:
        """Inside, the model has some facts in it."""
        with temporary_folder() as folder:
            measure_ingredients(session, session.ingredients, self.corpus, self.templates, folder)
            statistics = session.statistics(folder)
        solver = session.make_solver(self._source(session, statistics), statistics)
        try:
            solver.write(facts, {name: {} for name in session.weights.names}, Clock())
            solver.deploy()
            yield
        finally:
            session.weights.reset()
