"""Before a run's first batch: everything that affects its results is decided, measured and written down."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from sphere_edit import ranks
from sphere_edit._version import __version__
from sphere_edit.editing.ingredients import Ingredient, Unedited, measure
from sphere_edit.editing.moments import Corpus, load_corpus
from sphere_edit.editing.problem import Statistics
from sphere_edit.editing.repair import readable_passages
from sphere_edit.editing.settings import make_settings, placed
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.prompts import context_templates
from sphere_edit.facts.readers import read_facts
from sphere_edit.files import content_digest, read_json, write_json
from sphere_edit.models.loading import load_model
from sphere_edit.numerics.experts import inputs_of
from sphere_edit.progress import Reporter
from sphere_edit.runs.commit import Committer
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.layout import Layout
from sphere_edit.runs.records import CorpusIdentity, ModelIdentity, RunConfig
from sphere_edit.runs.selection import readable
from sphere_edit.runs.session import Session
from sphere_edit.runs.trust import remember

_HELDOUT = "heldout.json"  # of a run: token ids of the text that perplexity is measured on
_PASSAGES = "passages.json"  # and of the ordinary text that its repair reads


def default_folder(model: str | Path, method: str) -> Path:
    """Where a run goes that was given no folder."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model).name)
    return Path("runs") / f"{name}-{method}-{ranks.once(lambda: time.strftime('%Y%m%d-%H%M%S'))}"


def create_run(session: Session, folder: Path, facts: int) -> RunFolder:
    """Create a run folder, with the lock taken, and all that the run needs from the unedited model; ``facts`` are those it begins with."""
    run = RunFolder.create(folder)
    try:
        settings = session.settings
        with session.weights.unedited():
            session.reporter.say("Preparing", "bold")
            count = settings.templates if session.method.needs.feed.at_subjects else 0
            templates = context_templates(session.loaded, settings.seed, count)
            corpus = load_corpus(session.loaded, settings.moments, settings.seed, session.reporter)
            measure_ingredients(session, session.ingredients, corpus, templates, folder / "statistics")
        if settings.moments.heldout is None:
            corpus = replace(corpus, heldout=corpus.heldout_for(facts))
        inputs = {_HELDOUT: write_json(folder / _HELDOUT, corpus.heldout)}
        if settings.repair:
            inputs[_PASSAGES] = write_json(folder / _PASSAGES, readable_passages(corpus.passages))
        for file in sorted((folder / "statistics").rglob("*.safetensors")):
            inputs[file.relative_to(folder).as_posix()] = content_digest(file) or ""
        run.decide(_config(session, templates, corpus), inputs)
        remember(run.config)
    except BaseException:
        run.unlock()
        raise
    return run


def measure_ingredients(
    session: Session, rows: Sequence[Ingredient], corpus: Corpus, templates: Sequence[str], folder: Path
) -> None:
    """Put what some ingredients measure of the unedited model into ``folder``, from the cache where it is there."""
    unedited = Unedited(
        loaded=session.loaded,
        names=session.weights.names,
        layers=session.layers,
        corpus=corpus,
        max_tokens=session.settings.tokens_per_batch,
        tolerance=session.settings.moments.tolerance,
        source=session.make_source(templates, session.settings.targets),
        demo_facts=lambda: readable(session, read_facts("demo").facts, skip_bad=True)[0],
        reporter=session.reporter,
    )
    measure(rows, unedited, folder)


