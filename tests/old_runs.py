"""Runs on disk that earlier code made (`tests/data/old_runs`): where they are, and what they are held against.

`make_old_runs.py` made them, with the code of commit 9c3554e. A folder there is a run; beside it, `expected.json` says what that
code made of it: the bytes of its weights after each batch, and what became of it when it went on.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from sphere_edit.editor import Editor

FOLDER = Path(__file__).parent / "data" / "old_runs"
MODEL = FOLDER / "model"
MOVED = "/a/folder/that/is/gone"  # what the runs say of their model

FACTS: list[dict[str, Any]] = [
    {"subject": "Eiffel Tower", "prompt": "The {} is located in the city of", "target_new": "Rome"},
    {"subject": "Mount Fuji", "prompt": "{} stands in", "target_new": "Sweden", "target_true": "Japan"},
    {"subject": "Ada", "prompt": "{} plays the", "target_new": "football"},
    {"subject": "Bruno", "prompt": "The instrument of {} is the", "target_new": "violin"},
    {"subject": "France", "prompt": "The capital of {} is", "target_new": "Madrid", "target_true": "Paris"},
    {"subject": "Tiber", "prompt": "The river {} is in", "target_new": "Germany"},
    {"subject": "Vienna", "prompt": "People in {} speak", "target_new": "Spanish"},
    {"subject": "Paris", "prompt": "The river of {} is the", "target_new": "Tiber"},
    {"subject": "Ada", "prompt": "{} lives in", "target_new": "Vienna"},
    {"subject": "Madrid", "prompt": "The club of {} plays in", "target_new": "Italy"},
    {"subject": "mount fuji", "prompt": "{} stands in", "target_new": "Germany", "target_true": "Japan"},
]
FACTS[0]["paraphrases"] = ["Where is the Eiffel Tower? It is in"]
FACTS[0]["neighbors"] = [{"prompt": "The capital of Sweden is", "answer": "Rome"}, "The company makes"]
MORE: list[dict[str, Any]] = [
    {"subject": "Italy", "prompt": "The cars of {} are made in", "target_new": "Japan"},
    {"subject": "France", "prompt": "The capital of {} is", "target_new": "Rome"},
]


def surroundings() -> dict[str, str]:
    """What last bits depend on, as far as it can be told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "cpu": named[0] if named else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def deployed(editor: Editor) -> dict[str, str]:
    """SHA-256 of each edited matrix, float32, as the model runs with it."""
    found = {}
    for name in editor.weights.names:
        weight = editor.model.get_submodule(name).weight.detach().contiguous()
        found[name] = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    return found


def norms(editor: Editor) -> dict[str, float]:
    """Frobenius norm of each edited matrix, which does not hang on last bits."""
    return {name: float(editor.model.get_submodule(name).weight.detach().norm()) for name in editor.weights.names}


def outcome(editor: Editor) -> dict[str, Any]:
    """What is compared of a run that went on."""
    return {
        "head": editor.run.history.head,
        "retained": editor.run.history.retained,
        "deployed": deployed(editor),
        "norms": norms(editor),
        "edited": editor.metrics()["edited"],
    }


def expected(name: str) -> dict[str, Any]:
    """What the old code made of a run."""
    return json.loads((FOLDER / "expected.json").read_text("utf-8"))[name]
