"""What rewordings give: the demo facts edited with none, or with some of their paraphrases as rewordings; the other paraphrases are asked.

python benchmarks/rewordings.py smollm2 runs/rewordings --given 1 --corpus ../shared/data/wikipedia_passages.jsonl

Each call makes one run, in minutes, and prints a table of all that are in the folder; a finished run is not made again. Every run
asks the same paraphrases: those that ``--most`` leaves over.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from sphere_edit import Editor, read_facts
from sphere_edit.evaluation.catalogue import EFFICACY, GENERALIZATION, SPECIFICITY, STRICT, of_part
from sphere_edit.facts.fact import Fact, make_fact

_SHOWN = [of_part(EFFICACY, STRICT), of_part(GENERALIZATION, STRICT), of_part(SPECIFICITY)]


def main() -> None:
    """Make one run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--facts", default="demo")
    parser.add_argument("--given", type=int, help="paraphrases of each fact that its target is optimised in")
    parser.add_argument("--most", type=int, default=1, help="paraphrases that no run asks")
    parser.add_argument("--corpus")
    parser.add_argument("--method", default="frugal")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--heldout", type=int, default=30)
    args = parser.parse_args()
    if args.given is not None and not (args.folder / f"{args.given}.json").is_file():
        made = measured(args)
        (args.folder / f"{args.given}.json").write_text(json.dumps(made, indent=1), "utf-8")
    show(args.folder)


def reworded(fact: Fact, given: int, most: int) -> Fact:
    """The fact with its first paraphrases as rewordings, and asked in those after ``most``."""
    checked = make_fact(fact.prompt, fact.target_new, fact.subject, rewordings=fact.paraphrases[:given])
    return replace(fact, rewordings=checked.rewordings, paraphrases=fact.paraphrases[most:])


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Edit all facts in batches, and ask them before and after."""
    moments: dict[str, Any] = {"heldout": args.heldout}
    if args.corpus:
        moments["corpus"] = args.corpus
    options = {"method": args.method, "batch_size": args.batch_size, "moments": moments}
    facts = [reworded(fact, args.given, args.most) for fact in read_facts(args.facts).facts]
    started = time.monotonic()
    editor = Editor.from_pretrained(
        args.model, args.folder / f"run-{args.given}", evaluation={"generation": "off"}, **options
    )
    metrics = editor.edit(facts)
    return {"seconds": time.monotonic() - started, **{side: metrics[side] for side in ("unedited", "edited")}}


def show(folder: Path) -> None:
    """One row a run."""
    print("| rewordings | " + " | ".join(metric.label for metric in _SHOWN) + " | perplexity | KL | s |")
    print("|---" * (len(_SHOWN) + 4) + "|")
    for path in sorted(folder.glob("[0-9]*.json")):
        found = json.loads(path.read_text("utf-8"))
        edited = found["edited"]
        cells = [metric.said(edited[metric.name]) for metric in _SHOWN]
        ratio = edited["perplexity"] / found["unedited"]["perplexity"]
        print(
            f"| {path.stem} | {' | '.join(cells)} | × {ratio:.3f} | {edited['divergence']:.4f} | {found['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
