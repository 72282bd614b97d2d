"""Runs side by side in one table, as the paper's Table 1: every method with and without SPHERE, means with intervals, the best in bold."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.metrics import PARTS, FactScores, difference_intervals, intervals, summarise
from sphere_edit.files import plain_errors
from sphere_edit.text import csv_cell, visible
from sphere_edit.text import latex as in_latex
from sphere_edit.text import markdown as in_markdown

Key = tuple[int, tuple[str, str, str]]  # a seed, and a fact: its subject, prompt and new answer


@dataclass(frozen=True)
class Column:
    """A number of a table: its name, how it reads, and whether more of it is better (None: neither)."""

    name: str
    label: str
    rising: bool | None
    digits: int = 1


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
    """

    group: str
    label: str
    method: str
    variant: str
    facts: int
    values: dict[str, float | None]
    spans: dict[str, tuple[float, float] | None]
    scores: dict[Key, FactScores]


def read_row(group: str, method: str, variant: str, folders: Mapping[int, Path], when: str = "edited") -> Row:
    """One row from the folders of finished runs by their seeds; ``when`` may be ``unedited``.

    Raises:
        SphereEditError: a run has no final evaluation.
    """
    contents = {}
    for seed, folder in folders.items():
        path = folder / "metrics.json"
        if not path.is_file():
            raise SphereEditError(f"{folder} is not finished: it has no metrics.json")
        with plain_errors(path, "read"):
            contents[seed] = json.loads(path.read_text("utf-8"))
    scores = {
        (seed, (fact["subject"], fact["prompt"], fact["target_new"])): FactScores.from_dict(fact[when])
        for seed, content in contents.items()
        for fact in content["per_fact"]
    }
    values: dict[str, float | None] = dict(summarise(list(scores.values())))
    sides = [content[when] for content in contents.values()]
    values["perplexity"] = _mean([_ratio(content, when) for content in contents.values()])
    values["divergence"] = _mean([side["divergence"] for side in sides])
    for name in ("fluency", "consistency"):
        values[name] = _mean([side.get("texts", {}).get(name) for side in sides])
    for task in dict.fromkeys(task for side in sides for task in side.get("ability", {})):
        found = [side.get("ability", {}).get(task) for side in sides]
        shown = [None if score is None else score["value"] * (100 if score["share"] else 1) for score in found]
        rising = all(score is None or score["rising"] for score in found)
        values[f"{_ABILITY if rising else _FALLING} {task}"] = _mean(shown)
    label = method if not variant else f"{method} + {variant}" if variant != "plain" else method
    spans = intervals(list(scores.values()), [fact for _, fact in scores])
    return Row(group, label, method, variant, len(scores), values, dict(spans), scores)


def _ratio(content: Mapping[str, Any], when: str) -> float | None:
    before, after = content["unedited"]["perplexity"], content[when]["perplexity"]
    return after / before if before and after else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns that these rows have something in."""
    wanted = [
        *(Column(part, part.capitalize(), True) for part in PARTS),
        Column("efficacy_strict", "Efficacy, strict", True),
        Column("generalization_strict", "Generalization, strict", True),
        Column("specificity_token", "Specificity, per token", True),
        Column("efficacy_generated", "Efficacy, generated", True),
        Column("fluency", "Fluency", None, 3),
        Column("consistency", "Consistency", True, 3),
        Column("perplexity", "Perplexity, ×", False, 3),
        Column("divergence", "KL, nats", False, 3),
    ]
    for kind, rising in ((_ABILITY, True), (_FALLING, False)):
        tasks = dict.fromkeys(name for row in rows for name in row.values if name.startswith(f"{kind} "))
        wanted += [Column(name, name.removeprefix(f"{kind} "), rising) for name in tasks]
    return [column for column in wanted if any(row.values.get(column.name) is not None for row in rows)]


def markdown(rows: Sequence[Row]) -> str:
    """One table a group; the best edited row of each column in bold."""
    parts = []
    for group, members in _grouped(rows):
        columns = columns_of(members)
        heads = " | ".join(in_markdown(column.label) for column in columns)
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
            f"% {visible(group)}",
            rf"\begin{{tabular}}{{lr{'r' * len(columns)}}}",
            r"\toprule",
            " & ".join(["", "Facts", *(in_latex(column.label) for column in columns)]) + r" \\",
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
    row: Row, column: Column, members: Sequence[Row], bold: Callable[[str], str], spread: Callable[[str, str], str]
) -> str:
    value = row.values.get(column.name)
    if value is None:
        return "–"
    shown, span = f"{value:.{column.digits}f}", row.spans.get(column.name)
    text = shown if span is None else spread(shown, f"{(span[1] - span[0]) / 2:.{column.digits}f}")
    rivals = [r.values[column.name] for r in members if r.method != UNEDITED and r.values.get(column.name) is not None]
    if column.rising is None or row.method == UNEDITED or not rivals:
        return text
    best = (max if column.rising else min)(value for value in rivals if value is not None)
    return bold(text) if shown == f"{best:.{column.digits}f}" else text


UNEDITED = "unedited"
_ABILITY, _FALLING = "ability", "ability, less is better:"


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
            for name in ("efficacy_strict", "generalization", "generalization_strict", "specificity"):
                before, after, span = means[0][name], means[1][name], spans[name]
                cells.append(
                    "–"
                    if before is None or after is None or span is None
                    else f"{after - before:+.1f} [{span[0]:+.1f}, {span[1]:+.1f}]"
                )
            ratio = [r.values["perplexity"] for r in (base, row)]
            cells.append("–" if None in ratio else f"{ratio[0]:.3f} → {ratio[1]:.3f}")
            lines.append(f"| {in_markdown(group)} | {in_markdown(row.label)} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = (
        "What a variant changes over its plain method, in points, paired by fact, with 95 % bootstrap intervals; and perplexity times the unedited one's:\n\n"
        "| | | facts of both | strict efficacy | generalization | strict generalization | specificity | perplexity |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(lines) + _over_the_best(rows)


def _over_the_best(rows: Sequence[Row]) -> str:
    lines = []
    for group, members in _grouped(rows):
        plain = [row for row in members if row.variant == "plain"]
        others = [row for row in members if row.variant not in ("plain", "") and row.method != UNEDITED]
        gains: dict[str, float] = {}
        for name in PARTS if plain and others else ():
            base, best = (max(row.values[name] or 0.0 for row in side) for side in (plain, others))
            if base > 0:
                gains[name] = 100 * (best - base) / base
        if gains:
            said = ", ".join(f"{name} {gain:+.2f} %" for name, gain in gains.items())
            lines.append(f"- {in_markdown(group)}: {said}; mean {sum(gains.values()) / len(gains):+.2f} %")
    if not lines:
        return ""
    return (
        "\n\nThe best variant over the best plain method, metric by metric (each may be another row), relative, in the likelihood protocol:\n\n"
        + "\n".join(lines)
    )
