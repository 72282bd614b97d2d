"""The sequential editing loop: batch after batch written, measured and committed to the run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_edit.editing.guard import objection
from sphere_edit.editing.journal import RunFolder
from sphere_edit.editing.methods.base import Seen, State
from sphere_edit.editing.solving import Clock, Solver, Written
from sphere_edit.errors import SphereEditError, refused_records
from sphere_edit.facts.fact import Fact, short
from sphere_edit.models.loading import peak_memory
from sphere_edit.numerics.energy import (
    KeyMetric,
    collateral_ratio,
    energy_bounds,
    energy_gradient,
    hyperspherical_energy,
)

_CHECKPOINT_EVERY = (
    10  # times what the last one took: large models spend a tenth of their time on them, and replay the rest
)


class SequentialLoop:
    """Edits batch after batch, and puts the weights back to where they were after any of them."""

    def __init__(self, run: RunFolder, solver: Solver, guarded: bool = False):
        self.run, self.solver, self.guarded = run, solver, guarded
        self.weights, self.source, self.method = solver.weights, solver.source, solver.method
        self.statistics = solver.statistics
        self.states: dict[str, State] = {name: {} for name in self.weights.names}
        self._key_metrics: dict[str, KeyMetric] = {}
        self._unedited_energies: dict[str, float] = {}
        self.at: int | None = None  # the batch whose weights and state are in memory
        self._checkpoint_cost, self._checkpointed = 0.0, float("-inf")  # of the last one: seconds it took, and when

    def edit(
        self,
        indices: Sequence[int],
        facts: Sequence[Fact],
        superseded: Sequence[int],
        asked: Sequence[int] = (),
        again: Sequence[int] = (),
        clock: Clock | None = None,
    ) -> dict[str, Any]:
        """Edit one batch and commit it: ``facts`` with their ``indices`` in the run, and the earlier ones they replace.

        Earlier facts that were ``asked`` and proved to be forgotten are edited ``again``: they stand at the end of ``facts``. The time that took
        is on the ``clock``, if one is given.

        Where the run is guarded and the batch would leave the safe region, nothing of it stands: what is committed instead
        is the guard's entry, which withdraws all facts still waiting.
        """
        self.settle()
        batch = self.run.history.head + 1
        clock = clock or Clock()
        self.at = None
        self._forget([*superseded, *again], batch)
        # copies: of a float32 model the deployed matrices are the parameters themselves
        deployed = {name: self.weights.deployed(name).clone() for name in self.weights.names}
        written = self.solver.write(facts, self.states, clock)
        self._check_finite(batch)
        seen = self._seen(written.problems, facts)
        self._remember(seen)
        clock.lap("keys after the batch")
        about = {"facts": list(indices), "superseded": list(superseded), "asked": list(asked), "again": list(again)}
        return self._commit(batch, written, seen, deployed, about, clock)

    def repair(
        self, facts: Sequence[Fact], passages: Sequence[Sequence[int]], steps: int, share: float, seed: int
    ) -> dict[str, Any]:
        """Repair what was done to ordinary text (`Repair`), as a batch without facts; ``facts`` are those that are to stay.

        The method remembers no key of it, only how far the weights have moved, where it wants to know. It is not guarded: it is what
        brings a model back.
        """
        self.settle()
        clock = Clock()
        batch = self.run.history.head + 1
        self.at = None
        deployed = {name: self.weights.deployed(name).clone() for name in self.weights.names}
        written, descent = self.solver.repair(facts, passages, self.states, steps, share, seed + batch)
        self._check_finite(batch)
        clock.lap("repair")
        self._remember({})
        about = {"facts": [], "superseded": [], "asked": [], "again": [], "repair": descent.as_dict()}
        return self._commit(batch, written, {}, deployed, about, clock)

    def _commit(
        self,
        batch: int,
        written: Written,
        seen: Mapping[str, Seen],
        deployed: Mapping[str, Tensor],
        about: Mapping[str, Any],
        clock: Clock,
    ) -> dict[str, Any]:
        """Put what stands in the working weights into the model and the run folder; ``deployed`` is what the model ran with before."""
        self.solver.deploy()
        clock.lap("deploying")
        matrices = {
            name: {
                "sha256": self.weights.digest(name),
                **self._norms(name, written),
                **self._energies(name, deployed[name], written),
            }
            for name in self.weights.names
        }
        clock.lap("diagnosing")
        done = {"batch": batch, **about, "targets": written.report.as_dict(), "matrices": matrices}
        if self.guarded and "repair" not in about and (reason := objection(matrices)):
            entry = self.run.append("guard", **done, reason=reason, seconds=clock.seconds)
            self.settle()
            return entry
        self.run.write_update(batch, written.updates, seen)
        if time.monotonic() - self._checkpointed >= _CHECKPOINT_EVERY * self._checkpoint_cost:
            self._checkpoint(batch)
        clock.lap("storing")
        memory = peak_memory(self.source.loaded.device)
        entry = self.run.append("batch", **done, seconds=clock.seconds, peak_memory=memory)
        self.at = batch
        self.run.thin(batch)
        self.solver.moved_on()
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
            entry = self.run.history.batches[number - 1]
            self._forget([*entry["superseded"], *entry.get("again", ())], number)
            for name, update in updates.items():
                self.weights.add(name, update)
            self._remember(seen)
        if batch > 0:
            self._check_digests(batch)
            self.solver.deploy()
        self.at = batch

    # --- what the journal says of it ------------------------------------------------------------------------------

    def _norms(self, name: str, written: Written) -> dict[str, Any]:
        update, before = written.updates[name], written.before[name]
        directions = self.solver.directions(name, before)
        return {
            "update_norm": update.norm(),
            "relative_norm": update.norm() / float(before.norm()),
            "principal_norm_before": float(written.solved[name].to(torch.float64).times(directions).norm()),
            "principal_norm": float(update.to(torch.float64).times(directions).norm()),
            "principal_rank": directions.shape[1],
        }

    def _energies(self, name: str, deployed: Tensor, written: Written) -> dict[str, float | None]:
        """The energy of the deployed matrix after the batch, its change, and what the theory says of that change.

        ``first_order`` changes are ⟨∇HE, ΔW⟩ at the weights before the batch: of the deployed change, of ΔW with and
        without SPHERE, and of the parts of the two that lie along the principal directions.
        """
        update, solved = written.updates[name], written.solved[name]
        original, now = self.weights.original(name), self.weights.deployed(name)
        gradient = energy_gradient(deployed)
        energy, unedited = hyperspherical_energy(now), self._unedited_energy(name)
        moment = self.statistics[name].second_moment
        if moment is not None and name not in self._key_metrics:
            self._key_metrics[name] = KeyMetric.of(moment)
        bounds = energy_bounds(gradient, now - deployed, self._key_metrics.get(name))
        directions = self.solver.directions(name, written.before[name])
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

    # --- what the method remembers --------------------------------------------------------------------------------

    def _seen(self, problems: dict[str, Seen], facts: Sequence[Fact]) -> dict[str, Seen]:
        """What the method's state learns from the batch, now that it is written."""
        if self.method.needs.remembers == "keys":
            return {name: {**problems[name], "keys": keys} for name, keys in self.source.all_keys(facts).items()}
        return problems

    def _remember(self, seen: Mapping[str, Seen]) -> None:
        """Fold a batch into the method's state; a repair has taught it nothing but how far the weights have moved."""
        for name in self.weights.names:
            weight = self.weights.working[name]
            here = {part: value.to(weight.device) for part, value in seen.get(name, {}).items()}
            if not here:
                if not self.method.needs.change:
                    continue
                here["keys"] = weight.new_empty(weight.shape[1], 0)
            if self.method.needs.change:
                here["change"] = weight - self.weights.original(name)
            self.states[name] = self.method.after_batch(self.states[name], here, self.statistics[name])

    def _forget(self, rewritten: Sequence[int], batch: int) -> None:
        """Take the keys of facts that ``batch`` supersedes or writes again out of the method's state, as last written."""
        if self.method.needs.remembers != "keys":
            return
        gone = set(rewritten)
        old: dict[str, list[Tensor]] = {name: [] for name in self.weights.names}
        for earlier in reversed(self.run.history.batches[: batch - 1]):
            if not gone:
                break
            members = [*earlier["facts"], *earlier.get("again", ())]
            places = [place for place, index in enumerate(members) if index in gone]
            if not places:
                continue
            gone -= {members[place] for place in places}
            for name, keys in self.run.read_keys(earlier["batch"]).items():
                each = keys.shape[1] // len(members)  # columns a fact
                columns = [place * each + column for place in places for column in range(each)]
                old[name].append(keys[:, columns].to(self.weights.working[name].device))
        for name, parts in old.items():
            if parts:
                self.states[name] = self.method.forget(
                    self.states[name], torch.cat(parts, dim=1), self.statistics[name]
                )

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


def next_batch(facts: Sequence[Fact], pending: Sequence[int], size: int) -> list[int]:
    """The first ``size`` of the facts waiting that are about different subjects; what is left out comes with a later batch.

    Facts of one subject are written at nearly the same key, with targets that know nothing of one another: together, each would
    get a share of its residual. The target of the second, found when the first is written, holds both.
    """
    subjects: set[str] = set()
    chosen: list[int] = []
    for index in pending:
        if len(chosen) == size:
            break
        subject, _ = facts[index].key
        if subject not in subjects:
            subjects.add(subject)
            chosen.append(index)
    return chosen


def superseded_by(facts: Sequence[Fact], new: Sequence[int], standing: Sequence[int]) -> list[int]:
    """Which of the ``standing`` facts are about the same subject and prompt as one of the ``new`` ones."""
    keys = {facts[index].key for index in new}
    return [index for index in standing if facts[index].key in keys]
