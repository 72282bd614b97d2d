"""One layer against several, on small models that normalise each MLP's output, trained here as in `families`.

python benchmarks/post_norm.py --models runs/families            # Gemma 3, OLMo 2
python benchmarks/post_norm.py --family gemma3_text --layers 0 0-1 0-4

Each row is one setting: facts about 26 of the world's people edited in one batch and taken back. One layer has its target before the
norm behind the MLP; several share one at the last one's output, and each writes what brings its norm nearest to its share.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from families import FAMILIES, prepared
from sphere_edit.editing.settings import make_settings, read_layers
from sphere_edit.models.loading import load_model
from sphere_edit.progress import Quiet
from sphere_edit.trials import Bench


def main() -> None:
    """One row a choice of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of 32 passages")
    parser.add_argument("--models", type=Path, help="keep the trained models there, and take those that are there")
    parser.add_argument("--method", default="frugal")
    parser.add_argument("--options", type=json.loads, default={}, help="of the method, as JSON")
    parser.add_argument("--targets", type=json.loads, default={}, help="settings of the targets, as JSON")
    parser.add_argument("--layers", nargs="+", default=["0", "1", "2", "3", "0-1", "0-2", "0-4", "1-2", "1-3"])
    args = parser.parse_args()
    print("| family | layers | targets | strict | generalization | specificity | KL |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = args.models or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for family in args.family or ("gemma3_text", "olmo2"):
            model, corpus, known, others = prepared(family, folder, args.steps)
            given = {"method": args.method, "options": args.options, "targets": args.targets}
            settings = make_settings(given, {"moments": {"corpus": str(corpus)}})
            bench = Bench(load_model(str(model)), settings, [*known.facts, *others.facts], Quiet())
            for layers in args.layers:
                setting = {"layers": read_layers(layers)}
                reach = bench.reach(setting)
                trial = bench.trial(setting)
                cells = " | ".join(f"{100 * share:.1f}" for share in trial.parts.nanmean(0).tolist())
                print(f"| {family} | {layers} | {reach:.2f} | {cells} | {trial.divergence:.3f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
