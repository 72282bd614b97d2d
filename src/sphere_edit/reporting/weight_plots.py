"""Figures of weight matrices before and after. Each function returns a matplotlib Figure; none shows or stores it."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from scipy import stats
from sklearn.manifold import TSNE
from torch import Tensor

from sphere_edit.numerics.linalg import principal_rank, right_eigenbasis, squared_singular_values
from sphere_edit.numerics.projection import unit_rows
from sphere_edit.reporting.plots import GREY, ticks
from sphere_edit.reporting.series import Series
from sphere_edit.reporting.words import short_name
from sphere_edit.text import label as plain

_BEFORE, _AFTER = "#56B4E9", "#D55E00"
_NEURONS_SHOWN = 200
_STEPS = 500  # of t-SNE, after which these maps are told from those of 1,000 by no eye
_NEURONS_EMBEDDED = 400
_ARROWS = 30


def idea(weight: Tensor, solved: Tensor, written: Tensor, title: str, eta: float = 0.5) -> Figure:
    """The idea of SPHERE on real neurons (the paper's figure 1): where an update pushes them, before and after projection.

    Neurons ``weight [d_out, d_in]`` are shown by their direction within three dimensions: the first two principal
    directions of the matrix, and the strongest direction of the update outside all principal ones. Arrows lead from
    the neurons that the update moves most to where ``solved`` and ``written [d_out, d_in]`` would put them.
    """
    rows = unit_rows(weight).double()
    values, vectors = right_eigenbasis(rows)
    principal = vectors[:, : principal_rank(values, eta)]
    outside = solved.double() - solved.double() @ principal @ principal.T
    strongest = right_eigenbasis(outside)[1][:, :1]
    axes3 = torch.cat([vectors[:, :2], strongest], dim=1)

    def place(matrix: Tensor) -> Tensor:
        inside = matrix.double() @ axes3
        return inside / inside.norm(dim=1, keepdim=True).clamp_min(1e-12)

    start = place(weight)
    moved = (solved.double() @ axes3).norm(dim=1).argsort(descending=True)[:_ARROWS]
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    angles = torch.linspace(0, 2 * torch.pi, 61, dtype=torch.float64)
    heights = torch.linspace(-1, 1, 13, dtype=torch.float64)
    for number, (update, name, colour) in enumerate(
        ((solved, "as solved", _AFTER), (written, "after SPHERE", "#0072B2")), 1
    ):
        axis: Any = figure.add_subplot(1, 2, number, projection="3d")
        for height in heights:
            radius = float((1 - height**2).clamp_min(0).sqrt())
            circle = (radius * angles.cos()).tolist(), (radius * angles.sin()).tolist(), [float(height)] * len(angles)
            axis.plot(*circle, color=GREY, linewidth=0.3, alpha=0.5)
        axis.scatter(*start.T.tolist(), s=2, color=GREY, alpha=0.6)
        end = place(weight + update)
        for index in moved.tolist():
            axis.plot(*torch.stack([start[index], end[index]]).T.tolist(), color=colour, linewidth=1.2)
        axis.scatter(*end[moved].T.tolist(), s=10, color=colour, label=name)
        for direction, label in enumerate(("u₁", "u₂")):
            tip = [1.25 * float(direction == part) for part in range(3)]
            axis.plot(*([0, value] for value in tip), color="black", linewidth=1)
            axis.text(*(1.15 * value for value in tip), label, fontsize=9, zorder=99, backgroundcolor="white")
        along = float((update.double() @ principal).norm() / update.double().norm())
        axis.set_title(f"{name}: ‖ΔW U‖ / ‖ΔW‖ = {along:.3f}", fontsize=9)
        axis.set_axis_off()
        axis.set_box_aspect((1, 1, 1), zoom=1.6)
        axis.view_init(elev=25, azim=35)
    figure.suptitle(f"Neurons of {plain(title)}; the {_ARROWS} that the last batch moves most", fontsize=9)
    return figure


def heat(run: Series) -> Figure:
    """Each edited matrix's change of energy over edits, in percent of the unedited one's."""
    names = list(run.energies)
    table = torch.tensor([[run.moved(name, batch.matrices[name]["energy"]) for batch in run.batches] for name in names])
    figure = Figure(figsize=(9.2, 0.9 + 0.32 * len(names)), layout="constrained")
    axis = figure.subplots()
    limit = float(table.abs().max()) or 1.0
    edges = [0, *run.batch_edits]
    image = axis.pcolormesh(edges, range(len(names) + 1), table, cmap="PuOr_r", vmin=-limit, vmax=limit)
    axis.set_yticks(
        [index + 0.5 for index in range(len(names))], [plain(short_name(name)) for name in names], fontsize=8
    )
    axis.invert_yaxis()
    axis.set_xlabel("Facts edited", fontsize=9)
    ticks(axis)
    figure.colorbar(image, ax=axis).set_label("ΔHE, %", fontsize=9)
    return figure


def spectrum(before: Tensor, after: Tensor, title: str, eta: float = 0.5) -> Figure:
    """Singular values of ΔW beside those of W, and how much of ΔW lies along the first k principal directions of W."""
    delta = (after - before).double()
    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for matrix, name, colour in ((before, "W before", _BEFORE), (delta, "ΔW, all batches", _AFTER)):
        sigma = squared_singular_values(matrix).flip(0).sqrt()
        sigma = sigma[sigma > 1e-6 * sigma[0]]
        left.plot(range(1, len(sigma) + 1), sigma.tolist(), color=colour, label=name)
    left.set_yscale("log")
    left.set_xlabel("Rank", fontsize=9)
    left.set_ylabel(f"Singular values of {plain(title)}", fontsize=9)
    left.legend(fontsize=9, frameon=False)
    values, vectors = right_eigenbasis(unit_rows(before))
    share = (delta @ vectors).square().sum(0).cumsum(0) / delta.square().sum()
    ranks = range(1, len(share) + 1)
    right.plot(ranks, (100 * share).tolist(), color=_AFTER, label="ΔW")
    right.plot(ranks, [100 * rank / before.shape[1] for rank in ranks], color=GREY, linestyle="--", label="chance")
    rank = principal_rank(values, eta)
    right.axvline(rank, color=GREY, linewidth=0.8)
    right.annotate(f"principal at η {eta:g}: {rank}", (rank, 2), fontsize=8, xytext=(4, 0), textcoords="offset points")
    right.set_xlabel("Principal directions of W, from the first", fontsize=9)
    right.set_ylabel("Share of ‖ΔW‖², %", fontsize=9)
    right.legend(fontsize=9, frameon=False, loc="upper left")
    for axis in (left, right):
        axis.tick_params(labelsize=8, which="both")
    return figure


def cosines(before: Tensor, after: Tensor, title: str) -> Figure:
    """Cosines between neurons before and after and their difference, ordered alike, and their histograms.

    At most 200 neurons are drawn, spread evenly over those sorted by their part along the first principal direction.
    """
    first, second = unit_rows(before), unit_rows(after)
    _, directions = right_eigenbasis(first)
    order = (first @ directions[:, 0]).argsort()
    shown = order[torch.linspace(0, len(order) - 1, min(_NEURONS_SHOWN, len(order))).round().long()]
    matrices = [rows[shown] @ rows[shown].T for rows in (first, second)]
    off = ~torch.eye(len(shown), dtype=torch.bool)
    # a few pairs lie far out; the scale is that of the rest, and they are drawn at its ends
    limit = max(float(matrix[off].abs().quantile(0.998)) for matrix in matrices)
    figure = Figure(figsize=(9.2, 5.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    top, bottom = parts
    axes = top.subplots(1, 3)
    image = None
    for axis, matrix, name in zip(
        axes, [*matrices, matrices[1] - matrices[0]], ("before", "after", "after − before"), strict=True
    ):
        image = axis.imshow(matrix, cmap="PuOr_r", vmin=-limit, vmax=limit)
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    assert image is not None
    top.colorbar(image, ax=axes, shrink=0.8).set_label("cosine", fontsize=9)
    axis = bottom.subplots()
    bins = torch.linspace(-limit, limit, 81).tolist()
    for matrix, name, colour in zip(matrices, ("before", "after"), (_BEFORE, _AFTER), strict=True):
        axis.hist(
            matrix[off].clamp(-limit, limit).tolist(),
            bins=bins,
            histtype="step",
            color=colour,
            label=name,
            density=True,
        )
    axis.set_xlabel(f"Cosine of two neurons of {plain(title)} ({len(shown)} of {len(order)} neurons)", fontsize=9)
    axis.set_ylabel("Density", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=9, frameon=False)
    return figure


def neighbourhoods(before: Tensor, after: Tensor, title: str, seed: int = 0) -> Figure:
    """Neurons before and after in the plane, by t-SNE of their directions, with the density along each axis.

    Both are embedded together, so that one map shows them; at most 400 neurons, evenly spread over the matrix's rows. Distances
    within a neighbourhood mean something, those between neighbourhoods do not (van der Maaten and Hinton 2008).
    """
    shown = torch.linspace(0, len(before) - 1, min(_NEURONS_EMBEDDED, len(before))).round().long()
    rows = torch.cat([unit_rows(before[shown]), unit_rows(after[shown])]).float()
    perplexity = min(30.0, (len(rows) - 1) / 3)
    map_of = TSNE(perplexity=perplexity, init="pca", max_iter=_STEPS, random_state=seed)
    placed = torch.from_numpy(map_of.fit_transform(rows.numpy()))
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(5, 1), height_ratios=(1, 5))
    axis = figure.add_subplot(grid[1, 0])
    top, right = figure.add_subplot(grid[0, 0], sharex=axis), figure.add_subplot(grid[1, 1], sharey=axis)
    count = len(shown)
    for points, name, colour, marker, width in (
        (placed[:count], "before", _BEFORE, "o", 3.5),
        (placed[count:], "after", _AFTER, "x", 1.2),
    ):
        x, y = points.T.tolist()
        axis.scatter(x, y, s=14, linewidths=0.8, color=colour, marker=marker, label=name)
        ends = placed.min(0).values.tolist(), placed.max(0).values.tolist()
        for values, low, high, density, across in ((x, ends[0][0], ends[1][0], top, True), (y, ends[0][1], ends[1][1], right, False)):  # fmt: skip
            at = torch.linspace(low, high, 200)
            height = stats.gaussian_kde(values)(at.numpy())
            density.plot(*((at, height) if across else (height, at)), color=colour, linewidth=width)
    for density in (top, right):
        density.set_axis_off()
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(f"t-SNE of {count} of {len(before)} neurons of {plain(title)}", fontsize=9)
    axis.legend(fontsize=9, frameon=False, loc="upper right")
    return figure
