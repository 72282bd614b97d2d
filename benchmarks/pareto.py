"""What runs know against what they cost at one point of a stream, with 95 % bootstrap intervals: a table and a figure of four panels.

sphere-edit bench configs/quality.yaml -o runs/quality
python benchmarks/pareto.py runs/quality/runs/* --at 1050 -o pareto.png

The figure's numbers are written beside it, to pareto.csv; given in place of a run folder, such a file brings in the rows of runs that
are elsewhere, or gone.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from lifetime import SHOWN, nearest, scores
from matplotlib.figure import Figure

from sphere_edit.evaluation.catalogue import DIVERGENCE, PERPLEXITY
from sphere_edit.evaluation.intervals import intervals, summarise
from sphere_edit.reporting.colours import colour_of
from sphere_edit.reporting.series import Series

*KNOWN, OTHERS = SHOWN  # how much is known of what was edited, and of what was not
MARKERS = "osD^vP*X<>hpdH8"
BROKEN = 5.0  # times the perplexity: in the table, and named above the figure, which they would leave no room in
TICKS = (1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)


@dataclass(frozen=True)
class Row:
    """A run at one checkpoint."""

    label: str
    method: str
    sphere: bool
    facts: int  # edited by then
    asked: int  # of those
    scores: dict[str, tuple[float, float, float]]  # %, with the ends of its interval
    perplexity: float  # times the unedited model's
    divergence: float | None  # KL(unedited ‖ edited) on held-out text, nats a token

    @classmethod
    def of(cls, run: Series, edits: int) -> Row:
        """A run at the checkpoint nearest to so many facts."""
        index = nearest(run, edits)
        _, asked = scores(run, index)
        means, spans = dict(summarise(asked)), dict(intervals(asked))
        perplexity = run.metrics[PERPLEXITY.name]
        parts = run.folder.name.split("--")  # a bench's: model, data, method, variant, seed
        return cls(
            (parts[2].replace("-", " ") if len(parts) == 5 else run.method) + (" + SPHERE" if run.sphere else ""),
            run.method,
            run.sphere,
            run.edits[index],
            len(asked),
            {m.name: (means[m.name], *spans[m.name]) for m in SHOWN},  # type: ignore[misc]
            (perplexity[index] or float("nan")) / (perplexity[0] or float("nan")),
            run.metrics[DIVERGENCE.name][index],
        )

    def cells(self) -> dict[str, Any]:
        """As a line of the file."""
        spread = {
            name + end: round(value, 2)
            for name, span in self.scores.items()
            for end, value in zip(("", "_low", "_high"), span, strict=True)
        }
        return {
            "label": self.label,
            "method": self.method,
            "sphere": int(self.sphere),
            "facts": self.facts,
            "asked": self.asked,
            PERPLEXITY.name: round(self.perplexity, 4),
            DIVERGENCE.name: None if self.divergence is None else round(self.divergence, 4),
            **spread,
        }

    @classmethod
    def read(cls, cells: dict[str, str]) -> Row:
        """From a line of the file."""
        return cls(
            cells["label"],
            cells["method"],
            cells["sphere"] == "1",
            int(cells["facts"]),
            int(cells["asked"]),
            {
                m.name: (float(cells[m.name]), float(cells[m.name + "_low"]), float(cells[m.name + "_high"]))
                for m in SHOWN
            },
            float(cells[PERPLEXITY.name]),
            float(cells[DIVERGENCE.name]) if cells[DIVERGENCE.name] else None,
        )

    def line(self) -> str:
        """As a line of the printed table."""
        cells = [f"{value:.1f} [{low:.1f}, {high:.1f}]" for value, low, high in self.scores.values()]
        kl = "" if self.divergence is None else f"{self.divergence:.3f}"
        return f"| {self.label} | {self.facts} | {self.asked} | {' | '.join(cells)} | × {self.perplexity:.3f} | {kl} |"


def ticks(low: float, high: float) -> list[float]:
    """Round ratios between two, no two of them closer than a twelfth of the axis."""
    chosen: list[float] = []
    for tick in TICKS:
        if low <= tick <= high and (not chosen or log(tick / chosen[-1]) >= log(high / low) / 12):
            chosen.append(tick)
    return chosen


def drawn(rows: list[Row]) -> Figure:
    """Down: what is known; across: what it costs. Up and left (perplexity), up and right (specificity) is better."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    broken = [f"{row.label} × {row.perplexity:.3g}" for row in rows if not row.perplexity <= BROKEN]
    rows = [row for row in rows if row.perplexity <= BROKEN] or rows
    for above, metric in enumerate(KNOWN):
        for column in range(2):
            axes = figure.add_subplot(2, 2, 2 * above + column + 1)
            for number, row in enumerate(rows):
                value, low, high = row.scores[metric.name]
                errors: dict[str, Any] = {"yerr": [[value - low], [high - value]]}
                x = row.perplexity
                if column == 1:
                    x, left, right = row.scores[OTHERS.name]
                    errors["xerr"] = [[x - left], [right - x]]
                axes.errorbar(
                    [x], [value], **errors, marker=MARKERS[number % len(MARKERS)],
                    fillstyle="full" if row.sphere else "none", capsize=2, color=colour_of(row.method), markersize=8,
                    linewidth=1, label=row.label if above + column == 0 else None,
                )  # fmt: skip
            axes.set_ylabel(metric.heading)
            if column == 0:
                axes.set_xscale("log")
                axes.set_xlabel(f"{PERPLEXITY.label}, times the unedited model's")
                axes.set_xticks([], minor=True)
                axes.set_xticks(ticks(*axes.get_xlim()))
                axes.xaxis.set_major_formatter(lambda value, _: f"× {value:.3g}")
            else:
                axes.set_xlabel(OTHERS.heading)
    edited = {row.facts for row in rows}
    title = f"After {' to '.join(map(str, sorted({min(edited), max(edited)})))} facts"
    figure.suptitle(f"{title} (not drawn, {PERPLEXITY.words}: {', '.join(broken)})" if broken else title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def rows_of(path: Path, edits: int) -> list[Row]:
    """The row of a run folder, or those of a figure's file."""
    if path.suffix != ".csv":
        return [Row.of(Series.read(path), edits)]
    with path.open(encoding="utf-8", newline="") as lines:
        return [Row.read(cells) for cells in csv.DictReader(lines)]


def main() -> None:
    """Read the runs, print the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or files written beside other figures")
    parser.add_argument("--at", type=int, default=1050, help="facts edited")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    found = [row for path in args.runs for row in rows_of(path, args.at)]
    rows = sorted({row.label: row for row in found}.values(), key=lambda row: row.perplexity)  # of two, the later given
    titles = ("run", "facts", "asked", *(metric.words for metric in (*SHOWN, PERPLEXITY, DIVERGENCE)))
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    print("\n".join(row.line() for row in rows))
    if args.output:
        with args.output.with_suffix(".csv").open("w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, list(rows[0].cells()), lineterminator="\n")
            writer.writeheader()
            writer.writerows(row.cells() for row in rows)
        drawn(rows).savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
