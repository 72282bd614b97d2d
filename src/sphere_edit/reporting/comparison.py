"""Runs side by side in one table, as the paper's Table 1: every method with and without SPHERE, means with intervals, the best in bold."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.ability import AbilityScore
from sphere_edit.evaluation.catalogue import EFFICACY, GENERALIZATION, PERPLEXITY, SPECIFICITY, STRICT, Metric, of_part
from sphere_edit.evaluation.intervals import difference_intervals, intervals, summarise
from sphere_edit.evaluation.scores import FactScores
from sphere_edit.runs.folder import METRICS, read_metrics
from sphere_edit.text import csv_cell, visible
from sphere_edit.text import latex as in_latex
from sphere_edit.text import markdown as in_markdown

UNEDITED = "unedited"
_IMPROVED = (
    of_part(EFFICACY, STRICT),
    of_part(GENERALIZATION),
    of_part(GENERALIZATION, STRICT),
    of_part(SPECIFICITY),
)  # what a variant may change over its plain method

Key = tuple[int, tuple[str, str, str]]  # a seed, and a fact: its subject, prompt and new answer


@dataclass(frozen=True)
class Row:
    """What some runs that differ in their seed alone came to, all their facts together.

    Attributes:
        group: which table the row belongs to: a model and a data set.
        label: what it is called.
        method: its method.
        variant: its variant of the method.
        facts: facts known in the end, over all seeds.
        values: by column, None where nothing was measured.
        spans: 95 % bootstrap intervals over facts, where there are facts to draw.
        scores: of every fact of every seed.
        abilities: the metrics of general ability among the values.
    """

    group: str
    label: str
    method: str
    variant: str
    facts: int
    values: dict[str, float | None]
    spans: dict[str, tuple[float, float] | None]
    scores: dict[Key, FactScores]
    abilities: tuple[Metric, ...] = ()


def read_row(group: str, method: str, variant: str, folders: Mapping[int, Path], when: str = "edited") -> Row:
    """One row from the folders of finished runs by their seeds; ``when`` may be ``unedited``.

    Raises:
        SphereEditError: a run has no final evaluation.
    """
    contents: dict[int, Mapping[str, Any]] = {}
    for seed, folder in folders.items():
        if not (folder / METRICS).is_file():
            raise SphereEditError(f"{folder} is not finished: it has no {METRICS}")
        contents[seed] = read_metrics(folder)
    scores = {
        (seed, (fact["subject"], fact["prompt"], fact["target_new"])): FactScores.from_dict(fact[when])
        for seed, content in contents.items()
        for fact in content["per_fact"]
    }
    values: dict[str, float | None] = dict(summarise(list(scores.values())))
    sides = [content[when] for content in contents.values()]
    for metric in catalogue.HELDOUT:
        values[metric.name] = _mean([_whole(metric, content, when) for content in contents.values()])
    for metric in catalogue.TEXTS:
        values[metric.name] = _mean([side.get("texts", {}).get(metric.name) for side in sides])
    abilities = []
    for task in dict.fromkeys(task for side in sides for task in side.get("ability", {})):
        found = [
            AbilityScore.from_dict(side["ability"][task]) if task in side.get("ability", {}) else None for side in sides
        ]
        known = [score for score in found if score is not None]
        metric = catalogue.of_ability(task, all(score.rising for score in known), all(score.share for score in known))
        abilities.append(metric)
        values[metric.name] = _mean(
            [None if score is None else score.value * (100 if score.share else 1) for score in found]
        )
    label = method if not variant else f"{method} + {variant}" if variant != "plain" else method
    spans = intervals(list(scores.values()), [fact for _, fact in scores])
    return Row(group, label, method, variant, len(scores), values, dict(spans), scores, tuple(abilities))


def _whole(metric: Metric, content: Mapping[str, Any], when: str) -> float | None:
    """What was measured of the model as a whole, as tables compare it."""
    before, after = content["unedited"].get(metric.name), content[when].get(metric.name)
    if metric.ratio:
        return after / before if before and after else None
    value: float | None = after
    return value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def columns_of(rows: Sequence[Row]) -> list[Metric]:
    """The metrics that these rows have something of; abilities of which more is better before the others."""
    tasks = sorted((metric for row in rows for metric in row.abilities), key=lambda metric: not metric.rising)
    wanted = {metric.name: metric for metric in (*catalogue.compared(), *tasks)}
    return [metric for name, metric in wanted.items() if any(row.values.get(name) is not None for row in rows)]


def _head(metric: Metric) -> str:
    return f"{metric.label}, ×" if metric.ratio else metric.column if metric.of != "ability" else metric.label


def markdown(rows: Sequence[Row]) -> str:
    """One table a group; the best edited row of each column in bold."""
    parts = []
    for group, members in _grouped(rows):
        columns = columns_of(members)
        heads = " | ".join(in_markdown(_head(column)) for column in columns)
        lines = [f"**{in_markdown(group)}**", "", f"| | facts | {heads} |"]
        lines.append("|---|" + "---|" * (len(columns) + 1))
        for row in members:
            cells = [_cell(row, column, members, "**{}**".format, "{} ± {}".format) for column in columns]
            lines.append(f"| {in_markdown(row.label)} | {row.facts} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *([comparison] if (comparison := _improvements(rows)) else [])]) + "\n"


def latex(rows: Sequence[Row]) -> str:
    """The same tables for a paper (booktabs)."""
    parts = []
    for group, members in _grouped(rows):
        columns = columns_of(members)
        lines = [
            f"% {visible(group)}; needs booktabs; ± is half of a 95 % bootstrap interval over facts",
            rf"\begin{{tabular}}{{lr{'r' * len(columns)}}}",
            r"\toprule",
            " & ".join(["", "Facts", *(in_latex(_head(column)) for column in columns)]) + r" \\",
            r"\midrule",
        ]
        for row in members:
            cells = [_cell(row, column, members, r"\textbf{{{}}}".format, r"{} $\pm$ {}".format) for column in columns]
            lines.append(" & ".join([in_latex(row.label), str(row.facts), *cells]) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Every number with its interval's ends, unrounded, a row a line."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "method", "variant", "facts", *(csv_cell(f"{name}{end}") for name in names for end in ("", "_low", "_high"))])  # fmt: skip
    for row in rows:
        cells: list[Any] = []
        for name in names:
            span = row.spans.get(name)
            cells += [row.values.get(name), *(span or (None, None))]
        words = map(csv_cell, (row.group, row.method, row.variant))
        writer.writerow([*words, row.facts, *("" if c is None else c for c in cells)])
    return text.getvalue()


def _grouped(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(group, [row for row in rows if row.group == group]) for group in dict.fromkeys(row.group for row in rows)]


def _cell(
    row: Row, column: Metric, members: Sequence[Row], bold: Callable[[str], str], spread: Callable[[str, str], str]
) -> str:
    value = row.values.get(column.name)
    if value is None:
        return "–"
    digits = 1 if column.of in ("prompts", "ability") else 3
    shown, span = f"{value:.{digits}f}", row.spans.get(column.name)
    text = shown if span is None else spread(shown, f"{(span[1] - span[0]) / 2:.{digits}f}")
    rivals = [r.values[column.name] for r in members if r.method != UNEDITED and r.values.get(column.name) is not None]
    if column.rising is None or row.method == UNEDITED or not rivals:
        return text
    if len(rivals) > 1 and len({f"{rival:.{digits}f}" for rival in rivals if rival is not None}) == 1:
        return text  # where all are as good, none is the best
    best = (max if column.rising else min)(value for value in rivals if value is not None)
    return bold(text) if shown == f"{best:.{digits}f}" else text


def _improvements(rows: Sequence[Row]) -> str:
    """What each variant changes over its plain method, paired by fact; and the best of them over the best plain row."""
    lines = []
    for group, members in _grouped(rows):
        for row in members:
            base = next((r for r in members if r.method == row.method and r.variant == "plain"), None)
            if row.variant == "plain" or base is None:
                continue
            both = [key for key in base.scores if key in row.scores]
            plain, other = ([r.scores[key] for key in both] for r in (base, row))
            spans = difference_intervals(plain, other, [fact for _, fact in both])
            means = summarise(plain), summarise(other)
            cells = [str(len(both))]
            for metric in _IMPROVED:
                before, after, span = means[0][metric.name], means[1][metric.name], spans[metric.name]
                cells.append(
                    "–"
                    if before is None or after is None or span is None
                    else f"{after - before:+.1f} [{span[0]:+.1f}, {span[1]:+.1f}]"
                )
            ratio = [r.values[PERPLEXITY.name] for r in (base, row)]
            cells.append("–" if None in ratio else f"{ratio[0]:.3f} → {ratio[1]:.3f}")
            lines.append(f"| {in_markdown(group)} | {in_markdown(row.label)} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = (
        "What a variant changes over its plain method, in points, paired by fact, with 95 % bootstrap intervals; and perplexity times the unedited one's:\n\n"
        f"| | | facts of both | {' | '.join(metric.words for metric in (*_IMPROVED, PERPLEXITY))} |\n"
        f"|---|---|---|{'---|' * (len(_IMPROVED) + 1)}\n"
    )
    return head + "\n".join(lines) + _over_the_best(rows)


def _over_the_best(rows: Sequence[Row]) -> str:
    lines = []
    for group, members in _grouped(rows):
        plain = [row for row in members if row.variant == "plain"]
        others = [row for row in members if row.variant not in ("plain", "") and row.method != UNEDITED]
        gains: dict[str, float] = {}
        for metric in map(of_part, catalogue.PARTS if plain and others else ()):
            base, best = (max(row.values.get(metric.name) or 0.0 for row in side) for side in (plain, others))
            if base > 0:
                gains[metric.words] = 100 * (best - base) / base
        if gains:
            said = ", ".join(f"{name} {gain:+.2f} %" for name, gain in gains.items())
            lines.append(f"- {in_markdown(group)}: {said}; mean {sum(gains.values()) / len(gains):+.2f} %")
    if not lines:
        return ""
    return (
        "\n\nThe best variant over the best plain method, metric by metric (each may be another row), relative, in the likelihood protocol:\n\n"
        + "\n".join(lines)
    )
