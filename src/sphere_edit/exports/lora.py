"""A LoRA adapter that PEFT and vLLM load: of each change, the part of rank R that counts most for the inputs it will see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere_edit.errors import SphereEditError
from sphere_edit.exports.card import Note
from sphere_edit.exports.gauge import Gauge, Measured, within
from sphere_edit.exports.manifest import Manifest
from sphere_edit.exports.shipment import Shipment, retained
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.forms import contexts, written_forms
from sphere_edit.facts.prompts import Encoder
from sphere_edit.files import read_tensors, write_json, write_tensors
from sphere_edit.models.forward import activations, at
from sphere_edit.models.quiet import quiet
from sphere_edit.models.tokens import TokenBatch, over_batches
from sphere_edit.numerics.lowrank import output_directions, truncated
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.session import Session
from sphere_edit.runs.weights import RunWeights

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its ``max_lora_rank`` may be, but for 1
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # before the names of modules, in PEFT's files
_ROUNDING = 1e-4  # of an adapter's factors in float32, relative


@dataclass
class Adapter:
    """What the ranks of an adapter can be, and what was measured of those tried.

    Attributes:
        changes: ΔW ``[d_out, d_in]`` by matrix, float32.
        directions: of each, by `output_directions`.
        table: what was measured, by "the whole edit" and "rank 8".
    """

    changes: dict[str, Tensor]
    directions: dict[str, Tensor]
    table: dict[str, Measured] = field(default_factory=dict)

    @property
    def largest(self) -> int:
        """The rank at which nothing is left out."""
        return max(len(directions) for directions in self.directions.values())

    def factors(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """``B [d_out, R]`` and ``A [R, d_in]`` of a matrix, float32."""
        return truncated(self.changes[name], self.directions[name], rank)


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
        SphereEditError: PEFT is not installed; the model has experts; a rank below 1 or beyond the matrices' own.
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
    manifest = shipment.manifest("lora", rank=chosen, measured=adapter.table)

    def note(written: Path) -> Note:
        if gauge is not None and measure:
            with _loaded_with(peft, shipment, written):
                adapter.table[f"rank {chosen}, loaded by PEFT"] = gauge.measure(shipment.loaded, "with the adapter")
        return Note("peft", _about(adapter, chosen), adapter.table)

    with shipment.folder(folder, manifest, note) as temporary:
        tensors: dict[str, Tensor] = {}
        for name in shipment.weights.names:
            left, right = adapter.factors(name, chosen)
            tensors |= {f"{_PREFIX}{name}.lora_A.weight": right, f"{_PREFIX}{name}.lora_B.weight": left}
        write_tensors(temporary / FILE, tensors)
        write_json(temporary / CONFIG, _config(peft, shipment, chosen))
    return _told(run, chosen)


def differing(folder: Path, manifest: Manifest, weights: RunWeights) -> Iterator[str]:
    """Which matrices of an adapter are no projection of the run's change, one sentence each."""
    assert manifest.state is not None
    tensors = read_tensors(folder / FILE)
    for name in manifest.matrices:
        right, left = (tensors[f"{_PREFIX}{name}.lora_{part}.weight"].double() for part in "AB")
        change = (weights.deployed(name, manifest.state.batch) - weights.original(name)).double()
        if float((left.T @ change - right).norm()) > _ROUNDING * max(float(right.norm()), 1e-30):
            yield f"{name} in {folder} is no part of what the run changed"


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise SphereEditError(
            "a LoRA adapter needs PEFT, which is not installed: pip install 'sphere-edit[export]'"
        ) from None
    return peft


def _adapter(shipment: Shipment, session: Session, run: RunFolder) -> Adapter:
    """The change of every matrix, and its directions over ordinary inputs and the facts' keys together."""
    weights, of_run = shipment.weights, RunWeights(run)
    changes = {name: weights.deployed(name) - weights.original(name) for name in weights.names}
    if any(change.dim() != 2 for change in changes.values()):
        raise SphereEditError("an adapter of experts is not written yet; export --as delta or hf")
    keys = key_moments(session, retained(run), run.config.templates)
    directions = {}
    for name, change in changes.items():
        ordinary = of_run.second_moment(name)
        moment = keys[name] if ordinary is None else keys[name] + ordinary.double().to(keys[name].device)
        _, directions[name] = output_directions(change, moment)
    return Adapter(changes, directions)


