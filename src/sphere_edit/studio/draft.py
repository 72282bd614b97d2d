"""The facts that are to be edited next: typed, pasted or from a file, each with what stands against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sphere_edit.counting import counted
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact, short
from sphere_edit.facts.readers import FactSet, facts_from
from sphere_edit.runs.selection import Judged, numbered

MOST = 100_000  # facts


@dataclass(frozen=True)
class Row:
    """A fact, or a record that is none; and what there is to say of it.

    Attributes:
        note: what the reader says of a record that is no fact; and of a fact, once it was checked, why it cannot be edited.
        checked: against the model and the run that are open.
    """

    fact: Fact | None
    note: str = ""
    source: str = ""
    supersedes: tuple[int, ...] = ()
    checked: bool = False

    @property
    def usable(self) -> bool:
        """Whether nothing stands against it."""
        return self.fact is not None and not self.note


class Draft:
    """Rows in the order in which they came."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.version = 0

    def add(self, given: FactSet) -> None:
        """Take up what was read, faults and all, in the order of the records.

        Raises:
            SphereEditError: that would be too many.
        """
        if len(self.rows) + len(given.facts) + len(given.bad) > MOST:
            raise SphereEditError(f"at most {MOST:,} facts at once; edit these first")
        found = [(fact.record, Row(fact, source=given.source)) for fact in given.facts]
        for sentence in given.bad:
            number, said = numbered(sentence)
            found.append((number, Row(None, said, f"{given.source}, record {number}")))
        self._become([*self.rows, *(row for _, row in sorted(found, key=lambda one: one[0]))])

    def take_out(self, numbers: Sequence[int]) -> None:
        """Without the rows of these numbers, from 1."""
        gone = set(numbers)
        self._become([row for number, row in enumerate(self.rows, 1) if number not in gone])

    def only_faulty(self) -> None:
        """Without those that can be edited: they are."""
        self._become([row for row in self.rows if not row.usable])

    def clear(self) -> None:
        """Nothing."""
        self._become([])

    def facts(self) -> list[Fact]:
        """The facts, those that cannot be edited included; their records have the numbers of their rows, from 1."""
        rows = enumerate(self.rows, 1)
        return [replace(row.fact, record=number) for number, row in rows if row.fact is not None]

    def usable(self) -> FactSet:
        """What is to be edited.

        Raises:
            SphereEditError: there is nothing, or something stands against a row.
        """
        bad = [number for number, row in enumerate(self.rows, 1) if not row.usable]
        if bad:
            row = self.rows[bad[0] - 1]
            raise SphereEditError(
                f"{counted(len(bad), 'row')} cannot be edited; the first is row {bad[0]}: {row.note}. Correct them, or take them out"
            )
        if not self.rows:
            raise SphereEditError("which facts? Type one, paste some, or give a file")
        return facts_from(self.facts())

    def judged(self, judged: Sequence[Judged]) -> None:
        """Keep what was found of the facts (`facts`)."""
        rows = list(self.rows)
        for one in judged:
            at = one.fact.record - 1
            rows[at] = replace(rows[at], note=one.fault, supersedes=one.supersedes, checked=True)
        self._become(rows)

    def _become(self, rows: list[Row]) -> None:
        self.rows, self.version = rows, self.version + 1


def said_of(row: Row, known: Sequence[Fact]) -> str:
    """What stands beside a row."""
    if row.note:
        return row.note
    if row.supersedes:
        old = row.supersedes[-1]
        return (
            f"supersedes fact {old}, '{short(known[old].target_new.strip(), 40)}'"
            if old < len(known)
            else f"supersedes fact {old}"
        )
    return "good" if row.checked else "read; to be checked against a model"
