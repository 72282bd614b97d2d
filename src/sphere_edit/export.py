"""A model folder that plain transformers and vLLM load, with a model card that says what was edited and how it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphere_edit._version import __version__
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.catalogue import LIKELIHOOD, PERPLEXITY, STRICT
from sphere_edit.facts.fact import Fact
from sphere_edit.files import folder_in_place
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.quiet import quiet
from sphere_edit.runs.history import History
from sphere_edit.runs.records import RunConfig
from sphere_edit.text import code, markdown, public_name


def export_model(loaded: LoadedModel, folder: Path, card: str) -> None:
    """Write weights (safetensors), configuration, generation configuration, tokenizer and ``card`` to a new folder.

    Raises:
        SphereEditError: the folder is not empty or cannot be written; nothing half-written is left behind.
    """
    with folder_in_place(folder) as temporary, quiet():
        loaded.model.save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, "utf-8")


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
