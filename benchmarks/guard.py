"""When would a limit have stopped some runs, and how did they fare? One run fixes the limits, the others judge them. Prints three tables.

sphere-edit edit smollm2 ../shared/data/counterfact.json --limit 480 --batch-size 20 --eval-every 1 --eval-sample 100 -o runs/a …
python benchmarks/guard.py runs/a runs/b runs/c        # runs/a fixes the limits
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sphere_edit.editing.guard import LIMITS, Limit
from sphere_edit.evaluation.catalogue import EFFICACY, PERPLEXITY, STRICT, of_part
from sphere_edit.reporting.series import Series, labelled

# for comparison, each with the largest value that the first run bore
DRIFT = Limit("relative drift of a matrix", "relative_drift", 1.65)
ENERGY = Limit("relative change of a matrix's energy", "energy_drift", 0.0029)
JUDGED = (*LIMITS, DRIFT, ENERGY)
TAKEN = of_part(EFFICACY, STRICT)
KEPT, SOUND = 0.9, 1.3  # of the best strict efficacy so far, and times the unedited perplexity: still good
LOST, BROKEN = 0.5, 2.0  # and bad
HARMED = 1.25  # times the unedited perplexity: where the numbers are compared at equal harm


def ratio(run: Series, index: int) -> float:
    """Perplexity times the unedited model's."""
    before, after = run.metrics[PERPLEXITY.name][0], run.metrics[PERPLEXITY.name][index]
    return after / before if before and after else float("inf")


def kept(run: Series, index: int) -> float:
    """Strict efficacy as a share of the best so far."""
    values = [value or 0.0 for value in run.metrics[TAKEN.name][1 : index + 1]]
    return values[-1] / max(values) if max(values) else 0.0


def first(run: Series, bad: Sequence[bool]) -> int | None:
    """Facts edited at the first checkpoint that is bad."""
    return next((edits for edits, verdict in zip(run.edits[1:], bad, strict=True) if verdict), None)


def last_good(run: Series) -> int:
    """The last checkpoint up to which the model was good throughout."""
    index = 0
    while index + 1 < len(run.edits) and kept(run, index + 1) >= KEPT and ratio(run, index + 1) <= SOUND:
        index += 1
    return index


def measured(run: Series, limit: Limit) -> list[float | None]:
    """A limit's number at each checkpoint after the unedited model."""
    at = {edits: batch.matrices for edits, batch in zip(run.batch_edits, run.batches, strict=True)}
    return [limit.measured(at[edits]) for edits in run.edits[1:]]


def main() -> None:
    """Print what the first run fixes, and when each limit would have stopped each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    runs = labelled(parser.parse_args().runs)
    good = last_good(runs[0])
    print(
        f"{runs[0].label} is good up to {runs[0].edits[good]} facts (strict efficacy at least {KEPT:g} of its best, perplexity at most × {SOUND:g}).\n"
    )
    print("| limit | its largest value until then | the guard's |\n|---|---|---|")
    for limit in JUDGED:
        values = [value for value in measured(runs[0], limit)[:good] if value is not None]
        print(f"| {limit.name} | {max(values, default=float('nan')):.4g} | {limit.value:g} |")
    names = [limit.name for limit in JUDGED]
    print(
        "\n| run | facts | strict efficacy, best and last | perplexity, last | good up to | halved at | perplexity doubled at | "
        + " | ".join(f"stopped by {name}" for name in names)
        + " |\n|"
        + "---|" * (7 + len(names))
    )
    for run in runs:
        steps = range(1, len(run.edits))
        values = [value or 0.0 for value in run.metrics[TAKEN.name][1:]]
        halved = first(run, [kept(run, step) < LOST for step in steps])
        doubled = first(run, [ratio(run, step) > BROKEN for step in steps])
        stops = [
            first(run, [value is not None and value > limit.value for value in measured(run, limit)])
            for limit in JUDGED
        ]
        cells = ["–" if stop is None else str(stop) for stop in (halved, doubled, *stops)]
        print(
            f"| {run.label} | {run.edits[-1]} | {max(values):.1f}, {values[-1]:.1f} | × {ratio(run, -1):.2f} | {run.edits[last_good(run)]} | {' | '.join(cells)} |"
        )
    print(
        f"\n| run | first checkpoint with perplexity above × {HARMED:g} | "
        + " | ".join(names)
        + " |\n|"
        + "---|" * (2 + len(names))
    )
    for run in runs:
        index = next((step for step in range(1, len(run.edits)) if ratio(run, step) > HARMED), None)
        if index is not None:
            found = [measured(run, limit)[index - 1] for limit in JUDGED]
            cells = ["–" if value is None else f"{value:.4g}" for value in found]
            print(f"| {run.label} | {run.edits[index]} facts, × {ratio(run, index):.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
