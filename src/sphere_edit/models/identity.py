"""What makes a result what it is: hashes of weights, configuration and tokenizer, and what computes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sphere_edit.models.architecture import architecture_of


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    _hash_into(digest, model.state_dict())
    return digest.hexdigest()


def fingerprints(model: Any, layers: Sequence[int]) -> dict[int, str]:
    """For each of ``layers``, a SHA-256 over the weights outside the layers and those of the layers up to it."""
    prefix = architecture_of(model).layers + "."
    outside: dict[str, torch.Tensor] = {}
    inside: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(prefix):
            inside.setdefault(int(name[len(prefix) :].split(".")[0]), {})[name] = tensor
        else:
            outside[name] = tensor
    digest = hashlib.sha256(repr(sorted(config_values(model).items())).encode())
    _hash_into(digest, outside)
    found = {}
    for layer in range(max(layers) + 1):
        _hash_into(digest, inside[layer])
        if layer in layers:
            found[layer] = digest.hexdigest()
    return found


def config_values(model: Any) -> dict[str, str]:
    """What of the configuration changes what the weights compute: all of it but for names and versions."""
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation_autoset")
    return {name: repr(value) for name, value in model.config.to_dict().items() if name not in ignored}


def device_name(device: torch.device) -> str:
    """What computes: results of two devices of one name can be compared bit for bit, those of ``cuda:0`` here and there cannot."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _hash_into(digest: hashlib._Hash, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor, in row-major order."""
    flat = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
