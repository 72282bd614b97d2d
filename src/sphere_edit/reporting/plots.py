"""Figures of runs. Each function returns a matplotlib Figure; none shows or stores it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.ticker import MaxNLocator
from scipy import stats
from sklearn.manifold import TSNE
from torch import Tensor

from sphere_edit.numerics.linalg import principal_rank, right_eigenbasis, squared_singular_values
from sphere_edit.numerics.projection import unit_rows
from sphere_edit.reporting.colours import colour_of
from sphere_edit.reporting.results import short_name
from sphere_edit.reporting.series import METRICS, Series
from sphere_edit.text import label as plain

_BEFORE, _AFTER, _GREY = "#56B4E9", "#D55E00", "#808080"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_NEURONS_SHOWN = 200
_NEURONS_EMBEDDED = 400
_ARROWS = 30


def trends(runs: Sequence[Series], columns: int = 2) -> Figure:
    """Energy and every metric over edits; a colour a method, solid with SPHERE and dashed without.

    The end of each metric's curve says Spearman's correlation with the energy over the checkpoints.
    """
    panels: list[tuple[str, str]] = [("energy", "Energy of edited matrices,\nchange in %"), *METRICS.items()]
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (key, label) in zip(axes, panels, strict=False):
        for run in runs:
            values = [100 * value for value in run.energy] if key == "energy" else run.metrics[key]
            points = [(x, y) for x, y in zip(run.edits, values, strict=True) if y is not None]
            if points:
                axis.plot(*zip(*points, strict=True), **_line(run))
        if key == "perplexity" and _spread([v for run in runs for v in run.metrics[key] if v]) > 10:
            axis.set_yscale("log")
        axis.set_ylabel(label, fontsize=9)
        _ticks(axis)
        if key != "energy":
            _correlations(axis, runs, key)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("Facts edited", fontsize=9)
    _legend(figure, axes[0], len(runs))
    return figure


def differences(runs: Sequence[Series]) -> Figure:
    """ΔHE against the change of each metric between consecutive checkpoints.

    All runs together: a regression line with its 95 % confidence band, Pearson's and Spearman's correlation; and an
    ellipse for each run that holds 95 % of a normal distribution of its points' mean and covariance.
    """
    keys = ("efficacy_strict", "generalization", "specificity", "perplexity")
    figure = Figure(figsize=(9.2, 6.4), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for axis, key in zip(axes, keys, strict=True):
        together: list[tuple[float, float]] = []
        for run in runs:
            values = run.judged(key)
            if key == "perplexity":  # a broken model's is thousands of times a sound one's
                values = [None if value is None else math.log(value) for value in values]
            steps = [
                (100 * (run.energy[i + 1] - run.energy[i]), after - before)
                for i, (before, after) in enumerate(pairwise(values))
                if before is not None and after is not None
            ]
            together += steps
            if steps:
                style = _line(run)
                filled = {"facecolors": style["color"] if run.sphere else "none"}
                axis.scatter(
                    *zip(*steps, strict=True),
                    s=16,
                    marker=style["marker"],
                    edgecolors=style["color"],
                    label=plain(run.label),
                    **filled,
                )
                _ellipse(axis, steps, style["color"])
        if len(together) > 3:
            axis.set_title(_regression(axis, together), fontsize=9)
        axis.axhline(0, color=_GREY, linewidth=0.5)
        axis.axvline(0, color=_GREY, linewidth=0.5)
        name = "ln perplexity" if key == "perplexity" else f"{METRICS[key][0].lower()}{METRICS[key][1:]}"
        axis.set_ylabel(f"Change of {name}", fontsize=9)
        axis.set_xlabel("Change of energy, % of the unedited", fontsize=9)
        axis.tick_params(labelsize=8)
    _legend(figure, axes[0], len(runs))
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
    placed = torch.from_numpy(TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows.numpy()))
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
    right.plot(ranks, [100 * rank / before.shape[1] for rank in ranks], color=_GREY, linestyle="--", label="chance")
    rank = principal_rank(values, eta)
    right.axvline(rank, color=_GREY, linewidth=0.8)
    right.annotate(f"principal at η {eta:g}: {rank}", (rank, 2), fontsize=8, xytext=(4, 0), textcoords="offset points")
    right.set_xlabel("Principal directions of W, from the first", fontsize=9)
    right.set_ylabel("Share of ‖ΔW‖², %", fontsize=9)
    right.legend(fontsize=9, frameon=False, loc="upper left")
    for axis in (left, right):
        axis.tick_params(labelsize=8, which="both")
    return figure


def heat(run: Series) -> Figure:
    """Each edited matrix's change of energy over edits, in percent of the unedited one's."""
    names = list(run.energies)
    table = torch.tensor(
        [[100 * (batch.matrices[name]["energy"] / run.energies[name] - 1) for batch in run.batches] for name in names]
    )
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
    _ticks(axis)
    figure.colorbar(image, ax=axis).set_label("ΔHE, %", fontsize=9)
    return figure


def abilities(runs: Sequence[Series], columns: int = 2) -> Figure:
    """General ability over edits, one panel a task, with one standard error up and down and what guessing would score."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.abilities))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.6 * columns, 0.6 + 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, task in zip(axes, tasks, strict=False):
        for run in runs:
            points = run.abilities.get(task, [])
            if points:
                x = [edits for edits, _ in points]
                scale, unit = (100, ", %") if points[0][1]["share"] else (1, "")
                y = [scale * score["value"] for _, score in points]
                errors = [scale * (score["error"] or 0.0) for _, score in points]
                axis.errorbar(x, y, yerr=errors, capsize=2, **_line(run))
                if points[0][1]["chance"] is not None:
                    axis.axhline(100 * points[0][1]["chance"], color=_GREY, linewidth=0.8, linestyle=":")
                axis.set_ylabel(plain(f"{task}, {points[0][1]['metric']}{unit}"), fontsize=9)
        axis.set_xlabel("Facts edited", fontsize=9)
        _ticks(axis)
    for axis in axes[len(tasks) :]:
        axis.axis("off")
    _legend(figure, axes[0], len(runs))
    return figure


