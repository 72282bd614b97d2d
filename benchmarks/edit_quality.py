"""What the engine's speed costs in quality: the same stream edited by the textbook loop and by the engine, evaluated at its end.

python benchmarks/edit_quality.py smollm2 ../shared/data/counterfact.json runs/quality --corpus ../shared/data/wikipedia_passages.jsonl

The textbook takes most of an hour for 300 facts on two cores. Finished rows are kept in the folder and not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edit_speed import STEPS, prepared, textbook_of

from sphere_edit import Editor, read_facts
from sphere_edit.evaluation.catalogue import on_page
from sphere_edit.evaluation.intervals import intervals, summarise
from sphere_edit.evaluation.scores import FactScores, score_facts
from sphere_edit.facts.fact import Fact
from sphere_edit.progress import Quiet

ROWS: dict[str, dict[str, Any]] = {
    "textbook": {"targets": STEPS},
    "engine, identical steps": {"targets": STEPS},
    "engine, its own defaults": {},
}
METRICS = [metric for metric in on_page() if metric.of == "prompts" and metric.always]


def main() -> None:
    """Make what is missing, print one table with 95 % bootstrap intervals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("facts")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--only", choices=ROWS)
    args = parser.parse_args()
    facts = read_facts(args.facts, limit=args.count).facts
    common = {"batch_size": args.batch_size, "moments": {"corpus": args.corpus, "heldout": 20}}
    found: dict[str, list[FactScores]] = {}
    for name, settings in ROWS.items():
        if args.only not in (None, name):
            continue
        file = args.folder / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        if not file.is_file():
            editor = prepared(args.model, args.folder / f"{file.stem}-run", **settings, **common)
            scores = textbook_scores(editor, facts) if name == "textbook" else engine_scores(editor, facts)
            editor.close()
            file.write_text(json.dumps([score.as_dict() for score in scores]), "utf-8")
        found[name] = [FactScores.from_dict(record) for record in json.loads(file.read_text("utf-8"))]
    print(f"| | {' | '.join(metric.words for metric in METRICS)} |\n|---|{'---|' * len(METRICS)}")
    for name, scores in found.items():
        means, spans = dict(summarise(scores)), intervals(scores)
        cells = []
        for metric in METRICS:
            low, high = spans[metric.name] or (float("nan"), float("nan"))
            cells.append(f"{means[metric.name]:.1f} [{low:.1f}, {high:.1f}]")
        print(f"| {name} | {' | '.join(cells)} |")


def textbook_scores(editor: Editor, facts: Sequence[Fact]) -> list[FactScores]:
    """Edit the stream with the textbook loop and evaluate all of it."""
    edit_batch, size = textbook_of(editor), editor.settings.batch_size
    for first in range(0, len(facts), size):
        edit_batch(facts[first : first + size])
    return score_facts(editor.loaded, facts, editor.settings.tokens_per_batch, Quiet())


def engine_scores(editor: Editor, facts: Sequence[Fact]) -> list[FactScores]:
    """Edit the stream with the engine and evaluate all of it."""
    size = editor.settings.batch_size
    editor._stream.run.add_facts(facts, "benchmark", "", [])
    for first in range(0, len(facts), size):
        editor._stream.committer.edit(range(first, first + size), facts[first : first + size], [])
    return score_facts(editor.loaded, facts, editor.settings.tokens_per_batch, Quiet())


if __name__ == "__main__":
    main()
