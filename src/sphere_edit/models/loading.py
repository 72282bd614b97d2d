"""Loading a model: a hub id, a local folder, a .gguf file, or ``smollm2``; device, dtype and identity."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sphere_edit import ranks
from sphere_edit.errors import SphereEditError
from sphere_edit.models.architecture import row_of
from sphere_edit.models.attention import use_plain_attention, use_quicker_attention
from sphere_edit.models.configuration import CAUSAL, loader_of
from sphere_edit.models.gguf import converted, embedded_model_file
from sphere_edit.models.identity import fingerprint
from sphere_edit.models.loaded import LoadedModel
from sphere_edit.models.miniature import miniature_layout
from sphere_edit.models.offload import Stored, hold_vectors, shared_maps
from sphere_edit.models.placement import Place, Placement, main_of, spoken
from sphere_edit.models.pretrained import first_lines, from_pretrained, skeleton, usable
from sphere_edit.models.probe import architecture_of, check_head, with_replay
from sphere_edit.models.products import keep_few_kernels
from sphere_edit.models.soundness import (
    check_extent,
    check_folder,
    check_hub,
    check_stored,
    fetched,
    quantised,
    refuse_file,
    undone_by_loading,
)
from sphere_edit.models.source import hub_companions, hub_folder, read_config, refuse_pointer
from sphere_edit.progress import Quiet, Reporter

EMBEDDED = "smollm2"


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cpu":
        answers = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return any(answer is not None and answer() for answer in answers)
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def cast_copy(loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    """A copy whose parameters are of ``dtype``; buffers, such as rotary tables, stay as they are.

    On a CPU it computes attention in plain products: the backward pass of the fused kernel takes ten times as long in
    bfloat16.
    """
    parameters = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        for parameter in loaded.model.parameters()
    }
    model = copy.deepcopy(loaded.model, {**parameters, **shared_maps(loaded.model)})
    if loaded.device.type == "cpu":
        use_plain_attention(model)
    return replace(loaded, model=model)


def resolve_device(name: str = "auto") -> torch.device:
    """``auto`` takes the accelerator PyTorch finds, else the CPU; anything else is a PyTorch device name."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS does not repeat itself bit for bit
    if name == "auto":
        if torch.accelerator.is_available():
            accelerator = torch.accelerator.current_accelerator()
            if accelerator is not None and accelerator.type != "mps":  # MPS has no float64, which the solves need
                return accelerator
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SphereEditError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from None
    return device


