"""What stands in a run's ``metrics.json``, typed."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Len
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from sphere_edit.errors import SphereEditError
from sphere_edit.runs.records import EnergyEntry, first_fault


class TextsEntry(TypedDict):
    """How the model writes (`generation.TextScores`)."""

    fluency: float | None
    consistency: float | None
    facts: int
    referenced: int


class FactEntry(TypedDict):
    """One fact of ``metrics.json``: the batch that wrote it, and its scores (`evaluation.scores.FactScores`) before and after."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    index: int
    batch: int
    subject: str
    prompt: str
    target_new: str
    target_true: str | None
    unedited: dict[str, Any]
    edited: dict[str, Any]


class RemovedEntry(TypedDict):
    """A fact that batch ``batch`` took back; where its prompt was asked since, what came of it (`records.ReturnedEntry`)."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    index: int
    batch: int
    subject: str
    prompt: str
    target_new: str


def _checked(measured: dict[str, Any]) -> dict[str, Any]:
    """Numbers by name, but for what is measured of each matrix, of texts and of tasks."""
    for name, value in measured.items():
        if name == "energy":
            _ENERGIES.validate_python(value)
        elif name in _TABLES:
            _TABLES[name].validate_python(value)
        elif value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"'{name}' is no number")
    return measured


def _checked_age(age: dict[str, Any]) -> dict[str, Any]:
    """Numbers by name, with their intervals, of the facts that were edited so many edits ago."""
    _AGE.validate_python(age)
    return {**age, **_checked({name: value for name, value in age.items() if name not in ("edits_ago", "intervals")})}


Intervals = dict[str, Annotated[list[float], Len(2, 2)] | None]
_EditsAgo = TypedDict("_EditsAgo", {"from": int, "to": int})


class _Age(TypedDict):
    edits_ago: _EditsAgo
    intervals: Intervals


_AGE = TypeAdapter(_Age)
_ENERGIES: TypeAdapter[dict[str, EnergyEntry]] = TypeAdapter(dict[str, EnergyEntry])
_TABLES: dict[str, TypeAdapter[Any]] = {
    "texts": TypeAdapter(TextsEntry),
    "ability": TypeAdapter(dict[str, dict[str, Any]]),
    "routes": TypeAdapter(dict[str, float]),
}
Measured = Annotated[dict[str, Any], AfterValidator(_checked)]


class MetricsContent(TypedDict):
    """The content of ``metrics.json``: what was measured of all facts that stand, after batch ``after``.

    ``unedited`` and ``edited`` hold a number for each row of the catalogue that was measured, by name.
    """

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    schema: int
    after: int
    facts: int
    superseded: int
    unedited: Measured
    edited: Measured
    intervals: dict[str, Intervals]
    retention: list[Annotated[dict[str, Any], AfterValidator(_checked_age)]]
    per_fact: list[FactEntry]
    removed: NotRequired[int]
    removed_facts: NotRequired[list[RemovedEntry]]


_METRICS: TypeAdapter[MetricsContent] = TypeAdapter(MetricsContent)


def parse_metrics(content: object, where: str) -> MetricsContent:
    """The content of a ``metrics.json``.

    Raises:
        SphereEditError: something in it is missing or of another kind.
    """
    try:
        return _METRICS.validate_python(content)
    except ValidationError as error:
        raise SphereEditError(
            f"{where} is damaged ({first_fault(error)}); remove it, and sphere-edit edit RUN --resume makes it again"
        ) from None
