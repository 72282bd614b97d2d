"""The public `Editor`: a model, a run folder, and everything a user does with them."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from sphere_edit._version import __version__
from sphere_edit.editing.guard import stopped
from sphere_edit.editing.journal import SCHEMA, RunFolder
from sphere_edit.editing.loop import SequentialLoop, next_batch, plan_batches, superseded_by
from sphere_edit.editing.methods.base import Statistics
from sphere_edit.editing.moments import Corpus, load_corpus
from sphere_edit.editing.repair import readable_passages, repair_steps
from sphere_edit.editing.settings import Settings, make_settings, with_preset
from sphere_edit.editing.solving import Clock, Solver
from sphere_edit.editing.sources import SOURCES, OptimisedTargets, Source
from sphere_edit.editing.statistics import load_statistics, prepare_statistics
from sphere_edit.editing.targets import TargetSettings
from sphere_edit.errors import SphereEditError, refused_records
from sphere_edit.evaluation.ability import AbilityTasks
from sphere_edit.evaluation.evaluator import Evaluator
from sphere_edit.evaluation.metrics import FactScores, complete_answers, summarise
from sphere_edit.export import export_model, model_card
from sphere_edit.facts.fact import Fact, short
from sphere_edit.facts.prompts import KL_PROMPT, Encoder, fill, sample_context_templates
from sphere_edit.facts.readers import FactSet, facts_from, read_facts
from sphere_edit.files import plain_errors, write_json, write_tensors
from sphere_edit.models.forward import generate
from sphere_edit.models.loading import LoadedModel, fast_bfloat16, load_model
from sphere_edit.models.weights import EditedWeights
from sphere_edit.progress import Reporter, RichReporter

_LIKELY = 0.5  # mean probability of the answers under the targets alone, below which something is wrong with these
_SATURATED = 0.25  # share of earlier facts forgotten, from which on a stream feeds on itself (docs/quality.md)
_PASSAGES = "passages.json"  # of a run: token ids of the ordinary text that its repair reads
_TEMPLATE_ROOM = 24  # tokens that a context template may put before a prompt

Facts = str | Path | FactSet | Iterable[Fact | Mapping[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """Scores of some facts on the unedited and on the edited model."""

    facts: list[Fact]
    unedited: list[FactScores]
    edited: list[FactScores]

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Means over the facts, in percent."""
        return {"unedited": summarise(self.unedited), "edited": summarise(self.edited)}


