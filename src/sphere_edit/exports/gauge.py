"""What an edited model is measured by once it has left its run: the facts that it should know, and the run's held-out text."""

from __future__ import annotations

from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.heldout import score_heldout
from sphere_edit.evaluation.intervals import summarise
from sphere_edit.evaluation.scores import score_facts
from sphere_edit.models.loading import LoadedModel
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.measuring import read_unedited
from sphere_edit.runs.preparing import heldout_text
from sphere_edit.runs.session import Session

Measured = dict[str, float | None]


class Gauge:
    """Measures models by the same facts and the same text."""

    def __init__(self, session: Session, run: RunFolder):
        complete, _, _ = read_unedited(run)
        self.facts = [complete[index] for index in run.history.retained]
        self._text = heldout_text(run, session.vocabulary)
        self._max_tokens, self._reporter = session.settings.tokens_per_batch, session.reporter

    def measure(self, loaded: LoadedModel, title: str) -> Measured:
        """Means of every metric of prompts, in percent, and perplexity; ``title`` is shown beside the bars."""
        scores = score_facts(loaded, self.facts, self._max_tokens, self._reporter, title)
        text = score_heldout(loaded, self._text, self._max_tokens, self._reporter, f"{title}, text")
        return {**summarise(scores), catalogue.PERPLEXITY.name: text.perplexity}


def within(found: Measured, wanted: Measured, points: float) -> bool:
    """Whether nothing shown on a card is worse by more than so many points, or per cent of perplexity."""
    for metric in catalogue.told_of_exports():
        now, before = found.get(metric.name), wanted.get(metric.name)
        if before is None:
            continue
        if now is None:
            return False
        worse = 100 * (now / before - 1) if metric.ratio else before - now
        if worse > points + 1e-9:
            return False
    return True
