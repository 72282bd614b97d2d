"""The card of an export: what was edited, how it measures, and below it the original model's own card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from sphere_edit._version import __version__
from sphere_edit.counting import counted, several
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.catalogue import LIKELIHOOD, PERPLEXITY, STRICT
from sphere_edit.facts.fact import Fact
from sphere_edit.files import yaml_value
from sphere_edit.models.source import Companions
from sphere_edit.runs.history import History
from sphere_edit.runs.records import RunConfig
from sphere_edit.text import code, markdown, public_name

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model")  # of the original's card
_FRONT = re.compile(r"\A---\s*\n(.*?\n)---\s*\n", re.DOTALL)


@dataclass(frozen=True)
class Note:
    """What a form has to say on its card.

    Attributes:
        loads_with: what loads it, as the hub calls that.
        text: paragraphs of our own, ready as Markdown.
        measured: means of metrics in this form, by what was measured; the first column is what the others are compared with.
    """

    loads_with: str = "transformers"
    text: str = ""
    measured: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


def whole_card(card: str, hub: str | None, companions: Companions) -> str:
    """Our card over the original's: licence, language and base model in front, the original's text below."""
    file = companions.card
    original = "" if file is None else file.read_text("utf-8", errors="replace")
    theirs, their_text = _split(original)
    ours, our_text = _split(card)
    front = {key: theirs[key] for key in _KEPT if _is_plain(theirs.get(key))} | ours
    if hub is not None:
        front["base_model"] = hub
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    below = (
        f"\n---\n\n*What follows is the card of the original model.*\n\n{their_text.strip()}\n"
        if their_text.strip()
        else ""
    )
    return f"---\n{head}---\n\n{our_text.strip()}\n{below}"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text."""
    found = _FRONT.match(card)
    if found is None:
        return {}, card
    try:
        front = yaml_value(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        front = None
    return (front if isinstance(front, dict) else {}), card[found.end() :]


def _is_plain(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def model_card(
    config: RunConfig,
    history: History,
    facts: Sequence[Fact],
    metrics: Mapping[str, Any] | None,
    note: Note,
) -> str:
    """The README of an exported model."""
    settings, sphere = config.settings, config.sphere
    projection = (
        f"SPHERE (η = {sphere.eta:g}, α = {sphere.alpha:g}, basis {sphere.basis}, {sphere.project})"
        if sphere
        else "none"
    )
    source = public_name(config.model.source)
    versions = ", ".join(f"{name} {version}" for name, version in config.versions.items())
    lines = [
        "---",
        f"library_name: {note.loads_with}",
        "tags: [model-editing, sphere-edit]",
        "---",
        "",
        f"# {markdown(source.rsplit('/', 1)[-1])}, edited",
        "",
        f"{counted(len(facts), 'fact')} of {code(source)} {several(len(facts), 'was')} changed in {counted(history.head, 'batch')} with "
        f"sphere-edit {__version__}. Everything else is the original model; it keeps the original's licence.",
        "",
        f"- Method: {code(config.method)}, options {code(str(config.method_options))}",
        f"- Projection: {markdown(projection)}",
        f"- Edited matrices: {', '.join(map(code, config.matrices))}",
        f"- Original weights: SHA-256 {code(config.model.fingerprint)}",
        f"- Statistics: {markdown(config.corpus.origin)}",
        f"- Seed {settings['seed']}; {markdown(versions)}",
        "",
        *([note.text, ""] if note.text else []),
        *_measured_in_form(note.measured),
    ]
    if metrics is not None:
        before, after = metrics["unedited"], metrics["edited"]
        lines += [
            f"## Measured on {counted(metrics['facts'], 'fact')} after batch {metrics['after']}",
            "",
            "| | before | after | before, strict | after, strict |",
            "|---|---|---|---|---|",
        ]
        for likelihood, strict in zip(*map(catalogue.of_protocol, (LIKELIHOOD, STRICT)), strict=True):
            if not likelihood.always and after.get(likelihood.name) is None:
                continue
            cells = [metric.said(side[metric.name]) for metric in (likelihood, strict) for side in (before, after)]
            lines.append(f"| {likelihood.title} | " + " | ".join(cells) + " |")
        cells = [PERPLEXITY.said(side[PERPLEXITY.name]) for side in (before, after)]
        lines += [
            f"| {PERPLEXITY.label} | " + " | ".join(cells) + " | | |",
            "",
            "Efficacy and generalization compare the likelihood of the new answer with the old one's, specificity the "
            "reverse on neighbouring prompts; *strict* asks that every token of the right answer be the likeliest.",
            "",
        ]
    else:
        lines += ["Not evaluated at this point.", ""]
    lines += ["## Edited facts", ""]
    lines += [f"- {markdown(fact.filled_prompt)} → **{markdown(fact.target_new.strip())}**" for fact in facts[:100]]
    if len(facts) > 100:
        lines.append(f"- … and {len(facts) - 100} more")
    return "\n".join(lines) + "\n"


def _measured_in_form(measured: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """A table of what was measured in this form, a row a metric."""
    if not measured:
        return []
    rows = [
        f"| {metric.label} | " + " | ".join(metric.said(column.get(metric.name)) for column in measured.values()) + " |"
        for metric in catalogue.told_of_exports()
        if any(column.get(metric.name) is not None for column in measured.values())
    ]
    head = f"| | {' | '.join(measured)} |"
    return ["## Measured in this form", "", head, "|---" * (1 + len(measured)) + "|", *rows, ""]
