"""Does the energy go with the metrics over the checkpoints of some runs, and do plainer predictors? Prints one table.

sphere-edit edit smollm2 ../shared/data/counterfact.json --limit 200 --batch-size 10 --eval-every 1 -o runs/a …
python benchmarks/correlation.py runs/a runs/b
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sphere_edit.evaluation.catalogue import EFFICACY, GENERALIZATION, PERPLEXITY, SPECIFICITY, STRICT, of_part
from sphere_edit.reporting.correlation import PREDICTORS, Correlation, correlate, predictors
from sphere_edit.reporting.series import labelled

METRICS = (of_part(EFFICACY, STRICT), of_part(GENERALIZATION), of_part(SPECIFICITY), PERPLEXITY)


def main() -> None:
    """Read runs, print Spearman's correlations of levels and of differences with their p-values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    print("| run | metric | " + " | ".join(PREDICTORS.values()) + " |\n|---|---|" + "---|" * len(PREDICTORS))
    for run in labelled(args.runs):
        for metric in METRICS:
            cells = []
            for values in predictors(run).values():
                levels, steps = (correlate(values, run.judged(metric.name), differences=kind) for kind in (False, True))
                cells.append(f"{said(levels)}; {said(steps)}")
            print(f"| {run.label} | {metric.words} | {' | '.join(cells)} |")
    print("\nIn each cell: Spearman's ρ (p by block permutation) of levels; of differences between checkpoints.")
    print(
        f"| run | facts | {PERPLEXITY.words} | {METRICS[0].words} | energy, change | largest drift | collateral, sum |\n|---|---|---|---|---|---|---|"
    )
    for run in labelled(args.runs):
        found = predictors(run)
        for index in sorted({0, len(run.edits) // 4, len(run.edits) // 2, 3 * len(run.edits) // 4, len(run.edits) - 1}):
            strict, perplexity = (run.metrics[metric.name] for metric in (METRICS[0], PERPLEXITY))
            ratio = (perplexity[index] or float("nan")) / (perplexity[0] or float("nan"))
            collateral = found["collateral"][index]
            print(
                f"| {run.label} | {run.edits[index]} | × {ratio:.3f} | {strict[index]:.1f} | {100 * run.energy[index]:+.4f} % "
                f"| {found['drift'][index]:.3f} | {'–' if collateral is None else f'{collateral:.3f}'} |"
            )


def said(correlation: Correlation | None) -> str:
    """One correlation."""
    return (
        "–" if correlation is None else f"{correlation.rho:+.2f} ({correlation.p:.3f})".replace("(0.000)", "(< 0.001)")
    )


if __name__ == "__main__":
    main()
