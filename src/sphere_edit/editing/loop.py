"""The sequential editing loop: the only place that writes weights.

facts → targets → keys → update → projection → weights, batch after batch, each committed to the run folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sphere_edit.editing.guard import objection
from sphere_edit.editing.journal import RunFolder
from sphere_edit.editing.methods.base import (
    JointMethod,
    LayerProblem,
    LayerwiseMethod,
    Method,
    Seen,
    State,
    Statistics,
)
from sphere_edit.editing.sources import Report, Source
from sphere_edit.errors import SphereEditError, refused_records
from sphere_edit.facts.fact import Fact, short
from sphere_edit.models.loading import peak_memory
from sphere_edit.models.weights import EditedWeights
from sphere_edit.numerics.energy import (
    KeyMetric,
    collateral_ratio,
    energy_bounds,
    energy_gradient,
    hyperspherical_energy,
)
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import Update, joined
from sphere_edit.progress import Reporter


@dataclass
class _Group:
    """What solving some facts came to, by matrix: ΔW as solved, ΔW as written, and the method's view of the facts."""

    solved: dict[str, Update] = field(default_factory=dict)
    written: dict[str, Update] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)


_CHECKPOINT_EVERY = (
    10  # times what the last one took: large models spend a tenth of their time on them, and replay the rest
)