def held_now(device: torch.device | None) -> int:
    """Bytes held at present, as `peak_memory` counts them; None stands for the CPU."""
    if device is not None and device.type != "cpu":
        return _told(device, "memory_allocated") or 0
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory(torch.device("cpu")) or 0  # not Linux


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: by tensors on an accelerator, by the whole process on a CPU; None where none can tell."""
    if device.type != "cpu":
        return _told(device, "max_memory_allocated")
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _told(device: torch.device, measure: str) -> int | None:
    """Bytes, as the module of a kind of accelerator counts them; None where it does not. `torch.accelerator` counts them from 2.9 on."""
    count = getattr(torch.get_device_module(device), measure, None)
    return None if count is None else int(count(device))


def resolve_dtype(name: str) -> torch.dtype | str:
    """``auto`` keeps the dtype of the checkpoint; or float32, bfloat16, float16."""
    names = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise SphereEditError(f"dtype '{name}' is not one of {', '.join(names)}")
    return names[name]  # type: ignore[return-value]


def load_model(
    source: str | os.PathLike[str],
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
    placement: Placement | None = None,
) -> LoadedModel:
    """Load ``source`` whole with transformers and hash its weights; what cannot be edited is refused before weights are fetched.

    Args:
        source: a hub id, a local folder, a ``.gguf`` file, or ``smollm2`` for the embedded SmolLM2-135M-Instruct.
        device: see `resolve_device`.
        dtype: see `resolve_dtype`; a GGUF file is dequantised, to float32 for ``auto``; fp8 and mxfp4 to bfloat16.
        trust_remote_code: run code that comes with the model; off unless the user asks.
        reporter: told what is loaded, what a quantised model takes in memory before it is, and where a model is that is spread.
        placement: spread it so over devices, CPU memory and disk; in place of ``device``.

    Raises:
        SphereEditError: the source does not exist, cannot be loaded, or is of an unsupported family.
    """
    keep_few_kernels()
    target = _target(device, placement)
    known = _looked_up(source, dtype, trust_remote_code)
    source, before = known.source, held_now(target)
    if known.folder is not None and known.gguf is None:
        check_stored(known.folder, source)
    bones = known.built()
    if bones is not None and known.folder is not None:
        check_extent(bones, known.folder, source, packed=known.quantised is not None)
    if known.quantised is not None and bones is not None:
        _say_memory(reporter or Quiet(), source, known.quantised, bones, known.dtype)
    (reporter or Quiet()).say(f"Loading {source}")
    places = None if placement is None else _places(placement, known)
    tokenizer, model = from_pretrained(
        source, known.where, known.dtype, trust_remote_code, known.loader, known.quantised, places=places
    )
    if getattr(model, "hf_quantizer", None) is not None:
        raise quantised(source, model.config.to_dict(), "and transformers computes with it as it is")
    model.config._name_or_path = source
    if places is not None:
        hold_vectors(model)
        (reporter or Quiet()).say(f"'{source}' is spread: {spoken(places)}")
    else:
        _move(model, target, source)
        if target is not None and target.type == "cpu":
            use_quicker_attention(model)
    return replace(prepare(model, tokenizer, source), placement=placement, before=before)


def sketch(
    source: str | os.PathLike[str],
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    placement: Placement | None = None,
) -> LoadedModel | None:
    """A model without its weights, of which the shapes are known; None where its layout is not, which is found by running it.

    A family without a row is run in a narrow copy (`miniature`), which does not succeed with every one.

    What can be told of a model that cannot be edited is told here, as by `load_model`.
    """
    target = _target(device, placement)
    known = _looked_up(source, dtype, trust_remote_code, fetch=False)
    bones = known.sized()
    row, architecture = row_of(bones.config.model_type), None
    with suppress(AttributeError):  # laid out otherwise than its family
        architecture = None if row is None else row.architecture(bones)
    architecture = architecture or miniature_layout(bones, known.loader, known.trust)
    if architecture is None:
        return None
    places = None if placement is None else placement.checked().resolved(bones, known.source)
    bones.hf_device_map = places or {"": str(target)}
    return LoadedModel(
        bones, None, architecture, known.source, "", placement, held_now(target), target or main_of(places)
    )


@dataclass(frozen=True)
class _Known:
    """What is known of a model before its weights are read: how it is called, where it is, and how it is loaded."""

    source: str
    where: str
    gguf: str | None
    folder: Path | None
    loader: str
    dtype: torch.dtype | str
    quantised: Mapping[str, Any] | None
    trust: bool

    def built(self) -> Any:
        """The model without weights; None where it cannot be built, which is told when it is loaded."""
        try:
            return skeleton(self.where, self.loader, self.trust)
        except SphereEditError:
            return None

    def sized(self) -> Any:
        """The model without weights, of the numbers that it will have."""
        bones = skeleton(self.where, self.loader, self.trust, None if isinstance(self.dtype, str) else self.dtype)
        bones.tie_weights()
        return bones


def _looked_up(source: str | os.PathLike[str], dtype: str, trust: bool, fetch: bool = True) -> _Known:
    """Look at a model's configuration, and with ``fetch`` have its files here."""
    source = full_name(source)
    where, gguf = _locate(source)
    chosen = resolve_dtype(dtype)
    local = gguf is not None or Path(where).is_dir()
    if gguf is not None:
        where = converted(where, gguf)
        chosen = torch.float32 if chosen == "auto" else chosen
    config = read_config(Path(where)) if local else check_hub(where)
    # without a configuration, the loader says what is the matter
    loader = CAUSAL if config is None else loader_of(config, source, trust)
    found = None if config is None else undone_by_loading(config, source, Path(where) if local else None)
    if found is not None:
        chosen = torch.bfloat16 if chosen == "auto" else chosen
    folder = Path(where) if local else fetched(where) if fetch else None
    return _Known(source, where, gguf, folder, loader, chosen, found, trust)


def load_beside(source: str | os.PathLike[str], other: LoadedModel) -> LoadedModel:
    """Load ``source``, of the layout of another loaded model, where that one is."""
    where = str(other.device) if other.placement is None else "auto"
    return load_model(source, where, placement=other.placement)


def _move(model: nn.Module, device: torch.device | None, source: str) -> None:
    try:
        model.to(device)
    except RuntimeError as error:
        raise SphereEditError(f"model '{source}' does not fit {device}: {first_lines(error)}") from None