class Editor:
    """Edits one model, batch after batch, in one run folder.

        editor = Editor.from_pretrained("smollm2", run="runs/first")
        editor.edit([{"subject": "Big Ben", "prompt": "{} stands in the city of", "target_new": "Vienna"}])
        editor.rollback(0)
        editor.save_pretrained("edited")

    ``editor.model`` and ``editor.tokenizer`` are the transformers objects; the model always runs with the deployed
    weights, those that `save_pretrained` writes.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings, preset: str | None, folder: Path, reporter: Reporter):
        self.loaded, self.folder, self.reporter = loaded, folder, reporter
        self.run: RunFolder | None = None
        self._loop: SequentialLoop | None = None
        self._adopt(settings, preset)

    def _adopt(self, settings: Settings, preset: str | None) -> None:
        """Go by these settings from here on."""
        loaded, self.preset, self.given = self.loaded, preset, settings
        depth = len(loaded.architecture.decoder_layers(loaded.model))
        self.method = settings.make_method()
        self.sphere = settings.make_sphere()
        matrices = settings.resolved_matrices(loaded.architecture, depth)
        faster = loaded.dtype == torch.float32 and fast_bfloat16(loaded.device)
        self.settings = settings.with_resolved(matrices, loaded.device, faster)
        self.layers = [layer for layer, _ in matrices]  # of each edited matrix
        names = [loaded.architecture.module_name(layer, role) for layer, role in matrices]
        self.weights = EditedWeights(loaded.model, loaded.architecture, names)
        self._evaluator = Evaluator(loaded, self.weights, self.settings, self.reporter)

    # --- opening --------------------------------------------------------------------------------------------------

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
            settings: all settings; or give single ones by name in ``options``, e.g. ``method="memit"``,
                ``batch_size=50``, ``targets={"steps": 25}``.
            reporter: where progress goes: bars on standard error by default, `Quiet` for silence.
            trust_remote_code: run code that comes with the model.

        Raises:
            SphereEditError: the model, a setting or the folder cannot be used.
        """
        given = make_settings(settings.model_dump(exclude_unset=True) if settings else {}, options)
        folder = Path(run) if run is not None else _default_folder(str(model), given.method)
        if RunFolder.exists(folder):
            raise SphereEditError(f"{folder} holds a run already; Editor.open('{folder}') goes on with it")
        loaded = load_model(model, given.device, given.dtype, trust_remote_code)
        settled = with_preset(given, loaded.model.config, loaded.fingerprint)
        editor = cls(loaded, *settled, folder, reporter or RichReporter())
        if editor.preset is not None:
            editor.reporter.say(f"Settings of {given.method} {editor.preset}, but for what you set")
        return editor

    @classmethod
    def open(
        cls,
        run: str | Path,
        reporter: Reporter | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        model: str | Path | None = None,
    ) -> Editor:
        """Load the model of a run as it stands after its last batch; unfinished work waits for `resume`.

        ``model`` says where the original model is now, if it has moved; its weights must be the same.

        Raises:
            SphereEditError: no run there, another process is at work in it, or its model is not what it was.
        """
        folder = RunFolder.open(run)
        folder.lock()
        try:
            before = {"repair": 0}  # of a run that began before there was a repair, and has no text for it
            settings = make_settings(before, folder.config["settings"])
            source = str(model or folder.config["model"]["source"])
            loaded = load_model(source, device or settings.device, settings.dtype, trust_remote_code)
            if loaded.fingerprint != folder.config["model"]["fingerprint"]:
                raise SphereEditError(
                    f"the model at '{source}' is not the one this run edited (its weights have another hash); "
                    "put the original back, or start a new run"
                )
            editor = cls(loaded, settings, folder.config.get("preset"), folder.path, reporter or RichReporter())
            editor._warn_of_other_surroundings(folder.config)
            editor._attach(folder)
        except BaseException:
            folder.unlock()
            raise
        return editor

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
        if self.run is not None:
            self.run.unlock()

    # --- editing --------------------------------------------------------------------------------------------------

    def edit(self, facts: Facts, skip_bad: bool = False, skip_known: bool = False) -> dict[str, Any]:
        """Edit facts in batches of ``batch_size``, then evaluate all facts edited so far.

        Called again, it goes on from where it stands, with the state of the method and the original weights.

        Args:
            facts: a file or data set, or facts (dictionaries with subject, prompt, target_new, …).
            skip_bad: leave out facts that cannot be used, instead of refusing all.
            skip_known: leave out facts whose new answer the unedited model gives already (the strict verdict).

        Returns:
            the content of ``metrics.json``.

        Raises:
            SphereEditError: before any work starts, for anything that would stop it; nothing is lost by one later.
        """
        given = facts_from(facts, skip_bad)
        planned, left_out = self.check(given, skip_bad, skip_known)
        if self.run is None:
            self._start()
        run = self._run()
        history = run.history
        if history.pending:
            raise SphereEditError(
                f"{self.folder} has {len(history.pending)} facts waiting; resume it before giving it more"
            )
        run.add_facts(planned, source=given.source, protocol=given.protocol, left_out=left_out)
        return self.resume()

    def check(self, given: FactSet, skip_bad: bool, skip_known: bool = False) -> tuple[list[Fact], list[str]]:
        """The facts to edit and the records left out: no contradictions in a batch, every subject found in its tokens.

        What the settings ask of the evaluation is checked too.
        """
        self._evaluator.check()
        usable, unreadable = self._readable(given.facts, skip_bad)
        usable, known = self._unknown(usable) if skip_known else (usable, [])
        plan = plan_batches(usable, self.settings.batch_size, skip_bad)
        left_out = [*given.bad, *unreadable, *known, *plan.bad]
        self._say_left_out(left_out)
        if not plan.facts:
            raise SphereEditError(f"{given.source}: none of its facts can be used; the first: {left_out[0]}")
        return plan.facts, left_out

    def resume(self) -> dict[str, Any]:
        """Do whatever the journal says is still to be done: batches, evaluations. Returns the final metrics."""
        run = self._run()
        try:
            evaluator = self._evaluator
            evaluator.measure_unedited(run)
            facts = run.facts()
            if run.history.pending:
                self._check_statistics()
            while pending := run.history.pending:
                evaluator.checkpoint(run)
                self._edit_batch(facts, self._together(facts, pending, self.settings.batch_size))
            if run.history.closing and repair_steps(self.settings.repair or 0, run.history.unrepaired):
                self._repair(facts)
            if run.history.closing and self.settings.recheck:
                self._look_back(facts)
            self._the_loop().keep()
            evaluator.finish(run)
            if not run.history.finished:
                run.append("finished", after=run.history.head)
        except BaseException:  # an interruption too must leave the model in memory as the journal says
            with suppress(SphereEditError):
                self._the_loop().settle()
            raise
        return self.metrics()

    def rollback(self, to: int) -> None:
        """Put the weights back to exactly what they were after batch ``to``; 0 is the original model, bit for bit.

        Later batches, and facts that were still waiting, are withdrawn.
        """
        run = self._run()
        head = run.history.head
        if not 0 <= to <= head:
            raise SphereEditError(
                f"cannot roll back to batch {to}: this run stands at batch {head}, so 0 to {head} exist"
            )
        loop = self._the_loop()
        try:
            loop.go_to(to)
            if to > 0:
                run.write_checkpoint(to, self.weights.working, loop.states)
            run.append("rollback", to=to)
        except BaseException:
            with suppress(SphereEditError):
                loop.settle()
            raise
        run.thin(to)
        if to < head:
            for name in ("metrics.json", "report.html"):  # of a later state
                (self.folder / name).unlink(missing_ok=True)
            self._evaluator.refresh_metrics(run)

    # --- looking --------------------------------------------------------------------------------------------------

    def evaluate(self, facts: Facts, skip_bad: bool = False) -> Evaluation:
        """Score any facts on the unedited and on the edited model."""
        found = facts_from(facts, skip_bad)
        given, unreadable = self._readable(found.facts, skip_bad)
        self._say_left_out([*found.bad, *unreadable])
        evaluator = self._evaluator
        with self.weights.unedited():
            complete = complete_answers(self.loaded, given)
            before = evaluator.score(complete, "unedited model", say=True)
        edited = self.run is not None and self.run.history.head > 0
        after = evaluator.score(complete, "edited model", say=True) if edited else before
        return Evaluation(complete, before, after)

    def ability(self, tasks: AbilityTasks) -> dict[str, dict[str, Any]]:
        """General ability of the unedited model and, in a run, of the edited one: scores by task, by ``unedited`` and ``edited``.

        Of a run, the scores go into its journal and ``metrics.json``, and what the journal has is not measured again.
        """
        if self.run is None:
            scores = tasks.score(self.loaded, self.settings.seed)
            return {"unedited": {name: score.as_dict() for name, score in scores.items()}}
        self._the_loop().settle()
        with self.weights.unedited():
            before = self._evaluator.measure_ability(self.run, 0, tasks)
        after = self._evaluator.measure_ability(self.run, self.run.history.head, tasks)
        self._evaluator.refresh_metrics(self.run)
        return {"unedited": before, "edited": after}

    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``."""
        path = self.folder / "metrics.json"
        with plain_errors(path, "read"):
            return json.loads(path.read_text("utf-8"))

    def generate(self, prompt: str, max_new_tokens: int = 12) -> str:
        """The greedy continuation of a prompt by the model as it stands."""
        ids = Encoder(self.tokenizer).encode(prompt).ids
        (said,) = generate(self.loaded, [ids], max_new_tokens)
        return self.tokenizer.decode(said[len(ids) :], skip_special_tokens=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Export the edited model: a plain Hugging Face folder with tokenizer, generation config and model card."""
        run = self._run()
        self._the_loop().settle()
        history = run.history
        all_facts = run.facts()
        metrics = self.metrics() if (self.folder / "metrics.json").is_file() else None
        if metrics is not None and metrics["after"] != history.head:
            metrics = None
        card = model_card(run.config, history.head, [all_facts[index] for index in history.retained], metrics)
        export_model(self.loaded, Path(folder), card)

    @property
    def measures_moments(self) -> bool:
        """Whether a run measures second moments: its method needs them, or the guard does."""
        return self.method.needs.statistics is not None or self.settings.guard

    # --- inside ---------------------------------------------------------------------------------------------------

    def measure_statistics(self, corpus: Corpus, folder: Path) -> None:
        """Put the method's statistics of every edited matrix into ``folder``, from the cache where they are there."""
        settings, names = self.settings, self.weights.names
        size, tolerance = settings.tokens_per_batch, settings.moments.tolerance
        prepare_statistics(self.loaded, corpus, self.layers, names, self.method, size, tolerance, self.reporter, folder)

    def make_source(
        self, templates: Sequence[str], targets: TargetSettings, kind: Callable[..., Source] | None = None
    ) -> Source:
        """What the method feeds on, or another ``kind`` of it."""
        needs = self.method.needs
        return (kind or SOURCES[needs.source])(
            self.loaded, self.weights, self.layers, templates, needs, targets, self.settings.tokens_per_batch
        )

    def make_solver(self, source: Source, statistics: Mapping[str, Statistics]) -> Solver:
        """What writes a batch with these settings."""
        diagnostic = self.settings.diagnostic_sphere()
        return Solver(self.weights, source, self.method, self.sphere, diagnostic, statistics, self.reporter)

    @property
    def would_calibrate(self) -> bool:
        """Whether nothing is known of this model, nor said, so that a calibration (`tune`) comes before the first edit."""
        said = self.given.model_fields_set & {"layers", "options", "targets"}
        return self.method.calibrated and self.preset is None and not said

    def adopt_tuned(self) -> None:
        """Before the first edit: go by the settings that `tune` has found for this model since it was loaded."""
        self._adopt(*with_preset(self.given, self.model.config, self.loaded.fingerprint))

    def would_supersede(self, facts: Sequence[Fact]) -> int:
        """How many facts that stand now these would replace."""
        run = self._run()
        known = run.facts()
        new = range(len(known), len(known) + len(facts))
        return len(superseded_by([*known, *facts], new, run.history.retained))

    def _readable(self, facts: Sequence[Fact], skip_bad: bool) -> tuple[list[Fact], list[str]]:
        """Facts whose every prompt this model's tokenizer can place and its positions can hold, and what is wrong elsewhere."""
        encoder = Encoder(self.tokenizer)
        limit = getattr(self.model.config, "max_position_embeddings", float("inf")) - _TEMPLATE_ROOM
        usable, bad = [], []
        for fact in facts:
            neighbors = [neighbor.prompt for neighbor in fact.neighbors]
            try:
                if self.method.needs.source == "targets":
                    encoder.subject_end(*fill("{}", fact))
                    encoder.subject_end(*fill("{}", fact, KL_PROMPT))
                for prompt in (fact.filled_prompt, *fact.paraphrases, *neighbors):
                    longest = max((fact.target_new, fact.target_true or ""), key=len)
                    size = len(encoder.with_target(prompt, longest)[0].ids)
                    if size > limit:
                        raise SphereEditError(
                            f"'{prompt[:60]}…' has {size} tokens; this model reads {limit} beside a template"
                        )
            except SphereEditError as error:
                bad.append(f"record {fact.record}: {error}")
            else:
                usable.append(fact)
        if bad and not skip_bad:
            raise refused_records("facts this model cannot read (--skip-bad goes on without)", bad)
        return usable, bad

    def _unknown(self, facts: Sequence[Fact]) -> tuple[list[Fact], list[str]]:
        """Facts whose new answer the unedited model does not give yet, and the records of the others.

        A fact that corrects an earlier one stays in, whatever the unedited model says.
        """
        with self.weights.unedited():
            given = self._knows(facts, "what is known already")
        standing = {fact.key for fact in self.run.facts()} if self.run is not None else set()
        known = []
        for fact, answered in zip(facts, given, strict=True):
            known.append(answered and fact.key not in standing)
            standing.add(fact.key)
        return [fact for fact, k in zip(facts, known, strict=True) if not k], [
            f"record {fact.record}: the unedited model says '{short(fact.target_new.strip())}' already"
            for fact, k in zip(facts, known, strict=True)
            if k
        ]

    def _check_statistics(self) -> None:
        """Refuse to edit on without what the run measured before its first batch."""
        needed = self.method.needs.statistics
        known = self._the_loop().solver.statistics
        missing = [name for name in self.weights.names if needed is not None and getattr(known[name], needed) is None]
        if missing:
            raise SphereEditError(
                f"{self.folder / 'statistics'} lacks what {self.method.name} needs of {missing[0]}, so this run cannot edit on; put the folder "
                "back, or start a new run"
            )

    def _edit_batch(self, facts: Sequence[Fact], batch: Sequence[int]) -> None:
        """Edit these facts, and those of earlier ones that are found forgotten."""
        history, clock = self._run().history, Clock()
        replaced = superseded_by(facts, batch, history.retained)
        assert self.settings.recheck is not None
        gone = set(replaced)
        due = [index for index in history.due if index not in gone]
        asked = due[: self.settings.recheck * len(batch)]
        forgotten = self._forgotten(facts, asked, clock)
        # a forgotten fact of a subject that the batch is about may have to wait for its next turn
        again = self._together(facts, [*batch, *forgotten], len(batch) + len(forgotten))[len(batch) :]
        parts = [f"{len(batch)} facts"]
        if asked:
            parts.append(f"{len(forgotten)} of {len(asked)} earlier ones that were forgotten")
        left = len(history.pending) - len(batch)
        self.reporter.say(f"Batch {history.head + 1}: {', and '.join(parts)}; {left} after it", "bold")
        for index in replaced:
            self.reporter.say(f"  supersedes: {facts[index].filled_prompt} → {facts[index].target_new.strip()}")
        self._write(facts, batch, again, replaced, asked, clock)

    def _look_back(self, facts: Sequence[Fact]) -> None:
        """At the end of a stream ask all its facts, once, and edit those again that are forgotten, in batches without new ones."""
        run = self._run()
        history = run.history
        if not history.looked_back:
            clock, asked = Clock(), history.due
            forgotten = self._forgotten(facts, asked, clock)
            run.append("look back", after=history.head, asked=asked, forgotten=forgotten, seconds=clock.seconds)
        while (waiting := history.forgotten) and history.guard is None:
            again = self._together(facts, waiting, self.settings.batch_size)
            asked = history.look_backs[-1]["asked"]
            self.reporter.say(f"Batch {history.head + 1}: {len(again)} forgotten of {len(asked)} facts asked", "bold")
            self._write(facts, [], again, [], [], Clock())

    def _write(
        self,
        facts: Sequence[Fact],
        batch: Sequence[int],
        again: Sequence[int],
        replaced: Sequence[int],
        asked: Sequence[int],
        clock: Clock,
    ) -> None:
        """Have the loop edit the facts of a ``batch`` and earlier ones ``again``, and say what came of it."""
        chosen = [facts[index] for index in (*batch, *again)]
        entry = self._the_loop().edit(batch, chosen, replaced, asked, again, clock)
        likely = entry["targets"]["probability_after"]
        if likely is not None and likely < _LIKELY:
            self.reporter.say(
                f"The targets of this batch make their answers only {likely:.0%} likely: this model does not read these facts "
                f"in layer {self.layers[-1]}. `sphere-edit tune` finds layers and a step for a model"
            )
        if entry["event"] == "guard":
            self.reporter.say(f"Guard: {stopped(entry)}", "bold red")

    def _together(self, facts: Sequence[Fact], waiting: Sequence[int], size: int) -> list[int]:
        """The first of those waiting that the method takes in one batch of ``size`` at most."""
        return next_batch(facts, waiting, size) if self.method.apart else list(waiting[:size])

    def _repair(self, facts: Sequence[Fact]) -> None:
        """Take back what the stream did to ordinary text, as far as its facts do not need it."""
        run = self._run()
        assert self.settings.repair is not None
        steps = repair_steps(self.settings.repair, run.history.unrepaired)
        self.reporter.say(f"Batch {run.history.head + 1}: repair, {steps} steps", "bold")
        with plain_errors(self.folder / _PASSAGES, "read"):
            passages = json.loads((self.folder / _PASSAGES).read_text("utf-8"))
        retained = [facts[index] for index in run.history.retained]
        share = run.history.unrepaired / len(run.history.edited)
        self._the_loop().repair(retained, passages, steps, share, self.settings.seed)

    def _forgotten(self, facts: Sequence[Fact], asked: Sequence[int], clock: Clock) -> list[int]:
        """Which of the facts ``asked`` the model does not give the new answer of any more (strict)."""
        if not asked:
            return []
        self._the_loop().settle()
        given = self._knows([facts[index] for index in asked], "earlier facts")
        clock.lap("asking earlier facts")
        forgotten = [index for index, answered in zip(asked, given, strict=True) if not answered]
        if len(forgotten) > _SATURATED * len(asked):
            self.reporter.say(
                f"{len(forgotten)} of {len(asked)} earlier facts are forgotten: the model holds no more with these settings, and writing them again "
                "soon harms it more than it helps; stop here, or go back to an earlier batch (rollback)",
                "bold red",
            )
        return forgotten

    def _knows(self, facts: Sequence[Fact], title: str) -> list[bool]:
        """Whether the model as it stands gives each fact's new answer (strict)."""
        return [score.rewrite.correct for score in self._evaluator.score([fact.bare() for fact in facts], title)]

    def _say_left_out(self, records: Sequence[str]) -> None:
        if records:
            self.reporter.say(f"{len(records)} records left out; the first: {records[0]}")

    def _warn_of_other_surroundings(self, config: Mapping[str, Any]) -> None:
        now = {**_versions(), "device": str(self.loaded.device), "threads": torch.get_num_threads()}
        then = {**config["versions"], "device": config["device"], "threads": config["threads"]}
        changed = [f"{name} {then.get(name)} → {value}" for name, value in now.items() if then.get(name) != value]
        if changed:
            self.reporter.say(
                f"Other surroundings than when this run began, so last bits may differ: {', '.join(changed)}"
            )

    def _run(self) -> RunFolder:
        if self.run is None:
            raise SphereEditError("nothing has been edited yet: call edit() first")
        return self.run

    def _the_loop(self) -> SequentialLoop:
        assert self._loop is not None
        return self._loop

    def _start(self) -> None:
        """Create the run folder: everything that affects results is decided and written here, before the first batch."""
        run = RunFolder.create(self.folder, {})
        try:
            with self.weights.unedited():
                self.reporter.say("Preparing", "bold")
                count = self.settings.templates if self.method.needs.source == "targets" else 0
                templates = sample_context_templates(self.loaded, self.settings.seed, count)
                corpus = load_corpus(self.loaded, self.settings.moments, self.settings.seed, self.reporter)
                if self.measures_moments:
                    self.measure_statistics(corpus, self.folder / "statistics")
                if self.method.needs.anchored:
                    self._measure_anchor(templates)
            run.config = self._config(templates, corpus)
            write_json(self.folder / "heldout.json", corpus.heldout)
            if self.settings.repair:
                write_json(self.folder / _PASSAGES, readable_passages(corpus.passages))
            write_json(self.folder / "config.json", run.config)
            self._attach(run)
        except BaseException:
            run.unlock()
            raise

    def _measure_anchor(self, templates: Sequence[str]) -> None:
        """Put the typical length of targets on the unedited model, those of the demo facts, with the run's statistics."""
        facts, _ = self._readable(read_facts("demo").facts, skip_bad=True)
        if not facts:
            raise SphereEditError(
                f"{self.method.name} measures the demo facts first, and this tokenizer places none of their subjects"
            )
        source = self.make_source(templates, self.settings.targets)
        assert isinstance(source, OptimisedTargets)
        with self.reporter.bar("targets of the demo facts", len(facts), "facts") as advance:
            length = source.typical_length(facts, advance)
        file = self.folder / "statistics" / "anchor" / f"{self.weights.names[-1]}.safetensors"
        write_tensors(file, {"anchor": torch.tensor([length])})

    def _config(self, templates: Sequence[str], corpus: Corpus) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "created": _now(),
            "model": {
                "source": self.loaded.source,
                "fingerprint": self.loaded.fingerprint,
                "family": self.model.config.model_type,
                "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
                "dtype": str(self.loaded.dtype).removeprefix("torch."),
            },
            "preset": self.preset,
            "settings": self.settings.model_dump(mode="json"),
            "method_options": self.method.model_dump(mode="json"),
            "sphere": None if self.sphere is None else self.sphere.model_dump(mode="json"),
            "layers": sorted(set(self.layers)),
            "matrices": list(self.weights.names),
            "templates": list(templates),
            "corpus": {
                "origin": corpus.origin,
                "sha256": corpus.sha256,
                "passages": len(corpus.passages),
                "tokens": sum(len(passage) for passage in corpus.passages),
                "heldout_passages": len(corpus.heldout),
            },
            "versions": _versions(),
            "device": str(self.loaded.device),
            "threads": torch.get_num_threads(),
        }

    def _attach(self, run: RunFolder) -> None:
        """Work in this run from here on, with the weights and the state of its last batch."""
        with plain_errors(self.folder / "heldout.json", "read"):
            self._evaluator.heldout = json.loads((self.folder / "heldout.json").read_text("utf-8"))
        statistics = load_statistics(self.folder / "statistics", self.weights.names, self.loaded.device)
        source = self.make_source(run.config["templates"], self.settings.targets)
        anchor = statistics[self.weights.names[-1]].anchor
        if self.method.needs.anchored and anchor is not None and isinstance(source, OptimisedTargets):
            source.anchor = float(anchor)
        solver = self.make_solver(source, statistics)
        self._loop = SequentialLoop(run, solver, self.settings.guard)
        self._loop.go_to(run.history.head)
        self.run = run


@contextmanager
def opened(run: str | Path, reporter: Reporter | None = None, **options: Any) -> Iterator[Editor]:
    """`Editor.open` as a context that closes the run again."""
    editor = Editor.open(run, reporter, **options)
    try:
        yield editor
    finally:
        editor.close()


def _default_folder(model: str, method: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model).name)
    return Path("runs") / f"{name}-{method}-{time.strftime('%Y%m%d-%H%M%S')}"


def _versions() -> dict[str, str]:
    return {
        "sphere-edit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
