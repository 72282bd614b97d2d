"""When and what a run measures: the unedited model first, checkpoints on the way, and in the end everything it should know."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sphere_edit import ranks
from sphere_edit.editing.settings import Settings
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.ability import AbilityTasks
from sphere_edit.evaluation.generation import check_chat, score_texts, with_answers
from sphere_edit.evaluation.heldout import score_heldout, unedited_heldout
from sphere_edit.evaluation.intervals import intervals, summarise
from sphere_edit.evaluation.natural import with_lines
from sphere_edit.evaluation.retrieval import with_retrieved
from sphere_edit.evaluation.routing import changed_share, mixed_above, routes_of
from sphere_edit.evaluation.scores import FactScores, complete_answers, score_facts, with_other_form
from sphere_edit.facts.chat import chat_frame, has_chat_template
from sphere_edit.facts.corpus import read_passages
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.files import cache_dir, plain_errors, read_cache, read_json, write_cache, write_json
from sphere_edit.models.identity import cache_key, config_values, tokenizer_identity
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.weights import EditedWeights
from sphere_edit.numerics.energy import hyperspherical_energy
from sphere_edit.progress import Reporter
from sphere_edit.runs.folder import METRICS, RunFolder, facts_of
from sphere_edit.runs.history import History
from sphere_edit.runs.records import Ability, Evaluation, Unedited
from sphere_edit.runs.trust import refuse_untrusted

METRICS_SCHEMA = 2
_SCORING = 5  # to be raised whenever the same model and facts would get other scores
_AGES = 10  # classes of age that retention tells apart


@dataclass(frozen=True)
class BeforeAndAfter:
    """Scores of some facts on the unedited and on the edited model; and what was measured of both on held-out text, if that was asked."""

    facts: list[Fact]
    unedited: list[FactScores]
    edited: list[FactScores]
    heldout: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Means over the facts, in percent."""
        scores = {"unedited": self.unedited, "edited": self.edited}
        return {side: {**summarise(found), **self.heldout.get(side, {})} for side, found in scores.items()}


