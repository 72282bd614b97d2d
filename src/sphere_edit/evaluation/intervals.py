"""Means of metrics over facts, and their bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.scores import FactScores, PromptScore

_DRAWS = 1000  # of the bootstrap


def summarise(scores: Sequence[FactScores]) -> dict[str, float | None]:
    """Every metric of prompts by name: means over facts (of a fact's prompts first), in percent; None where nothing was measured."""
    values = _values(scores)
    return _named(_means(values, torch.ones(1, len(values), dtype=values.dtype))[0])


def intervals(
    scores: Sequence[FactScores], facts: Sequence[Hashable] | None = None, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile bootstrap intervals, over facts, of what `summarise` says, from 1,000 draws.

    ``facts`` names the fact of each score, where several are of one fact (runs with several seeds): it is drawn with all of them.
    """
    values = _values(scores)
    return _spans(_means(values, resampled(range(len(scores)) if facts is None else facts, seed)))


def difference_intervals(
    before: Sequence[FactScores],
    after: Sequence[FactScores],
    facts: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile bootstrap intervals of the change from ``before`` to ``after``, paired: the same facts in the same order."""
    if len(before) != len(after):
        raise ValueError(f"paired scores must be of the same facts, not {len(before)} and {len(after)}")
    weights = resampled(range(len(before)) if facts is None else facts, seed)
    return _spans(_means(_values(after), weights) - _means(_values(before), weights))


def resampled(facts: Sequence[Hashable], seed: int) -> Tensor:
    """How often each score is in each of 1,000 draws of the bootstrap over facts ``[draws, scores]``, float64."""
    numbers = {fact: number for number, fact in enumerate(dict.fromkeys(facts))}
    weights = torch.zeros(_DRAWS, len(numbers), dtype=torch.float64)
    if numbers:
        drawn = torch.randint(len(numbers), (_DRAWS, len(numbers)), generator=torch.Generator().manual_seed(seed))
        weights.scatter_add_(1, drawn, torch.ones_like(weights))
    return weights[:, [numbers[fact] for fact in facts]]


def _spans(means: Tensor) -> dict[str, tuple[float, float] | None]:
    """The middle 95 % of each column of ``means [draws, metrics]``."""
    low, high = means.nanquantile(torch.tensor([0.025, 0.975], dtype=means.dtype), dim=0)
    lows, highs = _named(low), _named(high)
    return {
        name: None if (first := lows[name]) is None or (last := highs[name]) is None else (first, last) for name in lows
    }


def _values(scores: Sequence[FactScores]) -> Tensor:
    """Each fact's share of prompts that went well ``[facts, protocols · parts]``, float64; NaN where it has none."""
    grid = [(part, protocol) for protocol in catalogue.PROTOCOLS for part in catalogue.PARTS]
    rows = [[_share(part.prompts(score), protocol.verdict) for part, protocol in grid] for score in scores]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(grid))


def _share(scores: Sequence[PromptScore], verdict: Callable[[PromptScore], float | None]) -> float:
    verdicts = [value for score in scores if (value := verdict(score)) is not None]
    return sum(verdicts) / len(verdicts) if verdicts else math.nan


def _means(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted means of columns in percent ``[draws, metrics]``, NaN left out, with each protocol's harmonic mean after its parts."""
    means = 100 * weighted_means(values, weights)
    parts = means.reshape(len(weights), len(catalogue.PROTOCOLS), len(catalogue.PARTS))
    known = parts.isfinite() & torch.tensor([part.always for part in catalogue.PARTS])
    harmonic = known.sum(-1) / torch.where(known, 1 / parts, 0.0).sum(-1)
    harmonic = torch.where(known.any(-1), harmonic, torch.nan)
    return torch.cat([parts, harmonic[..., None]], dim=-1).flatten(1)


def weighted_means(values: Tensor, weights: Tensor) -> Tensor:
    """Means ``[draws, columns]`` of ``values [scores, columns]`` with ``weights [draws, scores]``; what is NaN does not count."""
    there = values.isfinite().to(values.dtype)
    return (weights @ values.nan_to_num()) / (weights @ there)


def _named(means: Tensor) -> dict[str, float | None]:
    names = [metric.name for metric in catalogue.of_prompts()]
    return {name: None if math.isnan(value) else value for name, value in zip(names, means.tolist(), strict=True)}
