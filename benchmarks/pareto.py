"""What runs know against what they cost at one point of a stream, with 95 % bootstrap intervals: a figure of four panels and a table.

sphere-edit bench configs/quality.yaml -o runs/quality
python benchmarks/pareto.py runs/quality/runs/* --at 900 -o pareto.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lifetime import nearest, scores
from matplotlib.figure import Figure

from sphere_edit.evaluation.metrics import intervals, summarise
from sphere_edit.reporting.plots import COLOURS
from sphere_edit.reporting.series import Series

KNOWN = {"efficacy_strict": "Strict efficacy, %", "generalization_strict": "Strict generalization, %"}
MARKERS = "osD^vP*X<>hpdH"
TICKS = (1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
Point = tuple[Series, str, float, dict[str, Any], dict[str, Any]]


def point(run: Series, edits: int) -> Point:
    """A run at the checkpoint nearest to so many facts: label, perplexity times the unedited one's, means, intervals."""
    index = nearest(run, edits)
    _, asked = scores(run, index)
    perplexity = run.metrics["perplexity"]
    ratio = (perplexity[index] or float("nan")) / (perplexity[0] or float("nan"))
    parts = run.folder.name.split("--")  # a bench's: model, data, method, variant, seed
    label = (parts[2].replace("-", " ") if len(parts) == 5 else run.method) + (" + SPHERE" if run.sphere else "")
    return run, label, ratio, dict(summarise(asked)), dict(intervals(asked))


def drawn(points: list[Point], title: str) -> Figure:
    """Rows: what is known; columns: what it costs. Up and left (perplexity), up and right (specificity) is better."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    for row, (name, label) in enumerate(KNOWN.items()):
        for column in range(2):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            for number, (run, named, ratio, means, spans) in enumerate(points):
                x = ratio if column == 0 else means["specificity"]
                low, high = spans[name]
                errors: dict[str, Any] = {"yerr": [[means[name] - low], [high - means[name]]]}
                if column == 1:
                    left, right = spans["specificity"]
                    errors["xerr"] = [[x - left], [right - x]]
                filled = "full" if run.sphere else "none"
                axes.errorbar(
                    [x], [means[name]], **errors, marker=MARKERS[number % len(MARKERS)], fillstyle=filled, capsize=2,
                    color=COLOURS[run.method], markersize=8, linewidth=1, label=named if row + column == 0 else None,
                )  # fmt: skip
            axes.set_ylabel(label)
            if column == 0:
                axes.set_xscale("log")
                axes.set_xlabel("Perplexity, times the unedited model's")
                axes.set_xticks([], minor=True)
                axes.set_xticks([tick for tick in TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]])
                axes.xaxis.set_major_formatter(lambda value, _: f"× {value:.3g}")
            else:
                axes.set_xlabel("Specificity, %")
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def main() -> None:
    """Read the runs, print the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--at", type=int, default=900)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    points = [point(Series.read(folder), args.at) for folder in args.runs]
    points.sort(key=lambda found: found[2])
    print(
        "| run | facts edited | strict efficacy | strict generalization | specificity | perplexity |\n|---|---|---|---|---|---|"
    )
    for run, label, ratio, means, spans in points:
        cells = [f"{means[name]:.1f} [{spans[name][0]:.1f}, {spans[name][1]:.1f}]" for name in (*KNOWN, "specificity")]
        print(f"| {label} | {run.edits[nearest(run, args.at)]} | {' | '.join(cells)} | × {ratio:.3f} |")
    if args.output:
        drawn(points, f"After {points[0][0].edits[nearest(points[0][0], args.at)]} facts").savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
