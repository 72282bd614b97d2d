"""What a run has to show, as plain data. Tables, the page, and whatever else draws runs take it from here.

A view holds numbers and names, neither rounded nor worded: no markup, and nothing of the library that draws it. Views of one run are
read from its folder or its ``metrics.json``; views of several runs side by side are made of `Series`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphere_edit.counting import counted
from sphere_edit.editing.guard import stopped
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.ability import AbilityScore
from sphere_edit.evaluation.catalogue import LIKELIHOOD, STRICT, Metric, Protocol
from sphere_edit.evaluation.scores import FactScores
from sphere_edit.reporting.neighbors import ChangedNeighbors
from sphere_edit.reporting.series import Series
from sphere_edit.reporting.stories import Removed
from sphere_edit.runs.folder import METRICS, RunFolder
from sphere_edit.runs.records import Batch, Evaluation, FinalRecheck

# --- what a run is and did ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a run is, and where it stands."""

    folder: str
    model: str
    method: str
    sphere: Mapping[str, Any] | None
    started: str
    layers: list[int]
    statistics: str
    batches: int
    edited: int
    superseded: int
    removed: int
    withdrawn: int
    state: str

    @classmethod
    def of(cls, run: RunFolder) -> Header:
        """From a run's folder."""
        config, history = run.config, run.history
        ended = "finished" if history.guard is None else stopped(history.guard)
        state = (
            ended if history.finished else f"interrupted, {counted(len(history.pending), 'fact')} waiting (--resume)"
        )
        return cls(
            str(run.path),
            config.model.source,
            config.method,
            None if config.sphere is None else config.sphere.model_dump(),
            config.created,
            config.layers,
            config.corpus.origin,
            history.head,
            len(history.edited),
            len(history.superseded),
            len(history.removed),
            len(history.withdrawn),
            state,
        )


@dataclass(frozen=True)
class BatchRow:
    """What the journal says of one batch.

    Attributes:
        kind: of batch, as the journal has it.
        stands: whether its work does, or a removal has gone back to before it.
        facts: new ones.
        again: earlier facts, written again.
        loss_before, loss_after, probability: of the targets, means; None where the method has none.
        norms: ‖ΔW‖/‖W‖ of each matrix.
        principal: ‖ΔW U‖/‖ΔW‖ of each matrix that was changed.
    """

    number: int
    kind: str
    facts: int
    superseded: int
    again: int
    loss_before: float | None
    loss_after: float | None
    probability: float | None
    norms: tuple[float, ...]
    principal: tuple[float, ...]
    seconds: float
    stands: bool = True

    @classmethod
    def of(cls, batch: Batch, stands: bool = True) -> BatchRow:
        """From its record."""
        matrices, targets = batch.matrices.values(), batch.targets
        return cls(
            batch.number,
            batch.kind,
            len(batch.facts),
            len(batch.superseded),
            len(batch.rewritten),
            targets["loss_before"],
            targets["loss_after"],
            targets["probability_after"],
            tuple(matrix["relative_norm"] for matrix in matrices),
            tuple(m["principal_norm"] / m["update_norm"] for m in matrices if m["update_norm"]),
            sum(batch.seconds.values()),
            stands,
        )


@dataclass(frozen=True)
class Batches:
    """The batches of a run."""

    rows: tuple[BatchRow, ...]

    @classmethod
    def of(cls, batches: Iterable[Batch], standing: Container[int] | None = None) -> Batches:
        """From a journal's records, and the numbers of those that stand; None for all."""
        return cls(tuple(BatchRow.of(batch, standing is None or batch.number in standing) for batch in batches))


@dataclass(frozen=True)
class Timings:
    """Seconds by stage, and the most memory that a batch took, in bytes (0 where that was not measured)."""

    seconds: Mapping[str, float]
    peak_memory: float

    @classmethod
    def of(cls, batches: Sequence[Batch], final_rechecks: Sequence[FinalRecheck]) -> Timings:
        """Over all of these records of a journal."""
        total: dict[str, float] = {}
        records: list[Batch | FinalRecheck] = [*batches, *final_rechecks]
        for record in records:
            for stage, seconds in record.seconds.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return cls(total, max((batch.peak_memory or 0 for batch in batches), default=0))


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation: after which batch, how many facts were asked, and every metric by name."""

    after: int
    facts: int
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class Evaluations:
    """The evaluations that stand."""

    rows: tuple[EvaluationRow, ...]

    @classmethod
    def of(cls, evaluations: Iterable[Evaluation]) -> Evaluations:
        """From a journal's records."""
        rows = []
        for found in evaluations:
            whole = {metric.name: getattr(found, metric.name, None) for metric in catalogue.HELDOUT}
            rows.append(EvaluationRow(found.after, found.facts, {**found.summary, **whole}))
        return cls(tuple(rows))


