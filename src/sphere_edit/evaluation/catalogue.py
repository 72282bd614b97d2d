"""Every metric is one row here: its name, label, direction, unit and what it is measured of. Whatever shows metrics asks this list.

The metrics of every prompt are a grid. Each part (efficacy, generalization, specificity) names some of a fact's prompts; each protocol
judges one prompt. A further protocol or part is one further row, and its metrics are then in ``metrics.json``, tables, page and figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sphere_edit.evaluation.heldout import HeldoutScores
from sphere_edit.evaluation.scores import FactScores, PromptScore

Of = Literal["prompts", "heldout", "texts", "ability", "routes"]  # what a metric is measured of


@dataclass(frozen=True)
class Part:
    """Which prompts of a fact are averaged.

    Attributes:
        name: how ``metrics.json`` calls it.
        label: how people call it.
        prompts: these prompts' scores; none where the fact has no such prompt.
        learnt: whether an edit is what makes them go well, so that the unedited model's value says only what was not yet edited.
        always: whether it is shown where no fact has such prompts too, and is part of the harmonic mean.
    """

    name: str
    label: str
    prompts: Callable[[FactScores], Sequence[PromptScore]]
    learnt: bool
    always: bool = True


EFFICACY = Part("efficacy", "Efficacy", lambda fact: (fact.rewrite,), learnt=True)
GENERALIZATION = Part("generalization", "Generalization", lambda fact: fact.paraphrases, learnt=True)
SPECIFICITY = Part("specificity", "Specificity", lambda fact: fact.neighbors, learnt=False)
PORTABILITY = Part("portability", "Portability", lambda fact: fact.portability, learnt=True, always=False)
PARTS = (EFFICACY, GENERALIZATION, SPECIFICITY, PORTABILITY)


@dataclass(frozen=True)
class Protocol:
    """How one prompt is judged.

    Attributes:
        suffix: what ``metrics.json`` adds to a part's name.
        label: how people call it.
        verdict: from 0 (went wrong) to 1 (went well); None where the prompt was not asked in this way.
        page: the parts that the report's page and its figures show in this protocol; all if None.
        compared: the parts that tables of several runs show in it; all if None. The table of one run shows all in any case.
    """

    suffix: str
    label: str
    verdict: Callable[[PromptScore], float | None]
    page: Sequence[Part] | None = None
    compared: Sequence[Part] | None = None


LIKELIHOOD = Protocol("", "likelihood", lambda prompt: float(prompt.prefers))
STRICT = Protocol(
    "_strict", "strict", lambda prompt: float(prompt.correct),
    page=(EFFICACY, GENERALIZATION, PORTABILITY), compared=(EFFICACY, GENERALIZATION, PORTABILITY),
)  # fmt: skip
PER_TOKEN = Protocol(
    "_token", "per token", lambda prompt: prompt.accuracy, page=(), compared=(SPECIFICITY, PORTABILITY)
)
GENERATED = Protocol(
    "_generated", "generated", lambda prompt: None if prompt.begins is None else float(prompt.begins),
    page=(), compared=(EFFICACY,),
)  # fmt: skip
OTHER_FORM = Protocol(
    "_other", "strict, other form", lambda prompt: None if prompt.other is None else float(prompt.other),
    page=(), compared=(),
)  # fmt: skip
LEARNT = tuple(part for part in PARTS if part.learnt)
EXACT_LINE = Protocol(
    "_exact", "exact line", lambda prompt: None if prompt.line is None else float(prompt.line.exact),
    page=(), compared=LEARNT,
)  # fmt: skip
OVERLAP = Protocol(
    "_rouge", "ROUGE-L", lambda prompt: None if prompt.line is None else prompt.line.overlap,
    page=(), compared=LEARNT,
)  # fmt: skip
PROTOCOLS = (LIKELIHOOD, STRICT, PER_TOKEN, GENERATED, OTHER_FORM, EXACT_LINE, OVERLAP)


@dataclass(frozen=True)
class Metric:
    """One number that is measured of a model.

    Attributes:
        name: in ``metrics.json``, in the journal and in tables' files.
        label: beside other metrics.
        of: what it is measured of.
        rising: whether more is better; None if neither.
        unit: "%", "nats", or nothing.
        digits: decimals in the table of one run.
        title: in that table, where the next column says ``of_what``; the label unless given.
        of_what: the protocol, or the text it was measured on.
        ratio: whether it is compared as a multiple of the unedited model's.
        distance: whether it is a distance from the unedited model, which has none itself.
        learnt, always: see `Part`.
        page, compared: whether page and figures, and tables of several runs, show it.
    """

    name: str
    label: str
    of: Of
    rising: bool | None
    unit: str = "%"
    digits: int = 1
    title: str = ""
    of_what: str = ""
    ratio: bool = False
    distance: bool = False
    learnt: bool = False
    always: bool = True
    page: bool = True
    compared: bool = True

    @property
    def heading(self) -> str:
        """The label with the unit, as an axis says it."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def column(self) -> str:
        """The label with the unit, unless it is a percentage, as the head of a column says it."""
        return self.label if self.unit == "%" else self.heading

    @property
    def words(self) -> str:
        """Within a sentence: "strict efficacy"."""
        first, _, rest = self.label.partition(", ")
        return " ".join([rest, _small(first)]).strip()

    def said(self, value: float | None, digits: int | None = None) -> str:
        """A value for people; percentages have a dash where nothing was measured, and other numbers say that they are not finite."""
        if self.unit == "%":
            return "–" if value is None else f"{value:.{self.digits}f} %"
        return "not finite" if value is None else f"{value:.{self.digits if digits is None else digits}f}"


