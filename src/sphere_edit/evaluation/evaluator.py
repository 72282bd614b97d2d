"""When and what a run measures: the unedited model first, checkpoints on the way, and in the end everything it should know."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sphere_edit.editing.journal import RunFolder
from sphere_edit.editing.settings import Settings
from sphere_edit.evaluation.metrics import (
    FactScores,
    complete_answers,
    continuations,
    perplexity,
    score_facts,
    summarise,
)
from sphere_edit.facts.fact import Fact
from sphere_edit.files import plain_errors, write_json
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.weights import EditedWeights
from sphere_edit.numerics.energy import hyperspherical_energy
from sphere_edit.progress import Reporter

METRICS_SCHEMA = 2


class Evaluator:
    """Measures a model whose weights are put in place by others, and keeps what it found in the run folder."""

    def __init__(
        self,
        loaded: LoadedModel,
        weights: EditedWeights,
        settings: Settings,
        heldout: Sequence[Sequence[int]],
        reporter: Reporter,
    ):
        self.loaded, self.weights, self.reporter, self.heldout = loaded, weights, reporter, heldout
        self.settings, self.seed, self.max_tokens = settings.evaluation, settings.seed, settings.tokens_per_batch

    def score(self, facts: Sequence[Fact], title: str, say: bool = False) -> list[FactScores]:
        """Scores of complete facts by the model as it stands, on request with what it says after each prompt."""
        scores = score_facts(self.loaded, facts, self.max_tokens, self.reporter, title)
        if not say:
            return scores
        said = continuations(self.loaded, facts, self.max_tokens, self.reporter)
        return [replace(score, said=text) for score, text in zip(scores, said, strict=True)]

    # --- of a run -------------------------------------------------------------------------------------------------

    def measure_unedited(self, run: RunFolder) -> None:
        """The unedited model on each session's facts, once; its perplexity and energies with the first."""
        done = {entry["session"] for entry in run.entries if entry["event"] == "unedited"}
        facts, first = run.facts(), 0
        for session, count in enumerate(run.history.sessions, 1):
            part, first = facts[first : first + count], first + count
            path = run.path / "evaluations" / f"unedited-{session:04d}.json"
            if session in done and path.is_file():
                continue
            with self.weights.unedited():
                complete = complete_answers(self.loaded, part)
                scores = self.score(complete, "unedited model", say=True)
                whole = self._whole_model("perplexity, unedited") if session == 1 else {}
            content = {"facts": [f.as_dict() for f in complete], "scores": [s.as_dict() for s in scores], **whole}
            write_json(path, content)
            if session not in done:
                run.append("unedited", session=session, summary=summarise(scores), **whole)

    def checkpoint(self, run: RunFolder) -> None:
        """Evaluate where the settings ask for it after the batch that the run stands at."""
        every, head = self.settings.every, run.history.head
        if every is not None and head > 0 and head % every == 0:
            self._evaluate(run, self._sampled(run.history.retained), say=False)

    def finish(self, run: RunFolder) -> None:
        """Evaluate every fact the model should know now, and write ``metrics.json``."""
        entry = self._evaluate(run, run.history.retained, say=True)
        path = _results(run)
        with plain_errors(path, "read"):
            scores = [FactScores.from_dict(s) for s in json.loads(path.read_text("utf-8"))["scores"]]
        write_json(run.path / "metrics.json", _metrics(run, entry, scores))

    def _evaluate(self, run: RunFolder, asked: Sequence[int], say: bool) -> Mapping[str, Any]:
        """Evaluate some facts after the batch that the run stands at; what the journal and the folder have is not done again."""
        head, path = run.history.head, _results(run)
        known = next(
            (entry for entry in run.history.evaluations if entry["after"] == head and entry["facts"] >= len(asked)),
            None,
        )
        if known is not None and path.is_file():
            return known
        complete, _, _ = _unedited(run)
        scores = self.score([complete[index] for index in asked], f"evaluation after {head}", say)
        write_json(path, {"after": head, "facts": list(asked), "scores": [s.as_dict() for s in scores]})
        if known is not None:
            return known
        whole = self._whole_model("perplexity")
        return run.append("evaluation", after=head, facts=len(asked), summary=summarise(scores), **whole)

    def _sampled(self, retained: Sequence[int]) -> list[int]:
        """The facts that a checkpoint asks for: all, or those first in a random order of all facts, fixed by the seed.

        A fact keeps its place in that order whatever comes after it, so that consecutive checkpoints ask for much the same facts.
        """
        size = self.settings.sample
        if size is None or len(retained) <= size:
            return list(retained)
        order = {index: random.Random(f"{self.seed} {index}").random() for index in retained}
        return sorted(sorted(retained, key=order.__getitem__)[:size])

    def _whole_model(self, title: str) -> dict[str, Any]:
        """Perplexity on the held-out text and the energy of every edited matrix, as deployed."""
        energies = {name: hyperspherical_energy(self.weights.deployed(name)) for name in self.weights.names}
        return {
            "perplexity": perplexity(self.loaded, self.heldout, self.max_tokens, self.reporter, title),
            "energy": {name: {"total": e.total, "per_pair": e.per_pair} for name, e in energies.items()},
        }


def _results(run: RunFolder) -> Path:
    return run.path / "evaluations" / f"batch-{run.history.head:04d}.json"


def _unedited(run: RunFolder) -> tuple[list[Fact], list[FactScores], dict[str, Any]]:
    """All facts with their true answers, the unedited model's scores of them, and what was measured of it as a whole."""
    facts: list[Fact] = []
    scores: list[FactScores] = []
    whole: dict[str, Any] = {}
    for session in range(1, len(run.history.sessions) + 1):
        path = run.path / "evaluations" / f"unedited-{session:04d}.json"
        with plain_errors(path, "read"):
            content = json.loads(path.read_text("utf-8"))
        facts += [Fact.from_dict(record) for record in content["facts"]]
        scores += [FactScores.from_dict(record) for record in content["scores"]]
        whole = whole or {name: content[name] for name in ("perplexity", "energy")}
    return facts, scores, whole


def _metrics(run: RunFolder, entry: Mapping[str, Any], after: Sequence[FactScores]) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    history = run.history
    facts, before, whole_before = _unedited(run)
    kept = history.retained
    batch_of = {index: batch["batch"] for batch in history.batches for index in batch["facts"]}
    return {
        "schema": METRICS_SCHEMA,
        "after": history.head,
        "facts": len(kept),
        "superseded": len(history.superseded),
        "unedited": {**summarise([before[index] for index in kept]), **whole_before},
        "edited": {**entry["summary"], "perplexity": entry["perplexity"], "energy": entry["energy"]},
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
