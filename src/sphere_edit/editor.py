"""The public `Editor`: a model, a run folder, and everything a user does with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

from sphere_edit.editing.settings import Settings, make_settings
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.ability import AbilityTasks
from sphere_edit.exports.forms import Wanted, write
from sphere_edit.exports.manifest import Form
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.readers import FactSet, facts_from
from sphere_edit.models.generation import generate
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.placement import DeviceMap, Memory
from sphere_edit.models.weights import EditedWeights
from sphere_edit.progress import Reporter, RichReporter
from sphere_edit.runs.folder import RunFolder, Watcher
from sphere_edit.runs.measuring import BeforeAndAfter, Evaluator
from sphere_edit.runs.preparing import create_run, default_folder, session_of
from sphere_edit.runs.removal import FactName, wanted_from
from sphere_edit.runs.selection import admit, asked
from sphere_edit.runs.session import Session
from sphere_edit.runs.stream import Stream
from sphere_edit.runs.summary import MetricsContent

Facts = str | Path | FactSet | Iterable[Fact | Mapping[str, Any]]


class Editor:
    """Edits one model, batch after batch, in one run folder.

        editor = Editor.from_pretrained("smollm2", run="runs/first")
        editor.edit([{"subject": "Big Ben", "prompt": "{} stands in the city of", "target_new": "Vienna"}])
        editor.rollback(0)
        editor.save_pretrained("edited")

    ``editor.model`` and ``editor.tokenizer`` are the transformers objects; the model always runs with the deployed
    weights, those that `save_pretrained` writes.
    """

    def __init__(self, session: Session, folder: Path):
        self.folder = folder
        self.watchers: list[Watcher] = []  # told of every line of the run's journal, as `reporting.tracking.Tracker` is
        self._stream: Stream | None = None
        self._stopping = Event()
        self._work_by(session)

    def _work_by(self, session: Session) -> None:
        self.session = session
        self._evaluator = Evaluator(session.loaded, session.weights, session.settings, session.reporter)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        run: str | Path | None = None,
        settings: Settings | None = None,
        reporter: Reporter | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Editor:
        """Load a model to be edited in a new run.

        Args:
            model: a hub id, a local folder, a ``.gguf`` file, or ``smollm2``.
            run: the run folder, which must not hold a run yet; by default ``runs/<model>-<method>-<time>``.
            settings: all settings; or give single ones by name in ``options``, e.g. ``method="memit"``, ``targets={"steps": 25}``.
            reporter: where progress goes: bars on standard error by default, `Quiet` for silence.
            trust_remote_code: run code that comes with the model.

        Raises:
            SphereEditError: the model, a setting or the folder cannot be used.
        """
        given = make_settings(settings.model_dump(exclude_unset=True) if settings else {}, options)
        folder = Path(run) if run is not None else default_folder(model, given.method)
        if RunFolder.exists(folder):
            raise SphereEditError(f"{folder} holds a run already; Editor.open('{folder}') goes on with it")
        return cls(Session.load(model, given, reporter or RichReporter(), trust_remote_code), folder)

    @classmethod
    def open(
        cls,
        run: str | Path,
        reporter: Reporter | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        model: str | Path | None = None,
        trust_run: bool = False,
        only_to_read: bool = False,
        device_map: DeviceMap | None = None,
        max_memory: Memory | None = None,
    ) -> Editor:
        """Load the model of a run as it stands after its last batch; unfinished work waits for `resume`.

        Args:
            device: to use in place of the run's.
            model: where the original model is now, if it has moved; its weights must be the same.
            trust_run: use what a run that was begun elsewhere names outside its folder (tasks, references).
            only_to_read: to evaluate, generate or export; the folder need not be writable then.
            device_map, max_memory: spread the model so, in place of the run's device or map (`Settings`).

        Raises:
            SphereEditError: no run there, another process is at work in it, or its model is not what it was.
        """
        folder = RunFolder.open(run)
        folder.lock(only_to_read)
        try:
            places = {"device": device, "device_map": device_map, "max_memory": max_memory}
            session = session_of(folder, reporter or RichReporter(), places, trust_remote_code, model)
            editor = cls(session, folder.path)
            editor._attach(folder, trust_run)
        except BaseException:
            folder.unlock()
            raise
        return editor

    @property
    def loaded(self) -> LoadedModel:
        """The model as it was loaded, and what is known of it."""
        return self.session.loaded

    @property
    def settings(self) -> Settings:
        """The settings, every default spelled out."""
        return self.session.settings

    @property
    def weights(self) -> EditedWeights:
        """The edited matrices."""
        return self.session.weights

    @property
    def run(self) -> RunFolder | None:
        """The run folder, once something was edited."""
        return None if self._stream is None else self._stream.run

    @property
    def model(self) -> Any:
        """The transformers model, with the deployed weights in it."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.loaded.tokenizer

    def close(self) -> None:
        """Release the run folder for other processes."""
        if self._stream is not None:
            self._stream.run.unlock()

    def edit(self, facts: Facts, skip_bad: bool = False, skip_known: bool = False) -> MetricsContent:
        """Edit facts in batches of ``batch_size``, then evaluate all facts edited so far.

        Called again, it goes on from where it stands, with the state of the method and the original weights. Returns the content of
        ``metrics.json``.

        Args:
            facts: a file or data set, or facts (dictionaries with subject, prompt, target_new, …).
            skip_bad: leave out facts that cannot be used, instead of refusing all.
            skip_known: leave out facts whose new answer the unedited model gives already (the strict verdict).

        Raises:
            SphereEditError: before any work starts, for anything that would stop it; nothing is lost by one later.
        """
        given = facts_from(facts, skip_bad)
        planned, left_out = self.check(given, skip_bad, skip_known)
        if self._stream is None:
            self._attach(create_run(self.session, self.folder, len(planned)))
        self._at_work().accept(planned, given, left_out)
        return self.resume()

    def check(self, given: FactSet, skip_bad: bool, skip_known: bool = False) -> tuple[list[Fact], list[str]]:
        """The facts to edit and the records left out (`admit`)."""
        standing = [] if self.run is None else self.run.facts()
        return admit(self.session, self._evaluator, given, skip_bad, standing if skip_known else None)

    def resume(self) -> MetricsContent:
        """Do whatever the journal says is still to be done: batches, evaluations. Returns the final metrics."""
        self._at_work().go_on()
        return self.metrics()

    def stop(self, wanted: bool = True) -> None:
        """From another thread: let what is at work, or comes next, end after its batch with `runs.stream.Stopped`; the rest waits for `resume`.

        Not ``wanted``: what was asked so before is taken back.
        """
        (self._stopping.set if wanted else self._stopping.clear)()

    def rollback(self, to: int) -> None:
        """Put the weights back to exactly what they were after batch ``to`` (0: the original); later batches and waiting facts are withdrawn."""
        self._at_work().roll_back(to)

    def remove(
        self, facts: int | str | Path | FactSet | Iterable[FactName | Mapping[str, Any]], exact: bool = False
    ) -> MetricsContent:
        """Take single facts back, so that their prompts give the unedited model's answers again; the other facts stay.

        What was written for them is subtracted, where the method writes a share for each fact; what does not come back so is written from
        the unedited model. Others that are lost by it are written again. Returns the content of ``metrics.json``.

        Args:
            facts: numbers of facts, subjects or prompts, or records as for `edit`; a path is a file of them.
            exact: go back to the batch before the first of them, and edit all others since then again.

        Raises:
            SphereEditError: a fact is not in the run, does not stand, or several could be meant.
        """
        self._at_work().remove(wanted_from(facts), exact)
        return self.metrics()

    def evaluate(self, facts: Facts, skip_bad: bool = False, heldout: bool = False) -> BeforeAndAfter:
        """Score any facts on the unedited and on the edited model; with ``heldout``, both on the run's held-out text too."""
        given = asked(self.session, facts_from(facts, skip_bad), skip_bad)
        return self._evaluator.before_and_after(given, self.run is not None and self.run.history.head > 0, heldout)

    def ability(self, tasks: AbilityTasks) -> dict[str, dict[str, Any]]:
        """General ability, by task, ``unedited`` and (in a run, whose journal keeps it and is not measured again) ``edited``."""
        if self._stream is not None:
            self._stream.committer.settle()
        return self._evaluator.ability_of(self.run, tasks)

    def metrics(self) -> MetricsContent:
        """The content of ``metrics.json``."""
        return self._at_work().run.metrics()

    def generate(self, prompt: str, max_new_tokens: int = 12, chat: bool = False) -> str:
        """The greedy continuation of a prompt by the model as it stands; or, in its own chat, its answer."""
        ids = Encoder(self.tokenizer).asked(prompt, chat).ids
        (said,) = generate(self.loaded, [ids], max_new_tokens)
        return self.tokenizer.decode(said[len(ids) :], skip_special_tokens=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """As `export` in the form ``hf``: the source's own files but for the edited tensors, and a model card."""
        self.export(folder)

    def export(self, folder: str | Path, form: Form = "hf", **asked: Any) -> None:
        """Write the edited model in a form: ``hf``, ``delta``, ``lora``, …; what can be asked of each, `exports.forms.Wanted` says."""
        wanted, stream = Wanted(form, **asked), self._at_work()
        stream.committer.settle()
        for sentence in write(wanted, self.session, stream.run, Path(folder)):
            self.session.reporter.say(sentence)

    def adopt_tuned(self) -> None:
        """Before the first edit: go by the settings that `tune` has found for this model since it was loaded."""
        self._work_by(self.session.with_tuned())

    def _attach(self, run: RunFolder, trust_run: bool = False) -> None:
        """Work in this run from here on."""
        try:
            run.watchers = self.watchers
            self._stream = Stream(self.session, self._evaluator, run, trust_run, self._stopping)
        except BaseException:
            run.unlock()
            raise

    def _at_work(self) -> Stream:
        if self._stream is None:
            raise SphereEditError("nothing has been edited yet: call edit() first")
        return self._stream


def opened(run: str | Path, reporter: Reporter | None = None, **options: Any) -> closing[Editor]:
    """`Editor.open` as a context that closes the run again."""
    return closing(Editor.open(run, reporter, **options))