def retention(runs: Sequence[Series]) -> Figure:
    """What is left of earlier facts: the metrics after the last batch against how many edits ago a fact was edited, with 95 % intervals."""
    keys = ("efficacy_strict", "generalization_strict", "specificity")
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    axes = figure.subplots(1, len(keys))
    for axis, key in zip(axes, keys, strict=True):
        for run in runs:
            ages = [age for age in run.retention() if age[key] is not None]
            x = [(age["edits_ago"]["from"] + age["edits_ago"]["to"]) / 2 for age in ages]
            y = [age[key] for age in ages]
            spans = [age["intervals"][key] for age in ages]
            errors = [[v - low for v, (low, _) in zip(y, spans, strict=True)], [high - v for v, (_, high) in zip(y, spans, strict=True)]]  # fmt: skip
            axis.errorbar(x, y, yerr=errors, capsize=2, **_line(run))
        axis.set_ylim(-3, 103)
        axis.set_ylabel(METRICS[key], fontsize=9)
        axis.set_xlabel("Edits since", fontsize=9)
        _ticks(axis)
    _legend(figure, axes[0], len(runs))
    return figure


def _legend(figure: Figure, axis: Axes, runs: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    columns = min(3, max(1, runs))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=9, frameon=False)


def _line(run: Series) -> dict[str, Any]:
    return {
        "color": colour_of(run.method),
        "linestyle": "-" if run.sphere else "--",
        "linewidth": 1.4,
        "marker": _MARKERS[run.kin % len(_MARKERS)],
        "markersize": 3 if run.kin == 0 else 4,
        "label": plain(run.label),
    }


def _ticks(axis: Axes) -> None:
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _spread(values: Sequence[float]) -> float:
    return max(values) / min(values) if values and min(values) > 0 else 1.0


def _correlations(axis: Axes, runs: Sequence[Series], key: str) -> None:
    """Spearman's correlation of each run's metric with its energy, in the run's colour beside the axis."""
    row = 0
    for run in runs:
        pairs = [(e, v) for e, v in zip(run.energy, run.judged(key), strict=True) if v is not None]
        if len(pairs) < 4 or len({v for _, v in pairs}) < 2 or len({e for e, _ in pairs}) < 2:
            continue
        rho = stats.spearmanr(*zip(*pairs, strict=True)).statistic
        axis.annotate(
            f"ρ {rho:+.2f}", (1.01, 1), xycoords="axes fraction", xytext=(0, -9 - 10 * row), textcoords="offset points",
            fontsize=7, color=colour_of(run.method), style="normal" if run.sphere else "italic",
        )  # fmt: skip
        row += 1


def _regression(axis: Axes, points: Sequence[tuple[float, float]]) -> str:
    """Draw the least-squares line with the 95 % confidence band of its mean; say the correlations."""
    x, y = torch.tensor(points, dtype=torch.float64).T
    if len(set(x.tolist())) < 3 or len(set(y.tolist())) < 2:
        return ""
    n, centre = len(x), x.mean()
    spread = (x - centre).square().sum()
    slope = ((x - centre) * (y - y.mean())).sum() / spread
    residual = y - y.mean() - slope * (x - centre)
    grid = torch.linspace(float(x.min()), float(x.max()), 50, dtype=torch.float64)
    line = y.mean() + slope * (grid - centre)
    error = (residual.square().sum() / (n - 2) * (1 / n + (grid - centre).square() / spread)).sqrt()
    half = float(stats.t.ppf(0.975, n - 2)) * error
    axis.plot(grid.tolist(), line.tolist(), color="black", linewidth=1)
    axis.fill_between(
        grid.tolist(), (line - half).tolist(), (line + half).tolist(), color=_GREY, alpha=0.2, linewidth=0
    )
    pearson, spearman = stats.pearsonr(x, y).statistic, stats.spearmanr(x, y).statistic
    return f"Pearson {pearson:+.2f}, Spearman {spearman:+.2f}, {n} steps"


def _ellipse(axis: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    """The 95 % ellipse of a normal distribution with the points' mean and covariance."""
    if len(points) < 3:
        return
    data = torch.tensor(points, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(data.T.cov())
    if not bool((values > 0).all()):
        return
    width, height = (2 * (values * float(stats.chi2.ppf(0.95, 2))).sqrt()).tolist()
    angle = float(torch.rad2deg(torch.atan2(vectors[1, 0], vectors[0, 0])))
    centre = data.mean(0).tolist()
    axis.add_patch(
        Ellipse((centre[0], centre[1]), width, height, angle=angle, fill=False, edgecolor=colour, linewidth=0.8)
    )


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
            axis.plot(*circle, color=_GREY, linewidth=0.3, alpha=0.5)
        axis.scatter(*start.T.tolist(), s=2, color=_GREY, alpha=0.6)
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
