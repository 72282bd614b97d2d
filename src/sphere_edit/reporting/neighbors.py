"""The neighbours of a run's facts whose answers the edits changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.catalogue import STRICT
from sphere_edit.evaluation.scores import FactScores
from sphere_edit.facts.fact import Fact


@dataclass(frozen=True)
class NeighborRow:
    """A prompt about something else, which is not answered as before.

    Attributes:
        index: the number of the fact whose neighbour it is.
        before, now: what the unedited and the edited model say; None where that was not asked.
    """

    index: int
    prompt: str
    before: str | None
    now: str | None


@dataclass(frozen=True)
class ChangedNeighbors:
    """Neighbours that were answered rightly (strict) by the unedited model, and are not by the edited one; of so many that were ``asked``."""

    rows: tuple[NeighborRow, ...]
    asked: int

    @classmethod
    def of(cls, per_fact: Sequence[Mapping[str, Any]], facts: Sequence[Fact]) -> ChangedNeighbors:
        """From the facts of ``metrics.json``, and the run's own.

        Raises:
            SphereEditError: they do not fit one another.
        """
        rows = [row for entry in per_fact for row in _changed(entry, facts)]
        return cls(tuple(rows), sum(len(entry["edited"]["neighbors"]) for entry in per_fact))


def _changed(entry: Mapping[str, Any], facts: Sequence[Fact]) -> Iterator[NeighborRow]:
    index = entry["index"]
    before, after = (FactScores.from_dict(entry[side]).neighbors for side in ("unedited", "edited"))
    neighbors = facts[index].neighbors if 0 <= index < len(facts) else None
    if neighbors is None or not len(neighbors) == len(before) == len(after):
        raise SphereEditError(
            f"metrics.json is damaged: the neighbours of fact {index} are not the run's; restore it from a backup"
        )
    for neighbor, old, new in zip(neighbors, before, after, strict=True):
        if STRICT.verdict(old) == 1 and STRICT.verdict(new) != 1:
            yield NeighborRow(index, str(neighbor.prompt), old.said, new.said)
