"""Seconds an edit: the textbook loop against the engine, on the same facts with identical steps, templates and stopping, alternately;
then the engine at its own defaults, and where its time goes; then a whole stream of the default method, recheck and repair included.

python benchmarks/edit_speed.py smollm2 ../shared/data/counterfact.json --corpus ../shared/data/wikipedia_passages.jsonl
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import textbook
import torch
from torch import Tensor

from sphere_edit import Editor, read_facts
from sphere_edit.editing.fact_prompts import FactPrompts
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.progress import Quiet
from sphere_edit.runs.preparing import create_run
from sphere_edit.runs.records import Batch, FinalRecheck, GuardStop

STEPS = {"lr": 0.5, "steps": 25}  # published for Qwen2.5-7B, and good for SmolLM2


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("facts")
    parser.add_argument("--corpus")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--textbook-facts", type=int, default=10, help="how many the textbook edits, in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--stream", type=int, default=200, help="facts of the default method's stream")
    args = parser.parse_args()
    facts = read_facts(args.facts, limit=args.batch_size).facts
    common = {"batch_size": args.batch_size, "moments": {"corpus": args.corpus, "heldout": 20}}
    rows: list[tuple[str, int, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            editor = prepared(args.model, Path(folder) / f"same-{number}", targets=STEPS, **common)
            seconds = textbook_seconds(editor, facts[: args.textbook_facts])
            rows.append(("textbook", args.textbook_facts, seconds, peak()))
            seconds, same = engine(editor, facts)
            rows.append(("engine, identical steps", len(facts), seconds, peak()))
            editor.close()
        editor = prepared(args.model, Path(folder) / "own", **common)
        seconds, own = engine(editor, facts)
        rows.append(("engine, its own defaults", len(facts), seconds, peak()))
        operations = floor(editor, facts, own.targets["evaluations"])
        compute = editor.settings.targets.compute
        editor.close()
        stream = read_facts(args.facts, limit=args.stream).facts
        seconds = streamed(args.model, Path(folder) / "stream", stream, **common)
        rows.append(("the default method's whole stream", len(stream), seconds, peak()))
    slow = min(seconds for name, _, seconds, _ in rows if name == "textbook")
    print("| | facts | seconds an edit | times the textbook's speed | peak memory so far, GB |\n|---|---|---|---|---|")
    for name, count, seconds, memory in rows:
        print(f"| {name} | {count} | {seconds:.3f} | {slow / seconds:.1f} | {memory:.1f} |")
    rate = {"float32": matmul_rate(torch.float32), "bfloat16": matmul_rate(torch.bfloat16)}
    print(f"\nLarge matrix products: {', '.join(f'{name} {r / 1e9:.0f} GFLOP/s' for name, r in rate.items())}")
    print(
        f"Targets were optimised in {compute}; mean evaluations {mean(own.targets['evaluations']):.1f} at its own defaults\n"
    )
    print("| stage, seconds an edit | identical steps | own defaults | floor at the product rate |\n|---|---|---|---|")
    for stage, seconds in own.seconds.items():
        used = rate["bfloat16" if stage == "targets v*" and compute == "bfloat16" else "float32"]
        least = f"{operations[stage] / len(facts) / used:.3f}" if stage in operations else ""
        print(f"| {stage} | {same.seconds[stage] / len(facts):.3f} | {seconds / len(facts):.3f} | {least} |")


def prepared(model: str, run: Path, **settings: Any) -> Editor:
    """An editor whose statistics are ready, so that editing alone is timed."""
    editor = Editor.from_pretrained(model, run, reporter=Quiet(), method="alphaedit", **settings)
    editor._attach(create_run(editor.session, editor.folder, editor.settings.batch_size))
    return editor


def textbook_seconds(editor: Editor, facts: Sequence[Fact]) -> float:
    """Seconds an edit of the textbook loop.

    What comes after the targets is spread over a whole batch: right for the solves, and for the keys in the textbook's favour.
    """
    edit_batch = textbook_of(editor)
    marks = [time.monotonic()]
    edit_batch(facts, done=lambda: marks.append(time.monotonic()))
    end = time.monotonic()
    editor.weights.reset()
    return (marks[-1] - marks[0]) / len(facts) + (end - marks[-1]) / editor.settings.batch_size


def textbook_of(editor: Editor) -> Callable[..., Any]:
    """The textbook loop with an editor's model, statistics and settings, to be called with the facts of each batch."""
    loop, names = editor._stream.committer, editor.weights.names
    bases = [loop.statistics[name]["null_space"] for name in names]
    projectors: list[Tensor] = [basis @ basis.T for basis in bases if basis is not None]
    return partial(
        textbook.edit_batch,
        editor.loaded,
        templates=loop.source.templates,
        layers=editor.session.layers,
        names=names,
        projectors=projectors,
        previous=[torch.zeros_like(projector) for projector in projectors],
        settings=editor.settings.targets,
        l2=editor.settings.options["l2"],
        eta=0.5,
        alpha=0.5,
    )


