"""One batch written, measured and committed to the run folder; and the weights put back to after any of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sphere_edit import ranks
from sphere_edit.editing.batch import Back, Clock, Solver, Written
from sphere_edit.editing.compensation import TAKEN
from sphere_edit.editing.diagnosing import BatchDiagnosis, MatrixEntry
from sphere_edit.editing.guard import objection
from sphere_edit.editing.ingredients import seen_of, unmeasured
from sphere_edit.editing.problem import Kept, Seen, State
from sphere_edit.editing.sources import Report
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact
from sphere_edit.models.heap import give_back
from sphere_edit.models.loading import peak_memory
from sphere_edit.numerics.update import DenseUpdate, LowRankUpdate, Update
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.records import Batch, GuardStop, Rollback

_CHECKPOINT_EVERY = (
    10  # times what the last one took: large models spend a tenth of their time on them, and replay the rest
)


class Committer:
    """Writes batch after batch, and puts the weights back to where they were after any of them."""

    def __init__(self, run: RunFolder, solver: Solver, guarded: bool = False):
        self.run, self.solver, self.guarded = run, solver, guarded
        self.weights, self.source, self.method = solver.weights, solver.source, solver.method
        self.statistics = solver.statistics
        self.states: dict[str, State] = {name: {} for name in self.weights.names}
        self.at: int | None = None  # the batch whose weights and state are in memory
        self._diagnosis = BatchDiagnosis(self.weights, self.statistics)
        self._checkpoint_cost, self._checkpointed = 0.0, float("-inf")  # of the last one: seconds it took, and when

    def edit(
        self,
        indices: Sequence[int],
        facts: Sequence[Fact],
        superseded: Sequence[int],
        rechecked: Sequence[int] = (),
        rewritten: Sequence[int] = (),
        clock: Clock | None = None,
        unanswered: Sequence[int] = (),
    ) -> Batch | GuardStop:
        """Edit one batch and commit it: ``facts`` with their ``indices`` in the run, and the earlier ones they replace.

        Of earlier facts that were ``rechecked``, some were ``unanswered``, and of these some are ``rewritten``: they stand at the end of
        ``facts``. The time that took is on the ``clock``, if one is given.

        Where the run is guarded and the batch would leave the safe region, nothing of it stands: what is committed instead
        is the guard's record, which withdraws all facts still waiting.
        """
        self.settle()
        batch = self.run.history.head + 1
        clock = clock or Clock()
        self.at = None
        with self._fitting(batch - 1):
            self._forget({*superseded, *rewritten}, batch)
        about = self._writing(rechecked=rechecked, unanswered=unanswered, superseded=superseded)
        about |= {"kind": "edit" if indices else "rewrite", "facts": list(indices), "rewritten": list(rewritten)}
        return self._solve(batch, facts, about, clock)

    def write_back(
        self,
        indices: Sequence[int],
        facts: Sequence[Fact],
        back: Back,
        removed: Sequence[int] = (),
        rechecked: Sequence[int] = (),
        unanswered: Sequence[int] = (),
    ) -> Batch | GuardStop:
        """Write what the unedited model makes of the prompts of removed ``facts`` with these ``indices``, as a batch.

        Args:
            back: what of it: its state at the subjects, or its greedy answers.
            removed: facts that are taken back with this batch; the method forgets what it remembers of them.
            rechecked, unanswered: other facts that were asked before it, and those of them that did not give their new answer.
        """
        self.settle()
        batch, clock = self.run.history.head + 1, Clock()
        self.at = None
        with self._fitting(batch - 1):
            self._forget({*removed, *indices}, batch)
        about = self._writing(rechecked=rechecked, unanswered=unanswered)
        about |= {"kind": "removal", "removed": list(removed), "written_back": list(indices)}
        return self._solve(batch, facts, about, clock, back)

    def subtract(
        self,
        removed: Sequence[int],
        shares: Mapping[str, LowRankUpdate],
        rechecked: Sequence[int] = (),
        unanswered: Sequence[int] = (),
    ) -> Batch | GuardStop:
        """Take the ``shares`` of some facts out of the weights, by matrix, and their keys out of the method's state, as a batch."""
        self.settle()
        batch, clock = self.run.history.head + 1, Clock()
        deployed, before = self._deployed(), self.weights.snapshot()
        self.at = None
        with self._fitting(batch - 1):
            self._forget(set(removed), batch)
        updates: dict[str, Update] = {name: share.negative() for name, share in shares.items()}
        for name, update in updates.items():
            self.weights.add(name, update)
        self._check_finite(batch)
        self._remember({}, wrote=False)
        clock.lap("subtracting")
        about = self._writing(rechecked=rechecked, unanswered=unanswered)
        about |= {"kind": "removal", "removed": list(removed)}
        return self._commit(batch, Written(before, updates, updates, {}, Report()), {}, deployed, about, clock)

    def restore(self, base: int, removed: Sequence[int]) -> Batch | GuardStop:
        """Take up weights and state of batch ``base`` again, before which none of the ``removed`` facts was written, as a batch."""
        self.settle()
        batch, clock = self.run.history.head + 1, Clock()
        deployed, before = self._deployed(), self.weights.snapshot()
        self.go_to(base)
        self.at = None
        changes: dict[str, Update] = {
            name: DenseUpdate(self.weights.working[name] - before[name]) for name in self.weights.names
        }
        clock.lap("restoring")
        about = {**self._writing(), "kind": "removal", "removed": list(removed), "restored": base}
        return self._commit(batch, Written(before, changes, changes, {}, Report()), {}, deployed, about, clock)

    @staticmethod
    def _writing(
        rechecked: Sequence[int] = (), unanswered: Sequence[int] = (), superseded: Sequence[int] = ()
    ) -> dict[str, Any]:
        """What the record of every batch says of facts."""
        asked = {"unanswered": list(unanswered)} if rechecked else {}
        return {"facts": [], "superseded": list(superseded), "rechecked": list(rechecked), "rewritten": [], **asked}

    def _solve(
        self, batch: int, facts: Sequence[Fact], about: dict[str, Any], clock: Clock, back: Back | None = None
    ) -> Batch | GuardStop:
        """Solve a batch, let the method remember it, and commit it."""
        deployed = self._deployed()
        written = self.solver.write(facts, self.states, clock, back)
        self._check_finite(batch)
        seen = self._seen(written.problems, facts)
        self._remember(seen)
        for name, taken in written.taken.items():
            seen[name][TAKEN] = taken
        self._owe(written.taken)
        clock.lap("keys after the batch")
        about["columns"] = self.source.columns(facts)
        return self._commit(batch, written, seen, deployed, about, clock)

    def repair(
        self, facts: Sequence[Fact], passages: Sequence[Sequence[int]], steps: int, share: float, seed: int
    ) -> Batch | GuardStop:
        """Repair what was done to ordinary text (`Repair`), as a batch without facts; ``facts`` are those that are to stay.

        The method remembers no key of it, only how far the weights have moved, where it wants to know. It is not guarded: it is what
        brings a model back.
        """
        self.settle()
        clock = Clock()
        batch = self.run.history.head + 1
        self.at = None
        deployed = self._deployed()
        seed += len(self.run.history.written(batch - 1)) + 1
        written, descent = self.solver.repair(facts, passages, self.states, steps, share, seed)
        self._check_finite(batch)
        clock.lap("repair")
        self._remember({}, wrote=False)
        about = {**self._writing(), "kind": "repair", "repair": descent.as_dict()}
        return self._commit(batch, written, {}, deployed, about, clock)

    def _deployed(self) -> dict[str, Tensor]:
        """Copies of what the model runs with."""
        return {name: self.weights.deployed(name) for name in self.weights.names}

    def _commit(
        self,
        batch: int,
        written: Written,
        seen: Mapping[str, Seen],
        deployed: Mapping[str, Tensor],
        about: Mapping[str, Any],
        clock: Clock,
    ) -> Batch | GuardStop:
        """Put what stands in the working weights into the model and the run folder; ``deployed`` is what the model ran with before."""

        def told(name: str) -> MatrixEntry:
            directions = self.solver.directions(name, written.before[name])
            return self._diagnosis.entry(name, written, deployed[name], directions)

        self.solver.deploy()
        clock.lap("deploying")
        matrices = dict(zip(self.weights.names, ranks.dealt(self.weights.names, told), strict=True))
        self._check_agreement(batch)
        clock.lap("diagnosing")
        done = {"number": batch, **about, "targets": written.report.as_dict(), "matrices": matrices}
        if self.guarded and about["kind"] in ("edit", "rewrite") and (reason := objection(matrices)):
            stop = GuardStop(**done, reason=reason, seconds=clock.seconds)
            self.run.append(stop)
            self.settle()
            return stop
        update = None if "restored" in about else self.run.write_update(batch, written.updates, seen)
        if ranks.once(self._checkpoint_is_due):
            self._checkpoint(batch)
        clock.lap("storing")
        record = Batch(**done, update=update, seconds=clock.seconds, peak_memory=peak_memory(self.source.loaded.device))
        self.run.append(record)
        self.at = batch
        self.run.thin(batch)
        self.solver.moved_on()
        give_back()
        return record

    def _checkpoint_is_due(self) -> bool:
        return time.monotonic() - self._checkpointed >= _CHECKPOINT_EVERY * self._checkpoint_cost

    def _checkpoint(self, batch: int) -> None:
        began = time.monotonic()
        self.run.write_checkpoint(batch, self.weights.working, self._states_and_owed())
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

    def roll_back(self, batch: int) -> None:
        """Put the weights back to after a batch, and commit that, once: given again, it finds what was committed."""
        self.go_to(batch)
        last = self.run.records[-1]
        if isinstance(last, Rollback) and last.to == batch:
            return
        if batch > 0:
            self.run.write_checkpoint(batch, self.weights.working, self._states_and_owed())
        self.run.append(Rollback(to=batch))

    def go_to(self, batch: int) -> None:
        """Weights and method state exactly as after ``batch`` (0: the unedited model), replayed from a checkpoint.

        Raises:
            SphereEditError: the replayed weights are not those the journal recorded.
        """
        self.at = None
        with self._fitting(batch):
            start = self._take_checkpoint(batch)
            if start < batch and self.method.learns:
                self.check_statistics()
            for number, updates, seen in self.run.updates(start, batch):
                record = self.run.history.batches[number - 1]
                self._forget({*record.superseded, *record.rewritten, *record.removed, *record.written_back}, number)
                for name in self.weights.names:
                    self.weights.add(name, updates[name])
                self._owe({name: parts.pop(TAKEN) for name, parts in seen.items() if TAKEN in parts})
                self._remember(seen, wrote=bool(record.members))
        if batch > 0:
            self._check_digests(batch)
            self.solver.deploy()
        self.at = batch

    def _take_checkpoint(self, batch: int) -> int:
        """Take up weights and states of the last checkpoint up to ``batch``. Returns its number, 0 for the unedited model."""
        start, weights, states = self.run.last_checkpoint(batch)
        self.states = {name: {} for name in self.weights.names}
        self.solver.compensation.taken = {}
        self._owe({name: state.pop(TAKEN) for name, state in states.items() if TAKEN in state})
        if start == 0:
            self.weights.reset()
            return 0
        self.weights.restore(weights)
        for name, state in states.items():
            device = self.weights.working[name].device
            away = self.statistics[name].device is not None
            self._keep(name, state if away else {part: value.to(device) for part, value in state.items()})
        return start

    @contextmanager
    def _fitting(self, batch: int) -> Iterator[None]:
        """Files whose tensors are not what this model's matrices need are told as damage, whatever tripped over them."""
        try:
            yield
        except (KeyError, IndexError, ValueError, TypeError, AssertionError, RuntimeError) as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise SphereEditError(
                f"the files of {self.run.path} up to batch {batch} do not fit this model's matrices "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); put them back from a backup"
            ) from None

    def check_statistics(self) -> None:
        """Refuse to solve, or to learn of a batch again, without what the run measured before its first batch.

        Raises:
            SphereEditError: naming what is missing.
        """
        missing = unmeasured(self.method.needs.ingredients, self.statistics)
        if missing:
            raise SphereEditError(
                f"{self.run.path / 'statistics'} lacks what {self.method.name} needs of {missing[0]}, so this run cannot edit on; "
                "put the folder back, or start a new run"
            )

    # --- what the method remembers --------------------------------------------------------------------------------

    def _seen(self, problems: dict[str, Seen], facts: Sequence[Fact]) -> dict[str, Seen]:
        """What the method's state learns from the batch, now that it is written."""
        return seen_of(self.method.needs.ingredients, problems, self.source, facts)

    def _remember(self, seen: Mapping[str, Seen], wrote: bool = True) -> None:
        """Fold a batch into the method's state; one that ``wrote`` no facts has taught it nothing but where the weights are."""
        fold = self.method.after_batch if wrote else self.method.after_repair
        for name in self.weights.names:
            device = self.weights.working[name].device
            here = {part: value.to(device) for part, value in seen.get(name, {}).items()}
            for row in self.method.needs.ingredients:
                here |= row.of_weights(self.weights, name)
            if here:
                self._keep(name, fold(self.states[name], here, self.statistics[name]))

    def _forget(self, chosen: set[int], batch: int) -> None:
        """Take the keys of facts that ``batch`` supersedes, removes or writes again out of the method's state, as last written."""
        if not self.method.forgets:
            return
        gone, history = set(chosen), self.run.history
        old: dict[str, list[Tensor]] = {name: [] for name in self.weights.names}
        for number in reversed(history.lineage(batch - 1)):
            if not gone:
                break
            earlier = history.batches[number - 1]
            here = gone.intersection(earlier.members)
            if here:
                for name, keys in self.run.read_keys(number).items():
                    columns = earlier.columns_of(here, keys.shape[1])
                    old[name].append(keys[:, columns].to(self.weights.working[name].device))
            gone -= {*here, *earlier.superseded, *earlier.removed}  # of the latter the state knows nothing any more
        for name, parts in old.items():
            if parts:
                state, statistics = self.states[name], self.statistics[name]
                self._keep(name, self.method.forget(state, torch.cat(parts, dim=1), statistics))

    def _keep(self, name: str, state: State) -> None:
        """A method's state lies where the statistics of its matrix do."""
        self.states[name] = Kept(state, self.statistics[name].device)

    def _owe(self, taken: Mapping[str, Tensor]) -> None:
        """What the last batch lost to the projection, which the next one is given back; nothing changes where it lost nothing."""
        owed = self.solver.compensation.taken
        owed |= {name: value.to(self.weights.working[name].device) for name, value in taken.items()}

    def _states_and_owed(self) -> dict[str, State]:
        """What a checkpoint keeps beside the weights: the method's state, and what the next batch is given back."""
        owed = self.solver.compensation.taken
        return {name: {**state, **({TAKEN: owed[name]} if name in owed else {})} for name, state in self.states.items()}

    def _check_finite(self, batch: int) -> None:
        for name in self.weights.names:
            if not bool(torch.isfinite(self.weights.working[name]).all()):
                raise SphereEditError(
                    f"batch {batch} would make {name} infinite or NaN; nothing of it was kept. Use a larger ridge or fewer facts"
                )

    def _check_agreement(self, batch: int) -> None:
        """Each rank adds the same updates to the same weights; where their machines round otherwise, nothing more is to be believed."""
        if ranks.count() > 1 and not ranks.agree([self.weights.digest(name) for name in self.weights.names]):
            raise SphereEditError(
                f"the {ranks.count()} processes of this run have not the same weights after batch {batch}: their devices round otherwise. "
                "Nothing of the batch was kept; go on with --resume, on devices of one kind"
            )

    def _check_digests(self, batch: int) -> None:
        recorded = self.run.history.batches[batch - 1].matrices
        wrong = [name for name in self.weights.names if self.weights.digest(name) != recorded[name]["sha256"]]
        if wrong:
            raise SphereEditError(
                f"the weights after batch {batch} cannot be rebuilt bit for bit ({', '.join(wrong)}): this device rounds "
                "otherwise than the one that edited, or files of the run were changed. Use the machine and device of the run"
            )
