"""Do two series over a run go together? Rank correlation of levels and of differences, with p-values that know of drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats

from sphere_edit.reporting.series import Series

PREDICTORS = {
    "energy": "energy, change",
    "energy_distance": "energy, |change|",
    "drift": "‖W − W0‖/‖W0‖",
    "collateral": "collateral ratio, sum",
}


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ of two series, and the share of block permutations whose |ρ| is no smaller; how many points."""

    rho: float
    p: float
    points: int


def predictors(run: Series) -> dict[str, list[float | None]]:
    """What might warn of a failing model, at each of a run's checkpoints: by the names of `PREDICTORS`.

    The largest relative drift of a matrix, and the sum over matrices of their collateral ratios, None without second moments.
    """
    at = {0: 0, **{edits: index + 1 for index, edits in enumerate(run.batch_edits)}}
    drift: list[float | None] = []
    collateral: list[float | None] = []
    for edits in run.edits:
        if edits == 0:
            drift.append(0.0)
            collateral.append(0.0)
            continue
        matrices = run.batches[at[edits] - 1].matrices.values()
        drift.append(max(matrix["relative_drift"] for matrix in matrices))
        ratios = [ratio for matrix in matrices if (ratio := matrix["collateral_ratio"]) is not None]
        collateral.append(sum(ratios) if len(ratios) == len(matrices) else None)
    levels: list[float | None] = list(run.energy)
    distance: list[float | None] = [abs(value) for value in run.energy]
    return {"energy": levels, "energy_distance": distance, "drift": drift, "collateral": collateral}


def correlate(
    first: Sequence[float | None],
    second: Sequence[float | None],
    differences: bool = False,
    block: int = 3,
    draws: int = 5000,
    seed: int = 0,
) -> Correlation | None:
    """Spearman's ρ of two series measured together, or of their steps; None with fewer than four points or a constant one.

    Neighbouring points of a drifting series resemble one another, and two such series correlate whatever they mean. So the second
    one is cut into blocks of ``block`` consecutive points, which are put in random order: what is left of the resemblance stays
    within the blocks. Levels that drift the whole way are still told apart from chance too easily; differences are not.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    x, y = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T
    if differences:
        x, y = x.diff(), y.diff()
    if len(x) < 4 or len(x.unique()) < 2 or len(y.unique()) < 2:
        return None
    ranks_x, ranks_y = (torch.from_numpy(stats.rankdata(values.numpy())) for values in (x, y))
    rho = _pearson(ranks_x, ranks_y[None])
    blocks = list(ranks_y.split(block))
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(blocks), generator=generator).tolist() for _ in range(draws)]
    permuted = torch.stack([torch.cat([blocks[index] for index in order]) for order in orders])
    beyond = int((_pearson(ranks_x, permuted).abs() >= rho.abs() - 1e-12).sum())
    return Correlation(float(rho), (1 + beyond) / (1 + draws), len(x))


def _pearson(x: torch.Tensor, many: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of ``x [n]`` with each row of ``many [m, n]``."""
    a, b = x - x.mean(), many - many.mean(1, keepdim=True)
    return (b @ a) / (a.norm() * b.norm(dim=1))
