"""AlphaEdit + SPHERE on randomly initialised models of Llama-3-8B's and Qwen2.5-7B's shape, bfloat16 with float32 masters, on one GPU.

python benchmarks/gpu.py              # both, on the accelerator that PyTorch finds
python benchmarks/gpu.py --shape tiny # a small one, on a CPU too

Needs nothing but a checkout: the model's weights are random, its tokenizer is made in memory, and a random null space stands in for the
statistics of text, which cost the same to use. Times are of the second of two batches.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from scaling import byte_tokenizer, made
from transformers import AutoConfig, AutoModelForCausalLM

from sphere_edit.editing.batch import Solver
from sphere_edit.editing.methods import METHODS
from sphere_edit.editing.methods.base import Statistics
from sphere_edit.editing.sources import OptimisedTargets
from sphere_edit.editing.targets import TargetSettings
from sphere_edit.models.loading import prepare, resolve_device
from sphere_edit.models.weights import EditedWeights
from sphere_edit.progress import Quiet
from sphere_edit.runs.commit import Committer
from sphere_edit.runs.folder import RunFolder

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "tiny": {
        "model_type": "llama", "num_hidden_layers": 10, "hidden_size": 128, "intermediate_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 300,
    },
}  # fmt: skip
LAYERS = (4, 5, 6, 7, 8)
TEMPLATES = ["{}", *(f"Some ten words that a model might have said number {n}. {{}}" for n in range(5))]


def main() -> None:
    """One row a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--steps", type=int, default=12, help="loss evaluations of each target; none stops early here")
    args = parser.parse_args()
    device = resolve_device()
    shapes = args.shape or (["tiny"] if device.type == "cpu" else ["llama-3-8b", "qwen2.5-7b"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| shape | edits a second | targets v* | keys | solve | SPHERE | storing | peak GPU memory, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            print(row(shape, Path(folder), device, args.batch_size, args.steps), flush=True)


def row(shape: str, folder: Path, device: torch.device, batch_size: int, steps: int) -> str:
    """Two batches; the second one's times."""
    options = dict(SHAPES[shape])
    torch.manual_seed(0)
    with device:
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    loaded = prepare(model, byte_tokenizer(), shape)
    names = [loaded.architecture.module_name(layer, "down") for layer in LAYERS]
    weights = EditedWeights(model, loaded.architecture, names)
    inner = config.intermediate_size
    basis, _ = torch.linalg.qr(torch.randn(inner, 4 * inner // 5, device=device))
    method = METHODS["alphaedit"]()
    settings = TargetSettings(steps=steps, stop_loss=0.0, tokens=4096, compute="model")
    source = OptimisedTargets(loaded, weights, LAYERS, TEMPLATES, method.needs.feed, settings, 16384)
    statistics = dict.fromkeys(names, Statistics(null_space=basis))
    run = RunFolder.create(folder / "run")
    loop = Committer(run, Solver(weights, source, method, method.sphere, method.sphere, statistics, Quiet()))
    loop.go_to(0)
    facts = made(2 * batch_size)
    run.add_facts(facts, "made up", "", [])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for first in (0, batch_size):
        began = time.monotonic()
        record = loop.edit(range(first, first + batch_size), facts[first : first + batch_size], [])
        seconds = time.monotonic() - began
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    stages = record.seconds
    keys = stages["keys"] + stages["keys after the batch"]
    cells = (stages["targets v*"], keys, stages["solve"], stages["sphere"], stages["storing"])
    run.unlock()
    return f"| {shape} | {batch_size / seconds:.2f} | {' | '.join(f'{cell:.1f} s' for cell in cells)} | {memory:.1f} |"


if __name__ == "__main__":
    main()