# --- what was measured --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetricRow:
    """A metric of the unedited and of the edited model.

    Attributes:
        of_what: the protocol, or the text that it was measured on.
        before, after: None where there was nothing to measure, or it is not finite (`Metric.said`).
        span: 95 % interval of ``after``; None where there is none.
    """

    metric: Metric
    of_what: str
    before: float | None
    after: float | None
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class EnergyRow:
    """A matrix's hyperspherical energy, a pair of neurons."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Metrics:
    """Everything that was measured of an edited model beside the unedited one, or of one model alone (``alone``)."""

    title: str
    rows: tuple[MetricRow, ...]
    energies: tuple[EnergyRow, ...]
    alone: bool

    @classmethod
    def of(cls, content: Mapping[str, Any], title: str) -> Metrics:
        """From the content of ``metrics.json``, or as much of it as there is; without ``unedited``, of one model alone."""
        alone = "unedited" not in content
        before, after = content.get("unedited", {}), content["edited"]
        spans = content.get("intervals", {}).get("edited", {})
        rows = [
            MetricRow(metric, metric.of_what, before.get(metric.name), value, spans.get(metric.name))
            for metric in catalogue.of_prompts()
            if (value := after.get(metric.name)) is not None
        ]
        rows += [
            MetricRow(metric, metric.of_what, before.get(metric.name), after[metric.name])
            for metric in catalogue.HELDOUT
            if metric.name in after
        ]
        texts = after.get("texts", {})
        rows += [
            MetricRow(metric, counted(texts["facts"], "fact"), before.get("texts", {}).get(metric.name), value)
            for metric in catalogue.TEXTS
            if (value := texts.get(metric.name)) is not None
        ]
        routed = {"text": "held-out text", "facts": "prompts"}
        rows += [MetricRow(catalogue.ROUTES, routed[of], None, value) for of, value in after.get("routes", {}).items()]
        energies = [
            EnergyRow(name, energy["per_pair"], after["energy"][name]["per_pair"])
            for name, energy in before.get("energy", {}).items()
            if name in after.get("energy", {})
        ]
        return cls(title, tuple(rows), tuple(energies), alone)


@dataclass(frozen=True)
class AbilityRow:
    """A task of general ability: the unedited model's score, the last score of the edited one, and after how many edits that was."""

    task: str
    before: AbilityScore
    after: AbilityScore | None
    edits: int | None = None
    run: str = ""


@dataclass(frozen=True)
class Abilities:
    """General ability by task; ``edited`` says whether there is an edited model."""

    title: str
    rows: tuple[AbilityRow, ...]
    edited: bool

    @classmethod
    def of(cls, scores: Mapping[str, Mapping[str, Any]], title: str) -> Abilities:
        """From what was scored by task, for ``unedited`` and perhaps ``edited``."""
        after = {task: AbilityScore.from_dict(score) for task, score in scores.get("edited", {}).items()}
        rows = [
            AbilityRow(task, AbilityScore.from_dict(score), after.get(task))
            for task, score in scores["unedited"].items()
        ]
        return cls(title, tuple(rows), "edited" in scores)


@dataclass(frozen=True)
class FactRow:
    """A fact that a run should know now.

    Attributes:
        index: its number in the run, from 0.
        prompt: with the subject in place.
        written: the batches that wrote it, first and again; the first alone where the journal is not at hand.
        before, after: what its prompts scored.
    """

    index: int
    prompt: str
    answer: str
    written: tuple[int, ...]
    before: FactScores
    after: FactScores
    run: str = ""

    def holds(self, protocol: Protocol) -> bool:
        """The edited model's verdict on the fact's own prompt."""
        return protocol.verdict(self.after.rewrite) == 1


