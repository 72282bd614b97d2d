"""What happened to a run and to its facts, as its journal tells it: plain data, as in `views`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.scores import FactScores
from sphere_edit.facts.fact import Fact
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.history import History
from sphere_edit.runs.measuring import read_scores, read_unedited
from sphere_edit.runs.records import (
    Batch,
    FactsAccepted,
    FinalRecheck,
    GuardStop,
    Record,
    RemovalCheck,
    Rollback,
)
from sphere_edit.runs.removal import matching, named


@dataclass(frozen=True)
class RemovedRow:
    """A fact that was taken back.

    Attributes:
        batch: that took it back.
        answer, said: the unedited model's answer to its prompt, and the model's when it was last asked; None where that was not.
        returned: whether they are the same.
        kl, kl_paraphrases: KL(unedited ‖ now) of the next token after the prompt, and after its paraphrases, in nats.
    """

    index: int
    prompt: str
    target: str
    batch: int
    answer: str | None = None
    said: str | None = None
    returned: bool | None = None
    kl: float | None = None
    kl_paraphrases: float | None = None


@dataclass(frozen=True)
class Removed:
    """The facts that were taken back, in the order of their numbers."""

    rows: tuple[RemovedRow, ...]

    @classmethod
    def of(cls, history: History, facts: Sequence[Fact]) -> Removed:
        """From a run's journal and its facts."""
        found = {entry["fact"]: entry for check in history.removal_checks for entry in check.facts}
        rows = []
        for index, batch in sorted(history.removed_in.items()):
            fact, entry = facts[index], found.get(index)
            row = RemovedRow(index, fact.filled_prompt, fact.target_new.strip(), batch)
            if entry is not None:
                said = entry["answer"], entry["said"], entry["returned"], entry["kl"], entry["kl_paraphrases"]
                row = RemovedRow(row.index, row.prompt, row.target, row.batch, *said)
            rows.append(row)
        return cls(tuple(rows))


@dataclass(frozen=True)
class Event:
    """Something that happened to a run, or to one of its facts.

    Attributes:
        time: when it was committed, UTC; None in runs that did not keep it.
        batch: after or in which it happened.
        kind: of what happened, a word.
        about: what else there is to say, by name.
        stands: whether it still counts: it was not rolled back, nor undone by a removal.
    """

    time: str | None
    batch: int
    kind: str
    about: Mapping[str, int | str] = field(default_factory=dict)
    stands: bool = True


@dataclass(frozen=True)
class Timeline:
    """What a run did, first to last."""

    events: tuple[Event, ...]

    @classmethod
    def of(cls, run: RunFolder) -> Timeline:
        """From its journal."""
        return cls(tuple(_events(run.records, _of_run)))


@dataclass(frozen=True)
class Answer:
    """What the model said to a fact's prompt.

    Attributes:
        after: the batch after which it was asked; 0 is the unedited model.
        said: in words, where they were kept.
        new: whether every token of the new answer was the likeliest one; None where that was not measured.
    """

    after: int
    said: str | None
    new: bool | None


@dataclass(frozen=True)
class Story:
    """One fact: what happened to it, what the model said, and where it stands now."""

    index: int
    name: str
    state: str
    events: tuple[Event, ...]
    answers: tuple[Answer, ...]


def stories(run: RunFolder, wanted: str) -> list[Story]:
    """What happened to the facts that a number, a subject or a prompt may mean, those included that do not stand any more.

    Raises:
        SphereEditError: the run has no such fact.
    """
    facts, history = run.facts(), run.history
    found = matching(facts, wanted)
    if not found:
        raise SphereEditError(f"{run.path} has no fact '{wanted}'; its facts have the numbers 0 to {len(facts) - 1}")
    answers = _answers(run, found)
    return [
        Story(
            index,
            named(facts[index]),
            history.state_of(index),
            tuple(_events(run.records, _of_fact(facts, index))),
            answers[index],
        )
        for index in found
    ]


# --- inside -------------------------------------------------------------------------------------------------------

Teller = Callable[[Record, History], list[Event]]  # the events of a record, given what was before it


def _events(records: Sequence[Record], teller: Teller) -> list[Event]:
    """What a teller says of each record; what was taken back later does not stand."""
    found: list[Event] = []
    history = History()
    for record in records:
        told = teller(record, history)
        history.take(record)
        if isinstance(record, Rollback):
            found = [event if event.batch <= record.to else replace(event, stands=False) for event in found]
        elif isinstance(record, Batch) and (base := record.restored) is not None:
            found = [event if event.batch <= base else replace(event, stands=False) for event in found]
        found += told
    return found


