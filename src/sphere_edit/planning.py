"""What a run would cost: time from short trials on this machine, memory and disk from shapes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from sphere_edit.editing.batch import Written
from sphere_edit.editing.diagnosing import BatchDiagnosis
from sphere_edit.editing.ingredients import Planned, SecondMoment, Shape, Trial
from sphere_edit.editing.methods.base import JointMethod
from sphere_edit.editing.moments import HELDOUT_PASSAGES, MomentSettings, heldout_tokens, ready_text, sample_text
from sphere_edit.editing.problem import Statistics
from sphere_edit.editing.repair import STEP_FACTS, Descent, Repair, repair_steps
from sphere_edit.editing.sources import Report, Source
from sphere_edit.evaluation.generation import with_answers
from sphere_edit.evaluation.natural import with_lines
from sphere_edit.evaluation.scores import score_facts
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.readers import read_facts
from sphere_edit.models.configuration import positions
from sphere_edit.models.forward import last_hidden
from sphere_edit.models.tokens import TokenBatch
from sphere_edit.numerics.update import LowRankUpdate, Update
from sphere_edit.progress import Quiet
from sphere_edit.runs.accounting import Account, account_of
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.session import Session
from sphere_edit.trials import HELDOUT
from sphere_edit.tuning import TRIALS

_TRIAL_FACTS = 8
_PASSAGE_TOKENS = 150.0  # of a passage of ordinary text, about
_TRIAL_STEPS = 2
_PADDING = ["{}", *["A few words before it. {}"] * 5]  # stands in for sampled templates


@dataclass(frozen=True)
class Estimate:
    """Seconds by stage, and bytes of memory and disk."""

    seconds: dict[str, float]
    memory: Account
    disk: int


def estimate(session: Session, facts: Sequence[Fact], run: RunFolder | None = None) -> Estimate:
    """Time each stage on a few of the facts, and multiply; add up the memory and disk that shapes dictate.

    Statistics that are in the cache are counted all the same, so that a first run takes no longer than it says.

    Args:
        run: which the facts would continue.
    """
    settings, loaded, method = session.settings, session.loaded, session.method
    together = min(_TRIAL_FACTS, settings.batch_size, method.max_batch or _TRIAL_FACTS)
    trial = [_with_truth(fact) for fact in facts[:together]]
    share = len(facts) / len(trial)
    length = min(256, positions(session.loaded.model))
    passage = [[index % 100 for index in range(length)]] * 2
    reading = _timed(lambda: last_hidden(loaded, TokenBatch.of(passage, loaded.device))) / (2 * length)
    evaluations = 2 + (
        len(facts) // settings.batch_size // settings.evaluation.every if settings.evaluation.every else 0
    )
    moments = settings.moments
    known = 0 if run is None else len(run.history.retained)  # which are asked again
    source = _source_times(session, trial)
    scoring = _timed(lambda: score_facts(loaded, trial, settings.tokens_per_batch, Quiet()))
    seconds = {}
    if session.would_calibrate:
        facts_a_trial = len(read_facts("demo").facts) / len(trial)
        seconds["calibration"] = TRIALS * (
            facts_a_trial * (sum(source.values()) + scoring) + HELDOUT * _PASSAGE_TOKENS * reading
        )
    seconds.update({stage: share * time for stage, time in source.items()})
    batches = -(-len(facts) // settings.batch_size)
    seconds["solving and measuring"] = batches * _timed_batch(session)
    seconds["evaluation"] = (share * evaluations + known / len(trial)) * scoring
    assert settings.recheck is not None
    assert settings.repair is not None
    if settings.recheck:
        size = settings.batch_size
        earlier = range(known, known + len(facts), size)
        asked = sum(min(settings.recheck * size, count) for count in earlier) + known + len(facts)
        bare = [fact.bare() for fact in trial]
        asking = _timed(lambda: score_facts(loaded, bare, settings.tokens_per_batch, Quiet()))
        seconds["earlier facts"] = asked / len(trial) * asking
    if steps := repair_steps(settings.repair, len(facts)):
        seconds["repair"] = steps * _timed_repair(session, trial, passage)
    seconds.update(_saying_times(session, trial, share * 2 + known / len(trial)))
    if moments.corpus is None and run is None and ready_text(loaded, moments.sampled_tokens, settings.seed) is None:
        sampling = _timed(lambda: sample_text(loaded, 64 * 8, 0, Quiet(), length=8)) / (64 * 8)
        seconds["sampling text"] = moments.sampled_tokens * sampling
    if run is None:
        tokens = moments.sampled_tokens if moments.corpus is None else moments.tokens
        timed = Trial(next(iter(source.values())) / len(trial), reading, tokens, len(read_facts("demo").facts))
        for row in session.ingredients:
            seconds.update(row.seconds(timed))
    seconds["perplexity"] = evaluations * _heldout_tokens(moments, len(facts)) * reading
    return Estimate(seconds, account_of(session), _disk(session, facts))


def _saying_times(session: Session, trial: Sequence[Fact], times: float) -> dict[str, float]:
    """Seconds that what the model says takes, for so many ``times`` some facts."""
    settings, loaded, size = session.settings.evaluation, session.loaded, session.settings.tokens_per_batch
    if settings.generation == "off" and not settings.natural:
        return {}
    scores, chat = score_facts(loaded, trial, size, Quiet()), settings.generation == "chat"
    ways: dict[str, Callable[[], object]] = {}
    if settings.generation != "off":
        ways["generation"] = partial(with_answers, loaded, trial, scores, chat, size, Quiet())
    if settings.natural:
        ways["whole answers"] = partial(with_lines, loaded, trial, scores, settings.natural, chat, size, Quiet())
    return {stage: times * _timed(way) for stage, way in ways.items()}


def _heldout_tokens(moments: MomentSettings, facts: int) -> float:
    """Of the text that perplexity is measured on, about."""
    if moments.heldout is not None and moments.corpus is not None:
        return moments.heldout * _PASSAGE_TOKENS
    kept = moments.sampled_tokens / 8 if moments.corpus is None else HELDOUT_PASSAGES * _PASSAGE_TOKENS
    return kept if moments.heldout is not None else min(kept, heldout_tokens(facts))


def _timed_batch(session: Session) -> float:
    """Seconds that every batch takes whatever its facts: of each matrix what `_each_batch` does."""
    working = session.weights.working
    shapes = Counter(tuple(weight.shape) for weight in working.values())
    examples = {tuple(weight.shape): name for name, weight in working.items()}
    return sum(count * _timed(_each_batch(session, examples[shape])) for shape, count in shapes.items())


def _each_batch(session: Session, name: str) -> Callable[[], object]:
    """SPHERE's directions of a matrix, a factor of its system, and what the journal says of it, for a change of rank one."""
    weight, sphere = session.weights.working[name], session.settings.diagnostic_sphere()
    system = torch.eye(weight.shape[-1], dtype=torch.float64, device=weight.device).expand(*weight.shape[:-2], -1, -1)
    asked = any(isinstance(row, SecondMoment) for row in session.ingredients)
    diagnosis = BatchDiagnosis(
        session.weights, {name: Statistics(second_moment=system.float()) if asked else Statistics()}
    )
    left, right = weight.new_full((weight.shape[-2], 1), 1e-3), torch.ones_like(weight[..., :1, :])
    update: dict[str, Update] = {name: LowRankUpdate(left, right)}
    written, before = Written({name: weight}, update, update, {}, Report()), 1.001 * weight

    def work() -> None:
        if session.ingredients:
            torch.linalg.cholesky(system)
        diagnosis.entry(name, written, before, sphere.directions(weight))

    return work


