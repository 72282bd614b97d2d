"""The sequential editing loop: the only place that writes weights.

facts → targets → keys → update → projection → weights, batch after batch, each committed to the run folder.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_edit.editing.journal import RunFolder
from sphere_edit.editing.methods.base import LayerProblem, Method, State, Statistics
from sphere_edit.editing.sources import OptimisedTargets, Targets
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact, short
from sphere_edit.models.weights import EditedWeights
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import Update


@dataclass
class _Projected:
    """One matrix's update as it goes through SPHERE, with what the journal says of it."""

    update: Update
    report: dict[str, Any]


class SequentialLoop:
    """Edits batch after batch, and puts the weights back to where they were after any of them."""

    def __init__(
        self,
        run: RunFolder,
        weights: EditedWeights,
        source: OptimisedTargets,
        method: Method,
        sphere: Sphere | None,
        diagnostic: Sphere,
        statistics: Mapping[str, Statistics],
    ):
        self.run, self.weights, self.source, self.method = run, weights, source, method
        self.sphere, self.diagnostic, self.statistics = sphere, diagnostic, statistics
        self.states: dict[str, State] = {name: {} for name in weights.names}
        self._pretrained: dict[str, Tensor] = {}
        self.at: int | None = None  # the batch whose weights and state are in memory

    def edit(self, indices: Sequence[int], facts: Sequence[Fact], superseded: Sequence[int]) -> dict[str, Any]:
        """Edit one batch and commit it: ``facts`` with their ``indices`` in the run, and the earlier ones they replace."""
        self.settle()
        batch = self.run.history.head + 1
        clock = _Clock()
        self.at = None
        self._forget(superseded, batch)
        self.weights.use_working()
        targets = self.source.begin(facts)
        clock.lap("targets")
        before = self.weights.snapshot()
        projected = self._layer_updates(clock)
        if self.sphere is not None and self.sphere.project == "after_all":
            self.weights.restore(before)
            for name in self.weights.names:
                projected[name] = self._through_sphere(name, projected[name].update)
                self.weights.add(name, projected[name].update)
        updates = {name: item.update for name, item in projected.items()}
        self._check_finite(batch)
        keys = self.source.all_keys()
        self._remember(keys)
        self.weights.deploy(self.method.deploy)
        clock.lap("keys after the batch")
        reports = {name: {**item.report, "sha256": self.weights.digest(name)} for name, item in projected.items()}
        self.run.write_update(batch, updates, keys)
        self.run.write_checkpoint(batch, self.weights.working, self.states)
        clock.lap("storing")
        entry = self.run.append(
            "batch",
            batch=batch,
            facts=list(indices),
            superseded=list(superseded),
            targets=_target_report(targets),
            matrices=reports,
            seconds=clock.seconds,
        )
        self.at = batch
        self.run.thin(batch)
        return entry

    def settle(self) -> None:
        """Bring weights and state back to the last batch, should interrupted work have left them elsewhere."""
        if self.at != self.run.history.head:
            self.go_to(self.run.history.head)

    def go_to(self, batch: int) -> None:
        """Weights and method state exactly as after ``batch`` (0: the unedited model), replayed from a checkpoint.

        Raises:
            SphereEditError: the replayed weights are not those the journal recorded.
        """
        self.at = None
        start = self.run.nearest_checkpoint(batch)
        self.states = {name: {} for name in self.weights.names}
        if start == 0:
            self.weights.reset()
        else:
            weights, states = self.run.read_checkpoint(start)
            self.weights.restore(weights)
            self.states |= states
        for number in range(start + 1, batch + 1):
            updates, keys = self.run.read_update(number)
            self._forget(self.run.history.batches[number - 1]["superseded"], number)
            for name, update in updates.items():
                self.weights.add(name, update)
            self._remember({name: key.to(self.weights.working[name].device) for name, key in keys.items()})
        if batch > 0:
            self._check_digests(batch)
        self.weights.deploy(self.method.deploy)
        self.at = batch

    def _layer_updates(self, clock: _Clock) -> dict[str, _Projected]:
        """Solve layer by layer, each seeing the weights of those below as already edited."""
        projected: dict[str, _Projected] = {}
        for index, name in enumerate(self.weights.names):
            keys, residual = self.source.layer(index)
            clock.lap("keys")
            problem = LayerProblem(
                self.weights.working[name], self.weights.original(name), keys, residual, self.statistics[name]
            )
            update = self.method.solve(problem, self.states[name]).to(torch.float32)
            clock.lap("solve")
            if self.sphere is None or self.sphere.project == "per_layer":
                projected[name] = self._through_sphere(name, update)
            else:
                projected[name] = _Projected(update, {})
            clock.lap("sphere")
            self.weights.add(name, projected[name].update)
        return projected

    def _through_sphere(self, name: str, update: Update) -> _Projected:
        """SPHERE on one update (as it is without SPHERE), and its norms before and after."""
        directions = self._directions(name)
        result = update if self.sphere is None else self.sphere.suppress(update, directions)
        weight = self.weights.working[name]
        report = {
            "update_norm": result.norm(),
            "relative_norm": result.norm() / float(weight.norm()),
            "principal_norm_before": float(update.to(torch.float64).times(directions).norm()),
            "principal_norm": float(result.to(torch.float64).times(directions).norm()),
            "principal_rank": directions.shape[1],
        }
        return _Projected(result, report)

    def _directions(self, name: str) -> Tensor:
        if self.diagnostic.basis == "current":
            return self.diagnostic.directions(self.weights.working[name])
        if name not in self._pretrained:
            self._pretrained[name] = self.diagnostic.directions(self.weights.original(name))
        return self._pretrained[name]

    def _remember(self, keys: Mapping[str, Tensor]) -> None:
        for name in self.weights.names:
            self.states[name] = self.method.after_batch(self.states[name], keys[name], self.statistics[name])

    def _forget(self, superseded: Sequence[int], batch: int) -> None:
        """Take the keys of facts that ``batch`` supersedes out of the method's state, batch by batch they came in."""
        gone = set(superseded)
        for earlier in self.run.history.batches[: batch - 1]:
            columns = [column for column, index in enumerate(earlier["facts"]) if index in gone]
            if columns:
                _, keys = self.run.read_update(earlier["batch"])
                for name in self.weights.names:
                    old = keys[name][:, columns].to(self.weights.working[name].device)
                    self.states[name] = self.method.forget(self.states[name], old, self.statistics[name])

    def _check_finite(self, batch: int) -> None:
        for name in self.weights.names:
            if not bool(torch.isfinite(self.weights.working[name]).all()):
                raise SphereEditError(
                    f"batch {batch} would make {name} infinite or NaN; nothing of it was kept. Use a larger ridge or fewer facts"
                )

    def _check_digests(self, batch: int) -> None:
        recorded = self.run.history.batches[batch - 1]["matrices"]
        wrong = [name for name in self.weights.names if self.weights.digest(name) != recorded[name]["sha256"]]
        if wrong:
            raise SphereEditError(
                f"the weights after batch {batch} cannot be rebuilt bit for bit ({', '.join(wrong)}): this device rounds "
                "otherwise than the one that edited, or files of the run were changed. Use the machine and device of the run"
            )


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 3)
        self._last = now