def _target(device: str, placement: Placement | None) -> torch.device | None:
    """The device of a model that is not spread; None of one that is, if the places that were named are there."""
    if placement is None:
        return resolve_device(device)
    placement.there()
    return None


def _places(placement: Placement, known: _Known) -> dict[str, Place]:
    """Where the model's modules go, told by their shapes."""
    if ranks.count() > 1:
        raise SphereEditError(
            "a device map spreads the model of one process; start it without torchrun, or leave the map out"
        )
    resolve_device()  # sets up what has to be before the first product
    return placement.checked().resolved(known.sized(), known.source)


def _say_memory(
    reporter: Reporter, source: str, found: Mapping[str, Any], model: nn.Module, dtype: torch.dtype | str
) -> None:
    assert isinstance(dtype, torch.dtype)
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    reporter.say(
        f"'{source}' is stored as {found['quant_method']}; it is turned into {name}, takes {size / 1e9:,.1f} GB of memory so, "
        f"and an export of it is {name} too"
    )


def checkpoint_folder(source: str) -> str:
    """The folder with ``source``'s configuration and safetensors: its own, the hub's, or one converted from GGUF.

    Raises:
        SphereEditError: there is none; or the hub's configuration says that the model cannot be edited, before weights are fetched.
    """
    where, gguf = _locate(full_name(source))
    if gguf is not None:
        return converted(where, gguf)
    if Path(where).is_dir():
        return where
    config = check_hub(where)
    if config is not None:
        loader_of(config, source)
        undone_by_loading(config, source)
    return str(hub_folder(where))


def whole_folder(source: str, code: bool = False) -> Path:
    """`checkpoint_folder` of a loaded model, with everything beside the weights that an export takes along.

    Raises:
        SphereEditError: there is none.
    """
    where, gguf = _locate(full_name(source))
    if gguf is None and not Path(where).is_dir():
        return hub_companions(where, code)
    return Path(checkpoint_folder(source))


def full_name(source: str | os.PathLike[str]) -> str:
    """A source as it can be found again from anywhere: local paths absolute, names as they are.

    Raises:
        SphereEditError: no file can have such a name.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    try:
        return str(path.resolve()) if name != EMBEDDED and path.exists() else name
    except OSError as error:
        said = f"{name[:60]}…" if len(name) > 60 else name
        raise SphereEditError(
            f"expected a model's hub id, folder or .gguf file, not '{said}' ({error.strerror})"
        ) from None


def prepare(model: Any, tokenizer: Any, source: str) -> LoadedModel:
    """Wrap a model that is already in memory: evaluation mode, no weight gradients, identity hashed.

    Raises:
        SphereEditError: its layout is not understood, tokenizer and model do not belong together, its weights are broken, or its
            logits are not what its layout makes of its last layer.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    with usable(source):
        ids = tokenizer("The capital of France is Paris, and the river there is the Seine.")["input_ids"]
    if max(ids, default=0) >= rows:
        raise SphereEditError(
            f"the tokenizer of '{source}' gives token ids that its model, with {rows} tokens, does not have"
        )
    model.eval().requires_grad_(False)
    stored = Stored(model)
    for name, _ in model.named_parameters():
        weight = stored[name]
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(weight)):  # NaN carries over to both ends
            raise SphereEditError(
                f"the weights of '{source}' are broken: {name} holds numbers that are infinite or undefined; get the model again"
            )
    with usable(source):
        architecture = architecture_of(model, ids, source)
        check_head(model, architecture, ids, source)
        loaded = LoadedModel(model, tokenizer, architecture, source, fingerprint(model))
        return loaded if architecture.found == "row" else with_replay(loaded, ids)


def _locate(source: str) -> tuple[str, str | None]:
    """What to hand to ``from_pretrained``: a folder or hub id, and the GGUF file's name where there is one."""
    path = embedded_model_file() if source == EMBEDDED else Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SphereEditError(f"there is no file '{source}'")
        refuse_pointer(path)
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise SphereEditError(f"'{source}' does not start as a GGUF file does; is it damaged?")
        return str(path.parent), path.name
    if path.is_dir():
        check_folder(path, source)
        return str(path), None
    if path.exists():
        refuse_file(path, source)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith("/"):
        raise SphereEditError(f"there is no folder '{source}'")
    return source, None