def _timed_repair(session: Session, trial: Sequence[Fact], passage: Sequence[list[int]]) -> float:
    """Seconds of one step, with the few facts as often as a step asks facts."""
    repeated = [trial[index % len(trial)] for index in range(STEP_FACTS)]
    source, weights = session.make_source(["{}"], session.settings.targets), session.weights
    repair = Repair(source.computing(), weights, passage, repeated, _PADDING[:2], {}, source.max_tokens, seed=0)
    started = time.monotonic()
    repair.gradients(weights.snapshot(), Descent())
    return time.monotonic() - started


def _source_times(session: Session, trial: Sequence[Fact]) -> dict[str, float]:
    """Seconds that what the method feeds on takes for some facts."""
    settings, method = session.settings, session.method
    templates = _PADDING[: 1 + 5 * min(settings.templates, 1)]
    short = settings.targets.model_copy(update={"steps": _TRIAL_STEPS, "stop_loss": 0.0, "patience": 1})
    source = session.make_source(templates, short)
    begin = _timed(lambda: source.begin(trial))
    if isinstance(method, JointMethod):
        weights = session.weights.snapshot()
        return {source.stage: method.evaluations * _timed(lambda: source.objective(weights))}
    if not method.needs.feed.at_subjects:
        return {source.stage: begin}
    keys = _timed(lambda: _read_keys(session, source, trial))
    return {source.stage: begin * settings.targets.steps / _TRIAL_STEPS, "keys": keys}


def _read_keys(session: Session, source: Source, trial: Sequence[Fact]) -> None:
    rows, names = session.method.needs.ingredients, session.weights.names
    for row in rows:
        row.of_batch(source, names)
    for index in range(len(names)):
        source.layer(index)
    for row in rows:
        row.once_written(source, trial)


def _timed(work: Callable[[], object]) -> float:
    work()  # the first call pays for what later ones find ready
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _with_truth(fact: Fact) -> Fact:
    neighbors = tuple(replace(n, answer=n.answer or fact.target_new) for n in fact.neighbors)
    portability = tuple(replace(p, rival=fact.target_new) for p in fact.portability)
    return replace(fact, target_true=fact.target_true or "unknown", neighbors=neighbors, portability=portability)


def _disk(session: Session, facts: Sequence[Fact]) -> int:
    method, shapes, encoder = session.method, _shapes(session), Encoder(session.loaded.tokenizer)
    batches = -(-len(facts) // session.settings.batch_size)
    columns = sum(method.needs.feed.columns(fact, encoder, session.settings.templates) for fact in facts)
    compensated = session.settings.compensated > 0
    dense = method.dense or compensated
    updates = sum(4 * (batches * out * inner if dense else columns * (out + inner)) for out, inner in shapes)
    weights = sum(4 * out * inner for out, inner in shapes)
    if compensated:
        updates += batches * weights
    if session.settings.repair:
        updates += weights
    planned = Planned(facts, columns, encoder)
    kept = sum(row.disk(shapes, planned) for row in session.ingredients)
    checkpoint = weights + sum(row.state(shapes) for row in session.ingredients)
    return updates + checkpoint * 3 + kept + len(facts) * 4000


def _shapes(session: Session) -> list[Shape]:
    return [Shape.of(weight) for weight in session.weights.working.values()]
