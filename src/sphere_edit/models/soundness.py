"""Weights that are not what they seem: quantised, adapted, pickled or absent. Told from files, before any are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sphere_edit.errors import SphereEditError
from sphere_edit.models.quiet import quiet
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
_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_SEPARATE = "hf_quant_config.json"  # where NVIDIA's ModelOpt tells what config.json may leave out
_ORIGINALS = ("_name_or_path", "base_model_name_or_path", "base_model")
_TOKENIZER = "tokenizer_config.json"
_COUNTS = re.compile(
    r"(^|_)(layers?|blocks|experts|labels|depth|stages|levels|extra_ids)$"
)  # names of what is built one by one
_COUNTED, _EXTRA = 1024, 100_000  # how many of these are harmless, however few tensors there are; and of extra tokens
_PLAIN, _PACKED = 1.0, 8.0  # weights a byte: two of a half's size, a tied one counted twice; a bit each where quantised
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


def check_hub(name: str) -> None:
    """The same of a hub model, and `check_stored` of its safetensors: what loading would fetch is fetched for it.

    Raises:
        SphereEditError: it is an adapter, or as `check_stored` says.
    """
    config = cached(name, "config.json")
    refuse_adapter(cached(name, _ADAPTER), name, alone=config is None)
    if config is None:
        return
    check_config(read_object(config), name)  # before gigabytes are fetched
    with suppress(
        SphereEditError
    ):  # a model without safetensors of its own is told, or found elsewhere, by whoever loads it
        config = hub_folder(name) / "config.json"
    if any(config.parent.glob("*.safetensors")):
        check_stored(config.parent, name)


def check_stored(folder: Path, source: str) -> None:
    """Refuse weights that are not plain float32, float16 or bfloat16, from the configuration and the files' headers.

    A method of quantisation that the installed transformers knows is left to it: on some devices it gives the plain
    weights back, and where it does not, the loaded model says so.

    Raises:
        SphereEditError: the weights are quantised, a file cannot be read, or the configuration describes far more than is there.
    """
    config, tensors = read_config(folder), stored_tensors(folder)
    packed = check_config(config, source, folder)
    if not packed:
        refuse_unreadable(tensors, config, source)
    check_extent(folder, config, tensors, source, _PACKED if packed else _PLAIN)


def check_extent(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], source: str, most: float
) -> None:
    """Refuse a configuration that describes far more than the files hold, before anything of that size is made.

    Counts in it are compared with the number of stored tensors, since a library builds lists as long as these. Then the model is
    built without memory (device ``meta``), and its weights and tables are added up.

    Args:
        most: how many weights a stored byte can give.

    Raises:
        SphereEditError: naming the count, or both sizes.
    """
    for path, limit in ((folder / "config.json", max(len(tensors), _COUNTED)), (folder / _TOKENIZER, _EXTRA)):
        if path.is_file():
            _refuse_counts(config if path.name == "config.json" else read_object(path), path.name, limit, source)
    held = sum(tensor.end - tensor.start for tensor in tensors.values())
    weights, tables = _described(folder, config)
    if weights > most * held:
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


def _described(folder: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """How many weights a configuration describes, and how many bytes of tables that no file holds; 0 where it cannot be told.

    What is wrong with a configuration that builds no model is told by whoever loads it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if str(config.get("model_type")) not in CONFIG_MAPPING:
        return 0, 0
    try:
        with quiet(), torch.device("meta"):
            causal: Any = AutoModelForCausalLM
            model = causal.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception:
        return 0, 0
    stored = model.state_dict()
    tables = [table for name, table in model.named_buffers() if name not in stored]
    return sum(weight.numel() for weight in model.parameters()), sum(table.nbytes for table in tables)


def check_config(config: Mapping[str, Any], source: str, folder: Path | None = None) -> bool:
    """Whether the configuration names a quantisation that the installed transformers knows.

    Raises:
        SphereEditError: it names one that transformers does not know, and would load as if the weights were plain.
    """
    found = _quantisation(config, folder)
    if found is None:
        return False
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    bits = next((f"_{bits}bit" for bits in (4, 8) if found.get(f"load_in_{bits}bit")), None)
    method = found.get("quant_method")
    if (f"bitsandbytes{bits}" if bits else method) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise quantised(source, config, f"by a method that this transformers does not know: '{method}'")
    return True


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
        if name.endswith("weight") and tensor.dtype not in _FLOATS:
            raise quantised(source, config, f"or at least no floats: {name} is stored as {tensor.dtype}")


def refuse_scales(names: Iterable[str], source: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that did not take stored tensors which say how to read others.

    Raises:
        SphereEditError: naming the first.
    """
    found = sorted(name for name in names if is_scale(name))
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