def session_of(
    run: RunFolder,
    reporter: Reporter,
    places: Mapping[str, Any],
    trust_remote_code: bool,
    model: str | Path | None,
) -> Session:
    """The model that a run edits, as it was before its first batch, and the run's settings.

    Args:
        places: a device, or a device map and its memory, in place of the run's.
        model: where the original model is now, if it has moved.

    Raises:
        SphereEditError: it cannot be loaded, or its weights are not what they were.
    """
    config = run.config
    settings = placed(make_settings(config.settings), places)
    source = str(model or config.model.source)
    loaded = load_model(source, settings.device, settings.dtype, trust_remote_code, reporter, settings.placement())
    if loaded.fingerprint != config.model.fingerprint:
        raise SphereEditError(
            f"the model at '{source}' is not the one this run edited (its weights have another hash); "
            "put the original back, or start a new run"
        )
    now = Layout.of(loaded.architecture)
    if config.layout is not None and (other := config.layout.differing(now, config.matrices)):
        raise SphereEditError(
            f"the model at '{source}' is laid out otherwise than when this run began: {other}. Go on with the libraries that "
            "config.json names, or start a new run"
        )
    if changed := _other_surroundings(config, loaded.device):
        reporter.say(f"Other surroundings than when this run began, so last bits may differ: {', '.join(changed)}")
    return Session(loaded, settings, config.preset, reporter)


def committer_of(session: Session, run: RunFolder) -> Committer:
    """What writes the run's batches, with the weights and the state of its last one in memory."""
    run.check_inputs()
    statistics = session.statistics(run.path / "statistics")
    _check_shapes(session, statistics, run.path / "statistics")
    source = session.make_source(run.config.templates, session.settings.targets, statistics)
    committer = Committer(run, session.make_solver(source, statistics), session.settings.guard)
    committer.go_to(run.history.head)
    return committer


def _check_shapes(session: Session, statistics: Mapping[str, Statistics], folder: Path) -> None:
    for name, known in statistics.items():
        width = inputs_of(session.weights.working[name])
        if not all(row.fits(known[row.name], width) for row in session.ingredients if row.name in known):
            raise SphereEditError(
                f"{folder} is damaged: what it has of {name} is not that of {width} inputs; put it back from a backup"
            )


def heldout_text(run: RunFolder, vocabulary: int) -> list[list[int]]:
    """Token ids of the text that the run's perplexity is measured on, all below ``vocabulary``."""
    return _token_ids(run.path / _HELDOUT, vocabulary)


def repair_text(run: RunFolder, vocabulary: int) -> list[list[int]]:
    """Token ids of the ordinary text that the run's repairs read, all below ``vocabulary``."""
    return _token_ids(run.path / _PASSAGES, vocabulary)


def _token_ids(path: Path, vocabulary: int) -> list[list[int]]:
    rows = read_json(path)
    plain = isinstance(rows, list) and all(
        isinstance(row, list) and all(type(token) is int and 0 <= token < vocabulary for token in row) for row in rows
    )
    if not plain:
        raise SphereEditError(
            f"{path} is damaged: expected lists of token ids below {vocabulary}; put it back from a backup"
        )
    return rows


def _config(session: Session, templates: Sequence[str], corpus: Corpus) -> RunConfig:
    loaded = session.loaded
    return RunConfig(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        model=ModelIdentity(
            source=loaded.source,
            fingerprint=loaded.fingerprint,
            family=loaded.model.config.model_type,
            parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
            dtype=str(loaded.dtype).removeprefix("torch."),
        ),
        preset=session.preset,
        settings=session.settings.model_dump(mode="json"),
        method_options=session.method.model_dump(mode="json"),
        sphere=session.sphere,
        layers=sorted(set(session.layers)),
        matrices=list(session.weights.names),
        templates=list(templates),
        corpus=CorpusIdentity(
            origin=corpus.origin,
            sha256=corpus.sha256,
            passages=len(corpus.passages),
            tokens=sum(len(passage) for passage in corpus.passages),
            heldout_passages=len(corpus.heldout),
        ),
        versions=_versions(),
        device=str(loaded.device),
        threads=torch.get_num_threads(),
        layout=Layout.of(loaded.architecture),
    )


def _other_surroundings(config: RunConfig, device: torch.device) -> list[str]:
    """What is not as it was when the run began, so that last bits may differ."""
    now: Mapping[str, object] = {**_versions(), "device": str(device), "threads": torch.get_num_threads()}
    then: Mapping[str, object] = {**config.versions, "device": config.device, "threads": config.threads}
    return [f"{name} {then.get(name)} → {value}" for name, value in now.items() if then.get(name) != value]


def _versions() -> dict[str, str]:
    return {
        "sphere-edit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
