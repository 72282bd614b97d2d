"""What each way of taking facts back leaves behind: some of a run's facts, chosen at random, removed step by step. Prints one table.

python benchmarks/removal.py smollm2 ../shared/data/counterfact.json RUNS --count 300 --batch-size 50 --remove 1,10,50 \
    --corpus ../shared/data/wikipedia_passages.jsonl --exact
python benchmarks/removal.py smollm2 demo RUNS --count 60 --batch-size 20 --remove 1,5,15          # smaller

The run is made once, and copied for each removal. After every step of a removal the same is asked: how many of the removed prompts give
the unedited model's greedy answer (strict), KL(unedited ‖ now) of the next token after them and after their paraphrases, how many of the
other facts give their new answer (strict), and perplexity. Seconds are of all work so far, for each removed fact.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from sphere_edit import Editor, read_facts
from sphere_edit.editing.settings import make_settings, read_settings_file
from sphere_edit.editor import opened
from sphere_edit.evaluation.heldout import score_heldout
from sphere_edit.progress import Quiet
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.history import History
from sphere_edit.runs.records import Batch, FinalRecheck, RemovalCheck

COLUMNS = (
    *("removed", "way", "unedited answer again", "KL, prompt", "KL, paraphrases", "others, strict", "perplexity"),
    "seconds a fact",
)


def main() -> None:
    """Read the command line, make the run if it is missing, take facts back, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("facts")
    parser.add_argument("folder", type=Path, help="where the run and its copies go")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--remove", default="1,10,50", help="how many facts to take back, one removal each")
    parser.add_argument("--method", default="frugal")
    parser.add_argument("--corpus")
    parser.add_argument("--seed", type=int, default=0, help="of which facts are taken back")
    parser.add_argument("--exact", action="store_true", help="replay the run without them too (slow)")
    parser.add_argument("--config", type=Path, action="append", default=[], help="YAML settings of the run")
    args = parser.parse_args()
    run = args.folder / "run"
    if not RunFolder.exists(run):
        _make(run, args)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for count in map(int, args.remove.split(",")):
        removed = sorted(random.Random(f"{args.seed} {count}").sample(range(args.count), count))
        for exact in (False, True)[: 1 + args.exact]:
            copy = args.folder / f"removed-{count}{'-exact' if exact else ''}"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(run, copy)
            for row in _steps(copy, removed, exact):
                print(f"| {' | '.join(row)} |", flush=True)


def _make(run: Path, args: argparse.Namespace) -> None:
    """Edit the facts, in a run that says nothing in words."""
    quiet = {"evaluation": {"generation": "off"}, "moments": {"corpus": args.corpus} if args.corpus else {}}
    files = [read_settings_file(path) for path in args.config]
    settings = make_settings(quiet, *files, {"method": args.method, "batch_size": args.batch_size})
    editor = Editor.from_pretrained(args.model, run, settings, Quiet())
    editor.edit(read_facts(args.facts, limit=args.count))
    editor.close()


def _steps(folder: Path, removed: Sequence[int], exact: bool) -> Iterator[list[str]]:
    """Take facts back, and what is left after every step."""
    with opened(folder, Quiet()) as editor:
        run = editor.run
        assert run is not None
        before = run.history.head
        editor.remove(list(removed), exact)
        stages = {before: "before"} if not exact else {}
        stages |= _stages(run.history, before, exact)
        for number, way in stages.items():
            yield [str(len(removed)), way, *_measured(editor, removed, number), _seconds(run, before, number, removed)]


def _stages(history: History, before: int, exact: bool) -> dict[int, str]:
    """The batches after which a step of a removal is done, and what that was."""
    if exact:
        return {history.head: "replayed without them"}
    ways = ["subtracted" if history.batches[before].written_back == [] else "written over", "+ state", "+ answers"]
    checks = [check.after for check in history.removal_checks if check.after > before]
    found = dict(zip(checks, ways, strict=False))
    return {**found, history.head: found.get(history.head, "+ others rewritten")}


def _measured(editor: Editor, removed: Sequence[int], number: int) -> list[str]:
    """What the model makes of the removed facts, of the others and of ordinary text after a batch."""
    stream, run = editor._stream, editor.run
    assert stream is not None
    assert run is not None
    stream.committer.go_to(number)
    facts = run.facts()
    returned = stream.taking_back._returned([facts[index] for index in removed])
    others = stream.evaluator.knows([facts[index] for index in run.history.retained], "others")
    text = score_heldout(editor.loaded, stream.evaluator.heldout, editor.settings.tokens_per_batch, Quiet())
    behind = [one.kl_paraphrases for one in returned if one.kl_paraphrases is not None]
    again = sum(one.returned for one in returned)
    return [
        f"{again} ({100 * again / len(removed):.1f} %)",
        f"{mean(one.kl for one in returned):.3f}",
        f"{mean(behind):.3f}" if behind else "–",
        f"{100 * mean(others):.1f} %" if others else "–",
        f"{text.perplexity:.2f}",
    ]


def _seconds(run: RunFolder, before: int, number: int, removed: Sequence[int]) -> str:
    """Seconds of the journal's work between two batches, for each removed fact; loading and the last evaluation are not in it."""
    total = 0.0
    for record in run.records:
        at = record.number if isinstance(record, Batch) else getattr(record, "after", 0)
        if isinstance(record, (Batch, FinalRecheck, RemovalCheck)) and before < at <= number:
            total += sum(record.seconds.values())
    return f"{total / len(removed):.1f}"


if __name__ == "__main__":
    main()
