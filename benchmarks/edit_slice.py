"""Edit a slice of a fact file, as for choosing settings on records that are not reported on.

python benchmarks/edit_slice.py smollm2 ../shared/data/counterfact.json 5000 200 runs/tune settings.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphere_edit import Editor, read_facts
from sphere_edit.editing.settings import make_settings, read_settings_file
from sphere_edit.progress import RichReporter
from sphere_edit.reporting.results import draw
from sphere_edit.reporting.views import Batches, Metrics
from sphere_edit.text import Screen


def main(model: str, source: str, start: str, count: str, run: str, *config: str) -> None:
    """Edit ``count`` facts from record ``start`` (from 0) on, and print what came of it."""
    settings = make_settings({"method": "alphaedit"}, *(read_settings_file(Path(path)) for path in config))
    facts = read_facts(source, limit=int(start) + int(count)).facts[int(start) :]
    editor = Editor.from_pretrained(model, run, settings, RichReporter())
    metrics = editor.edit(facts)
    console = Screen()
    console.print(draw(Metrics.of(metrics, f"{source}, records {start} on")))
    console.print(draw(Batches.of(editor.run.history.batches if editor.run else [])))


if __name__ == "__main__":
    main(*sys.argv[1:])