def _of_run(record: Record, before: History) -> list[Event]:
    """What a record says of the run as a whole."""
    about: dict[str, int | str]
    match record:
        case FactsAccepted():
            number, kind, about = before.head, "facts", {"facts": record.count, "source": record.source}
        case Batch(kind="removal"):
            number, kind, about = record.number, _how(record), {"facts": len(record.removed or record.written_back)}
            about |= {} if record.restored is None else {"base": record.restored}
        case Batch(kind="repair"):
            number, kind = record.number, "repair"
            about = {"steps": record.repair["steps"] if record.repair else 0}
        case Batch():
            number, kind = record.number, record.kind
            about = {"facts": len(record.facts), "again": len(record.rewritten), "superseded": len(record.superseded)}
        case GuardStop():
            number, kind, about = before.head, "guard", {"reason": record.reason}
        case FinalRecheck():
            number, kind = record.after, "recheck"
            about = {"asked": len(record.rechecked), "missing": len(record.forgotten)}
        case RemovalCheck():
            number, kind = record.after, "check"
            about = {"asked": len(record.facts), "missing": len(record.missing)}
        case Rollback():
            number, kind, about = record.to, "rollback", {}
        case _:
            return []
    return [Event(record.time, number, kind, about)]


def _how(batch: Batch) -> str:
    """Which way a removal's batch goes."""
    if batch.restored is not None:
        return "restored"
    return "written back" if batch.written_back else "subtracted"


def _of_fact(facts: Sequence[Fact], index: int) -> Teller:
    """What a record says of one fact."""

    def teller(record: Record, before: History) -> list[Event]:
        told: list[tuple[int, str, dict[str, int | str]]] = []
        match record:
            case FactsAccepted() if before.total <= index < before.total + record.count:
                told.append((before.head, "facts", {"source": record.source}))
            case Batch():
                told = _written(record, facts, index)
            case FinalRecheck() if index in record.rechecked:
                told.append((record.after, "missed" if index in record.forgotten else "knew", {}))
            case RemovalCheck():
                own = [entry for entry in record.facts if entry["fact"] == index]
                told += [(record.after, "returned" if entry["returned"] else "not returned", {}) for entry in own]
            case GuardStop() if index in before.pending:
                told.append((before.head, "guard", {"reason": record.reason}))
            case Rollback() if index in before.pending or before.batch_of.get(index, 0) > record.to:
                told.append((record.to, "rollback", {}))
        return [Event(record.time, *one) for one in told]

    return teller


def _written(batch: Batch, facts: Sequence[Fact], index: int) -> list[tuple[int, str, dict[str, int | str]]]:
    """What a batch did with one fact."""
    told: list[tuple[str, dict[str, int | str]]] = []
    if index in batch.rechecked:
        told.append(("knew" if index in batch.answered else "missed", {}))
    if index in batch.superseded:
        by = next((other for other in batch.facts if facts[other].key == facts[index].key), -1)
        told.append(("superseded", {"by": by}))
    if index in batch.facts:
        told.append(("edit", {}))
    if index in batch.rewritten:
        told.append(("rewrite", {}))
    if index in batch.removed:
        told.append((_how(batch), {"facts": 1, **({} if batch.restored is None else {"base": batch.restored})}))
    elif index in batch.written_back:
        told.append(("written back", {"facts": 1}))
    return [(batch.number, kind, about) for kind, about in told]


def _answers(run: RunFolder, indices: Sequence[int]) -> dict[int, tuple[Answer, ...]]:
    """What the model said to the prompts of some facts, in every evaluation that stands and in checks of removals."""
    found: dict[int, list[Answer]] = {index: [] for index in indices}
    _, before, _ = read_unedited(run)
    for index in indices:
        found[index].append(_answer(0, before[index]))
    for evaluation in run.history.evaluations:
        scores = read_scores(run, evaluation)
        for index in indices:
            if index in scores:
                found[index].append(_answer(evaluation.after, scores[index]))
    for check in run.history.removal_checks:
        for entry in check.facts:
            if entry["fact"] in found:
                found[entry["fact"]].append(Answer(check.after, entry["said"], entry["new"]))
    return {index: tuple(sorted(answers, key=lambda answer: answer.after)) for index, answers in found.items()}


def _answer(after: int, scores: FactScores) -> Answer:
    return Answer(after, scores.rewrite.said, scores.rewrite.correct)
