"""How long some runs of the same facts last, and what SPHERE changes on the way, paired by fact. Prints two tables.

sphere-edit bench configs/smollm2.yaml -o runs/bench
python benchmarks/lifetime.py runs/bench/runs/* --at 500 1000 2000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path

from sphere_edit.evaluation.catalogue import EFFICACY, GENERALIZATION, PERPLEXITY, SPECIFICITY, STRICT, of_part
from sphere_edit.evaluation.intervals import difference_intervals, summarise
from sphere_edit.evaluation.scores import FactScores
from sphere_edit.reporting.series import Series
from sphere_edit.runs.folder import RunFolder

SHOWN = (of_part(EFFICACY, STRICT), of_part(GENERALIZATION, STRICT), of_part(SPECIFICITY))


def crossing(edits: Sequence[int], values: Sequence[float | None], limit: float, rising: bool) -> str:
    """Facts edited when a series first crosses a limit, interpolated between checkpoints."""
    known = [(x, y) for x, y in zip(edits, values, strict=True) if y is not None]
    for (x0, y0), (x1, y1) in pairwise(known):
        if (y1 > limit) if rising else (y1 < limit):
            return f"{x0 + (x1 - x0) * (limit - y0) / (y1 - y0):.0f}"
    return "–"


def variant(run: Series) -> str:
    """Plain, or where SPHERE's directions are from."""
    return f"SPHERE, {run.config.sphere.basis}" if run.sphere else "plain"


def row(run: Series, at: Sequence[int]) -> str:
    """When a run's strict efficacy has halved and its perplexity doubled, and what it has at some checkpoints."""
    strict, perplexity = run.judged(SHOWN[0].name), run.metrics[PERPLEXITY.name]
    unedited = perplexity[0] or float("nan")
    best = max(value for value in strict if value is not None)
    cells = [
        run.method,
        variant(run),
        json.dumps(run.config.settings["options"]),
        crossing(run.edits, strict, best / 2, rising=False),
        crossing(run.edits, perplexity, 2 * unedited, rising=True),
    ]
    for index in (nearest(run, edits) for edits in at):
        values = [run.metrics[metric.name][index] or 0.0 for metric in SHOWN]
        cells.append(" / ".join(f"{value:.1f}" for value in values) + f", × {(perplexity[index] or 0) / unedited:.2f}")
    return "| " + " | ".join(cells) + " |"


def nearest(run: Series, edits: int) -> int:
    """The checkpoint nearest to so many facts; of several the last, after the stream's repair and look back."""
    return min(range(1, len(run.edits)), key=lambda index: (abs(run.edits[index] - edits), -index))


def scores(run: Series, index: int) -> tuple[list[int], list[FactScores]]:
    """The facts asked at a checkpoint, and what they scored."""
    entries = sorted(RunFolder.open(run.folder).history.evaluations, key=lambda evaluation: evaluation.after)
    path = run.folder / "evaluations" / f"batch-{entries[index - 1].after:04d}.json"
    content = json.loads(path.read_text("utf-8"))
    return content["facts"], [FactScores.from_dict(score) for score in content["scores"]]


def changed(plain: Series, other: Series, edits: int) -> str:
    """What another run has over the plain one at a checkpoint, on the facts that both were asked."""
    index = nearest(plain, edits)
    theirs, ours = (dict(zip(*scores(run, index), strict=True)) for run in (plain, other))
    both = [fact for fact in theirs if fact in ours]
    before, after = [theirs[fact] for fact in both], [ours[fact] for fact in both]
    means, spans = (summarise(before), summarise(after)), difference_intervals(before, after)
    cells = [plain.method, variant(other), str(plain.edits[index]), str(len(both))]
    for metric in SHOWN:
        low, high, span = means[0][metric.name], means[1][metric.name], spans[metric.name]
        assert low is not None
        assert high is not None
        assert span is not None
        cells.append(f"{high - low:+.1f} [{span[0]:+.1f}, {span[1]:+.1f}]")
    first = plain.metrics[PERPLEXITY.name][0] or float("nan")
    cells.append(" → ".join(f"{(run.metrics[PERPLEXITY.name][index] or 0) / first:.2f}" for run in (plain, other)))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Read the runs and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--at", type=int, nargs="+", default=[500, 1000])
    args = parser.parse_args()
    runs = sorted((Series.read(folder) for folder in args.runs), key=lambda run: (run.method, run.sphere))
    names = [metric.words for metric in SHOWN]
    stated = [f"at {edits} facts: {' / '.join(names)}, {PERPLEXITY.words}" for edits in args.at]
    print(
        "| "
        + " | ".join(["method", "variant", "options", f"{names[0]} halved", f"{PERPLEXITY.words} doubled", *stated])
        + " |"
    )
    print("|" + "---|" * (5 + len(args.at)))
    for run in runs:
        print(row(run, args.at))
    print(f"\n| method | variant | facts edited | facts asked | {' | '.join(names)} | {PERPLEXITY.words} |")
    print("|" + "---|" * 8)
    for _, group in groupby(runs, key=lambda run: run.method):
        plain, *others = group
        if not plain.sphere:
            for other in others:
                for edits in args.at:
                    print(changed(plain, other, edits))


if __name__ == "__main__":
    main()