class Evaluator:
    """Measures a model whose weights are put in place by others, and keeps what it found in the run folder."""

    def __init__(
        self,
        loaded: LoadedModel,
        weights: EditedWeights,
        settings: Settings,
        reporter: Reporter,
        heldout: Sequence[Sequence[int]] = (),
    ):
        self.loaded, self.weights, self.reporter, self.heldout = loaded, weights, reporter, heldout
        self.settings, self.seed, self.max_tokens = settings.evaluation, settings.seed, settings.tokens_per_batch
        self._unedited_hidden: dict[int, Tensor] | None = None
        self._tasks: AbilityTasks | None = None
        self.trusted = True  # whether what the settings name outside the run may be used

    def check(self) -> None:
        """Refuse what could not be measured, before anything is computed.

        Raises:
            SphereEditError: no chat template where answers are asked for in a chat; reference texts or tasks that cannot be read, or
                that a run from elsewhere names.
        """
        settings = self.settings
        if not self.trusted:
            refuse_untrusted(settings)
        if settings.generation == "chat":
            check_chat(self.loaded)
        if settings.references is not None:
            read_passages(settings.references)
        if settings.tasks and self._tasks is None:
            self._tasks = AbilityTasks(settings.tasks, settings.task_dir, settings.task_limit)

    def score(self, facts: Sequence[Fact], title: str, say: bool = False) -> list[FactScores]:
        """Scores of complete facts by the model as it stands; with ``say`` also in the other form, and what it says, if the settings want that."""
        scores = score_facts(self.loaded, facts, self.max_tokens, self.reporter, title)
        if say and self._chats:
            scores = with_other_form(self.loaded, facts, scores, self.max_tokens, self.reporter)
        if not say:
            return scores
        chat, size = self.settings.generation == "chat", self.max_tokens
        if self.settings.generation != "off":
            scores = with_answers(self.loaded, facts, scores, chat, size, self.reporter)
        if self.settings.natural:
            scores = with_lines(self.loaded, facts, scores, self.settings.natural, chat, size, self.reporter)
        return scores

    def knows(self, facts: Sequence[Fact], title: str) -> list[bool]:
        """Whether the model as it stands gives each fact's new answer (strict), in every form that it is edited in."""
        asked = [(number, form.bare()) for number, fact in enumerate(facts) for form in fact.in_each_form()]
        scores = self.score([form for _, form in asked], title)
        unknown = {number for (number, _), score in zip(asked, scores, strict=True) if not score.rewrite.correct}
        return [number not in unknown for number in range(len(facts))]

    @cached_property
    def _chats(self) -> bool:
        """Whether prompts can be asked in a chat too; where a template is there that cannot be used, that is told."""
        if not has_chat_template(self.loaded.tokenizer):
            return False
        try:
            chat_frame(self.loaded.tokenizer)
        except SphereEditError as error:
            self.reporter.say(f"Nothing is asked in a chat: {error}")
            return False
        return True

    def before_and_after(self, facts: Sequence[Fact], edited: bool, heldout: bool = False) -> BeforeAndAfter:
        """Scores of any facts on the unedited model, and on the model as it stands if that is ``edited``; with ``heldout`` of its text too."""
        with self.weights.unedited():
            complete = complete_answers(self.loaded, facts)
            before = self.score(complete, "unedited model", say=True)
        after = self.score(complete, "edited model", say=True) if edited else before
        text = {"unedited": self._text_on_unedited(), "edited": self._text()} if heldout else {}
        return BeforeAndAfter(complete, before, after, text)

    # --- of a run -------------------------------------------------------------------------------------------------

    def measure_unedited(self, run: RunFolder) -> None:
        """The unedited model on each session's facts, once; with the first, it as a whole (`_whole_model`)."""
        done = {record.session: record for record in run.records if isinstance(record, Unedited)}
        facts, first = run.facts(), 0
        for session, count in enumerate(run.history.sessions, 1):
            part, first = facts[first : first + count], first + count
            path = _unedited_file(run, session)
            if session in done and _is_as_written(path, done[session].sha256):
                continue
            content = self._unedited_content(part, whole=session == 1)
            sha256 = write_json(path, content)
            if session not in done or done[session].sha256 not in (None, sha256):
                scores = [FactScores.from_dict(score) for score in content["scores"]]
                whole = {name: content[name] for name in catalogue.whole_model() if name in content}
                run.append(Unedited(session=session, summary=summarise(scores), sha256=sha256, **whole))
        if self.settings.tasks:
            self.check()
            with self.weights.unedited():
                self._ability(run, 0)

    def _unedited_content(self, facts: Sequence[Fact], whole: bool) -> dict[str, Any]:
        """What the unedited model makes of some facts, and it as a whole. Runs that ask the same of the same model share it."""
        path = cache_dir() / "unedited" / f"{self._unedited_key(facts, whole)}.json"
        found: dict[str, Any] | None = read_cache(path)
        if found is None:
            with self.weights.unedited():
                complete = complete_answers(self.loaded, facts)
                scores = self.score(complete, "unedited model", say=True)
                found = {"facts": [f.as_dict() for f in complete], "scores": [s.as_dict() for s in scores]}
                if whole:
                    found |= self._text_on_unedited()
            write_cache(path, found)
        return {**found, "energy": self._energies(self.weights.original)} if whole else found

    def _unedited_key(self, facts: Sequence[Fact], whole: bool) -> str:
        """A hash of all that `_unedited_content` depends on: weights, numbers they compute with, facts, texts, settings."""
        settings = self.settings
        parts: list[Any] = [_SCORING, self.loaded.fingerprint, config_values(self.loaded.model)]
        parts += [tokenizer_identity(self.loaded.tokenizer), self.max_tokens, settings.generation, settings.natural]
        parts += [[fact.as_dict() for fact in facts], *([self.heldout] if whole else [])]
        return cache_key(self.loaded.device, *parts)[:32]

    def checkpoint(self, run: RunFolder) -> None:
        """Evaluate where the settings ask for it after the batch that the run stands at."""
        every, head = self.settings.every, run.history.head
        if every is not None and head > 0 and head % every == 0:
            self._evaluate(run, self._sampled(run.history.retained), final=False)
        every = self.settings.tasks_every
        if every is not None and head > 0 and head % every == 0:
            self._ability(run, head)

    def finish(self, run: RunFolder) -> None:
        """Evaluate every fact the model should know now, and write ``metrics.json``."""
        evaluation = self._evaluate(run, run.history.retained, final=True)
        self._ability(run, run.history.head)
        self._write_metrics(run, evaluation)

    def refresh_metrics(self, run: RunFolder) -> None:
        """Write ``metrics.json`` for where the run stands, if its last evaluation asked all that the model should know here."""
        evaluation = run.history.evaluation_at_head(final=True)
        if evaluation is not None and _is_as_written(_results(run), evaluation.sha256):
            self._write_metrics(run, evaluation)

    def _write_metrics(self, run: RunFolder, evaluation: Evaluation) -> None:
        content = read_json(_results(run), evaluation.sha256)
        scores = [FactScores.from_dict(score) for score in content["scores"]]
        write_json(run.path / METRICS, _metrics(run, evaluation, scores))

    def _evaluate(self, run: RunFolder, asked: Sequence[int], final: bool) -> Evaluation:
        """Evaluate some facts after the batch that the run stands at; what the journal and the folder have is not done again."""
        head, path = run.history.head, _results(run)
        known = run.history.evaluation_at_head(final)
        if known is not None and _is_as_written(path, known.sha256):
            return known
        complete, _, _ = read_unedited(run)
        facts = [complete[index] for index in asked]
        prompts = self._as_asked(complete, run.history.retained, asked)
        scores = self.score(prompts, f"evaluation after {head}", say=final)
        content = {"after": head, "facts": list(asked), "scores": [s.as_dict() for s in scores]}
        sha256 = write_json(path, content)
        if known is not None and known.sha256 in (None, sha256):
            return known
        whole = {**self._whole_model(), **self._routes(facts), **(self._texts(asked, facts) if final else {})}
        summary = summarise(scores)
        found = Evaluation(after=head, facts=len(asked), final=final, summary=summary, sha256=sha256, **whole)
        run.append(found)
        return found

    def _as_asked(self, facts: Sequence[Fact], retained: Sequence[int], asked: Sequence[int]) -> list[Fact]:
        """The facts asked, with what is found among all that stand before their prompts, if the settings want that."""
        if not self.settings.retrieval:
            return [facts[index] for index in asked]
        self.reporter.say(f"Each prompt is asked behind {self.settings.retrieval} of the facts, found by BM25")
        found = with_retrieved([facts[index] for index in retained], self.settings.retrieval)
        known = dict(zip(retained, found, strict=True))
        return [known[index] for index in asked]

    def _ability(self, run: RunFolder, after: int) -> None:
        if self._tasks is not None:
            self.measure_ability(run, after, self._tasks)

    def ability_of(self, run: RunFolder | None, tasks: AbilityTasks) -> dict[str, dict[str, Any]]:
        """General ability of the unedited model and, in a run, after its last batch, which must be in place; kept in the run."""
        if run is None:
            scores = tasks.score(self.loaded, self.seed)
            return {"unedited": {name: score.as_dict() for name, score in scores.items()}}
        with self.weights.unedited():
            before = self.measure_ability(run, 0, tasks)
        after = self.measure_ability(run, run.history.head, tasks)
        self.refresh_metrics(run)
        return {"unedited": before, "edited": after}

    def measure_ability(self, run: RunFolder, after: int, tasks: AbilityTasks) -> dict[str, Any]:
        """Scores of the model in place, which is that after a batch (0: unedited); what the journal has is not measured again."""
        asked = tasks.hashes.items()
        known = [
            ability.scores
            for ability in run.history.abilities
            if ability.after == after and ability.limit == tasks.limit and asked <= ability.tasks.items()
        ]
        if not known:
            self.reporter.say(f"General ability after batch {after}: {', '.join(tasks.names)}")
            scores = ranks.once(partial(tasks.score, self.loaded, self.seed))
            found = {name: score.as_dict() for name, score in scores.items()}
            run.append(Ability(after=after, tasks=tasks.hashes, limit=tasks.limit, scores=found))
            known.append(found)
        return {name: score for name, score in known[-1].items() if name in {*tasks.names, *tasks.hashes}}

    def _sampled(self, retained: Sequence[int]) -> list[int]:
        """The facts that a checkpoint asks for: all, or those first in a random order of all facts, fixed by the seed.

        A fact keeps its place in that order whatever comes after it, so that consecutive checkpoints ask for much the same facts.
        """
        size = self.settings.sample
        return list(retained) if size is None else self._first_of(retained, size)

    def _first_of(self, indices: Sequence[int], size: int) -> list[int]:
        order = {index: random.Random(f"{self.seed} {index}").random() for index in indices}
        return sorted(sorted(indices, key=order.__getitem__)[:size])

    def _whole_model(self) -> dict[str, Any]:
        """Held-out text on the model as it stands, and the energy of every edited matrix."""
        return {**self._text(), "energy": self._energies(self.weights.deployed)}

    def _text(self) -> dict[str, float | None]:
        """Held-out text on the model as it stands, compared with the unedited one."""
        if self._unedited_hidden is None:
            self._text_on_unedited()
        text = score_heldout(self.loaded, self.heldout, self.max_tokens, self.reporter, unedited=self._unedited_hidden)
        return catalogue.of_heldout(text)

    def _routes(self, facts: Sequence[Fact]) -> dict[str, Any]:
        """Of a mixture of experts, how many routes above the edit changed: of held-out text, and of the facts' prompts."""
        experts = mixed_above(self.loaded, self.weights.names)
        if not experts:
            return {}
        encoder = Encoder(self.loaded.tokenizer)
        prompts = [encoder.asked_fact(fact).ids for fact in facts]
        shares = {}
        for name, rows in (("text", self.heldout), ("facts", prompts)):
            if rows:
                read = partial(routes_of, self.loaded, rows, experts, self.max_tokens)
                with self.weights.unedited():
                    before = read()
                shares[name] = changed_share(before, read())
        return {"routes": shares}

    def _text_on_unedited(self) -> dict[str, float | None]:
        """Held-out text on the unedited model, whose hidden states are kept to compare later ones with."""
        with self.weights.unedited():
            found = unedited_heldout(self.loaded, self.heldout, self.max_tokens, self.reporter)
        self._unedited_hidden = found.hidden
        return {**catalogue.of_heldout(found), catalogue.DIVERGENCE.name: 0.0}

    def _energies(self, weight: Callable[[str], Tensor]) -> dict[str, dict[str, float]]:
        found = {name: hyperspherical_energy(weight(name)) for name in self.weights.names}
        return {name: {"total": energy.total, "per_pair": energy.per_pair} for name, energy in found.items()}

    def _texts(self, indices: Sequence[int], facts: Sequence[Fact]) -> dict[str, Any]:
        """How the unedited and the edited model write about some of the facts, the same ones, if the settings want to know."""
        count = min(self.settings.texts, len(facts))
        if count == 0:
            return {}
        chosen = set(self._first_of(indices, count))
        shown = [fact for index, fact in zip(indices, facts, strict=True) if index in chosen]
        source = self.settings.references
        references = None if source is None else read_passages(source)
        write = partial(score_texts, self.loaded, shown, references, self.seed, self.max_tokens, self.reporter)
        with self.weights.unedited():
            before = ranks.once(write)
        return {"unedited_texts": asdict(before), "texts": asdict(ranks.once(write))}