def _target_report(targets: Targets) -> dict[str, Any]:
    first = [losses[0] for losses in targets.losses]
    last = [losses[-1] for losses in targets.losses]
    probability = [values[-1] for values in targets.probabilities]
    return {
        "loss_before": sum(first) / len(first),
        "loss_after": sum(last) / len(last),
        "probability_after": sum(probability) / len(probability),
        "evaluations": [len(losses) for losses in targets.losses],
    }


@dataclass(frozen=True)
class Plan:
    """A stream of facts cut into batches, and the records that had to be left out."""

    facts: list[Fact]
    bad: list[str]


def plan_batches(facts: Sequence[Fact], batch_size: int, skip_bad: bool) -> Plan:
    """Check that no batch says two things of one subject and prompt (across batches, the later one supersedes).

    Raises:
        SphereEditError: naming both records, unless ``skip_bad`` leaves the later one out.
    """
    kept: list[Fact] = []
    bad: list[str] = []
    current: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        if len(kept) % batch_size == 0:
            current = {}
        twin = current.get(fact.key)
        if twin is None:
            current[fact.key] = fact
            kept.append(fact)
            continue
        if twin.target_new == fact.target_new:
            bad.append(f"record {fact.record}: the same fact as record {twin.record}, in one batch")
        else:
            bad.append(
                f"record {fact.record}: contradicts record {twin.record} in the same batch "
                f"('{short(fact.filled_prompt)}' → '{short(twin.target_new)}' or '{short(fact.target_new)}'?)"
            )
    if bad and not skip_bad:
        shown = "\n  ".join(itertools.islice(bad, 20))
        raise SphereEditError(f"facts that cannot stand in one batch (--skip-bad keeps the first of each):\n  {shown}")
    return Plan(kept, bad)


def superseded_by(facts: Sequence[Fact], new: Sequence[int], standing: Sequence[int]) -> list[int]:
    """Which of the ``standing`` facts are about the same subject and prompt as one of the ``new`` ones."""
    keys = {facts[index].key for index in new}
    return [index for index in standing if facts[index].key in keys]
