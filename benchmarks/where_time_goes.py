"""Where the time of a whole command goes, stage by stage, with what each stage buys.

    python benchmarks/where_time_goes.py demo -o runs/timed                         # SPHERE_EDIT_CACHE=EMPTY for a first run
    python benchmarks/where_time_goes.py edit smollm2 facts.json --limit 200 --corpus text.jsonl -o runs/timed
    python benchmarks/where_time_goes.py tune smollm2

What follows the file is a command line of sphere-edit. Seconds on the clock and of all processor cores; a stage inside another
one counts for itself alone.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from sphere_edit.progress import RichReporter

# what is a stage of its own: a function or method where it is looked up, and the stage
STAGES = {
    "sphere_edit.models.loading:converted": "converting the GGUF file",
    "sphere_edit.runs.session:load_model": "loading the model",
    "sphere_edit.runs.preparing:context_templates": "context templates",
    "sphere_edit.editing.sources:OptimisedTargets.layer": "keys",
    "sphere_edit.editing.sources:OptimisedTargets.context_tokens": "keys",
    "sphere_edit.editing.sources:OptimisedTargets.all_keys": "keys",
    "sphere_edit.editing.batch:Solver._solve_layers": "solves",
    "sphere_edit.editing.batch:Solver.directions": "SPHERE's directions",
    "sphere_edit.editing.batch:Solver.repair": "repair",
    "sphere_edit.runs.commit:Committer._remember": "solves",
    "sphere_edit.editing.diagnosing:BatchDiagnosis.entry": "energies and bounds",
    "sphere_edit.runs.measuring:Evaluator._energies": "energies and bounds",
    "sphere_edit.runs.folder:RunFolder.write_update": "storing",
    "sphere_edit.runs.folder:RunFolder.write_checkpoint": "storing",
    "sphere_edit.cli.edit:write_report": "the page",
}
BARS = {
    "held-out, unedited": "held-out text",
    "unedited model": "scoring",
    "earlier facts": "recheck",
    "longer answers": "generation",
    "report": "the page",
}
BUYS = {
    "imports": "torch and transformers, whatever is asked",
    "converting the GGUF file": "once: later loads take a tenth",
    "loading the model": "weights, their hash, and the proof that the layout is understood",
    "context templates": "targets and keys that hold in other contexts",
    "sampling text": "C0, the repair and perplexity without a corpus",
    "second moments": "C0: what is to be left alone",
    "targets v*": "what is to be written",
    "keys": "where it is written, and that earlier facts stay",
    "solves": "the updates",
    "SPHERE's directions": "what no update may touch",
    "energies and bounds": "the journal's energies; the guard",
    "storing": "resume, rollback, verify",
    "recheck": "facts that were forgotten are written again",
    "repair": "half of the harm to ordinary text is taken back",
    "scoring": "the verdicts by likelihood and strict, before and after",
    "other form": "whether an edit reaches the chat, or the plain text",
    "generation": "what the model says, before and after",
    "held-out text": "perplexity and divergence",
    "the page": "report.html",
}


@dataclass
class Stopwatch:
    """Seconds by stage, those of inner stages left out of outer ones."""

    clock: dict[str, float] = field(default_factory=dict)
    cores: dict[str, float] = field(default_factory=dict)
    _stack: list[str] = field(default_factory=lambda: ["everything else"])
    _since: tuple[float, float] = field(default_factory=lambda: (time.monotonic(), time.process_time()))

    def _lap(self) -> None:
        now, stage = (time.monotonic(), time.process_time()), self._stack[-1]
        for seconds, before, after in zip((self.clock, self.cores), self._since, now, strict=True):
            seconds[stage] = seconds.get(stage, 0.0) + after - before
        self._since = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside to a stage."""
        self._lap()
        self._stack.append(name)
        try:
            yield
        finally:
            self._lap()
            self._stack.pop()

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted to a stage."""

        @functools.wraps(work)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return work(*args, **kwargs)

        return counted

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, count every stage of `STAGES`, and every bar of progress by its title."""
        places = [found(place) for place in STAGES]
        bar = RichReporter.bar

        @contextmanager
        def counted(reporter: RichReporter, title: str, total: float, unit: str) -> Iterator[Any]:
            name = "scoring" if title.startswith("evaluation") else BARS.get(title, title)
            with self.stage(name), bar(reporter, title, total, unit) as advance:
                yield advance

        with ExitStack() as patches:
            for (owner, attribute), name in zip(places, STAGES.values(), strict=True):
                before = getattr(owner, attribute)
                patches.callback(setattr, owner, attribute, before)
                setattr(owner, attribute, self.timed(name, before))
            patches.callback(setattr, RichReporter, "bar", bar)
            RichReporter.bar = counted  # type: ignore[method-assign, assignment]
            yield

    def table(self) -> list[str]:
        """Rows of a Markdown table, the longest stage first."""
        self._lap()
        order = sorted(self.clock, key=self.clock.__getitem__, reverse=True)
        rows = [
            f"| {name} | {self.clock[name]:.1f} | {self.cores[name]:.1f} | {BUYS.get(name, '')} |" for name in order
        ]
        total = f"| together | {sum(self.clock.values()):.1f} | {sum(self.cores.values()):.1f} | |"
        return ["| stage | seconds | of all cores | what for |", "|---|---|---|---|", *rows, total]


def found(place: str) -> tuple[Any, str]:
    """A module or class, and the name in it, of ``module:name`` or ``module:Class.name``."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, attribute = path.split(".")
    for name in outer:
        owner = getattr(owner, name)
    return owner, attribute


def main() -> None:
    """Run the command line and print the table."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    watch, status = Stopwatch(), 0
    with watch.stage("imports"):
        for place in STAGES:
            found(place)
        importlib.import_module("transformers.generation.utils")
    from sphere_edit.cli import main as command

    with watch.watching():
        try:
            command()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    print("\n".join(watch.table()))
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
