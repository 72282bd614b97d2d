"""Time and memory of a batch over a long stream, and over batch size, width and number of edited layers, on a small random model.

python benchmarks/scaling.py --batches 150
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sphere_edit import Editor
from sphere_edit.facts.fact import Fact
from sphere_edit.progress import Quiet
from sphere_edit.runs.preparing import create_run
from sphere_edit.runs.records import Batch, GuardStop


def main() -> None:
    """A long stream first, then short runs of different shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        print("| batch of the stream | seconds (median of nine around it) | peak memory so far, GB |\n|---|---|---|")
        seconds, memory = stream(folder / "stream", args.batches, args.batch_size)
        marks = [2, *range(25, args.batches, 25), args.batches]
        around = {mark: median(seconds[max(0, mark - 5) : mark + 4]) for mark in marks}
        for mark in marks:
            print(f"| {mark} | {around[mark]:.3f} | {memory[mark - 1]:.3f} |")
        print(
            f"\nBatch {args.batches} against batch 2: time × {around[args.batches] / around[2]:.3f}, "
            f"memory × {memory[-1] / memory[1]:.3f}\n"
        )
        print("| shape | seconds a batch | solve and SPHERE |\n|---|---|---|")
        shapes: list[tuple[str, dict[str, Any]]] = [
            (f"{args.batch_size} facts, d_in 512, 2 layers", {}),
            ("80 facts", {"batch_size": 80}),
            ("d_in 1024", {"inner": 1024}),
            ("d_in 2048", {"inner": 2048}),
            ("4 layers", {"layers": (1, 2, 3, 4)}),
        ]
        for number, (name, shape) in enumerate(shapes):
            times, solve = short(folder / f"shape-{number}", {"batch_size": args.batch_size, **shape})
            print(f"| {name} | {times:.3f} | {solve:.3f} |")


def stream(folder: Path, batches: int, batch_size: int) -> tuple[list[float], list[float]]:
    """Seconds of every batch and peak memory after it, GB."""
    editor = started(folder, batch_size)
    facts = made(batches * batch_size)
    editor._stream.run.add_facts(facts, "benchmark", "", [])
    seconds, memory = [], []
    for first in range(0, len(facts), batch_size):
        record = edit(editor, facts, range(first, first + batch_size))
        seconds.append(sum(record.seconds.values()))
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
    editor.close()
    return seconds, memory


def short(folder: Path, shape: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a batch (the last of three), and those of its solves and SPHERE."""
    editor = started(folder, **shape)
    size = shape["batch_size"]
    facts = made(3 * size)
    editor._stream.run.add_facts(facts, "benchmark", "", [])
    for first in range(0, len(facts), size):
        record = edit(editor, facts, range(first, first + size))
    editor.close()
    return sum(record.seconds.values()), record.seconds["solve"] + record.seconds["sphere"]


def edit(editor: Editor, facts: Sequence[Fact], indices: range) -> Batch | GuardStop:
    """One batch, without the evaluation that a whole run ends with."""
    return editor._stream.committer.edit(indices, facts[indices.start : indices.stop], [])


def started(folder: Path, batch_size: int, inner: int = 512, layers: Sequence[int] = (1, 2)) -> Editor:
    """A small random Llama, ready to be edited."""
    model = folder / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=inner, num_hidden_layers=6, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    settings = {"targets": {"steps": 2, "compute": "model"}, "moments": {"sampled_tokens": 2048}, "templates": 1}
    options = {"null_space": "quantile", "null_space_threshold": 0.8}
    editor = Editor.from_pretrained(
        model, folder / "run", reporter=Quiet(), method="alphaedit", batch_size=batch_size, layers=list(layers),
        options=options, **settings,
    )  # fmt: skip
    editor._attach(create_run(editor.session, editor.folder, batch_size))
    return editor


def made(count: int) -> list[Fact]:
    """Facts about numbered things, all of one length in bytes, which are tokens here."""
    return [Fact(f"Thing {number:05d}", "{} lies in", f"Place {number % 7}") for number in range(count)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, made in memory."""
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


if __name__ == "__main__":
    main()
