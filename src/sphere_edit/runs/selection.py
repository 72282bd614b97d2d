"""Which facts a run takes, and which of them go together in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sphere_edit.counting import counted
from sphere_edit.editing.ingredients import ContextTokens
from sphere_edit.editing.methods import METHODS, Method
from sphere_edit.editing.methods.unedited import Unedited
from sphere_edit.editing.rewording import NEAR, reworded
from sphere_edit.errors import SphereEditError, refused_records
from sphere_edit.facts.chat import chat_frame, has_chat_template
from sphere_edit.facts.fact import Fact, Neighbor, Probe, short
from sphere_edit.facts.forms import begins_its_row
from sphere_edit.facts.prompts import KL_PROMPT, Encoder
from sphere_edit.facts.readers import FactSet
from sphere_edit.models.configuration import positions
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.measuring import Evaluator
from sphere_edit.runs.session import Session

_TEMPLATE_ROOM = 24  # tokens that a context template may put before a prompt


def admit(
    session: Session, evaluator: Evaluator, given: FactSet, skip_bad: bool, standing: Sequence[Fact] | None = None
) -> tuple[list[Fact], list[str]]:
    """The facts to edit and the records left out: no contradictions in a batch, every subject found in its tokens.

    What the settings ask of the evaluation is checked too.

    Args:
        skip_bad: leave out what cannot be used, instead of refusing all.
        standing: leave out what the unedited model knows already, but for what corrects one of these facts.

    Raises:
        SphereEditError: a fact cannot be used, or none is left.
    """
    evaluator.check()
    _say_remarks(session, given)
    facts = in_forms(session, given.facts)
    usable, unreadable = readable(session, facts, skip_bad)
    if session.settings.rewordings == "auto":
        usable = _reworded(session, usable)
    usable, known = (usable, []) if standing is None else _unknown(session, evaluator, usable, standing)
    plan = plan_batches(usable, session.settings.batch_size, skip_bad)
    left_out = [*given.bad, *unreadable, *known, *plan.bad]
    _say_left_out(session, left_out)
    if not plan.facts:
        raise SphereEditError(f"{given.source}: none of its facts can be used; the first: {left_out[0]}")
    _say_first_tokens(session, plan.facts)
    return plan.facts, left_out


def asked(session: Session, given: FactSet, skip_bad: bool) -> list[Fact]:
    """The facts that a model can be asked, edited or not; what is left out is told."""
    _say_remarks(session, given)
    usable, unreadable = readable(session, in_forms(session, given.facts), skip_bad, edited=False)
    _say_left_out(session, [*given.bad, *unreadable])
    return usable


def in_forms(session: Session, facts: Sequence[Fact]) -> list[Fact]:
    """The facts, those that do not say in which forms they are edited with the run's.

    Where a chat model is edited in plain text because nobody said anything, that is told.

    Raises:
        SphereEditError: a fact is about a chat, and the model has no chat template that can be used.
    """
    default, tokenizer = session.settings.default_forms(), session.loaded.tokenizer
    chosen = [fact if fact.forms else replace(fact, forms=default) for fact in facts]
    if (system := session.settings.system) is not None:
        chosen = [fact if fact.system is not None else replace(fact, system=system) for fact in chosen]
    for wanted in {fact.system for fact in chosen if "chat" in fact.forms or fact.system is not None}:
        chat_frame(tokenizer, wanted)  # told before any work, not fact by fact
    if any("chat" in fact.forms for fact in chosen):
        return chosen
    if has_chat_template(tokenizer) and not any(fact.forms for fact in chosen):
        session.reporter.say(
            "This model has a chat template, and its facts are edited as plain text: `--chat` edits them in a chat, `--forms plain,chat` in both. "
            "How much holds in a chat is measured as 'strict, other form'"
        )
    return chosen


def _reworded(session: Session, facts: Sequence[Fact]) -> list[Fact]:
    """The facts with rewordings that the tool made of them all; how many, and an example, are told.

    Raises:
        SphereEditError: the method has no use for rewordings.
    """
    if not session.method.needs.feed.at_subjects:
        raise SphereEditError(
            f"rewordings: auto is for methods with optimised targets; {session.method.name} uses none, leave it out"
        )
    with session.weights.unedited():
        settings = session.settings
        found = reworded(session.loaded, facts, settings.tokens_per_batch, settings.seed, session.reporter)
    got = [(old, new) for old, new in zip(facts, found.facts, strict=True) if new.rewordings != old.rewordings]
    made = sum(len(new.rewordings) - len(old.rewordings) for old, new in got)
    said = f"Rewordings: {made} for {len(got)} of {counted(len(facts), 'fact')}, kept with them; of {found.tried} looked at, {found.lent} lent by other prompts and "
    said += f"{found.written} written by the model are within {NEAR} nats of a prompt"
    if got:
        _, first = got[0]
        said += f". For example '{short(first.rewordings[-1])}' for '{short(first.prompt)}'"
    session.reporter.say(said)
    return found.facts


def _say_remarks(session: Session, facts: FactSet) -> None:
    """Tell how facts were understood."""
    for remark in facts.remarks():
        session.reporter.say(remark)


def _say_first_tokens(session: Session, facts: Sequence[Fact]) -> None:
    """Tell what becomes of facts whose subject is the first token of its row, where the method has nothing to leave others alone by."""
    needs, encoder = session.method.needs, Encoder(session.loaded.tokenizer)
    if not needs.feed.at_subjects or needs.get(ContextTokens) is not None:
        return
    first = [fact for fact in facts if any(begins_its_row(form, encoder) for form in fact.in_each_form())]
    if first:
        session.reporter.say(
            f"In {len(first)} of {counted(len(facts), 'fact')} the subject is the first token of its prompt, for example "
            f"'{short(first[0].filled_prompt)}'. {session.method.name} changes what bare prompts like these say of other subjects too; "
            "frugal, or words before the subject, leave them alone"
        )


def _say_left_out(session: Session, records: Sequence[str]) -> None:
    """Tell how many records were left out, and why the first was."""
    if records:
        session.reporter.say(f"{counted(len(records), 'record')} left out; the first: {records[0]}")


def readable(
    session: Session, facts: Sequence[Fact], skip_bad: bool, edited: bool = True
) -> tuple[list[Fact], list[str]]:
    """Facts whose every prompt this model's tokenizer can place and its positions can hold, and what is wrong elsewhere.

    Those to be ``edited`` need a subject, where the method writes at it.
    """
    encoder = Encoder(session.loaded.tokenizer)
    limit = positions(session.loaded.model) - _TEMPLATE_ROOM
    usable, bad = [], []
    for fact in facts:
        try:
            _check_readable(session, encoder, fact, limit, edited)
        except SphereEditError as error:
            bad.append(f"record {fact.record}: {error}")
        else:
            usable.append(fact)
    if bad and not skip_bad:
        raise refused_records("facts this model cannot read (--skip-bad goes on without)", bad)
    return usable, bad


def _check_readable(session: Session, encoder: Encoder, fact: Fact, limit: float, edited: bool) -> None:
    if edited and session.method.needs.feed.at_subjects:
        if not fact.subject:
            editing = {name: kind for name, kind in METHODS.items() if name != Unedited.name}
            free = ", ".join(sorted(name for name, kind in editing.items() if not kind().needs.feed.at_subjects))
            raise SphereEditError(
                f"'{short(fact.prompt)}' comes without a 'subject', and {session.method.name} writes at its last token; add it, or take a method "
                f"that needs none ({free})"
            )
        for form in fact.in_each_form():
            encoder.at_subject(form)
            for prompt in (KL_PROMPT, *form.rewordings):
                encoder.at_subject(form, prompt=prompt)
    longest = max((fact.target_new, fact.target_true or ""), key=len)
    others: list[Neighbor | Probe] = [*fact.neighbors, *(probe for probe in fact.portability if probe.answers)]
    for prompt in (fact.filled_prompt, *fact.paraphrases, *(other.prompt for other in others)):
        for form in fact.in_each_form():
            size = len(encoder.answered(prompt, longest, fact.separator, form.chat, form.system)[0].ids)
            if size > limit:
                raise SphereEditError(
                    f"'{prompt[:60]}…' has {counted(size, 'token')}; this model reads {limit} beside a template"
                )


def _unknown(
    session: Session, evaluator: Evaluator, facts: Sequence[Fact], standing: Sequence[Fact]
) -> tuple[list[Fact], list[str]]:
    """Facts whose new answer the unedited model does not give yet, and the records of the others.

    A fact that corrects an earlier one stays in, whatever the unedited model says.
    """
    with session.weights.unedited():
        given = evaluator.knows(facts, "what is known already")
    corrected = {fact.key for fact in standing}
    unknown: list[Fact] = []
    known: list[str] = []
    for fact, answered in zip(facts, given, strict=True):
        if answered and fact.key not in corrected:
            known.append(f"record {fact.record}: the unedited model says '{short(fact.target_new.strip())}' already")
        else:
            unknown.append(fact)
        corrected.add(fact.key)
    return unknown, known


@dataclass(frozen=True)
class BatchPlan:
    """A stream of facts that can be cut into batches, and the records that had to be left out."""

    facts: list[Fact]
    bad: list[str]


def plan_batches(facts: Sequence[Fact], batch_size: int, skip_bad: bool) -> BatchPlan:
    """Check that no batch says two things of one subject and prompt (across batches, the later one supersedes).

    Raises:
        SphereEditError: naming both records, unless ``skip_bad`` leaves the later one out.
    """
    kept: list[Fact] = []
    bad: list[str] = []
    current: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        if len(kept) % batch_size == 0:
            current = {}
        twin = current.get(fact.key)
        if twin is None:
            current[fact.key] = fact
            kept.append(fact)
            continue
        if twin.target_new == fact.target_new:
            bad.append(f"record {fact.record}: the same fact as record {twin.record}, in one batch")
        else:
            bad.append(
                f"record {fact.record}: contradicts record {twin.record} in the same batch "
                f"('{short(fact.filled_prompt)}' → '{short(twin.target_new)}' or '{short(fact.target_new)}'?)"
            )
    if bad and not skip_bad:
        raise refused_records("facts that cannot stand in one batch (--skip-bad keeps the first of each)", bad)
    return BatchPlan(kept, bad)


def next_batch(facts: Sequence[Fact], pending: Sequence[int], size: int) -> list[int]:
    """The first ``size`` of the facts waiting that are about different subjects; what is left out comes with a later batch.

    Facts of one subject are written at nearly the same key, with targets that know nothing of one another: together, each would
    get a share of its residual. The target of the second, found when the first is written, holds both.
    """
    subjects: set[str] = set()
    chosen: list[int] = []
    for index in pending:
        if len(chosen) == size:
            break
        subject, _ = facts[index].key
        if subject not in subjects:
            subjects.add(subject)
            chosen.append(index)
    return chosen


def together(method: Method, facts: Sequence[Fact], waiting: Sequence[int], size: int) -> list[int]:
    """The first of those waiting that the method takes in one batch of ``size`` at most."""
    return next_batch(facts, waiting, size) if method.one_fact_a_subject else list(waiting[:size])


def superseded_by(facts: Sequence[Fact], new: Sequence[int], standing: Sequence[int]) -> list[int]:
    """Which of the ``standing`` facts are about the same subject and prompt as one of the ``new`` ones."""
    keys = {facts[index].key for index in new}
    return [index for index in standing if facts[index].key in keys]


@dataclass(frozen=True)
class Judged:
    """What there is to say of a fact before it is edited.

    Attributes:
        fault: why it cannot be edited, in a sentence; empty where it can.
        supersedes: facts of the run that it would replace, by index.
    """

    fact: Fact
    fault: str = ""
    supersedes: tuple[int, ...] = ()


def judge(session: Session, facts: Sequence[Fact], run: RunFolder | None = None) -> list[Judged]:
    """Each of some facts by itself, as `admit` would take or refuse it; the facts' records must be numbered from 1.

    Raises:
        SphereEditError: a fact is about a chat, and the model has no chat template that can be used.
    """
    usable, unreadable = readable(session, in_forms(session, facts), skip_bad=True)
    plan = plan_batches(usable, session.settings.batch_size, skip_bad=True)
    faults = dict(numbered(sentence) for sentence in (*unreadable, *plan.bad))
    known = [] if run is None else run.facts()
    standing: dict[tuple[str, str], list[int]] = {}
    for index in () if run is None else run.history.retained:
        standing.setdefault(known[index].key, []).append(index)
    return [Judged(fact, faults.get(fact.record, ""), tuple(standing.get(fact.key, ()))) for fact in facts]


def numbered(sentence: str) -> tuple[int, str]:
    """The number of the record that a sentence about a bad one begins with, and what it says of it."""
    record, _, said = sentence.partition(": ")
    return int(record.removeprefix("record ")), said


def would_supersede(run: RunFolder, facts: Sequence[Fact]) -> int:
    """How many facts that stand in a run now these would replace."""
    known = run.facts()
    new = range(len(known), len(known) + len(facts))
    return len(superseded_by([*known, *facts], new, run.history.retained))
