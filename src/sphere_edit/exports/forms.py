"""Which form an edited model leaves in, and what can be asked of each: the one place that knows all forms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sphere_edit.errors import SphereEditError
from sphere_edit.exports.delta import write_delta
from sphere_edit.exports.gauge import Gauge
from sphere_edit.exports.gguf import base_of, write_gguf
from sphere_edit.exports.hf import loaded_by, write_hf
from sphere_edit.exports.lora import write_lora
from sphere_edit.exports.manifest import Form
from sphere_edit.exports.shipment import Shipment
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.session import Session

_TAKEN: dict[Form, frozenset[str]] = {
    "hf": frozenset({"dtype", "measure"}),
    "delta": frozenset(),
    "lora": frozenset({"rank", "within", "measure"}),
    "gguf": frozenset({"base", "measure"}),
}
_WITHIN = 1.0  # points of the whole edit, within which an adapter is by default


@dataclass(frozen=True)
class Wanted:
    """A form, and what was asked of it.

    Attributes:
        dtype: numbers of the whole model's weights; as the run has them unless given.
        rank: of a LoRA adapter; unless given, the least that is ``within`` so many points of the whole edit.
        base: the GGUF file whose tensors are replaced; that which the model came from, unless given.
        measure: whether what was written is loaded and measured, and its card says so.

    Raises:
        SphereEditError: something was asked that this form does not take.
    """

    form: Form = "hf"
    dtype: torch.dtype | None = None
    rank: int | None = None
    within: float | None = None
    base: Path | None = None
    measure: bool = False

    def __post_init__(self) -> None:
        asked = [name for name, value in vars(self).items() if name != "form" and value not in (None, False)]
        for name in asked:
            if name not in _TAKEN[self.form]:
                forms = " or ".join(f"--as {form}" for form, taken in _TAKEN.items() if name in taken)
                raise SphereEditError(f"--{name} is for {forms}, not for --as {self.form}")
        if self.rank is not None and self.within is not None:
            raise SphereEditError("--rank says which rank, and --within lets it be found; give one of them")
        if self.rank is not None and self.rank < 1:
            raise SphereEditError(f"a rank is 1 or more; {self.rank} is not")


def write(wanted: Wanted, session: Session, run: RunFolder, folder: Path) -> list[str]:
    """Write the model of a run, whose last batch must be in place, to a new folder.

    Returns:
        what a user should know of it, in sentences, the last of which says what the folder holds.

    Raises:
        SphereEditError: the folder is not empty or cannot be written, or the form cannot be had of this model.
    """
    shipment = Shipment.of(session, run)
    gauge = Gauge(session, run) if wanted.measure else None
    match wanted.form:
        case "hf":
            told = write_hf(shipment, folder, wanted.dtype, gauge)
            said = f"the model; {loaded_by(folder)} loads it"
        case "delta":
            told = write_delta(shipment, run, folder)
            said = f"the change; sphere-edit apply {folder} BASE -o DIR makes the whole model of it"
        case "lora":
            within = _WITHIN if wanted.within is None else wanted.within
            told = write_lora(shipment, session, run, folder, wanted.rank, within, wanted.measure)
            said = f"the adapter; peft.PeftModel.from_pretrained(MODEL, '{folder}') loads it"
        case "gguf":
            told = write_gguf(shipment, folder, base_of(shipment, wanted.base), gauge)
            said = "the GGUF file; llama.cpp, Ollama and LM Studio load it"
    return [*told, f"{folder} holds {said}."]
