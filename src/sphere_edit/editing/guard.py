"""The guard: a batch after which the model would leave its safe region is withdrawn, and the run stops there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Reports = Mapping[str, Mapping[str, Any]]  # what the journal says of each edited matrix after a batch


@dataclass(frozen=True)
class Limit:
    """One number of a batch's journal entry, and the largest value at which the model is held to be safe.

    Attributes:
        name: what it is called on pages and in sentences.
        key: its name in a matrix's report.
        value: the largest safe value.
        summed: whether the matrices' values add up; otherwise the largest of them counts.
    """

    name: str
    key: str
    value: float
    summed: bool = False

    def measured(self, reports: Reports) -> float | None:
        """The number after a batch; None where a matrix has none."""
        found = [report[self.key] for report in reports.values()]
        if not found or None in found:
            return None
        return sum(found) if self.summed else max(map(abs, found))


# What one collapsing stream still bore, judged on others: docs/results.md, "The guard". Neither the energy, which rose at once on that
# stream and then fell while the model broke, nor the update's norm, which was small where UltraEdit broke it in one batch, has a limit here.
COLLATERAL = Limit("collateral ratio, all matrices together", "collateral_ratio", 0.9, summed=True)
LIMITS: Sequence[Limit] = (COLLATERAL,)


class Stop(Protocol):
    """A batch that was withdrawn, and why."""

    @property
    def number(self) -> int:
        """Of the batch."""

    @property
    def reason(self) -> str:
        """In a phrase."""


def stopped(stop: Stop) -> str:
    """What the guard did, as a sentence."""
    return (
        f"stopped before batch {stop.number}: after it {stop.reason}. The run stands as after batch {stop.number - 1}; "
        "facts from there on were not edited"
    )


def objection(reports: Reports, limits: Sequence[Limit] | None = None) -> str | None:
    """Why a batch should not stand, in a phrase; None if nothing speaks against it."""
    for limit in LIMITS if limits is None else limits:
        value = limit.measured(reports)
        if value is not None and value > limit.value:
            return f"the {limit.name} would be {value:.4g}, above {limit.value:g}"
    return None
