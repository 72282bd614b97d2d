"""Perplexity of a run's model, unedited and edited, on the passages a corpus holds out (its last 300).

python benchmarks/heldout_perplexity.py RUN CORPUS
"""

from __future__ import annotations

import sys

from sphere_edit.editing.moments import MomentSettings, load_corpus
from sphere_edit.editor import opened
from sphere_edit.evaluation.heldout import score_heldout
from sphere_edit.progress import RichReporter


def main(run: str, corpus: str) -> None:
    """Print both perplexities and their ratio."""
    reporter = RichReporter()
    with opened(run, reporter) as editor:
        tokens = editor.settings.tokens_per_batch
        heldout = load_corpus(editor.loaded, MomentSettings(corpus=corpus), 0, reporter).heldout
        with editor.weights.unedited():
            before = score_heldout(editor.loaded, heldout, tokens, reporter, "unedited").perplexity
        after = score_heldout(editor.loaded, heldout, tokens, reporter, "edited").perplexity
    print(f"{run}: {before:.3f} → {after:.3f}, × {after / before:.4f}, on {len(heldout)} passages of {corpus}")


if __name__ == "__main__":
    main(*sys.argv[1:])