def engine(editor: Editor, facts: Sequence[Fact]) -> tuple[float, Batch | GuardStop]:
    """Seconds an edit of the engine, and the batch's record."""
    editor._stream.run.add_facts(facts, "benchmark", "", [])
    began = time.monotonic()
    record = editor._stream.committer.edit(range(len(facts)), facts, [])
    return (time.monotonic() - began) / len(facts), record


def streamed(model: str, run: Path, facts: Sequence[Fact], **settings: Any) -> float:
    """Seconds an edit of a stream with recheck and repair; what measures it, before and after, is not counted."""
    editor = Editor.from_pretrained(model, run, reporter=Quiet(), **settings, evaluation={"generation": "off"})
    editor.edit(facts)
    spent = [record.seconds for record in editor.run.records if isinstance(record, (Batch, FinalRecheck))]
    editor.close()
    return sum(sum(seconds.values()) for seconds in spent) / len(facts)


def floor(editor: Editor, facts: Sequence[Fact], evaluations: Sequence[int]) -> dict[str, float]:
    """Floating-point operations that these stages cannot do without, from shapes alone, without any padding.

    Targets: one forward pass over every row, then for each evaluation a forward and a backward pass (by activations) of the layers
    above the edited one over the positions from the subject on, and the logits of target and KL positions. Keys: two passes up
    to the last edited layer.
    """
    config, architecture = editor.model.config, editor.loaded.architecture
    layers = architecture.decoder_layers(editor.model)
    layer = sum(weight.numel() for weight in layers[0].parameters() if weight.dim() == 2)
    logits = config.vocab_size * config.hidden_size
    encoder, last = Encoder(editor.tokenizer), editor.session.layers[-1]
    templates = editor._stream.committer.source.templates
    targets = keys = 0.0
    for fact, count in zip(facts, evaluations, strict=True):
        prompts = FactPrompts.of(fact, templates, encoder)
        whole = sum(map(len, prompts.rows))
        suffix = sum(len(row) - subject for row, subject in zip(prompts.rows, prompts.subjects, strict=True))
        read = sum(map(len, prompts.targets)) + 1
        targets += 2 * whole * layer * len(layers) + count * 4 * (
            suffix * layer * (len(layers) - last - 1) + read * logits
        )
        keys += 2 * 2 * sum(subject + 1 for subject in prompts.subjects[: len(templates)]) * layer * (last + 1)
    return {"targets v*": targets, "keys": keys}


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / best(lambda: a @ b)


def best(work: Callable[[], Any], times: int = 5) -> float:
    """The shortest of some timings, in seconds."""
    work()
    found = []
    for _ in range(times):
        began = time.monotonic()
        work()
        found.append(time.monotonic() - began)
    return min(found)


def peak() -> float:
    """Peak resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
