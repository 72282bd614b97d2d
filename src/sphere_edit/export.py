"""A folder that plain transformers and vLLM load: the source's own files but for the edited tensors, and a card of the edits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sphere_edit._version import __version__
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.catalogue import LIKELIHOOD, PERPLEXITY, STRICT
from sphere_edit.facts.fact import Fact
from sphere_edit.files import folder_in_place, write_text
from sphere_edit.models.loading import EMBEDDED, LoadedModel
from sphere_edit.models.replica import Replica
from sphere_edit.models.source import Companions
from sphere_edit.models.weights import EditedWeights
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.history import History
from sphere_edit.runs.records import RunConfig
from sphere_edit.runs.session import Session
from sphere_edit.text import code, markdown, public_name

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model")  # of the original's card
_FRONT = re.compile(r"\A---\s*\n(.*?\n)---\s*\n", re.DOTALL)


def export_run(session: Session, run: RunFolder, folder: Path) -> None:
    """Export the model of a run, whose last batch must be in place, with a card of its edits; say what a user should know of it."""
    facts = run.facts()
    retained = [facts[index] for index in run.history.retained]
    card = model_card(run.config, run.history, retained, run.current_metrics())
    for sentence in export_model(session.loaded, session.weights, folder, card):
        session.reporter.say(sentence)


def export_model(loaded: LoadedModel, weights: EditedWeights, folder: Path, card: str) -> list[str]:
    """Write the edited model to a new folder: the source's own files, but for the edited tensors and the card.

    Where the edited tensors cannot be found in the source's files, all weights are written anew by transformers.

    Returns:
        what a user should know of it, in sentences.

    Raises:
        SphereEditError: the folder is not empty or cannot be written; nothing half-written is left behind.
    """
    replica = Replica(loaded, weights)
    with folder_in_place(folder) as temporary:
        replica.write(temporary)
        write_text(temporary / "README.md", whole_card(card, _hub_name(loaded, replica), replica.companions))
    told = []
    if replica.why_anew:
        kept = "tokenizer and the rest are the source's own" if replica.source else "so are configuration and tokenizer"
        told.append(f"All weights were written anew by transformers, because {replica.why_anew}; {kept}")
    if replica.companions.left:
        told.append(
            f"Left behind, as nothing that loads the edited model needs it: {', '.join(replica.companions.left)} "
            "(weights in other forms are not edited; code comes along only where it was trusted)"
        )
    return told


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


def _hub_name(loaded: LoadedModel, replica: Replica) -> str | None:
    """The original's name on the hub, None for a model of this machine."""
    here = replica.source is None or loaded.source == EMBEDDED or Path(loaded.source).is_absolute()
    return None if here else loaded.source


def _split(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text."""
    found = _FRONT.match(card)
    if found is None:
        return {}, card
    try:
        front = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        front = None
    return (front if isinstance(front, dict) else {}), card[found.end() :]


def _is_plain(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def model_card(config: RunConfig, history: History, facts: Sequence[Fact], metrics: Mapping[str, Any] | None) -> str:
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
        "library_name: transformers",
        "tags: [model-editing, sphere-edit]",
        "---",
        "",
        f"# {markdown(source.rsplit('/', 1)[-1])}, edited",
        "",
        f"{len(facts)} facts of {code(source)} were changed in {history.head} sequential batches with "
        f"sphere-edit {__version__}. Everything else is the original model; it keeps the original's licence.",
        "",
        f"- Method: {code(config.method)}, options {code(str(config.method_options))}",
        f"- Projection: {markdown(projection)}",
        f"- Edited matrices: {', '.join(map(code, config.matrices))}",
        f"- Original weights: SHA-256 {code(config.model.fingerprint)}",
        f"- Statistics: {markdown(config.corpus.origin)}",
        f"- Seed {settings['seed']}; {markdown(versions)}",
        "",
    ]
    if metrics is not None:
        before, after = metrics["unedited"], metrics["edited"]
        lines += [
            f"## Measured on {metrics['facts']} facts after batch {metrics['after']}",
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