def _unedited_file(run: RunFolder, session: int) -> Path:
    return run.path / "evaluations" / f"unedited-{session:04d}.json"


def _is_as_written(path: Path, sha256: str | None) -> bool:
    """Whether scores are there, and those that the journal speaks of; others are measured again."""
    if not path.is_file():
        return False
    with plain_errors(path, "read"):
        return sha256 is None or hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _results(run: RunFolder, after: int | None = None) -> Path:
    return run.path / "evaluations" / f"batch-{run.history.head if after is None else after:04d}.json"


def read_unedited(run: RunFolder) -> tuple[list[Fact], list[FactScores], dict[str, Any]]:
    """All facts with their true answers, the unedited model's scores of them, and what was measured of it as a whole."""
    facts: list[Fact] = []
    scores: list[FactScores] = []
    whole: dict[str, Any] = {}
    hashes = {record.session: record.sha256 for record in run.records if isinstance(record, Unedited)}
    for session, count in enumerate(run.history.sessions, 1):
        path = _unedited_file(run, session)
        content = read_json(path, hashes.get(session))
        if not isinstance(content, dict) or not isinstance(content.get("scores"), list):
            raise SphereEditError(f"{path} is damaged; remove it, and sphere-edit edit RUN --resume measures it again")
        facts += facts_of(content.get("facts"), count, path)
        scores += [FactScores.from_dict(record) for record in content["scores"]]
        whole = whole or {name: content[name] for name in catalogue.whole_model() if name in content}
    return facts, scores, whole


