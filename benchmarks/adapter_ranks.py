"""What an edit keeps as a LoRA adapter of every rank: finished runs measured at each, beside plain truncation of the same change.

python benchmarks/adapter_ranks.py runs/sixty runs/three-hundred -o adapter-ranks.png

Prints a table a run, and draws them side by side. In ours the matrices share out the directions that the facts need (`numerics.lowrank`);
the plain one keeps the largest singular values of each ΔW, as anybody would do it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure

from sphere_edit.editor import opened
from sphere_edit.evaluation.catalogue import EFFICACY, GENERALIZATION, PERPLEXITY, SPECIFICITY, STRICT, of_part
from sphere_edit.exports.gauge import Gauge, Measured
from sphere_edit.exports.lora import VLLM_RANKS, _adapter, _merged
from sphere_edit.exports.shipment import Shipment
from sphere_edit.numerics.lowrank import Factors
from sphere_edit.progress import Quiet

SHOWN = (of_part(EFFICACY, STRICT), of_part(GENERALIZATION, STRICT), of_part(SPECIFICITY))
OURS, PLAIN = "shared out", "plain SVD"
Rows = dict[tuple[str, int], Measured]  # by how the rank was cut, and the rank; 0 is the whole edit


def main() -> None:
    """Read the command line, measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True, help="of the figure")
    parser.add_argument("--ranks", type=int, nargs="+", default=VLLM_RANKS)
    args = parser.parse_args()
    found: dict[str, Rows] = {}
    for folder in args.runs:
        with opened(folder, Quiet()) as editor:
            run = editor.run
            assert run is not None
            facts = len(run.history.retained)
            print(f"\n{facts} facts, {editor.session.settings.method}\n")
            print(
                f"| | {' | '.join(metric.label for metric in SHOWN)} | perplexity |\n|---{'|---' * (len(SHOWN) + 1)}|"
            )
            rows: Rows = {}
            for cut, rank, measured in _measured(editor, args.ranks):
                rows[cut, rank] = measured
                name = f"{cut}, rank {rank}" if rank else cut
                values = " | ".join(f"{measured[metric.name]:.1f}" for metric in SHOWN)
                print(f"| {name} | {values} | {measured[PERPLEXITY.name]:.2f} |", flush=True)
            found[f"{facts} facts"] = rows
    _draw(found, args.output)


def _measured(editor, ranks) -> Iterator[tuple[str, int, Measured]]:  # type: ignore[no-untyped-def]
    """The whole edit, then every rank cut in both ways; the full one leaves nothing out either way."""
    shipment = Shipment.of(editor.session, editor.run)
    gauge = Gauge(editor.session, editor.run)
    yield "the whole edit", 0, gauge.measure(shipment.loaded, "whole")
    ours = _adapter(shipment, editor.session, editor.run)
    parts = {
        name: torch.linalg.svd(change.double(), full_matrices=False)
        for group in ours.groups
        for name, change in group.changes.items()
    }

    def plain(rank: int) -> dict[str, Factors]:
        return {name: ((u[:, :rank] * s[:rank]).float(), vt[:rank].float()) for name, (u, s, vt) in parts.items()}

    for rank in (*(rank for rank in ranks if rank < ours.largest), ours.largest):
        for cut, factors in ((OURS, ours.factors), (PLAIN, plain))[: 1 + (rank < ours.largest)]:
            with _merged(shipment, factors(rank)):
                yield cut, rank, gauge.measure(shipment.loaded, f"{cut}, {rank}")


def _draw(found: dict[str, Rows], path: Path) -> None:
    """One panel a metric, one colour a run: ours drawn through, the plain cut dashed, the whole edit a thin line."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(SHOWN))
    for panel, metric in zip(panels, SHOWN, strict=True):
        for number, (name, rows) in enumerate(found.items()):
            panel.axhline(rows["the whole edit", 0][metric.name], color=f"C{number}", linewidth=0.8, alpha=0.6)
            for cut, style in ((OURS, "-o"), (PLAIN, "--x")):
                points = sorted((rank, row[metric.name]) for (how, rank), row in rows.items() if how == cut)
                panel.plot(*zip(*points, strict=True), style, color=f"C{number}", markersize=4, label=f"{name}, {cut}")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("rank of the adapter")
        panel.set_title(f"{metric.label}, %", fontsize=10)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
