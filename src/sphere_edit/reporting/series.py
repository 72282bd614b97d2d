"""A run as series over edits, read from its folder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sphere_edit.counting import counted
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.intervals import summarise
from sphere_edit.reporting.neighbors import ChangedNeighbors
from sphere_edit.reporting.stories import Removed
from sphere_edit.runs.folder import METRICS, RunFolder, read_metrics
from sphere_edit.runs.measuring import read_unedited
from sphere_edit.runs.records import Batch, Evaluation, FactsAccepted, FinalRecheck, GuardStop, RunConfig, Unedited
from sphere_edit.runs.summary import FactEntry, MetricsContent
from sphere_edit.runs.weights import RunWeights


@dataclass(frozen=True)
class Series:
    """One run: its evaluated checkpoints and its batches.

    Attributes:
        label: what it is called beside others.
        edits: facts edited by each checkpoint, the unedited model (0) first.
        metrics: by name, a value a checkpoint; None where nothing was measured.
        energy: energy of all edited matrices together at each checkpoint, relative to the unedited model's, less 1.
        batches: those that stand.
        final_rechecks: the journal's records.
        batch_edits: facts edited by the end of each batch.
    """

    folder: Path
    label: str
    method: str
    sphere: bool
    config: RunConfig
    edits: list[int]
    metrics: dict[str, list[float | None]]
    energy: list[float]
    energies: dict[str, float]  # of each unedited matrix
    batches: list[Batch]
    final_rechecks: list[FinalRecheck]
    batch_edits: list[int]
    abilities: dict[str, list[tuple[int, dict[str, Any]]]]  # by task: facts edited, score
    finished: bool
    guard: GuardStop | None  # where the guard stopped the run
    current: bool  # whether the last evaluation is of where the run stands now, and of all facts
    evaluated: str | None  # which facts that was of, and when
    changed: bool  # whether the work of a batch stands
    kin: int = 0  # how many runs of the same method, with or without SPHERE like this one, stand before it
    protocols: tuple[str, ...] = ()  # how the records of its facts were understood

    @classmethod
    def read(cls, folder: str | Path) -> Series:
        """A run from its folder.

        Raises:
            SphereEditError: no run there, or it has not measured the unedited model yet.
        """
        run = RunFolder.open(folder)
        config, history = run.config, run.history
        unedited = next((record for record in run.records if isinstance(record, Unedited)), None)
        if unedited is None:
            raise SphereEditError(
                f"{folder} has measured nothing yet; finish it first: sphere-edit edit {folder} --resume"
            )
        sphere, method = config.sphere, config.method
        name = method + (" + SPHERE" if sphere else "")
        before = {matrix: energy["total"] for matrix, energy in (unedited.energy or {}).items()}
        whole = sum(before.values())
        batches, done = history.standing, {0: 0}
        for batch in batches:
            done[batch.number] = list(done.values())[-1] + len(batch.facts)
        evaluations = sorted(
            (evaluation for evaluation in history.evaluations if evaluation.after in done),
            key=lambda evaluation: evaluation.after,
        )
        last = evaluations[-1] if evaluations else None
        current = (
            history.head == 0 if last is None else (last.after, last.facts) == (history.head, len(history.retained))
        )
        checkpoints: list[Unedited | Evaluation] = [unedited, *evaluations]
        summaries = [_unedited_summary(run, unedited), *(evaluation.summary for evaluation in evaluations)]
        metrics: dict[str, list[float | None]] = {
            metric.name: [summary.get(metric.name) for summary in summaries]
            if metric.of == "prompts"
            else [getattr(point, metric.name, None) for point in checkpoints]
            for metric in catalogue.over_checkpoints()
        }
        totals = [sum(matrix["total"] for matrix in (point.energy or {}).values()) for point in checkpoints]
        energy = [total / whole - 1 if whole else 0.0 for total in totals]  # a matrix of zeros has none
        return cls(
            run.path,
            name,
            method,
            sphere is not None,
            config,
            [0, *(done[evaluation.after] for evaluation in evaluations)],
            metrics,
            energy,
            before,
            batches,
            history.final_rechecks,
            list(done.values())[1:],
            {
                task: [(done[after], score) for after, score in scores if after in done]
                for task, scores in history.ability_series().items()
            },
            history.finished,
            history.guard,
            current,
            None if last is None else f"{counted(last.facts, 'fact')} asked after batch {last.after} of {history.head}",
            bool(history.written(history.head)),
            protocols=tuple(dict.fromkeys(r.protocol for r in run.records if isinstance(r, FactsAccepted))),
        )

    def moved(self, name: str, energy: float) -> float:
        """By how many percent an energy of a matrix differs from the unedited one's; 0 of a matrix that has none."""
        return 100 * (energy / self.energies[name] - 1) if self.energies[name] else 0.0

    def judged(self, key: str) -> list[float | None]:
        """A metric at each checkpoint as what the edits did: without the unedited model's where that is merely what was not yet edited."""
        values = self.metrics[key]
        learnt = any(metric.learnt for metric in catalogue.over_checkpoints() if metric.name == key)
        return [None, *values[1:]] if learnt else values

    def removed(self) -> Removed:
        """The facts that were taken back."""
        run = RunFolder.open(self.folder)
        return Removed.of(run.history, run.facts()) if run.history.removed else Removed(())

    def changed_neighbors(self) -> ChangedNeighbors:
        """The neighbours of its facts that are not answered as before."""
        return ChangedNeighbors.of(self.facts(), RunFolder.open(self.folder).facts())

    def facts(self) -> list[FactEntry]:
        """Every fact of ``metrics.json``, empty before the first evaluation is finished."""
        found = self._final()
        return [] if found is None else found["per_fact"]

    def retention(self) -> list[dict[str, Any]]:
        """The metrics of ``metrics.json`` by age of the facts, youngest first; empty before the first evaluation is finished."""
        found = self._final()
        return [] if found is None else found["retention"]

    def _final(self) -> MetricsContent | None:
        return read_metrics(self.folder) if (self.folder / METRICS).is_file() else None

    def change(self, name: str) -> tuple[Tensor, Tensor]:
        """What the model ran with before the first edit and what it runs with after the last batch ``[d_out, d_in]``, float32."""
        weights = RunWeights(RunFolder.open(self.folder))
        return weights.original(name), weights.deployed(name)

    def last_update(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Of the last batch: `RunWeights.last_batch`."""
        return RunWeights(RunFolder.open(self.folder)).last_batch(name)


def labelled(folders: Sequence[str | Path], labels: Sequence[str] | None = None) -> list[Series]:
    """Several runs, with labels and, where method and SPHERE are the same, markers that tell them apart."""
    found = [Series.read(folder) for folder in folders]
    own = [series.label for series in found]
    if labels is None:
        labels = [
            label if own.count(label) == 1 else f"{label} ({one.folder.name})"
            for label, one in zip(own, found, strict=True)
        ]
    return [
        replace(series, label=label, kin=own[:index].count(own[index]))
        for index, (series, label) in enumerate(zip(found, labels, strict=True))
    ]


def any_known(runs: Sequence[Series], metric: catalogue.Metric) -> bool:
    """Whether any of the runs measured a metric at any checkpoint."""
    return any(value is not None for run in runs for value in run.metrics[metric.name])


def _unedited_summary(run: RunFolder, unedited: Unedited) -> Mapping[str, float | None]:
    """The unedited model's scores of the facts that stand; the record has those of the first call of edit."""
    history = run.history
    if history.retained in ([], list(range(history.sessions[0]))):
        return unedited.summary
    _, scores, _ = read_unedited(run)
    return summarise([scores[index] for index in history.retained])