def read_scores(run: RunFolder, evaluation: Evaluation) -> dict[int, FactScores]:
    """What an evaluation measured, by fact; nothing where its file is gone or not as it was written."""
    path = _results(run, evaluation.after)
    if not _is_as_written(path, evaluation.sha256):
        return {}
    content = read_json(path)
    return {
        index: FactScores.from_dict(record) for index, record in zip(content["facts"], content["scores"], strict=True)
    }


def _removed(history: History, facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """The facts that were taken back, with what the last check of each said."""
    checked = {entry["fact"]: entry for check in history.removal_checks for entry in check.facts}
    return [
        {
            "index": index,
            "batch": batch,
            **{name: getattr(facts[index], name) for name in ("subject", "prompt", "target_new")},
            **{name: value for name, value in checked.get(index, {}).items() if name != "fact"},
        }
        for index, batch in sorted(history.removed_in.items())
    ]


def _abilities(history: History, after: int) -> dict[str, Any]:
    """Every score of general ability after a batch."""
    scores = {task: dict(points)[after] for task, points in history.ability_series().items() if after in dict(points)}
    return {"ability": scores} if scores else {}


def _metrics(run: RunFolder, evaluation: Evaluation, after: Sequence[FactScores]) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    history = run.history
    facts, before, whole_before = read_unedited(run)
    kept = history.retained
    batch_of, entry = history.batch_of, evaluation.as_entry()
    return {
        "schema": METRICS_SCHEMA,
        "after": history.head,
        "facts": len(kept),
        "superseded": len(history.superseded),
        **({"removed": len(history.removed), "removed_facts": _removed(history, facts)} if history.removed else {}),
        "unedited": {
            **summarise([before[index] for index in kept]),
            **whole_before,
            **({"texts": entry["unedited_texts"]} if "unedited_texts" in entry else {}),
            **_abilities(history, 0),
        },
        "edited": {
            **entry["summary"],
            **{name: entry[name] for name in catalogue.whole_model() if name in entry},
            **_abilities(history, history.head),
        },
        "intervals": {"unedited": intervals([before[index] for index in kept]), "edited": intervals(after)},
        "retention": _retention(history, kept, after),
        "per_fact": [
            {
                "index": index,
                "batch": batch_of[index],
                **{name: getattr(facts[index], name) for name in ("subject", "prompt", "target_new", "target_true")},
                "unedited": before[index].as_dict(),
                "edited": score.as_dict(),
            }
            for index, score in zip(kept, after, strict=True)
        ],
    }


def _retention(history: History, kept: Sequence[int], scores: Sequence[FactScores]) -> list[dict[str, Any]]:
    """The metrics by how many edits ago a fact was edited, youngest first: batches in at most ten classes of much the same size."""
    after = dict(zip(kept, scores, strict=True))
    classes: list[dict[str, Any]] = []
    newest_first = history.standing[::-1]
    ago, size = 0, -(-len(newest_first) // _AGES) if newest_first else 1
    for start in range(0, len(newest_first), size):
        batches = newest_first[start : start + size]
        edits = sum(len(batch.facts) for batch in batches)
        members = [after[index] for batch in batches for index in batch.facts if index in after]
        if members:
            span = {"from": ago, "to": ago + edits - 1}
            classes.append(
                {"edits_ago": span, "facts": len(members), **summarise(members), "intervals": intervals(members)}
            )
        ago += edits
    return classes
