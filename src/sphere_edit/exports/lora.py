"""A LoRA adapter that PEFT and vLLM load: matrices of rank R that together do to the facts what the changes do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere_edit.editing.sinks import Sinks
from sphere_edit.errors import SphereEditError
from sphere_edit.exports.card import Note
from sphere_edit.exports.gauge import Gauge, Measured, within
from sphere_edit.exports.manifest import Manifest
from sphere_edit.exports.shipment import Shipment, retained
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.forms import contexts, written_forms
from sphere_edit.facts.prompts import Encoder
from sphere_edit.files import read_tensors, write_json, write_tensors
from sphere_edit.models.architecture import WRITERS, Architecture
from sphere_edit.models.forward import activations, at
from sphere_edit.models.quiet import quiet
from sphere_edit.models.tokens import TokenBatch, over_batches
from sphere_edit.numerics.lowrank import Factors, Shared
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.session import Session
from sphere_edit.runs.weights import RunWeights

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its ``max_lora_rank`` may be, but for 1
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # before the names of modules, in PEFT's files
_SAME = 1e-4  # how near a distance from ΔW is to the one that was written down


@dataclass
class Adapter:
    """What the ranks of an adapter can be, and what was measured of those tried.

    Attributes:
        groups: the changes ΔW; those of one group are shared out among its matrices.
        table: what was measured, by "the whole edit" and "rank 8".
    """

    groups: Sequence[Shared]
    table: dict[str, Measured] = field(default_factory=dict)

    @property
    def largest(self) -> int:
        """The rank at which nothing is left out."""
        return max(group.largest for group in self.groups)

    def factors(self, rank: int) -> dict[str, Factors]:
        """``B [d_out, R]`` and ``A [R, d_in]`` of every matrix, float32."""
        return {name: pair for group in self.groups for name, pair in group.factors(rank).items()}

    def distances(self, factors: Mapping[str, Factors]) -> dict[str, float]:
        """How far the products are from ΔW."""
        changes = {name: change for group in self.groups for name, change in group.changes.items()}
        return {name: _distance(*pair, changes[name]) for name, pair in factors.items()}


def write_lora(
    shipment: Shipment,
    session: Session,
    run: RunFolder,
    folder: Path,
    rank: int | None = None,
    points: float = 1.0,
    measure: bool = False,
) -> list[str]:
    """Write the edit as a LoRA adapter to a new folder.

    Without a ``rank``, ranks are tried from the least, with the adapter's product added to the original weights, until one is within
    so many ``points`` of the whole edit in everything that a card shows (per cent for perplexity).

    Args:
        measure: load the adapter with PEFT once it is written, and measure the model with it.

    Returns:
        what a user should know of it, in sentences.

    Raises:
        SphereEditError: PEFT is not installed; the model has experts; the run has no facts; a rank below 1 or beyond the matrices' own.
    """
    peft = _peft()
    adapter = _adapter(shipment, session, run)
    if rank is not None and not 1 <= rank <= adapter.largest:
        raise SphereEditError(f"a rank is from 1 to {adapter.largest}, which leaves nothing out; {rank} is not")
    gauge = Gauge(session, run) if measure or rank is None else None
    if gauge is not None:
        adapter.table["the whole edit"] = gauge.measure(shipment.loaded, "the whole edit")
    chosen = _least(shipment, adapter, gauge, points) if rank is None else rank
    assert chosen is not None
    factors = adapter.factors(chosen)
    distances = adapter.distances(factors)
    manifest = shipment.manifest("lora", rank=chosen, measured=adapter.table, distances=distances)

    def note(written: Path) -> Note:
        if gauge is not None and measure:
            with _loaded_with(peft, shipment, written):
                adapter.table[f"rank {chosen}, loaded by PEFT"] = gauge.measure(shipment.loaded, "with the adapter")
        return Note("peft", _about(distances, chosen), adapter.table)

    with shipment.folder(folder, manifest, note) as temporary:
        tensors: dict[str, Tensor] = {}
        for name, (left, right) in factors.items():
            tensors |= {f"{_PREFIX}{name}.lora_A.weight": right, f"{_PREFIX}{name}.lora_B.weight": left}
        write_tensors(temporary / FILE, tensors)
        write_json(temporary / CONFIG, _config(peft, shipment, chosen))
    return _told(run, chosen)


def differing(folder: Path, manifest: Manifest, weights: RunWeights) -> Iterator[str]:
    """Which matrices of an adapter are not as far from the run's change as they were when they were made of it, one sentence each."""
    assert manifest.state is not None
    tensors, written = read_tensors(folder / FILE), manifest.details.get("distances", {})
    for name in manifest.matrices:
        right, left = (tensors[f"{_PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        found = _distance(left, right, weights.deployed(name, manifest.state.batch) - weights.original(name))
        if name not in written or abs(found - written[name]) > _SAME * max(1.0, found):
            yield f"{name} in {folder} was not made of what the run changed"


def _distance(left: Tensor, right: Tensor, change: Tensor) -> float:
    """``‖B A − ΔW‖ / ‖ΔW‖``."""
    wanted = change.double()
    return float((left.double() @ right.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise SphereEditError(
            "a LoRA adapter needs PEFT, which is not installed: pip install 'sphere-edit[export]'"
        ) from None
    return peft


def _adapter(shipment: Shipment, session: Session, run: RunFolder) -> Adapter:
    """The change of every matrix, those that add to one stream together, with the facts' keys and ordinary inputs."""
    weights, of_run = shipment.weights, RunWeights(run)
    device = session.loaded.device  # of a model that is spread over several, matrices of one stream meet on one
    changes = {name: (weights.deployed(name) - weights.original(name)).to(device) for name in weights.names}
    if any(change.dim() != 2 for change in changes.values()):
        raise SphereEditError("an adapter of experts is not written yet; export --as delta or hf")
    if not (facts := retained(run)):
        raise SphereEditError(
            "this run knows no facts now, so that an adapter of it would hold nothing; edit some first"
        )
    keys = written_keys(session, facts, run.config.templates)
    groups: dict[str, list[str]] = {}
    for name in weights.names:
        groups.setdefault(_stream(session.loaded.architecture, name), []).append(name)
    return Adapter(
        [
            Shared(
                {name: changes[name] for name in names},
                {name: keys[name] for name in names},
                {name: of_run.second_moment(name) for name in names},
            )
            for names in groups.values()
        ]
    )


def _stream(architecture: Architecture, name: str) -> str:
    """What a matrix's output is added to as it is, so that others can write it as well; its own name where it is not."""
    role, matrix = architecture.role_of(name), architecture.named(name)
    return f"{role} {matrix.factor}" if role in WRITERS and not matrix.inside else name


def written_keys(session: Session, facts: Sequence[Fact], templates: Sequence[str]) -> dict[str, Tensor]:
    """Inputs ``[N, d_in]`` (float32, CPU) of each edited matrix where facts are read, a row for every context they are written in.

    That is at the subject's last token; of a fact without a subject, at its prompt's.
    """
    loaded, encoder, names = session.loaded, Encoder(session.loaded.tokenizer), session.weights.names
    about = [fact for fact in facts if fact.subject]
    sinks = Sinks(loaded, session.weights, session.layers[-1], session.settings.tokens_per_batch)
    sinks.measure(about, encoder)
    rows = [
        encoder.at_subject(form, template)[0]
        for form in written_forms(about, encoder, sinks)
        for template in contexts(form, templates)
    ]
    rows += [encoder.asked_fact(fact).ids for fact in facts if not fact.subject]
    modules = [loaded.model.get_submodule(name) for name in names]

    def read(chunk: list[list[int]]) -> list[list[Tensor]]:
        batch = TokenBatch.of(chunk, loaded.device)
        inputs, _ = activations(loaded, batch, modules)
        last = batch.mask.sum(1) - 1
        return [list(row) for row in zip(*(at(seen, last).float().cpu() for seen in inputs), strict=True)]

    found = over_batches(rows, session.settings.tokens_per_batch, read)
    return {name: torch.stack(keys) for name, keys in zip(names, zip(*found, strict=True), strict=True)}


def _least(shipment: Shipment, adapter: Adapter, gauge: Gauge | None, points: float) -> int:
    """The least rank that is within so many points of the whole edit; all ranks tried are in the adapter's table then."""
    assert gauge is not None
    whole = adapter.table["the whole edit"]
    for rank in (*(rank for rank in VLLM_RANKS if rank < adapter.largest), adapter.largest):
        with _merged(shipment, adapter.factors(rank)):
            adapter.table[f"rank {rank}"] = found = gauge.measure(shipment.loaded, f"rank {rank}")
        if within(found, whole, points):
            return rank
    return adapter.largest


@contextmanager
def _merged(shipment: Shipment, factors: Mapping[str, Factors]) -> Iterator[None]:
    """Inside, the model runs with ``W0 + B A``."""
    weights = shipment.weights
    kept = {name: weights.deployed(name) for name in weights.names}
    try:
        for name, (left, right) in factors.items():
            original = weights.original(name)
            weights.deploy(name, torch.addmm(original, left.to(original.device), right.to(original.device)))
        yield
    finally:
        for name, weight in kept.items():
            weights.deploy(name, weight)


@contextmanager
def _loaded_with(peft: Any, shipment: Shipment, folder: Path) -> Iterator[None]:
    """Inside, the model runs with its original weights and the adapter, as PEFT loads it."""
    with shipment.weights.unedited():
        with quiet():
            model = peft.PeftModel.from_pretrained(shipment.loaded.model, str(folder)).eval()
        try:
            yield
        finally:
            model.unload()


def _config(peft: Any, shipment: Shipment, rank: int) -> dict[str, Any]:
    """``adapter_config.json``: nothing that vLLM does not take (no bias, no saved modules, no DoRA), and a scale of one.

    Modules go by their full names, so that no layer gets an adapter that has none.
    """
    architecture, names = shipment.loaded.architecture, shipment.weights.names
    transposed = {architecture.named(name).transposed for name in names}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(names),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed == {True},
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=shipment.base_name(),
    )
    return {**config.to_dict(), "peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": list(names)}


def _about(distances: Mapping[str, float], rank: int) -> str:
    far = ", ".join(f"{distance:.1%}" for distance in distances.values())
    return (
        f"This is a LoRA adapter of rank {rank}. The change itself has no low rank. The adapter does to the edited facts what the change "
        "does, as far as its rank allows, and little to ordinary inputs; matrices that add to one stream take over from each other what "
        f"they have no rank for. Their products are {far} away from the changes, by norm. Ranks are measured with the products added to "
        "the original weights, unless the column says that PEFT loaded it."
    )


def _told(run: RunFolder, rank: int) -> list[str]:
    told = []
    if rank not in VLLM_RANKS:
        fits = next((limit for limit in VLLM_RANKS if limit >= rank), None)
        how = f"serve it with --max-lora-rank {fits}" if fits else f"it takes no rank beyond {VLLM_RANKS[-1]}"
        told.append(f"Rank {rank} is not one of vLLM's ({', '.join(map(str, VLLM_RANKS))}): {how}")
    if RunWeights(run).second_moment(run.config.matrices[0]) is None:
        told.append(
            "This run measured no second moments, so that all inputs count as ordinary ones; look at perplexity"
        )
    return told