def _small(word: str) -> str:
    return word if word.isupper() else word[:1].lower() + word[1:]


PERPLEXITY = Metric(
    "perplexity", "Perplexity", "heldout", rising=False, unit="", digits=2, of_what="held-out text", ratio=True
)
DIVERGENCE = Metric(
    "divergence", "KL", "heldout", rising=False, unit="nats", digits=4, title="KL from unedited", of_what="held-out text",
    distance=True,
)  # fmt: skip
FLUENCY = Metric("fluency", "Fluency", "texts", rising=None, unit="", digits=3, page=False)
CONSISTENCY = Metric("consistency", "Consistency", "texts", rising=True, unit="", digits=3, page=False)
ROUTES = Metric(
    "routes", "Routes changed above the edit", "routes", rising=False, distance=True, page=False, compared=False
)  # of a mixture of experts
HELDOUT = (PERPLEXITY, DIVERGENCE)
TEXTS = (FLUENCY, CONSISTENCY)

_SCORE = "score"  # harmonic mean of a protocol's parts, of those that are always shown


def of_part(part: Part, protocol: Protocol = LIKELIHOOD) -> Metric:
    """A part in a protocol."""
    return Metric(
        part.name + protocol.suffix, part.label if protocol is LIKELIHOOD else f"{part.label}, {protocol.label}", "prompts",
        rising=True, title=part.label, of_what=protocol.label, learnt=part.learnt, always=part.always,
        page=protocol.page is None or part in protocol.page,
        compared=protocol.compared is None or part in protocol.compared,
    )  # fmt: skip


def harmonic(protocol: Protocol = LIKELIHOOD) -> Metric:
    """The harmonic mean of a protocol's parts."""
    title = "Score (harmonic mean)"
    return Metric(
        _SCORE + protocol.suffix, title if protocol is LIKELIHOOD else f"{title}, {protocol.label}", "prompts",
        rising=True, title=title, of_what=protocol.label, page=False, compared=False,
    )  # fmt: skip


def of_protocol(protocol: Protocol) -> list[Metric]:
    """Every part in a protocol, then their harmonic mean."""
    return [*(of_part(part, protocol) for part in PARTS), harmonic(protocol)]


def of_prompts() -> list[Metric]:
    """Every metric of prompts, protocol by protocol."""
    return [metric for protocol in PROTOCOLS for metric in of_protocol(protocol)]


def of_ability(task: str, rising: bool, share: bool) -> Metric:
    """A task of general ability."""
    return Metric(
        f"ability {task}" if rising else f"ability, less is better: {task}",
        task, "ability", rising=rising, unit="%" if share else "",
    )  # fmt: skip


def on_page() -> list[Metric]:
    """What page and figures show of every checkpoint: part by part in its protocols, then the model as a whole."""
    parts = [of_part(part, protocol) for part in PARTS for protocol in PROTOCOLS]
    return [metric for metric in (*parts, *HELDOUT) if metric.page]


def compared() -> list[Metric]:
    """What tables of several runs show."""
    return [metric for metric in (*of_prompts(), *TEXTS, *HELDOUT) if metric.compared]


def told_of_exports() -> list[Metric]:
    """What the card of an export tells, and what two forms of one model are compared by."""
    return [*(of_part(part, protocol) for part in PARTS for protocol in (LIKELIHOOD, STRICT)), PERPLEXITY]


def over_checkpoints() -> list[Metric]:
    """What a run measures at every checkpoint."""
    return [*of_prompts(), *HELDOUT]


def measured(metrics: Iterable[Metric], known: Callable[[Metric], bool]) -> list[Metric]:
    """The metrics without those that only some facts have prompts for, unless something is ``known`` of them."""
    return [metric for metric in metrics if metric.always or known(metric)]


def of_heldout(scores: HeldoutScores) -> dict[str, float | None]:
    """What was measured on held-out text, by name."""
    return {metric.name: getattr(scores, metric.name) for metric in HELDOUT}


def whole_model() -> tuple[str, ...]:
    """What journal and ``metrics.json`` call that which is measured of the model as a whole."""
    return (*(metric.name for metric in HELDOUT), "energy", "texts", "routes")
