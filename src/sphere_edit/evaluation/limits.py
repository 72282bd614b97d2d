"""Limits that a pipeline sets to what is measured of a model: ``efficacy_strict=98``, ``perplexity_ratio=1.1``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.catalogue import HELDOUT, Metric, of_prompts

_RATIO = "_ratio"  # after a metric's name: as a multiple of the unedited model's
_RATIOS = {f"{metric.name}{_RATIO}": metric for metric in HELDOUT if metric.ratio}


@dataclass(frozen=True)
class Limit:
    """One limit: the metric may not be under ``bound``, or with ``over`` not over it."""

    name: str
    bound: float
    over: bool

    @property
    def words(self) -> str:
        """As it was set: "efficacy_strict ≥ 98"."""
        return f"{self.name} {'≤' if self.over else '≥'} {self.bound:g}"


@dataclass(frozen=True)
class Verdict:
    """A limit and what was measured; what could not be measured does not keep a limit."""

    limit: Limit
    value: float | None

    @property
    def kept(self) -> bool:
        """Whether the value is there and on the right side."""
        if self.value is None or math.isnan(self.value):
            return False
        return self.value <= self.limit.bound if self.limit.over else self.value >= self.limit.bound

    @property
    def words(self) -> str:
        """The limit, and what came."""
        return f"{self.limit.words}: {'not measured' if self.value is None else f'{self.value:.6g}'}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        kind = "fail_over" if self.limit.over else "fail_under"
        return {"name": self.limit.name, kind: self.limit.bound, "value": self.value, "kept": self.kept}


def metrics_with_limits() -> dict[str, Metric]:
    """Everything that a limit can be set to, by name."""
    return {metric.name: metric for metric in (*of_prompts(), *HELDOUT)} | _RATIOS


def read_limits(under: Iterable[str], over: Iterable[str]) -> list[Limit]:
    """Limits as they are given: ``NAME=NUMBER``.

    Raises:
        SphereEditError: a name that is no metric's, with all that are; or no number.
    """
    return [*(_read(text, False) for text in under), *(_read(text, True) for text in over)]


def needs_text(limits: Sequence[Limit]) -> bool:
    """Whether any of them is about held-out text."""
    return any(metrics_with_limits()[limit.name].of == "heldout" for limit in limits)


def judge(limits: Sequence[Limit], summary: Mapping[str, Mapping[str, float | None]]) -> list[Verdict]:
    """What becomes of each limit, given the means of the ``edited`` and the ``unedited`` model by name."""
    edited, unedited = summary["edited"], summary["unedited"]
    return [Verdict(limit, _value(limit.name, edited, unedited)) for limit in limits]


def _value(name: str, edited: Mapping[str, float | None], unedited: Mapping[str, float | None]) -> float | None:
    if name not in _RATIOS:
        return edited.get(name)
    now, before = (side.get(_RATIOS[name].name) for side in (edited, unedited))
    return None if now is None or not before else now / before


def _read(text: str, over: bool) -> Limit:
    name, _, number = (part.strip() for part in text.partition("="))
    option, known = "--fail-over" if over else "--fail-under", metrics_with_limits()
    if name not in known:
        raise SphereEditError(f"{option} '{text}': there is no metric '{name}'; there are {', '.join(known)}")
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    if math.isnan(bound):
        raise SphereEditError(f"{option} '{text}': expected NAME=NUMBER, such as {name}=98")
    return Limit(name, bound, over)
