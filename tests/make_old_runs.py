"""Makes `tests/data/old_runs`; run by hand, with the code that shall count as old: `python tests/make_old_runs.py`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from sphere_edit.editing.journal import RunFolder
from transformers import AutoConfig, AutoModelForCausalLM

from families import tiny_tokenizer
from old_runs import FACTS, FOLDER, MODEL, MORE, MOVED, deployed, outcome, surroundings
from sphere_edit.editing import loop
from sphere_edit.editor import Editor, opened
from sphere_edit.progress import Quiet

QUICK: dict[str, Any] = {
    "batch_size": 4,
    "layers": [1],
    "targets": {"steps": 3, "lr": 0.3},
    "templates": 0,
    "moments": {"sampled_tokens": 256},
    "tokens_per_batch": 256,
    "evaluation": {"every": 1},
}
RUNS: dict[str, dict[str, Any]] = {
    "frugal": {"method": "frugal", "repair": 1, "evaluation": {"every": 2, "sample": 3}},
    "interrupted": {"method": "frugal"},
    "alphaedit": {
        "method": "alphaedit",
        "layers": [0, 1],
        "options": {"l2": 0.1, "null_space": "quantile", "null_space_threshold": 0.8},
        "guard": True,
    },
    "prune": {"method": "prune", "options": {"second_moment_weight": 0.01, "log_base": 1.2}},
}


def save_model() -> None:
    """A model as small as they come."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(bos=True)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(MODEL)
    tokenizer.save_pretrained(MODEL)


def make(name: str) -> None:
    """One run folder, finished, or as a process leaves it that dies between the second batch's files and its line in the journal."""
    editor = Editor.from_pretrained(MODEL, FOLDER / name, reporter=Quiet(), **{**QUICK, **RUNS[name]})
    if name == "interrupted":
        append = RunFolder.append

        def dying(self: RunFolder, event: str, **content: Any) -> Any:
            if event == "batch" and content["batch"] == 2:
                os._exit(0)
            return append(self, event, **content)

        RunFolder.append = dying  # type: ignore[method-assign]
    if name == "alphaedit":  # with a rollback in its journal
        editor.edit(FACTS[:10])
        editor.rollback(1)
        editor.edit(FACTS[6:])
    else:
        editor.edit(FACTS)
    editor.close()


def forked(name: str) -> None:
    """`make` in a process of its own."""
    child = os.fork()
    if child == 0:
        make(name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def look(name: str, scratch: Path) -> dict[str, Any]:
    """What this code makes of a run: its weights after each batch, and how it goes on."""
    found: dict[str, Any] = {"surroundings": surroundings()}
    shutil.copytree(FOLDER / name, scratch / name)
    with opened(scratch / name, Quiet()) as editor:
        if editor.run.history.pending:
            editor.resume()
            found["resumed"] = outcome(editor)
        editor.edit(MORE)
        found["continued"] = outcome(editor)
        after = {editor.run.history.head: deployed(editor)}
        for batch in reversed(range(editor.run.history.head)):
            editor.rollback(batch)
            after[batch] = deployed(editor)
        found["after"] = dict(sorted(after.items()))
    return found


def main() -> None:
    """Model, runs, what became of them; and their model moves away."""
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    loop._CHECKPOINT_EVERY = 10**9  # the first and the last, so that a rollback has something to replay
    save_model()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SPHERE_EDIT_CACHE"] = f"{scratch}/cache"
        found = {}
        for name in RUNS:
            forked(name)
            found[name] = look(name, Path(scratch))
        (FOLDER / "expected.json").write_text(json.dumps(found, indent=1) + "\n")
    for name in RUNS:
        path = FOLDER / name / "config.json"
        config = json.loads(path.read_text())
        config["model"]["source"] = MOVED
        path.write_text(json.dumps(config, indent=2) + "\n")
        (FOLDER / name / ".lock").unlink(missing_ok=True)
        shutil.rmtree(FOLDER / name / "figures", ignore_errors=True)


if __name__ == "__main__":
    main()
