"""What a run would cost: time from short trials on this machine, memory and disk from shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from sphere_edit.editing.methods.base import JointMethod
from sphere_edit.editing.moments import sample_text
from sphere_edit.editing.repair import STEP_FACTS, Descent, Repair, repair_steps
from sphere_edit.editing.sources import OptimisedTargets
from sphere_edit.evaluation.generation import with_answers
from sphere_edit.evaluation.metrics import score_facts
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.readers import read_facts
from sphere_edit.models.forward import last_hidden
from sphere_edit.models.tokens import TokenBatch
from sphere_edit.progress import Quiet
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.session import Session
from sphere_edit.tuning import HELDOUT, TRIALS

_TRIAL_FACTS = 8
_PASSAGE_TOKENS = 150.0  # of a passage of ordinary text, about
_TRIAL_STEPS = 2
_PADDING = ["{}", *["A few words before it. {}"] * 5]  # stands in for sampled templates


@dataclass(frozen=True)
class Estimate:
    """Seconds by stage, and bytes of memory and disk."""

    seconds: dict[str, float]
    memory: int
    disk: int


def estimate(session: Session, facts: Sequence[Fact], run: RunFolder | None = None) -> Estimate:
    """Time each stage on a few of the facts, and multiply; add up the memory and disk that shapes dictate.

    Statistics that are in the cache are counted all the same, so that a first run takes no longer than it says.

    Args:
        run: which the facts would continue.
    """
    settings, loaded, method = session.settings, session.loaded, session.method
    trial = [_with_truth(fact) for fact in facts[: min(_TRIAL_FACTS, method.max_batch or _TRIAL_FACTS)]]
    share = len(facts) / len(trial)
    length = min(256, getattr(session.loaded.model.config, "max_position_embeddings", 256))
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
    if method.needs.anchored and run is None:
        about = len(read_facts("demo").facts) / len(trial)
        seconds["targets of the demo facts"] = about * seconds[OptimisedTargets.stage] / share
    if settings.evaluation.generation != "off":
        scores = score_facts(loaded, trial, settings.tokens_per_batch, Quiet())
        chat = settings.evaluation.generation == "chat"
        answering = partial(with_answers, loaded, trial, scores, chat, settings.tokens_per_batch, Quiet())
        seconds["generation"] = (share * 2 + known / len(trial)) * _timed(answering)
    if moments.corpus is None and run is None:
        sampling = _timed(lambda: sample_text(loaded, 64 * 8, 0, Quiet(), length=8)) / (64 * 8)
        seconds["sampling text"] = moments.sampled_tokens * sampling
    if session.measures_moments and run is None:
        tokens = moments.sampled_tokens if moments.corpus is None else moments.tokens
        seconds["second moments"] = tokens * reading
    heldout = moments.sampled_tokens / 8 if moments.corpus is None else moments.heldout * _PASSAGE_TOKENS
    seconds["perplexity"] = evaluations * heldout * reading
    return Estimate(seconds, _memory(session), _disk(session, facts))


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
    short = settings.targets.model_copy(update={"steps": _TRIAL_STEPS, "stop_loss": 0.0})
    source = session.make_source(templates, short)
    begin = _timed(lambda: source.begin(trial))
    if isinstance(method, JointMethod):
        weights = session.weights.snapshot()
        return {source.stage: method.evaluations * _timed(lambda: source.objective(weights))}
    if method.needs.source == "gradients":
        return {source.stage: begin}
    keys = _timed(lambda: [*map(source.layer, range(len(session.layers))), source.all_keys(trial)])
    return {source.stage: begin * settings.targets.steps / _TRIAL_STEPS, "keys": keys}


def _timed(work: Callable[[], object]) -> float:
    work()  # the first call pays for what later ones find ready
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _with_truth(fact: Fact) -> Fact:
    neighbors = tuple(replace(n, answer=n.answer or fact.target_new) for n in fact.neighbors)
    return replace(fact, target_true=fact.target_true or "unknown", neighbors=neighbors)


def _memory(session: Session) -> int:
    model = sum(parameter.numel() * parameter.element_size() for parameter in session.loaded.model.parameters())
    copied = session.settings.targets.compute == "bfloat16" and session.loaded.dtype != torch.bfloat16
    if copied and session.method.needs.source == "targets":
        model += 2 * sum(parameter.numel() for parameter in session.loaded.model.parameters())
    matrices = sum(weight.numel() for weight in session.weights.working.values())
    inputs = max(weight.shape[1] for weight in session.weights.working.values())
    needs = session.method.needs
    # C0, its factors for the solve and for the energy's bounds, and the memory of earlier keys; while C0 is measured, its sums
    held = 4 + max(16, 8 + 8 + (16 if needs.remembers == "keys" else 0))
    statistics = len(session.weights.names) * inputs * inputs * held if session.measures_moments else 0
    solving = 4 * inputs * inputs * 8 if needs.statistics else matrices * 4 * 4
    if session.settings.repair:  # change, momentum, value, and gradients of every matrix, and what its keys say
        repairing = 6 * matrices * 4 + sum(4 * weight.shape[1] ** 2 for weight in session.weights.working.values())
        solving = max(solving, repairing)
    vocabulary = session.loaded.model.get_output_embeddings().weight.shape[0]
    tokens = session.settings.tokens_per_batch
    if needs.source == "targets":
        tokens = session.settings.targets.tokens_on(session.loaded.device)
    activations = tokens * session.loaded.model.config.hidden_size * 16 * 4 * session.depth
    return model + matrices * (4 + 4) + statistics + solving + activations + 512 * vocabulary * 4 * 3


def _disk(session: Session, planned: Sequence[Fact]) -> int:
    method, widths = session.method, [weight.shape for weight in session.weights.working.values()]
    batches = -(-len(planned) // session.settings.batch_size)
    needs, encoder = method.needs, Encoder(session.loaded.tokenizer)
    columns, beside = len(planned), 0
    if needs.source == "gradients":  # a column a target token
        coded = (encoder.with_target(fact.filled_prompt, fact.target_new, fact.separator) for fact in planned)
        columns = sum(len(tokens.ids) - start for tokens, start in coded)
    if needs.contexts == "each":
        columns *= 1 + 5 * session.settings.templates
    if needs.bystanders:
        beside = sum(len(encoder.encode(fact.filled_prompt).ids) - 1 for fact in planned)
    remembers = needs.remembers
    updates = 0
    for out, inner in widths:
        updates += 4 * (batches * out * inner if method.dense else columns * (out + inner))
        updates += 4 * ({"keys": inner, "problem": out + inner, None: 0}[remembers] * columns + beside * inner)
    if session.settings.repair:
        updates += 4 * sum(out * inner for out, inner in widths)
    checkpoint = sum(out * inner * 4 + (2 * inner * inner * 8 if remembers == "keys" else 0) for out, inner in widths)
    statistics = sum(inner * inner * 4 for _, inner in widths) if session.measures_moments else 0
    return updates + checkpoint * 3 + statistics + len(planned) * 4000
