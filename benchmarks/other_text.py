"""How far runs moved their model on text of kinds that no run reads: its own samples, and the source code of Python's library.

    python benchmarks/other_text.py RUN...

Statistics and repair read a corpus, and held-out text is of the same kind; whoever repairs on it must show that the rest got better too.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
from pathlib import Path

from sphere_edit.editing.moments import sample_text
from sphere_edit.editor import opened
from sphere_edit.evaluation.heldout import score_heldout
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.loading import LoadedModel
from sphere_edit.progress import Quiet

_TOKENS = 8192
_LENGTH = 128
_SEED = 20261123  # not that of any run


def texts(loaded: LoadedModel) -> dict[str, list[list[int]]]:
    """Token ids of each kind of text."""
    length = min(_LENGTH, getattr(loaded.model.config, "max_position_embeddings", _LENGTH) - 1)
    code = Encoder(loaded.tokenizer).encode(inspect.getsource(statistics)).ids[:_TOKENS]
    return {
        "own samples": sample_text(loaded, _TOKENS, _SEED, Quiet(), length),
        "Python source": [code[start : start + length] for start in range(0, len(code), length)],
    }


def main() -> None:
    """Print a line a run and kind of text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    found: dict[str, dict[str, list[list[int]]]] = {}
    print("| run | text | perplexity, unedited | edited | KL, nats |\n|---|---|---|---|---|")
    for folder in parser.parse_args().runs:
        with opened(folder, Quiet()) as editor:
            loaded, size = editor.loaded, editor.settings.tokens_per_batch
            with editor.weights.unedited():
                kinds = dict(found.setdefault(loaded.fingerprint, {}) or texts(loaded))
                found[loaded.fingerprint] = dict(kinds)
                kinds["held-out"] = json.loads((folder / "heldout.json").read_text("utf-8"))
                before = {kind: score_heldout(loaded, passages, size, Quiet()) for kind, passages in kinds.items()}
            for kind, passages in kinds.items():
                then = before[kind]
                now = score_heldout(loaded, passages, size, Quiet(), unedited=then.hidden)
                ratio = (now.perplexity or float("nan")) / (then.perplexity or float("nan"))
                print(
                    f"| {folder.name} | {kind} | {then.perplexity:.2f} | × {ratio:.3f} | {now.divergence:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
