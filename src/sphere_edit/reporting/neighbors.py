"""The neighbours of a run's facts whose answers the edits changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        """From the facts of ``metrics.json``, and the run's own."""
        rows = [row for entry in per_fact for row in _changed(entry, facts[entry["index"]])]
        return cls(tuple(rows), sum(len(entry["edited"]["neighbors"]) for entry in per_fact))


def _changed(entry: Mapping[str, Any], fact: Fact) -> Iterator[NeighborRow]:
    before, after = (FactScores.from_dict(entry[side]).neighbors for side in ("unedited", "edited"))
    for neighbor, old, new in zip(fact.neighbors, before, after, strict=True):
        if STRICT.verdict(old) == 1 and STRICT.verdict(new) != 1:
            yield NeighborRow(entry["index"], neighbor.prompt, old.said, new.said)
