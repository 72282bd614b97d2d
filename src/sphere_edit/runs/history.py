"""What a run's journal says, folded: which batches stand, which facts wait, which are out. Pure: reads and writes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from sphere_edit.counting import counted
from sphere_edit.errors import SphereEditError
from sphere_edit.runs.records import (
    Ability,
    Batch,
    Evaluation,
    FactsAccepted,
    FinalRecheck,
    Finished,
    GuardStop,
    Record,
    RemovalCheck,
    Rollback,
)


class Inconsistent(SphereEditError):
    """A record that cannot follow those before it."""


@dataclass(frozen=True)
class GoneBack:
    """What a rollback does: the batches it takes back, the facts it withdraws, and those that stand again by it (superseded or removed since)."""

    batches: tuple[int, ...]
    withdrawn: tuple[int, ...]
    again: tuple[int, ...]


@dataclass
class History:
    """The records of a journal, folded one by one."""

    total: int = 0  # facts accepted so far
    sessions: list[int] = field(default_factory=list)  # the number of facts each call of edit brought
    sources: list[str] = field(default_factory=list)  # and where they came from
    batches: list[Batch] = field(default_factory=list)  # first to last, those included whose work was undone since
    final_rechecks: list[FinalRecheck] = field(default_factory=list)
    removal_checks: list[RemovalCheck] = field(default_factory=list)
    recheck_done: bool = False  # the final one, since the last facts came
    removal: Batch | None = None  # which began a removal that is not finished
    closed: set[int] = field(default_factory=lambda: {0})  # batches after which nothing was left to do
    withdrawn: set[int] = field(default_factory=set)  # facts taken back by a rollback or the guard
    evaluations: list[Evaluation] = field(default_factory=list)
    abilities: list[Ability] = field(default_factory=list)
    finished: bool = False
    guard: GuardStop | None = None  # why the run stopped before its last facts

    @classmethod
    def of(cls, records: Iterable[Record]) -> History:
        """The fold of all of them."""
        history = cls()
        for record in records:
            history.take(record)
        return history

    @property
    def head(self) -> int:
        """Number of the last batch; 0 is the unedited model."""
        return len(self.batches)

    def lineage(self, batch: int) -> list[int]:
        """The batches that the weights after ``batch`` come from, first to last: all up to it, but for those that a removal undid."""
        found = []
        while batch:
            found.append(batch)
            restored = self.batches[batch - 1].restored
            batch = batch - 1 if restored is None else restored
        return found[::-1]

    def written(self, batch: int) -> list[int]:
        """Those of them that have a ΔW."""
        return [number for number in self.lineage(batch) if self.batches[number - 1].restored is None]

    @property
    def standing(self) -> list[Batch]:
        """The batches whose work stands, first to last."""
        return [self.batches[number - 1] for number in self.lineage(self.head)]

    @property
    def edited(self) -> list[int]:
        """Indices of the facts that were edited in a batch that stands, in order; some may be superseded or removed since."""
        return [index for batch in self.standing for index in batch.facts]

    @property
    def removed(self) -> set[int]:
        """Facts that were taken back one by one."""
        return {index for batch in self.batches for index in batch.removed}

    @property
    def removed_in(self) -> dict[int, int]:
        """The batch that took each of them back."""
        return {index: batch.number for batch in self.batches for index in batch.removed}

    def state_of(self, index: int) -> str:
        """Where a fact that was accepted stands, in a word."""
        return self.states[index]

    @property
    def states(self) -> list[str]:
        """Where each fact that was accepted stands, in a word, by index."""
        of = [(self.removed, "removed"), (self.superseded, "superseded"), (set(self.batch_of), "stands")]
        of.append((self.withdrawn, "withdrawn"))
        return [next((word for those, word in of if index in those), "waiting") for index in range(self.total)]

    @property
    def written_back(self) -> set[int]:
        """Removed facts whose prompts were given the unedited model's answers, and no new fact since."""
        found: set[int] = set()
        for batch in self.standing:
            found = (found - set(batch.superseded)) | set(batch.written_back)
        return found

    @property
    def superseded(self) -> set[int]:
        """Facts that a later one contradicted; they leave retention."""
        return {index for batch in self.standing for index in batch.superseded} - self.removed

    @property
    def retained(self) -> list[int]:
        """Facts the model should know now."""
        gone = self.superseded | self.removed
        return [index for index in self.edited if index not in gone]

    @property
    def due(self) -> list[int]:
        """Retained facts in the order of the next recheck: those never asked yet, then those asked longest ago."""
        standing = self.standing
        asked: dict[int, float] = {index: 0 for batch in standing for index in batch.facts}
        for batch in standing:
            asked.update({index: batch.number for index in batch.rechecked if index in asked})
        for recheck in self._standing_rechecks:
            asked.update({i: max(asked[i], recheck.after + 0.5) for i in recheck.rechecked if i in asked})
        return sorted(self.retained, key=lambda index: (asked[index], index))

    @property
    def pending(self) -> list[int]:
        """Facts accepted and not yet edited."""
        gone = set(self.edited) | self.withdrawn | self.removed
        return [index for index in range(self.total) if index not in gone]

    @property
    def unrepaired(self) -> int:
        """How many facts were edited since ordinary text was last repaired."""
        count = 0
        for batch in reversed(self.standing):
            if batch.kind == "repair":
                break
            count += len(batch.facts)
        return count

    @property
    def closing(self) -> bool:
        """Whether the last new facts of a stream were edited, so that what ends it is to be done: repair, and the final recheck."""
        return bool(self.batches) and not self.finished and self.guard is None and not self.pending

    @property
    def replayed(self) -> bool:
        """Whether the removal at work edits again what came after its facts, or took up a state in which a stream was not at its end."""
        removal = self.removal
        if removal is None or removal.restored is None:
            return False
        return self.head > removal.number or removal.restored not in self.closed

    @property
    def forgotten(self) -> list[int]:
        """What the final recheck found forgotten, or never taken, and no batch has written again since."""
        if not self.recheck_done:
            return []
        last = self.final_rechecks[-1]
        written = {index for batch in self.batches[last.after :] for index in batch.rewritten}
        return [index for index in last.forgotten if index not in written]

    @property
    def seen(self) -> set[int]:
        """Facts that gave their new answer when they were rechecked, be it once."""
        found = {index for batch in self.standing for index in batch.answered}
        for recheck in self._standing_rechecks:
            found |= set(recheck.rechecked) - set(recheck.forgotten)
        return found

    @property
    def batch_of(self) -> dict[int, int]:
        """The number of the batch that first wrote each fact that stands."""
        return {index: batch.number for batch in self.standing for index in batch.facts}

    @property
    def _standing_rechecks(self) -> list[FinalRecheck]:
        numbers = set(self.lineage(self.head))
        return [recheck for recheck in self.final_rechecks if recheck.after in numbers]

    def last_without(self, chosen: Iterable[int]) -> int:
        """The last batch before any of the ``chosen`` facts was written, and before any that was removed after it."""
        first, gone = self.batch_of, set(chosen)
        while True:
            base = min(first[index] for index in gone) - 1
            later = {i for batch in self.standing if batch.number > base for i in batch.removed if i in first}
            if later <= gone:
                return base
            gone |= later

    def evaluation_at_head(self, final: bool) -> Evaluation | None:
        """The evaluation of where the run stands; with ``final``, one that asked for all facts."""
        found = (e for e in self.evaluations if e.after == self.head and (e.final or not final))
        return next(found, None)

    def ability_series(self) -> dict[str, list[tuple[int, dict[str, Any]]]]:
        """Scores of general ability by task, each with its batch, in order.

        What was asked with another definition, other data or another limit than last time does not compare, and is left out.
        """
        found: dict[str, dict[int, dict[str, Any]]] = {}
        last: dict[str, tuple[Any, Any]] = {}
        for ability in reversed(self.abilities):
            for task, score in ability.scores.items():
                kind = ability.limit, ability.tasks.get(task, ability.tasks)  # of a group, all its tasks
                if last.setdefault(task, kind) == kind:
                    found.setdefault(task, {}).setdefault(ability.after, score)
        return {task: sorted(scores.items()) for task, scores in found.items()}

    def back_to(self, batch: int) -> GoneBack:
        """What a rollback to after a batch would do to the facts; nothing is changed here."""
        then = copy(self)
        then.take(Rollback(to=batch))
        now, later = {*self.retained, *self.pending}, set(then.retained)
        return GoneBack(tuple(range(batch + 1, self.head + 1)), tuple(sorted(now - later)), tuple(sorted(later - now)))

    def take(self, record: Record) -> None:
        """Fold in one more.

        Raises:
            Inconsistent: it cannot follow those before it.
        """
        self._check(record)
        match record:
            case FactsAccepted():
                self.sessions.append(record.count)
                self.sources.append(record.source)
                self.total += record.count
                self.finished, self.guard, self.recheck_done, self.removal = False, None, False, None
            case Batch():
                self.batches.append(record)
                if record.removed:
                    self.removal = record
                    self.finished, self.guard, self.recheck_done = False, None, False
            case RemovalCheck():
                self.removal_checks.append(record)
            case FinalRecheck():
                self.final_rechecks.append(record)
                self.recheck_done = True
            case Evaluation():
                self.evaluations = [e for e in self.evaluations if e.after != record.after] + [record]
            case Ability():
                self.abilities.append(record)
            case GuardStop():
                self.withdrawn |= set(self.pending)
                self.guard = record
            case Rollback():
                self._back_to(record.to)
            case Finished():
                self.finished, self.removal = True, None
                self.closed.add(record.after)

    def _check(self, record: Record) -> None:
        match record:
            case FactsAccepted() if record.count < 1 or record.session != len(self.sessions) + 1:
                raise Inconsistent(
                    f"session {record.session} with {counted(record.count, 'fact')} follows {counted(len(self.sessions), 'session')}"
                )
            case Batch() | GuardStop():
                if record.number != self.head + 1:
                    raise Inconsistent(f"batch {record.number} follows batch {self.head}")
                known = range(self.total)
                if strange := [index for index in record.mentioned if index not in known]:
                    raise Inconsistent(f"batch {record.number} is about fact {strange[0]} of {self.total}")
                if record.restored is not None and not 0 <= record.restored < record.number:
                    raise Inconsistent(f"batch {record.number} restores batch {record.restored}")
            case FinalRecheck() | RemovalCheck() | Evaluation() | Ability() | Finished() if (
                not 0 <= record.after <= self.head
            ):
                raise Inconsistent(f"'{record.event}' after batch {record.after} of {self.head}")
            case Rollback() if not 0 <= record.to <= self.head:
                raise Inconsistent(f"a rollback to batch {record.to} of {self.head}")

    def _back_to(self, batch: int) -> None:
        """Nothing after the batch stands, and facts that were still waiting are out."""
        self.batches = self.batches[:batch]
        self.final_rechecks = [recheck for recheck in self.final_rechecks if recheck.after <= batch]
        self.removal_checks = [check for check in self.removal_checks if check.after <= batch]
        self.recheck_done, self.removal = False, None
        self.withdrawn = set(range(self.total)) - set(self.edited) - self.removed
        self.evaluations = [evaluation for evaluation in self.evaluations if evaluation.after <= batch]
        self.abilities = [ability for ability in self.abilities if ability.after <= batch]
        self.finished, self.guard = True, None
        self.closed = {number for number in self.closed if number <= batch} | {batch}