@dataclass(frozen=True)
class Facts:
    """Some of a run's facts, those that did not take first, then those not held strictly, then the oldest."""

    rows: tuple[FactRow, ...]
    total: int

    @classmethod
    def of(
        cls,
        per_fact: Sequence[Mapping[str, Any]],
        batches: Iterable[Batch] = (),
        run: str = "",
        count: int | None = None,
    ) -> Facts:
        """From the facts of ``metrics.json``, and the batches of the run's journal; ``count`` of them, or all."""
        written = _written(batches)
        rows = [
            FactRow(
                fact["index"],
                fact["prompt"].replace("{}", fact["subject"]),
                fact["target_new"].strip(),
                written.get(fact["index"], (fact["batch"],)),
                FactScores.from_dict(fact["unedited"]),
                FactScores.from_dict(fact["edited"]),
                run,
            )
            for fact in per_fact
        ]
        rows.sort(key=lambda row: (row.holds(LIKELIHOOD), row.holds(STRICT), row.index))
        return cls(tuple(rows[:count]), len(rows))


def _written(batches: Iterable[Batch]) -> dict[int, tuple[int, ...]]:
    """The batches that wrote each fact."""
    found: dict[int, tuple[int, ...]] = {}
    for batch in batches:
        for index in batch.members:
            found[index] = (*found.get(index, ()), batch.number)
    return found


# --- all of one run, and several runs side by side ----------------------------------------------------------------

View = Header | Batches | Timings | Evaluations | Metrics | Abilities | ChangedNeighbors | Facts | Removed


def of_run(folder: str | Path, facts: int) -> Iterator[View]:
    """All that there is to show of one run, with so many facts.

    Raises:
        SphereEditError: no run there, or one of its files cannot be read.
    """
    run = RunFolder.open(folder)
    history = run.history
    yield Header.of(run)
    if history.batches:
        yield Batches.of(history.batches, history.lineage(history.head))
        yield Timings.of(history.batches, history.final_rechecks)
    if history.evaluations:
        yield Evaluations.of(history.evaluations)
    if history.removed:
        yield Removed.of(history, run.facts())
    if not (run.path / METRICS).is_file():
        return
    content = run.metrics()
    title = f"After batch {content['after']}"
    yield Metrics.of(content, title)
    if "ability" in content["edited"]:
        scores = {when: content[when].get("ability", {}) for when in ("unedited", "edited")}
        yield Abilities.of(scores, f"after batch {content['after']}")
    if facts:
        changed = ChangedNeighbors.of(content["per_fact"], run.facts())
        if changed.rows:
            yield changed
        yield Facts.of(content["per_fact"], history.standing, count=facts)


@dataclass(frozen=True)
class State:
    """A model, unedited or edited, and what `catalogue.on_page` lists of it by name; nothing where it was not evaluated."""

    label: str
    values: Mapping[str, float | None]


def states(runs: Sequence[Series]) -> list[State]:
    """Each run's unedited model and its edited one as last evaluated."""
    found = []
    for run in runs:
        for index in (0, -1):
            values = {metric.name: run.metrics[metric.name][index] for metric in catalogue.on_page()}
            label = f"{run.label}, unedited"
            if index == -1:
                label = f"{run.label}, edited" + ("" if run.current else f" ({run.evaluated or 'not evaluated'})")
                values = values if run.current or run.evaluated else {}
            found.append(State(label, values))
    return found


@dataclass(frozen=True)
class MatrixRow:
    """An edited matrix: its energy before the first edit and after the last batch, and what the last batch did to it."""

    run: str
    name: str
    before: float
    after: float
    drift: float
    collateral: float | None
    first_order: float
    last_change: float


def matrices(runs: Sequence[Series]) -> list[MatrixRow]:
    """Every edited matrix of some runs."""
    return [
        MatrixRow(
            run.label,
            name,
            run.energies[name],
            report["energy"],
            report["relative_drift"],
            report["collateral_ratio"],
            report["first_order"],
            report["energy_change"],
        )
        for run in runs
        for name, report in (run.batches[-1].matrices.items() if run.batches else ())
    ]


def abilities(runs: Sequence[Series]) -> list[AbilityRow]:
    """General ability of some runs, first and last."""
    return [
        AbilityRow(
            task, AbilityScore.from_dict(points[0][1]), AbilityScore.from_dict(points[-1][1]), points[-1][0], run.label
        )
        for run in runs
        for task, points in run.abilities.items()
    ]
