"""The first three questions about a run, each answered by one number and a colour."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sphere_edit.editing.guard import COLLATERAL
from sphere_edit.evaluation.catalogue import EFFICACY, PERPLEXITY, SPECIFICITY, STRICT, of_part
from sphere_edit.reporting.series import Series


@dataclass(frozen=True)
class Light:
    """An answer: what was asked, the number as people read it, its colour ("" where there is no answer), in words, and by which rule.

    Attributes:
        measure: what the number is of, in a word or two; "" where there is no answer.
        beside: another measure that the answer does not go by.
    """

    question: str
    value: str
    colour: str
    verdict: str
    rule: str
    measure: str = ""
    beside: str = ""

    @property
    def words(self) -> str:
        """On one line: the answer, and what it goes by."""
        return f"{self.verdict} ({'; '.join(filter(None, (f'{self.measure} {self.value}'.strip(), self.beside)))})"


@dataclass(frozen=True)
class Rule:
    """What is asked, and up to where its answer is good (green) or in doubt (amber)."""

    question: str
    green: float
    amber: float
    wording: str
    verdicts: tuple[str, str, str]
    measure: str
    rising: bool = False  # whether more is better

    def light(self, value: float | None, shown: str) -> Light:
        """The answer for a value, in colour and words."""
        if value is None or not math.isfinite(value):
            index = 2
        else:
            sign = -1 if self.rising else 1
            index = 0 if sign * value <= sign * self.green else 1 if sign * value <= sign * self.amber else 2
        return Light(
            self.question, shown, ("green", "amber", "red")[index], self.verdicts[index], self.wording, self.measure
        )

    def unknown(self, why: str) -> Light:
        """No answer, and why there is none."""
        return Light(self.question, "not measured", "", why, self.wording)


TAKEN = Rule(
    "Did the edits take?", 90, 70, "Strict efficacy over all facts edited. Green from 90 %, amber from 70 %.",
    ("yes", "not all of them", "no"), "strict efficacy", rising=True,
)  # fmt: skip
INTACT = Rule(
    "Is the rest intact?", 1.10, 1.30, "Perplexity on held-out text, times the unedited model's. Green up to 1.10, amber up to 1.30.",
    ("yes", "it begins to suffer", "no"), "perplexity",
)  # fmt: skip


def lights(run: Series) -> tuple[Light, Light, Light]:
    """Did the edits take, is the rest intact, and is the model still near itself."""
    metric = of_part(EFFICACY, STRICT)
    strict = run.metrics[metric.name][-1]
    before, after = run.metrics[PERPLEXITY.name][0], run.metrics[PERPLEXITY.name][-1]
    ratio = after / before if after and before else None
    return (
        _measured(TAKEN, run, strict, metric.said(strict)),
        replace(
            _measured(INTACT, run, ratio, "not finite" if ratio is None else f"× {ratio:.3f}"), beside=_neighbors(run)
        ),
        _near(run),
    )


def _measured(rule: Rule, run: Series, value: float | None, shown: str) -> Light:
    """A rule's answer, if the run was evaluated where it stands."""
    if run.current:
        return rule.light(value, shown)
    return rule.unknown("not evaluated where the run stands" + (f"; last: {run.evaluated}" if run.evaluated else ""))


def _neighbors(run: Series) -> str:
    """What became of the neighbours' own answers, by the strict verdict; nothing where there are none, or none was asked."""
    metric = of_part(SPECIFICITY, STRICT)
    before, after = run.metrics[metric.name][0], run.metrics[metric.name][-1]
    if not run.current or before is None or after is None:
        return ""
    return f"{metric.words} {metric.said(before)} → {metric.said(after)}"


def _near(run: Series) -> Light:
    """How far the weights have moved, by the guard's own measure, with the energy beside it."""
    matrices = run.batches[-1].matrices if run.batches else {}
    value = COLLATERAL.measured(matrices) if matrices else 0.0
    changes = [run.moved(name, matrix["energy"]) for name, matrix in matrices.items()]
    wording = (
        f"{COLLATERAL.name[0].upper()}{COLLATERAL.name[1:]}. Green up to {COLLATERAL.value / 2:g}, amber up to {COLLATERAL.value:g}, "
        f"the guard's limit. Hyperspherical energy: {max(changes, key=abs, default=0.0):+.3f} % at most."
    )
    rule = Rule(
        "Is it still near itself?",
        COLLATERAL.value / 2,
        COLLATERAL.value,
        wording,
        ("yes", "it moves away", "no"),
        "collateral ratio",
    )
    if value is None:
        return rule.unknown("no second moments; --guard measures them")
    return rule.light(value, f"{value:.3f}")
