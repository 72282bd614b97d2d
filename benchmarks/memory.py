"""How right the account of memory is: what `--dry-run` expects from shapes alone, against the peak of a real edit, in fresh processes.

python benchmarks/memory.py                  # three random models of middling size, on the CPU
python benchmarks/memory.py llama --stages   # one of them, and the peak after each stage
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from scaling import byte_tokenizer, made
from transformers import AutoConfig, AutoModelForCausalLM

from sphere_edit import Editor
from sphere_edit.editing.settings import make_settings
from sphere_edit.models.loading import peak_memory
from sphere_edit.progress import Quiet
from sphere_edit.runs.accounting import account_of
from sphere_edit.runs.session import Session

_LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 64000,
}
_MIXTURE: dict[str, Any] = {
    **_LLAMA,
    "num_hidden_layers": 4,
    "vocab_size": 32000,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "head_dim": 64,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "gpt2": ("gpt2", {"n_embd": 768, "n_layer": 6, "n_head": 12, "n_positions": 512, "vocab_size": 50257}),
    "qwen3_moe": ("qwen3_moe", _MIXTURE),
}
FACTS, SEED = 20, 0


class Stages(Quiet):
    """Notes the peak whenever something is said."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, float, float]] = []

    def say(self, text: str, style: str = "") -> None:
        """One line for each thing said: the peak, and what is held now of its own and of files."""
        peak = (peak_memory(torch.device("cpu")) or 0) / 1e9
        self.seen.append((text.strip()[:60], peak, *held()))


def held() -> tuple[float, float]:
    """GB that this process holds now: of its own, and of files that it has mapped."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    found = {line[0]: int(line[1]) * 1024 / 1e9 for line in lines if line[0] in ("RssAnon:", "RssFile:")}
    return found["RssAnon:"], found["RssFile:"]


def main() -> None:
    """A line of the table for each shape; what follows ``--one`` runs in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--method", default="frugal")
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one is not None:
        print(json.dumps(measured(args.one, args.method)))
        return
    print("| shape | weights, GB | expected before loading, GB | with the model, GB | peak, GB | off by | fullest at |")
    print("|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as root:
            prepare(shape, Path(root))
            command = [sys.executable, __file__, "--one", root, "--method", args.method]
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
        sketched = "–" if found["sketched"] is None else f"{found['sketched']:.2f}"
        off = f"{found['expected'] / found['peak'] - 1:+.0%}"
        print(
            f"| {shape} | {found['weights']:.2f} | {sketched} | {found['expected']:.2f} | {found['peak']:.2f} | {off} | {found['fullest']} |"
        )
        if args.stages:
            for name, size in found["stages"].items():
                print(f"    {size:8.3f}  {name}")
            print("        peak     own   files  when this was said")
            for name, *sizes in found["seen"]:
                print(f"    {' '.join(f'{size:7.3f}' for size in sizes)}  {name}")


def prepare(shape: str, folder: Path) -> None:
    """A random model, and text and facts that its tokenizer of bytes reads."""
    kind, values = SHAPES[shape]
    tokenizer = byte_tokenizer()
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = ["river", "city", "violin", "the", "of", "stands", "in", "a", "was", "born", "north", "old"]
    order = torch.randint(0, len(words), (160, 60)).tolist()
    lines = [json.dumps({"text": " ".join(words[index] for index in row)}) for row in order]
    (folder / "text.jsonl").write_text("\n".join(lines))


def measured(folder: Path, method: str) -> dict[str, Any]:
    """What was expected of an edit in this process, and what it took."""
    given = make_settings(
        {
            "method": method,
            "batch_size": FACTS // 2,
            "targets": {"steps": 3},
            "moments": {"corpus": str(folder / "text.jsonl"), "tokens": 4096, "heldout": 12},
            "evaluation": {"generation": "off"},
            "layers": [1, 2],
        }
    )
    sketched = Session.sketched(folder / "model", given, Quiet())
    before = None if sketched is None else account_of(sketched).peak["cpu"] / 1e9
    del sketched
    stages = Stages()
    editor = Editor.from_pretrained(folder / "model", folder / "run", given, stages)
    stages.say("loaded")
    editor.edit(made(FACTS))
    account = account_of(editor.session)
    return {
        "weights": sum(parameter.numel() * parameter.element_size() for parameter in editor.model.parameters()) / 1e9,
        "sketched": before,
        "expected": account.peak["cpu"] / 1e9,
        "peak": (peak_memory(torch.device("cpu")) or 0) / 1e9,
        "fullest": account.fullest("cpu"),
        "stages": {name: sizes["cpu"] / 1e9 for name, sizes in account.stages.items()},
        "seen": stages.seen,
    }


if __name__ == "__main__":
    main()
