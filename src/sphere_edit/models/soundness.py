"""Weights that are not what they seem: quantised, adapted, pickled or absent. Told from files, before any are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.models.source import (
    SINGLE,
    StoredTensor,
    cached,
    hub_folder,
    pickled,
    read_config,
    read_object,
    refuse_pointer,
    stored_tensors,
)

_FLOATS = ("F32", "F16", "BF16")
_SMALL = (
    "F8",
    "F6",
    "F4",
    "I8",
)  # how the names of what only quantisation uses begin; experts need not be called "weight"
_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_UNDONE = ("fp8", "mxfp8", "mxfp4")  # what models are published in, and transformers turns back on any machine
_SEPARATE = "hf_quant_config.json"  # where NVIDIA's ModelOpt tells what config.json may leave out
_ORIGINALS = ("_name_or_path", "base_model_name_or_path", "base_model")
_TOKENIZER = "tokenizer_config.json"
_COUNTS = re.compile(
    r"(^|_)(layers?|blocks|experts|labels|depth|stages|levels|extra_ids)$"
)  # names of what is built one by one
COUNTED, _EXTRA = 1024, 100_000  # how many of these are harmless, however few tensors there are; and of extra tokens
_PACKED = 8  # weights that a byte may hold where they are quantised
_TABLES = 1 << 30  # bytes of tables made from a configuration that are harmless beside the smallest model
# the last part of a tensor's name that says how to read other numbers: scales, zeros, packed weights, codebooks
_SCALES = re.compile(
    r"(^|[._])(scales?|scaling|scale_inv|zeros?|zero_points?|qzeros|qweight|qscales?|g_idx|absmax|amax|quant_map"
    r"|nested_quant_map|quant_state|scb|weight_packed|weight_shape|codebooks?|codes)([._]|\d|$)",
    re.IGNORECASE,
)


def check_folder(folder: Path, source: str) -> None:
    """Refuse a local folder whose weights cannot be what is edited: none, pickled, pointers, cut short, an adapter.

    Raises:
        SphereEditError: what is there, and what to do.
    """
    names = {path.name for path in folder.iterdir()}
    refuse_adapter(folder / _ADAPTER if _ADAPTER in names else None, source, alone="config.json" not in names)
    if "config.json" not in names:
        raise SphereEditError(
            f"folder '{source}' holds no config.json, so it is not a model in Hugging Face format{_pickles(names)}"
        )
    refuse_pointer(folder / "config.json")
    stray = sorted(names & set(_ADAPTER_WEIGHTS))
    if stray:
        raise SphereEditError(f"folder '{source}' holds {stray[0]}, {_MERGE}")
    if not any(name.endswith(".safetensors") for name in names):
        raise SphereEditError(
            f"folder '{source}' holds no .safetensors weights; pickled weights are never loaded{_pickles(names)}"
        )
    for name in sorted(names):
        if name.startswith(("tokenizer", "vocab", "merges", SINGLE)) and (folder / name).is_file():
            refuse_pointer(folder / name)


_MERGE = (
    "a LoRA adapter, which would be left out. Merge it into the weights first (peft: merge_and_unload, then "
    "save_pretrained), or move it away to edit the weights without it"
)


def refuse_adapter(config: Path | None, source: str, alone: bool) -> None:
    """Refuse a model whose ``adapter_config.json`` is at ``config``; ``alone`` if there are no weights beside it.

    Raises:
        SphereEditError: there is one.
    """
    if config is None:
        return
    if not alone:
        raise SphereEditError(f"model '{source}' comes with {_ADAPTER}, {_MERGE}")
    base = read_object(config).get("base_model_name_or_path")
    raise SphereEditError(
        f"'{source}' is a LoRA adapter{f' of {base!r}' if base else ''}, not a whole model; merge the two first (peft: "
        "merge_and_unload, then save_pretrained), and edit what comes out"
    )


def refuse_file(path: Path, source: str) -> None:
    """Say what a file is that was given in the place of a model.

    Raises:
        SphereEditError: always.
    """
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        raise SphereEditError(
            f"'{source}' holds weights alone; give the folder in which it lies with its config.json and its tokenizer"
        )
    if pickled([path.name]):
        raise SphereEditError(f"'{source}' is a file, not a model{_pickles([path.name])}")
    raise SphereEditError(f"'{source}' is a file, not a model: expected a hub id, a folder, a .gguf file or 'smollm2'")


def _pickles(names: Iterable[str]) -> str:
    found = pickled(names)
    if not found:
        return ""
    return (
        f". {found[0]} is a pickle, and reading one can run what others wrote into it. If you trust it: "
        "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER) writes it as safetensors, "
        "AutoTokenizer's save_pretrained the rest"
    )


def check_hub(name: str) -> Mapping[str, Any] | None:
    """The configuration of a hub model, for which nothing else is fetched; None where it cannot be had.

    Raises:
        SphereEditError: the model is an adapter.
    """
    config = cached(name, "config.json")
    refuse_adapter(cached(name, _ADAPTER), name, alone=config is None)
    return None if config is None else read_object(config)


def check_stored(folder: Path, source: str) -> None:
    """Refuse weights that are not plain float32, float16 or bfloat16, from the configuration and the files' headers.

    Raises:
        SphereEditError: the weights are quantised in a way that cannot be undone, a file cannot be read, or a configuration counts to more
            than can be. A library builds lists that long.
    """
    config, tensors = read_config(folder), stored_tensors(folder)
    if undone_by_loading(config, source, folder) is None:
        refuse_unreadable(tensors, config, source)
    else:
        _refuse_unscaled(tensors, config, source)
    _refuse_counts(config, "config.json", max(len(tensors), COUNTED), source)
    if (folder / _TOKENIZER).is_file():
        _refuse_counts(read_object(folder / _TOKENIZER), _TOKENIZER, _EXTRA, source)


def check_extent(model: Any, folder: Path, source: str, packed: bool) -> None:
    """Refuse a configuration that describes far more than the files hold, before anything of that size is made.

    Args:
        model: what it describes, without memory (device ``meta``).
        packed: whether the weights are quantised, so that a byte may hold several.

    Raises:
        SphereEditError: naming both sizes.
    """
    held = sum(tensor.end - tensor.start for tensor in stored_tensors(folder).values())
    weights, stored = sum(weight.numel() for weight in model.parameters()), model.state_dict()
    tables = sum(table.nbytes for name, table in model.named_buffers() if name not in stored)
    if weights > (_PACKED if packed else 1) * held:  # a number has two bytes at least; so a tied one may count twice
        raise SphereEditError(
            f"model '{source}' lacks weights that its config.json describes: {weights:,} numbers, and its files hold {held:,} bytes. "
            "Is config.json damaged, or a file missing?"
        )
    if tables > max(held, _TABLES):
        raise SphereEditError(
            f"the config.json of model '{source}' asks for tables of {tables:,} bytes beside weights of {held:,}; it is damaged"
        )


def _refuse_counts(config: Mapping[str, Any], file: str, limit: int, source: str) -> None:
    for name, value in _numbers(config):
        if _COUNTS.search(name) and value > limit:
            raise SphereEditError(
                f"{file} of model '{source}' says {name}: {value}, where {limit:,} is the most that can be; it is damaged"
            )


def _numbers(config: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in a configuration, each with the nearest name above it."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _numbers(value, key)
    elif isinstance(config, list):
        for value in config:
            yield from _numbers(value, name)
    elif isinstance(config, int | float):
        yield name, config


def fetched(name: str) -> Path | None:
    """The folder with a hub model's configuration and safetensors, fetched if need be; None where it has none of its own.

    What is wrong with such a model is told by whoever loads it.
    """
    try:
        folder = hub_folder(name)
    except SphereEditError:
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def undone_by_loading(config: Mapping[str, Any], source: str, folder: Path | None = None) -> Mapping[str, Any] | None:
    """How the weights are quantised, where loading undoes it exactly; None where they are plain.

    Raises:
        SphereEditError: they are quantised in another way.
    """
    found = _quantisation(config, folder)
    if found is None:
        return None
    method = found.get("quant_method")
    bits = next((f" ({bits} bits)" for bits in (4, 8) if found.get(f"load_in_{bits}bit")), "")
    if method not in _UNDONE:
        named = f"'{method}'{bits}" if method else "a method that its configuration does not name"
        raise quantised(source, config, f"by {named}, which cannot be undone here")
    return found


def _quantisation(config: Mapping[str, Any], folder: Path | None) -> Mapping[str, Any] | None:
    nested = [part for part in config.values() if isinstance(part, Mapping)]
    for part in (config, *nested):
        found = part.get("quantization_config")
        if found is not None:
            return found if isinstance(found, Mapping) else {"quant_method": found}
    if "compression_config" in config:
        return {"quant_method": "compression_config"}
    if folder is not None and (folder / _SEPARATE).is_file():
        producer = read_object(folder / _SEPARATE).get("producer")
        return {"quant_method": producer.get("name") if isinstance(producer, Mapping) else _SEPARATE}
    return None


def refuse_unreadable(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], source: str) -> None:
    """Refuse stored weights of other numbers than float32, float16 and bfloat16.

    Raises:
        SphereEditError: naming the first.
    """
    for name, tensor in tensors.items():
        plain = tensor.dtype in _FLOATS or (tensor.dtype[:2] not in _SMALL and not name.endswith("weight"))
        if not plain:
            raise quantised(source, config, f"or at least no floats: {name} is stored as {tensor.dtype}")


def _refuse_unscaled(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], source: str) -> None:
    """Refuse float8 without a scale beside it, which some versions of transformers take as it is."""
    scaled = {name.rpartition(".")[0] for name in tensors if is_scale(name)}
    for name, tensor in tensors.items():
        if tensor.dtype.startswith("F8_") and not is_scale(name) and name.rpartition(".")[0] not in scaled:
            raise quantised(source, config, f"and no scales say how to read {name}")


def refuse_scales(names: Iterable[str], source: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that did not take stored tensors which say how to read others.

    Raises:
        SphereEditError: naming the first.
    """
    every = set(names)  # a layer that is not part of the model comes with its own scales
    found = sorted(name for name in every if is_scale(name) and f"{name.rsplit('.', 1)[0]}.weight" not in every)
    if found:
        raise quantised(
            source, config, f"and the model did not take {len(found)} tensors that say how; the first: {found[0]}"
        )


def is_scale(name: str) -> bool:
    """Whether a tensor's name is that of a scale, a zero point or other parts of a quantised weight."""
    return _SCALES.search(".".join(name.split(".")[-2:])) is not None


def quantised(source: str, config: Mapping[str, Any], how: str) -> SphereEditError:
    """The error for weights that are quantised, naming the original where the configuration does."""
    original = next((value for key in _ORIGINALS if isinstance(value := config.get(key), str) and value), None)
    hint = f"its config.json names '{original}' as where it comes from" if original not in (None, source) else ""
    return SphereEditError(
        f"model '{source}' is quantised, {how}. Editing needs float weights (float32, bfloat16, float16); use the "
        f"unquantised original{f' ({hint})' if hint else ''}"
    )