class SequentialLoop:
    """Edits batch after batch, and puts the weights back to where they were after any of them."""

    def __init__(
        self,
        run: RunFolder,
        weights: EditedWeights,
        source: Source,
        method: Method,
        sphere: Sphere | None,
        diagnostic: Sphere,
        statistics: Mapping[str, Statistics],
        reporter: Reporter,
        guarded: bool = False,
    ):
        self.run, self.weights, self.source, self.method = run, weights, source, method
        self.sphere, self.diagnostic, self.statistics, self.reporter = sphere, diagnostic, statistics, reporter
        self.guarded = guarded
        self.states: dict[str, State] = {name: {} for name in weights.names}
        self._bases: dict[str, tuple[Tensor | None, Tensor]] = {}
        self._key_metrics: dict[str, KeyMetric] = {}
        self._unedited_energies: dict[str, float] = {}
        self.at: int | None = None  # the batch whose weights and state are in memory
        self._checkpoint_cost, self._checkpointed = 0.0, float("-inf")  # of the last one: seconds it took, and when

    def edit(self, indices: Sequence[int], facts: Sequence[Fact], superseded: Sequence[int]) -> dict[str, Any]:
        """Edit one batch and commit it: ``facts`` with their ``indices`` in the run, and the earlier ones they replace.

        Where the run is guarded and the batch would leave the safe region, nothing of it stands: what is committed instead
        is the guard's entry, which withdraws all facts still waiting.
        """
        self.settle()
        batch = self.run.history.head + 1
        clock = _Clock()
        self.at = None
        self._forget(superseded, batch)
        # copies: of a float32 model the deployed matrices are the parameters themselves
        deployed = {name: self.weights.deployed(name).clone() for name in self.weights.names}
        self.weights.use_working()
        before = self.weights.snapshot()
        groups, report = self._solve_groups(facts, clock)
        updates, solved = self._finished(groups, before)
        clock.lap("sphere")
        self.weights.restore(before)
        for name, update in updates.items():
            self.weights.add(name, update)
        self._check_finite(batch)
        seen = self._seen(groups, facts)
        self._remember(seen)
        clock.lap("keys after the batch")
        self._deploy()
        clock.lap("deploying")
        matrices = {
            name: {
                "sha256": self.weights.digest(name),
                **self._norms(updates[name], solved[name], before[name], self._directions(name, before[name])),
                **self._energies(name, deployed[name], updates[name], solved[name], before[name]),
            }
            for name in self.weights.names
        }
        clock.lap("diagnosing")
        done = {
            "batch": batch,
            "facts": list(indices),
            "superseded": list(superseded),
            "targets": report.as_dict(),
            "matrices": matrices,
        }
        if self.guarded and (reason := objection(matrices)):
            entry = self.run.append("guard", **done, reason=reason, seconds=clock.seconds)
            self.settle()
            return entry
        self.run.write_update(batch, updates, seen)
        if time.monotonic() - self._checkpointed >= _CHECKPOINT_EVERY * self._checkpoint_cost:
            self._checkpoint(batch)
        clock.lap("storing")
        memory = peak_memory(self.source.loaded.device)
        entry = self.run.append("batch", **done, seconds=clock.seconds, peak_memory=memory)
        self.at = batch
        self.run.thin(batch)
        if self.diagnostic.basis == "current":
            self._bases.clear()
        return entry

    def _checkpoint(self, batch: int) -> None:
        began = time.monotonic()
        self.run.write_checkpoint(batch, self.weights.working, self.states)
        self._checkpointed = time.monotonic()
        self._checkpoint_cost = self._checkpointed - began

    def keep(self) -> None:
        """Store weights and state of the last batch, should its checkpoint have been left out."""
        self.settle()
        head = self.run.history.head
        if self.run.nearest_checkpoint(head) != head:
            self._checkpoint(head)
            self.run.thin(head)

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
            for name, state in states.items():
                device = self.weights.working[name].device
                self.states[name] = {part: value.to(device) for part, value in state.items()}
        for number in range(start + 1, batch + 1):
            updates, seen = self.run.read_update(number)
            self._forget(self.run.history.batches[number - 1]["superseded"], number)
            for name, update in updates.items():
                self.weights.add(name, update)
            self._remember(seen)
        if batch > 0:
            self._check_digests(batch)
            self._deploy()
        self.at = batch

    # --- solving --------------------------------------------------------------------------------------------------

    def _solve_groups(self, facts: Sequence[Fact], clock: _Clock) -> tuple[list[_Group], Report]:
        """Solve the batch, in groups of as many facts as the method takes at one time, each written before the next."""
        size = self.method.max_batch or len(facts)
        report, groups = Report(), []
        with self.reporter.bar(self.source.stage, len(facts), "facts") as advance:
            for first in range(0, len(facts), size):
                self.source.begin(facts[first : first + size], advance)
                clock.lap(self.source.stage)
                if isinstance(self.method, LayerwiseMethod):
                    groups.append(self._solve_layers(self.method, clock))
                else:
                    assert isinstance(self.method, JointMethod)
                    groups.append(self._solve_jointly(self.method, clock))
                    advance(len(facts))
                report.add(self.source.report())
        return groups, report

    def _solve_layers(self, method: LayerwiseMethod, clock: _Clock) -> _Group:
        """Solve matrix by matrix, each seeing the weights of those below as already edited."""
        group = _Group()
        for index, name in enumerate(self.weights.names):
            keys, residual = self.source.layer(index)
            clock.lap("keys")
            problem = LayerProblem(self.weights.working[name], keys, residual, self.statistics[name])
            update = method.solve(problem, self.states[name]).to(torch.float32)
            clock.lap("solve")
            self._write(group, name, update)
            if method.needs.remembers == "problem":
                group.seen[name] = {"keys": keys, "residual": residual}
            clock.lap("sphere")
        return group

    def _solve_jointly(self, method: JointMethod, clock: _Clock) -> _Group:
        group = _Group()
        updates = method.descend(self.source.objective, self.weights.snapshot())
        clock.lap(self.source.stage)
        for name in self.weights.names:
            self._write(group, name, updates[name].to(torch.float32))
        clock.lap("sphere")
        return group

    def _write(self, group: _Group, name: str, update: Update) -> None:
        """Add an update to its matrix, through SPHERE if that acts inside the layer loop."""
        group.solved[name] = update
        if self.sphere is not None and self.sphere.project == "per_layer":
            update = self.sphere.suppress(update, self._directions(name, self.weights.working[name]))
        group.written[name] = update
        self.weights.add(name, update)

    def _finished(
        self, groups: Sequence[_Group], before: Mapping[str, Tensor]
    ) -> tuple[dict[str, Update], dict[str, Update]]:
        """The whole batch's update of each matrix, through the method's last step and SPHERE; and what it was before SPHERE."""
        updates: dict[str, Update] = {}
        solved: dict[str, Update] = {}
        for name in self.weights.names:
            update = self.method.finish(joined([group.written[name] for group in groups]), before[name])
            solved[name] = joined([group.solved[name] for group in groups])
            if self.sphere is not None and self.sphere.project == "after_all":
                solved[name] = update
                update = self.sphere.suppress(update, self._directions(name, before[name]))
            updates[name] = update
        return updates, solved

    # --- what the journal says of it ------------------------------------------------------------------------------

    def _norms(self, update: Update, solved: Update, before: Tensor, directions: Tensor) -> dict[str, Any]:
        return {
            "update_norm": update.norm(),
            "relative_norm": update.norm() / float(before.norm()),
            "principal_norm_before": float(solved.to(torch.float64).times(directions).norm()),
            "principal_norm": float(update.to(torch.float64).times(directions).norm()),
            "principal_rank": directions.shape[1],
        }

    def _energies(
        self, name: str, deployed: Tensor, update: Update, solved: Update, before: Tensor
    ) -> dict[str, float | None]:
        """The energy of the deployed matrix after the batch, its change, and what the theory says of that change.

        ``first_order`` changes are ⟨∇HE, ΔW⟩ at the weights before the batch: of the deployed change, of ΔW with and
        without SPHERE, and of the parts of the two that lie along the principal directions.
        """
        original, now = self.weights.original(name), self.weights.deployed(name)
        gradient = energy_gradient(deployed)
        energy, unedited = hyperspherical_energy(now), self._unedited_energy(name)
        moment = self.statistics[name].second_moment
        if moment is not None and name not in self._key_metrics:
            self._key_metrics[name] = KeyMetric.of(moment)
        bounds = energy_bounds(gradient, now - deployed, self._key_metrics.get(name))
        directions = self._directions(name, before)
        along = gradient @ directions
        return {
            "energy": energy.total,
            "energy_per_pair": energy.per_pair,
            "energy_drift": energy.total / unedited - 1 if unedited else 0.0,
            "energy_change": energy.total - hyperspherical_energy(deployed).total,
            "first_order": bounds.first_order,
            "first_order_solved": float((gradient * solved.dense()).sum()),
            "first_order_solved_principal": float((along * solved.to(torch.float64).times(directions)).sum()),
            "first_order_update": float((gradient * update.dense()).sum()),
            "first_order_update_principal": float((along * update.to(torch.float64).times(directions)).sum()),
            "gradient_norm": bounds.gradient_norm,
            "largest_change": bounds.largest_change,
            "least_forgetting": bounds.least_forgetting,
            "least_response": bounds.least_response,
            "response": bounds.response,
            "relative_drift": float((now - original).double().norm() / original.double().norm()),
            "collateral_ratio": None if moment is None else collateral_ratio(now - original, original, moment),
        }

    def _unedited_energy(self, name: str) -> float:
        if name not in self._unedited_energies:
            self._unedited_energies[name] = hyperspherical_energy(self.weights.original(name)).total
        return self._unedited_energies[name]

    def _directions(self, name: str, weight: Tensor) -> Tensor:
        """SPHERE's directions for a matrix: those of ``weight``, or of W0; each is computed once."""
        key = weight if self.diagnostic.basis == "current" else None
        known = self._bases.get(name)
        if known is None or known[0] is not key:
            known = key, self.diagnostic.directions(self.weights.original(name) if key is None else key)
            self._bases[name] = known
        return known[1]

    def _deploy(self) -> None:
        """Run the model with what the method makes of the working weights, SPHERE acting on all that it changed so far."""
        for name in self.weights.names:
            original, working = self.weights.original(name), self.weights.working[name]
            directions = partial(self._directions, name, working)
            self.weights.deploy(name, deployed_weight(self.method, self.sphere, original, working, directions))

    # --- what the method remembers --------------------------------------------------------------------------------

    def _seen(self, groups: Sequence[_Group], facts: Sequence[Fact]) -> dict[str, Seen]:
        """What the method's state learns from the batch, now that it is written."""
        if self.method.needs.remembers == "keys":
            return {name: {"keys": keys} for name, keys in self.source.all_keys(facts).items()}
        found: dict[str, Seen] = {name: {} for name in self.weights.names}
        for name, seen in found.items():
            for part in groups[0].seen.get(name, {}):
                seen[part] = torch.cat([group.seen[name][part] for group in groups], dim=1)
        return found

    def _remember(self, seen: Mapping[str, Seen]) -> None:
        for name in self.weights.names:
            device = self.weights.working[name].device
            here = {part: value.to(device) for part, value in seen[name].items()}
            if self.method.needs.change:
                here["change"] = self.weights.working[name] - self.weights.original(name)
            self.states[name] = self.method.after_batch(self.states[name], here, self.statistics[name])

    def _forget(self, superseded: Sequence[int], batch: int) -> None:
        """Take the keys of facts that ``batch`` supersedes out of the method's state, batch by batch they came in."""
        if self.method.needs.remembers != "keys":
            return
        gone = set(superseded)
        for earlier in self.run.history.batches[: batch - 1]:
            places = [place for place, index in enumerate(earlier["facts"]) if index in gone]
            if places:
                _, seen = self.run.read_update(earlier["batch"])
                for name in self.weights.names:
                    keys = seen[name]["keys"]
                    each = keys.shape[1] // len(earlier["facts"])  # columns a fact
                    columns = [place * each + column for place in places for column in range(each)]
                    old = keys[:, columns].to(self.weights.working[name].device)
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


def deployed_weight(
    method: Method, sphere: Sphere | None, original: Tensor, working: Tensor, directions: Callable[[], Tensor]
) -> Tensor:
    """What the model runs with ``[d_out, d_in]``, from W0 and the working weight, and SPHERE's directions if they are asked for."""
    deployed = method.deploy(original, working)
    if sphere is not None and sphere.project == "deployed":
        change = sphere.suppress(deployed.double() - original.double(), directions())
        deployed = (original.double() + change).float()
    return deployed


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 3)
        self._last = now


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
        raise refused_records("facts that cannot stand in one batch (--skip-bad keeps the first of each)", bad)
    return Plan(kept, bad)


def superseded_by(facts: Sequence[Fact], new: Sequence[int], standing: Sequence[int]) -> list[int]:
    """Which of the ``standing`` facts are about the same subject and prompt as one of the ``new`` ones."""
    keys = {facts[index].key for index in new}
    return [index for index in standing if facts[index].key in keys]