def key_moments(session: Session, facts: Sequence[Fact], templates: Sequence[str]) -> dict[str, Tensor]:
    """``E[k kᵀ] [d_in, d_in]`` (float64) of each edited matrix's inputs where facts are read, in every context they are written in.

    That is at the subject's last token; of a fact without a subject, at its prompt's.
    """
    loaded, encoder, names = session.loaded, Encoder(session.loaded.tokenizer), session.weights.names
    about = [fact for fact in facts if fact.subject]
    rows = [
        encoder.at_subject(form, template)[0]
        for form in written_forms(about, encoder)
        for template in contexts(form, templates)
    ]
    rows += [encoder.asked_fact(fact).ids for fact in facts if not fact.subject]
    modules = [loaded.model.get_submodule(name) for name in names]
    sizes = {name: session.weights.working[name].shape[1] for name in names}
    moments = {name: torch.zeros(d, d, dtype=torch.float64, device=loaded.device) for name, d in sizes.items()}

    def read(chunk: list[list[int]]) -> list[None]:
        batch = TokenBatch.of(chunk, loaded.device)
        inputs, _ = activations(loaded, batch, modules)
        for name, seen in zip(names, inputs, strict=True):
            keys = at(seen, batch.mask.sum(1) - 1).double()
            moments[name] += keys.T @ keys / len(rows)
        return [None] * len(chunk)

    over_batches(rows, session.settings.tokens_per_batch, read)
    return moments


def _least(shipment: Shipment, adapter: Adapter, gauge: Gauge | None, points: float) -> int:
    """The least rank that is within so many points of the whole edit; all ranks tried are in the adapter's table then."""
    assert gauge is not None
    whole = adapter.table["the whole edit"]
    for rank in (*(rank for rank in VLLM_RANKS if rank < adapter.largest), adapter.largest):
        with _merged(shipment, lambda name, rank=rank: adapter.factors(name, rank)):  # type: ignore[misc]
            adapter.table[f"rank {rank}"] = found = gauge.measure(shipment.loaded, f"rank {rank}")
        if within(found, whole, points):
            return rank
    return adapter.largest


@contextmanager
def _merged(shipment: Shipment, factors: Callable[[str], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, the model runs with ``W0 + B A``."""
    weights = shipment.weights
    kept = {name: weights.deployed(name) for name in weights.names}
    try:
        for name in weights.names:
            left, right = factors(name)
            weights.deploy(name, torch.addmm(weights.original(name), left, right))
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


def _about(adapter: Adapter, rank: int) -> str:
    kept = {
        name: float(
            (directions[:, :rank].T @ adapter.changes[name].double()).norm()
            / adapter.changes[name].double().norm().clamp_min(1e-30)
        )
        for name, directions in adapter.directions.items()
    }
    shares = ", ".join(f"{share:.1%}" for share in kept.values())
    return (
        f"This is a LoRA adapter of rank {rank}. The change itself has no low rank; what is kept is the part of it that counts most for "
        f"ordinary inputs and for the edited facts' keys. By norm that is {shares} of each matrix's change. Ranks are measured with the "
        "adapter's product added to the original weights, unless the column says that PEFT loaded it."
    )


def _told(run: RunFolder, rank: int) -> list[str]:
    told = []
    if rank not in VLLM_RANKS:
        fits = next((limit for limit in VLLM_RANKS if limit >= rank), None)
        how = f"serve it with --max-lora-rank {fits}" if fits else f"it takes no rank beyond {VLLM_RANKS[-1]}"
        told.append(f"Rank {rank} is not one of vLLM's ({', '.join(map(str, VLLM_RANKS))}): {how}")
    if RunWeights(run).second_moment(run.config.matrices[0]) is None:
        told.append(
            "This run measured no second moments, so that the facts' keys alone say what counts; look at perplexity"
        )
    return told
