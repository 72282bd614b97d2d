"""What the page works on: one model with its run, the facts to be edited next, and the worker that does what is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sphere_edit.counting import counted
from sphere_edit.editing.settings import make_settings
from sphere_edit.editor import Editor
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.comparing import Compared, compare
from sphere_edit.exports.manifest import is_export
from sphere_edit.exports.proof import prove_export
from sphere_edit.facts.readers import FactSet, facts_from
from sphere_edit.facts.suggesting import suggest_neighbours, suggest_paraphrases
from sphere_edit.inspection import Inspection
from sphere_edit.preview import Preview, preview
from sphere_edit.progress import Reporter
from sphere_edit.reporting.report import write_report
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.preparing import default_folder
from sphere_edit.runs.proof import prove
from sphere_edit.runs.selection import judge
from sphere_edit.studio.draft import Draft
from sphere_edit.studio.places import Places
from sphere_edit.studio.worker import Job, Live, Worker
from sphere_edit.tuning import calibrate

T = TypeVar("T")
_SELDOM = 4.0  # seconds between two looks at all that a run at work has to show


class Desk:
    """One desk a server: all tabs look at the same model, run and facts."""

    def __init__(self, places: Places, settings: Mapping[str, Any], reporter: Reporter):
        self.places, self.settings = places, dict(settings)
        self.live = Live(reporter)
        self.worker = Worker(self.live)
        self.draft = Draft()
        self.folder: Path | None = None  # of the run that is open, or is to be made
        self.inspected: Inspection | None = None
        self.previewed: Preview | None = None
        self._editor: Editor | None = None
        self._kept: dict[str, tuple[Any, Any]] = {}
        self._looked, self._seen = 0.0, ""  # when the run's files were last looked at, and what they were
        self._run: tuple[tuple[int, ...], RunFolder] | None = None  # as last read, and of which files

    # --- open -----------------------------------------------------------------------------------------------------

    def open_model(self, source: str, name: str = "", **chosen: Any) -> Job:
        """Load a model for a new run of that name; ``chosen`` are settings, over those that the studio was started with."""
        model = self.places.model(source)
        settings = make_settings(self.settings, {key: value for key, value in chosen.items() if value is not None})
        folder = self.places.new(name or default_folder(model, settings.method).name)

        def load() -> None:
            self._leave()
            self._editor = Editor.from_pretrained(model, folder, settings, self.live)
            self.folder = folder
            self._look_at_it()

        return self.worker.submit(f"loading {model}", load, writes=True)

    def open_run(self, path: str | Path) -> Job:
        """Load the model of a run, as it stands after its last batch. The run can be looked at meanwhile."""
        folder = self.places.inside(path)
        RunFolder.open(folder)

        def load() -> None:
            self._leave()
            self.folder = folder
            self._editor = Editor.open(folder, self.live)
            self._look_at_it()

        return self.worker.submit(f"loading the model of {folder.name}", load, writes=True)

    def _leave(self) -> None:
        if self._editor is not None:
            self._editor.close()
        self._editor = self._run = self.folder = self.inspected = self.previewed = None

    def _look_at_it(self) -> None:
        with self._muted():
            self.inspected = Inspection.of(self.editor.session)
            self._judge()

    @property
    def editor(self) -> Editor:
        """The model in memory.

        Raises:
            SphereEditError: there is none yet.
        """
        if self._editor is None:
            raise SphereEditError("no model is loaded yet; choose one, or open a run, under Start")
        return self._editor

    @property
    def loaded(self) -> bool:
        """Whether there is one."""
        return self._editor is not None

    def run(self) -> RunFolder | None:
        """The run as its folder has it now, read anew where it has changed; None where nothing was edited yet."""
        if self.folder is None or not RunFolder.exists(self.folder):
            return None
        files = [self.folder / name for name in ("journal.jsonl", "metrics.json")]
        stamp = tuple(
            part for file in files if file.is_file() for part in (file.stat().st_size, file.stat().st_mtime_ns)
        )
        if self._run is None or self._run[0] != stamp:
            self._run = stamp, RunFolder.open(self.folder)
        return self._run[1]

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """What takes long to make of the run, made once for as long as the run stays as it is."""
        stamp = self.run() and self._run and self._run[0]
        if name not in self._kept or self._kept[name][0] != stamp:
            self._kept[name] = stamp, make()
        found: T = self._kept[name][1]
        return found

    def stamp(self) -> str:
        """Another text whenever there is something new to see; of a run at work not more often than every few seconds."""
        self.run()
        now = time.monotonic()
        if not self.worker.writing or now > self._looked + _SELDOM:
            self._looked, self._seen = now, f"{self.folder} {self._run and self._run[0]}"
        return f"{self._seen} {self.worker.writing} {self.worker.done} {self.draft.version}"

    # --- facts ----------------------------------------------------------------------------------------------------

    def add(self, given: FactSet) -> Job | None:
        """Take up facts to be edited next, and check them as soon as there is a model to do so."""
        self.draft.add(given)
        return self.check()

    def check(self) -> Job | None:
        """Look for what stands against the facts in this model and this run; nothing before a model is loaded."""
        if not self.loaded or not self.draft.rows:
            return None

        def work() -> None:
            with self._muted():
                self._judge()

        return self.worker.submit("checking facts", work)

    def _judge(self) -> None:
        self.draft.judged(judge(self.editor.session, self.draft.facts(), self.run()))

    def suggest(self, subject: str, prompt: str) -> Job:
        """Ask the model for paraphrases and neighbours of a fact: a pair of lists."""
        loaded = self.editor.loaded
        (fact,) = facts_from([{"subject": subject, "prompt": prompt, "target_new": "-"}]).facts

        def work() -> tuple[list[str], list[str]]:
            asked = loaded, fact.subject, fact.prompt
            return suggest_paraphrases(*asked), suggest_neighbours(*asked)

        return self.worker.submit("suggesting paraphrases and neighbours", work)

    def compare(self, prompt: str, answers: Sequence[str] = (), **how: Any) -> Job:
        """Ask the unedited and the edited model: a `Compared`."""
        if not prompt.strip():
            raise SphereEditError("which prompt? Write one")
        if not self.worker.writing:
            _ = self.editor

        def work() -> Compared:
            editor = self.editor
            return compare(editor.loaded, editor.weights, prompt, answers, **how)

        return self.worker.submit(f"asking '{prompt[:40]}'", work)

    # --- edit -----------------------------------------------------------------------------------------------------

    def edit(self) -> Job:
        """Edit the facts that were gathered, and keep the result."""
        return self._write("editing", lambda given: self.editor.edit(given))

    def preview(self) -> Job:
        """Edit them, show what came of it, and take it back."""

        def work(given: FactSet) -> None:
            self.previewed = preview(self.editor, given)

        return self._write("previewing", work, keep=True)

    def _write(self, what: str, work: Callable[[FactSet], Any], keep: bool = False) -> Job:
        editor, given = self.editor, self.draft.usable()
        if editor.run is not None and not editor.run.history.finished:
            waits = len(editor.run.history.pending)
            raise SphereEditError(
                f"{counted(waits, 'fact')} waiting in this run; go on with it, or roll it back, first"
            )

        def whole() -> None:
            editor.stop(False)
            self.previewed = None
            calibrate(editor, given, False)
            known = 0 if editor.run is None else editor.run.history.total
            try:
                work(given)
            finally:
                if not keep and editor.run is not None and editor.run.history.total > known:
                    self.draft.clear()  # the run has them now, whatever became of the work

        return self.worker.submit(f"{what} {counted(len(given.facts), 'fact')}", whole, writes=True)

    def go_on(self) -> Job:
        """Do what was left of an interrupted run."""
        editor = self.editor

        def work() -> None:
            editor.stop(False)
            editor.resume()

        return self.worker.submit("going on", work, writes=True)

    def stop(self) -> None:
        """End the work after its batch."""
        if self._editor is not None and self.worker.writing:
            self._editor.stop()

    def roll_back(self, to: int) -> Job:
        """Go back to after a batch."""
        editor = self.editor
        return self.worker.submit(f"rolling back to batch {to}", lambda: editor.rollback(to), writes=True)

    def remove(self, fact: int) -> Job:
        """Take one fact back."""
        editor = self.editor
        return self.worker.submit(f"removing fact {fact}", lambda: editor.remove(fact), writes=True)

    # --- ship -----------------------------------------------------------------------------------------------------

    def export(self, form: Any, name: str, rank: int | None = None, base: str = "", measure: bool = False) -> Job:
        """Write the edited model into a new folder of that name: that folder."""
        editor, folder = self.editor, self.places.new(name)
        options: dict[str, Any] = {"rank": rank, "base": self.places.inside(base) if base.strip() else None}

        def work() -> Path:
            editor.export(folder, form, measure=measure, **options)
            return folder

        return self.worker.submit(f"exporting as {form}", work)

    def verify(self, export: str = "") -> Job:
        """Prove the run, or an export of it: a sentence."""
        run, folder = self.known_run(), self.places.inside(self.places.home / export)

        def work() -> str:
            if not export:
                return prove(run, self.live).verdict(run)
            return prove_export(folder, run, self.live).sentence(folder, f"its weights are those of {run.path}")

        return self.worker.submit("verifying", work)

    def exports(self) -> list[str]:
        """The names of the exports that lie where new ones go."""
        home = self.places.home
        found = home.iterdir() if home.is_dir() else ()
        return sorted(path.name for path in found if is_export(path))

    def report(self) -> Job:
        """Write the page about the run: its path."""
        folder = self.known_run().path
        return self.worker.submit(
            "writing the report", lambda: write_report([folder], folder / "report.html", folder / "figures", self.live)
        )

    def known_run(self) -> RunFolder:
        """The run.

        Raises:
            SphereEditError: nothing was edited yet.
        """
        run = self.run()
        if run is None:
            raise SphereEditError("nothing was edited yet; this shows a run once there is one")
        return run

    def close(self) -> None:
        """Let other processes at the run."""
        self._leave()

    @contextmanager
    def _muted(self) -> Iterator[None]:
        self.live.muted = True
        try:
            yield
        finally:
            self.live.muted = False
