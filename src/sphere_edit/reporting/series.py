"""A run as series over edits, read from its folder alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere_edit.editing.journal import RunFolder
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.evaluator import read_unedited
from sphere_edit.evaluation.metrics import summarise
from sphere_edit.files import plain_errors
from sphere_edit.numerics.projection import Sphere

METRICS = {
    "efficacy": "Efficacy, %",
    "efficacy_strict": "Efficacy, strict, %",
    "generalization": "Generalization, %",
    "generalization_strict": "Generalization, strict, %",
    "specificity": "Specificity, %",
    "perplexity": "Perplexity",
    "divergence": "KL, nats",
}
_WHOLE = ("perplexity", "divergence")


@dataclass(frozen=True)
class Series:
    """One run: its evaluated checkpoints and its batches.

    Attributes:
        label: what it is called beside others.
        edits: facts edited by each checkpoint, the unedited model (0) first.
        metrics: by name (`METRICS`), a value a checkpoint; None where nothing was measured.
        energy: energy of all edited matrices together at each checkpoint, relative to the unedited model's, less 1.
        batches, look_backs: the journal's entries.
        batch_edits: facts edited by the end of each batch.
    """

    folder: Path
    label: str
    method: str
    sphere: bool
    config: Mapping[str, Any]
    edits: list[int]
    metrics: dict[str, list[float | None]]
    energy: list[float]
    energies: dict[str, float]  # of each unedited matrix
    batches: list[dict[str, Any]]
    look_backs: list[dict[str, Any]]
    batch_edits: list[int]
    abilities: dict[str, list[tuple[int, dict[str, Any]]]]  # by task: facts edited, score
    finished: bool
    guard: dict[str, Any] | None  # the journal's entry, where the guard stopped the run
    current: bool  # whether the last evaluation is of where the run stands now, and of all facts
    evaluated: str | None  # which facts that was of, and when
    kin: int = 0  # how many runs of the same method, with or without SPHERE like this one, stand before it

    @classmethod
    def read(cls, folder: str | Path) -> Series:
        """A run from its folder.

        Raises:
            SphereEditError: no run there, or it has not measured the unedited model yet.
        """
        run = RunFolder.open(folder)
        config, history = run.config, run.history
        unedited = next((entry for entry in run.entries if entry["event"] == "unedited"), None)
        if unedited is None:
            raise SphereEditError(
                f"{folder} has measured nothing yet; finish it first: sphere-edit edit {folder} --resume"
            )
        sphere = config["sphere"]
        method = config["settings"]["method"]
        name = method + (" + SPHERE" if sphere else "")
        before = {matrix: energy["total"] for matrix, energy in unedited["energy"].items()}
        whole = sum(before.values())
        done = [0]
        for batch in history.batches:
            done.append(done[-1] + len(batch["facts"]))
        entries = [
            {**unedited, "summary": _unedited_summary(run, unedited)},
            *sorted(history.evaluations, key=lambda entry: entry["after"]),
        ]
        last = entries[-1] if len(entries) > 1 else None
        current = (
            history.head == 0
            if last is None
            else (last["after"], last["facts"]) == (history.head, len(history.retained))
        )
        metrics: dict[str, list[float | None]] = {
            key: [entry[key] if key in _WHOLE else entry["summary"][key] for entry in entries] for key in METRICS
        }
        energy = [sum(matrix["total"] for matrix in entry["energy"].values()) / whole - 1 for entry in entries]
        return cls(
            run.path,
            name,
            method,
            sphere is not None,
            config,
            [0, *(done[entry["after"]] for entry in entries[1:])],
            metrics,
            energy,
            before,
            history.batches,
            history.look_backs,
            done[1:],
            {task: [(done[after], s) for after, s in scores] for task, scores in history.ability_series().items()},
            history.finished,
            history.guard,
            current,
            None if last is None else f"{last['facts']} facts asked after batch {last['after']} of {history.head}",
        )

    def judged(self, key: str) -> list[float | None]:
        """A metric at each checkpoint as what the edits did: without the unedited model's where that is merely what was not yet edited."""
        values = self.metrics[key]
        return [None, *values[1:]] if key.startswith(("efficacy", "generalization")) else values

    def facts(self) -> list[dict[str, Any]]:
        """Every fact of ``metrics.json``, empty before the first evaluation is finished."""
        return self._final("per_fact")

    def retention(self) -> list[dict[str, Any]]:
        """The metrics of ``metrics.json`` by age of the facts, youngest first; empty before the first evaluation is finished."""
        return self._final("retention")

    def _final(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / "metrics.json"
        if not path.is_file():
            return []
        with plain_errors(path, "read"):
            found: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))[name]
        return found

    def change(self, name: str) -> tuple[Tensor, Tensor]:
        """W before the first edit and after the last batch ``[d_out, d_in]``, float32.

        The run keeps W and every ΔW, so that W0 is W less their sum, up to rounding.
        """
        run = RunFolder.open(self.folder)
        head = run.history.head
        working = _working(run, name)
        total = torch.zeros_like(working)
        for batch in range(1, head + 1):
            updates, _ = run.read_update(batch)
            total += updates[name].dense()
        return working - total, working

    def last_update(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The last batch's W before it, its ΔW as solved, and after SPHERE, ``[d_out, d_in]`` each.

        The run keeps what was written. SPHERE took a share α of its principal part away, which is given back here to say what was
        solved; where SPHERE was off, is total (α = 1) or acts on the deployed weights alone, it is applied here to show what it does.
        """
        run = RunFolder.open(self.folder)
        head = run.history.head
        updates, _ = run.read_update(head)
        written = updates[name].dense()
        weight = _working(run, name) - written
        options = self.config["sphere"]
        sphere = Sphere(**options) if options else Sphere()
        if options is None or sphere.project == "deployed" or sphere.alpha == 1:
            return weight, written, sphere(written, weight)
        basis = self.change(name)[0] if sphere.basis == "pretrained" else weight
        principal = sphere.directions(basis)
        part = (written.double() @ principal) @ principal.T
        return weight, (written + sphere.alpha / (1 - sphere.alpha) * part).float(), written


def _working(run: RunFolder, name: str) -> Tensor:
    """A matrix after the last batch ``[d_out, d_in]``, float32: its last checkpoint and the updates since."""
    head = run.history.head
    start = run.nearest_checkpoint(head)
    weight = run.read_checkpoint(start)[0][name]
    for batch in range(start + 1, head + 1):
        weight = run.read_update(batch)[0][name].added_to(weight)
    return weight


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


def _unedited_summary(run: RunFolder, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The unedited model's scores of the facts that stand; the journal's entry has those of the first call of edit."""
    history = run.history
    if history.retained in ([], list(range(history.sessions[0]))):
        summary: Mapping[str, Any] = entry["summary"]
        return summary
    _, scores, _ = read_unedited(run)
    return summarise([scores[index] for index in history.retained])
