"""What makes a result what it is: hashes of weights, configuration and tokenizer, and what computes."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sphere_edit.models.offload import Stored
from sphere_edit.models.products import precision

# case, spaces, digits, accents and other scripts: what tokenizers differ in
_SHOWING = " Ada's 1,234 cafés\n\tin  TOKYO (東京) — don’t! ﬁ 🙂"


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights."""
    digest, stored = hashlib.sha256(), Stored(model)
    _hash_into(digest, stored, stored)
    return digest.hexdigest()


def fingerprints(model: Any, path: str, layers: Sequence[int]) -> dict[int, str]:
    """For each of ``layers``, a SHA-256 over the weights outside the layers (which are at ``path``) and those of the layers up to it."""
    prefix = f"{path}."
    stored = Stored(model)
    outside: list[str] = []
    inside: dict[int, list[str]] = {}
    for name in stored:
        if name.startswith(prefix):
            inside.setdefault(int(name[len(prefix) :].split(".")[0]), []).append(name)
        else:
            outside.append(name)
    digest = hashlib.sha256(repr(sorted(config_values(model).items())).encode())
    _hash_into(digest, stored, outside)
    found = {}
    for layer in range(max(layers) + 1):
        _hash_into(digest, stored, inside[layer])
        if layer in layers:
            found[layer] = digest.hexdigest()
    return found


def config_values(model: Any) -> dict[str, str]:
    """What of the configuration changes what the weights compute: all of it but for names and versions."""
    return {name: repr(value) for name, value in _values(model.config.to_dict()).items()}


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration and of its parts."""
    ignored = ("_name_or_path", "transformers_version", "dtype")
    return {
        name: _values(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in ignored
    }


def tokenizer_identity(tokenizer: Any) -> str:
    """SHA-256 over what a tokenizer does to texts and chats, be it fast or slow.

    A fast tokenizer is one pipeline that can be written down whole. A slow one is code: its class, its vocabulary with the
    files it is kept in (merges, a SentencePiece model), its special tokens, and the ids of a text that shows its settings.
    """
    if tokenizer.is_fast:
        parts = [tokenizer.backend_tokenizer.to_str()]
    else:
        kind = type(tokenizer)
        parts = [f"{kind.__module__}.{kind.__qualname__}", repr(sorted(tokenizer.get_vocab().items()))]
        parts += [repr(sorted((index, repr(token)) for index, token in tokenizer.added_tokens_decoder.items()))]
        parts += [
            repr(tokenizer.all_special_ids),
            repr(tokenizer(_SHOWING)["input_ids"]),
            *_vocabulary_files(tokenizer),
        ]
    return hashlib.sha256(json.dumps([*parts, tokenizer.chat_template]).encode()).hexdigest()


def _vocabulary_files(tokenizer: Any) -> list[str]:
    """Hashes of the files in which a slow tokenizer keeps its vocabulary; of none, if it has none (ByT5)."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_vocabulary(folder)
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(folder).iterdir())]


def cache_key(device: torch.device, *parts: Any) -> str:
    """SHA-256 that names a cached result: ``parts`` (JSON values) say what was computed, and of what; the rest is what computed it.

    Weights, text and settings alone do not decide a result's bits. Libraries and the kind of device choose the kernels, and on a
    CPU the instruction set and the number of threads choose the order in which sums are taken. So all of these are in the key:
    the same command gives the same numbers, whoever filled the cache. The dtype is that of the weights, and is in their hash.
    """
    computing = [device_name(device), *map(version, ("torch", "transformers")), precision(device)]
    if device.type == "cpu":
        computing += [torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())]
    return hashlib.sha256(json.dumps([computing, *parts]).encode()).hexdigest()


def device_name(device: torch.device) -> str:
    """What computes: results of two devices of one name can be compared bit for bit, those of device 0 here and there cannot."""
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(device) if named is None else str(named(device))


def _hash_into(digest: hashlib._Hash, tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> None:
    for name in names:
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor, in row-major order."""
    flat = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
