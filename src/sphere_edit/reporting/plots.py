"""Figures of what runs measured. Each function returns a matplotlib Figure; none shows or stores it."""

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

from sphere_edit.counting import counted
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.catalogue import EFFICACY, GENERALIZATION, PERPLEXITY, SPECIFICITY, STRICT, of_part
from sphere_edit.reporting.colours import colour_of
from sphere_edit.reporting.series import Series, any_known
from sphere_edit.text import label as plain

GREY = "#808080"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def trends(runs: Sequence[Series], columns: int = 2) -> Figure:
    """Energy and every metric over edits; a colour a method, solid with SPHERE and dashed without.

    The end of each metric's curve says Spearman's correlation with the energy over the checkpoints.
    """
    metrics = catalogue.measured(catalogue.on_page(), lambda metric: any_known(runs, metric))
    shown = [(metric.name, metric.heading) for metric in metrics]
    panels = [("energy", "Energy of edited matrices,\nchange in %"), *shown]
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (key, label) in zip(axes, panels, strict=False):
        for run in runs:
            values = [100 * value for value in run.energy] if key == "energy" else run.metrics[key]
            points = [(x, y) for x, y in zip(run.edits, values, strict=True) if y is not None]
            if points:
                axis.plot(*zip(*points, strict=True), **_line(run))
        if key == PERPLEXITY.name and _spread([v for run in runs for v in run.metrics[key] if v]) > 10:
            axis.set_yscale("log")
        axis.set_ylabel(label, fontsize=9)
        ticks(axis)
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
    shown = (of_part(EFFICACY, STRICT), of_part(GENERALIZATION), of_part(SPECIFICITY), PERPLEXITY)
    figure = Figure(figsize=(9.2, 6.4), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for axis, metric in zip(axes, shown, strict=True):
        together: list[tuple[float, float]] = []
        for run in runs:
            values = run.judged(metric.name)
            if metric is PERPLEXITY:  # a broken model's is thousands of times a sound one's
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
        axis.axhline(0, color=GREY, linewidth=0.5)
        axis.axvline(0, color=GREY, linewidth=0.5)
        name = "ln perplexity" if metric is PERPLEXITY else f"{metric.heading[0].lower()}{metric.heading[1:]}"
        axis.set_ylabel(f"Change of {name}", fontsize=9)
        axis.set_xlabel("Change of energy, % of the unedited", fontsize=9)
        axis.tick_params(labelsize=8)
    _legend(figure, axes[0], len(runs))
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
                    axis.axhline(100 * points[0][1]["chance"], color=GREY, linewidth=0.8, linestyle=":")
                axis.set_ylabel(plain(f"{task}, {points[0][1]['metric']}{unit}"), fontsize=9)
        axis.set_xlabel("Facts edited", fontsize=9)
        ticks(axis)
    for axis in axes[len(tasks) :]:
        axis.axis("off")
    _legend(figure, axes[0], len(runs))
    return figure


def retention(runs: Sequence[Series]) -> Figure:
    """What is left of earlier facts: the metrics after the last batch against how many edits ago a fact was edited, with 95 % intervals."""
    shown = (of_part(EFFICACY, STRICT), of_part(GENERALIZATION, STRICT), of_part(SPECIFICITY))
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    axes = figure.subplots(1, len(shown))
    for axis, metric in zip(axes, shown, strict=True):
        key = metric.name
        for run in runs:
            ages = [age for age in run.retention() if age[key] is not None]
            x = [(age["edits_ago"]["from"] + age["edits_ago"]["to"]) / 2 for age in ages]
            y = [age[key] for age in ages]
            spans = [age["intervals"][key] for age in ages]
            errors = [[max(v - low, 0) for v, (low, _) in zip(y, spans, strict=True)], [max(high - v, 0) for v, (_, high) in zip(y, spans, strict=True)]]  # fmt: skip
            axis.errorbar(x, y, yerr=errors, capsize=2, **_line(run))
        axis.set_ylim(-3, 103)
        axis.set_ylabel(metric.heading, fontsize=9)
        axis.set_xlabel("Edits since", fontsize=9)
        ticks(axis)
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


def ticks(axis: Axes) -> None:
    """Small labels, and whole numbers along x."""
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
    axis.fill_between(grid.tolist(), (line - half).tolist(), (line + half).tolist(), color=GREY, alpha=0.2, linewidth=0)
    pearson, spearman = stats.pearsonr(x, y).statistic, stats.spearmanr(x, y).statistic
    return f"Pearson {pearson:+.2f}, Spearman {spearman:+.2f}, {counted(n, 'step')}"


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
