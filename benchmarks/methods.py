"""Edit the same facts with every method, plain and with SPHERE, and print one table. Finished runs are not made again.

python benchmarks/methods.py smollm2 ../shared/data/counterfact.json runs/methods --count 100 --batch-size 50 \
    --corpus ../shared/data/wikipedia_passages.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sphere_edit import Editor, read_facts
from sphere_edit.editing.methods import METHODS
from sphere_edit.editing.settings import make_settings, read_settings_file
from sphere_edit.evaluation.catalogue import PERPLEXITY, on_page
from sphere_edit.progress import Quiet
from sphere_edit.runs.folder import RunFolder
from sphere_edit.text import Screen

SHOWN = [metric for metric in on_page() if metric.of == "prompts" and metric.always]


def main() -> None:
    """Read the command line, make the runs that are missing, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("facts")
    parser.add_argument("folder", type=Path, help="where the runs go, one folder each")
    parser.add_argument("--start", type=int, default=0, help="first record, from 0")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--corpus")
    parser.add_argument("--heldout", type=int, default=100, help="passages kept for perplexity")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--sphere", choices=["on", "off", "both"], default="both")
    parser.add_argument("--config", type=Path, action="append", default=[], help="YAML settings for every run")
    args = parser.parse_args()

    facts = read_facts(args.facts, limit=args.start + args.count).facts[args.start :]
    given = [read_settings_file(path) for path in args.config]
    common: dict[str, Any] = {"batch_size": args.batch_size, "moments": {"heldout": args.heldout}}
    if args.corpus:
        common["moments"]["corpus"] = args.corpus
    rows, unedited = [], None
    for method in args.methods.split(","):
        for sphere in {"on": (True,), "off": (False,), "both": (False, True)}[args.sphere]:
            folder = args.folder / f"{method}{'-sphere' if sphere else ''}"
            settings = make_settings(common, {"method": method, "sphere": {"enabled": sphere}}, *given)
            metrics = finished(args.model, folder, settings, facts)
            run = RunFolder.open(folder)
            seconds = sum(sum(batch.seconds.values()) for batch in run.history.batches) / len(facts)
            unedited = unedited or metrics["unedited"]
            rows.append((method + (" + SPHERE" if sphere else ""), metrics["edited"], seconds))
            Screen(stderr=True).print(line(*rows[-1], unedited))
    assert unedited is not None
    print(f"| | {' | '.join(metric.words for metric in (*SHOWN, PERPLEXITY))} | seconds a fact |")
    print("|---|---|" + "---|" * (len(SHOWN) + 1))
    print(line("unedited", unedited, None, unedited))
    for row in rows:
        print(line(*row, unedited))


def finished(model: str, folder: Path, settings: Any, facts: list[Any]) -> dict[str, Any]:
    """The metrics of one run, made or gone on with where it is not finished."""
    if not RunFolder.exists(folder):
        editor = Editor.from_pretrained(model, folder, settings, Quiet())
        metrics = editor.edit(facts)
        editor.close()
        return metrics
    if not RunFolder.open(folder).history.finished:
        editor = Editor.open(folder, Quiet())
        editor.resume()
        editor.close()
    return json.loads((folder / "metrics.json").read_text("utf-8"))


def line(name: str, metrics: dict[str, Any], seconds: float | None, unedited: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [f"{metrics[metric.name]:.1f}" for metric in SHOWN]
    before, after = unedited[PERPLEXITY.name], metrics[PERPLEXITY.name]
    ratio = after and after / before
    cells.append("not finite" if ratio is None else f"× {ratio:.3f}")
    cells.append("" if seconds is None else f"{seconds:.2f}")
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
