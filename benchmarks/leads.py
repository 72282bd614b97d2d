"""One row of a probe: some facts edited with some settings, and what they answer to; a table of all rows that are in the folder.

python benchmarks/leads.py smollm2 runs/leads "carried, λ 1" options.carried=true options.second_moment_weight=1 \\
    --corpus ../shared/data/wikipedia_passages.jsonl

Settings are those of a run, as in a YAML file, with dots for what is nested. A row that is there already is not made again, so
the same command only shows it. ``--given`` paraphrases of each fact become its rewordings; ``--most`` are asked in no row, so that rows
with and without are asked the same. Settings are to be chosen on the demo facts, or on records that no table is made of
(CounterFact 5000–5199, 6000–6999).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from own_wordings import own_wordings

from sphere_edit import Editor, read_facts
from sphere_edit.evaluation.catalogue import EFFICACY, GENERALIZATION, SPECIFICITY, STRICT, of_part
from sphere_edit.facts.fact import Fact, make_fact
from sphere_edit.files import yaml_value

_SHOWN = [
    of_part(EFFICACY, STRICT),
    of_part(GENERALIZATION),
    of_part(GENERALIZATION, STRICT),
    of_part(SPECIFICITY),
]


def main() -> None:
    """Make one row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", nargs="?", help="of the row; without one, the table is shown")
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    parser.add_argument("--facts", default="demo")
    parser.add_argument("--skip", type=int, default=0, help="the first of these records")
    parser.add_argument("--limit", type=int, help="how many of them")
    parser.add_argument("--given", type=int, default=0, help="paraphrases of each fact that its target is optimised in")
    parser.add_argument(
        "--own", type=int, default=0, help="how many of our own wordings (own_wordings.py) go with them"
    )
    parser.add_argument("--most", type=int, default=0, help="paraphrases that no row asks")
    parser.add_argument("--corpus")
    parser.add_argument("--heldout", type=int, default=30)
    args = parser.parse_args()
    if args.name is not None:
        row = args.folder / f"{slug(args.name)}.json"
        if not row.is_file():
            made = measured(args)
            row.write_text(json.dumps({"name": args.name, **made}, indent=1, ensure_ascii=False), "utf-8")
    show(args.folder)


def slug(name: str) -> str:
    """A row's name as a file's."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def nested(assignments: list[str]) -> dict[str, Any]:
    """``a.b=1`` as ``{"a": {"b": 1}}``."""
    found: dict[str, Any] = {}
    for assignment in assignments:
        path, _, value = assignment.partition("=")
        *parents, last = path.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = yaml_value(value)
    return found


def reworded(fact: Fact, given: int, most: int, own: int) -> Fact:
    """The fact with its first paraphrases as rewordings, and asked in those after ``most``; with so many of our own wordings too."""
    if not given and not most and not own:
        return fact
    wordings = [*fact.paraphrases[:given], *own_wordings(fact)[:own]]
    checked = make_fact(fact.prompt, fact.target_new, fact.subject, rewordings=wordings)
    return replace(fact, rewordings=checked.rewordings, paraphrases=fact.paraphrases[max(given, most) :])


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Edit all facts in batches, and ask them before and after."""
    settings: dict[str, Any] = {"method": "frugal", "batch_size": 20, **nested(args.settings)}
    settings.setdefault("evaluation", {}).setdefault("generation", "off")
    moments = settings.setdefault("moments", {})
    moments.setdefault("heldout", args.heldout)
    if args.corpus:
        moments["corpus"] = args.corpus
    facts = read_facts(args.facts, skip=args.skip, limit=args.limit, skip_bad=True).facts
    started = time.monotonic()
    editor = Editor.from_pretrained(args.model, args.folder / f"run-{slug(args.name)}", **settings)
    metrics = editor.edit([reworded(fact, args.given, args.most, args.own) for fact in facts])
    told = {"settings": args.settings, "given": args.given, "own": args.own, "facts": len(facts)}
    return {
        **told,
        "seconds": time.monotonic() - started,
        **{side: metrics[side] for side in ("unedited", "edited")},
    }


def show(folder: Path) -> None:
    """One line a row, in the order in which they were made, after what the first one's model said unedited."""
    rows = [
        json.loads(path.read_text("utf-8"))
        for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    ]
    print("| | " + " | ".join(metric.label for metric in _SHOWN) + " | perplexity | KL | s |")
    print("|---" * (len(_SHOWN) + 4) + "|")
    for row in rows[:1]:
        print(f"| unedited | {cells(row['unedited'])} | | | |")
    for row in rows:
        edited = row["edited"]
        ratio = edited["perplexity"] / row["unedited"]["perplexity"]
        print(
            f"| {row['name']} | {cells(edited)} | × {ratio:.3f} | {edited['divergence']:.4f} | {row['seconds']:.0f} |"
        )


def cells(values: dict[str, Any]) -> str:
    """The metrics of one side."""
    return " | ".join(metric.said(values[metric.name]) if metric.name in values else "" for metric in _SHOWN)


if __name__ == "__main__":
    main()
