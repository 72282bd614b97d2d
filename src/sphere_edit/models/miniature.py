"""The layout of a model before its weights are here: looked for in a copy that has all its layers, narrow ones, with random weights.

A family without a row is laid out as a run of the model shows (`finding`), and a run takes weights. Which module does what does not hang
on how wide the model is. So every width in its configuration is divided by one number, and the copy is looked at in its place. What is
found so is good for counting; a model that is edited is looked at itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sphere_edit.models.architecture import Architecture
from sphere_edit.models.finding import NotFound, found_layout
from sphere_edit.models.quiet import quiet

_DIVISORS = (32, 16, 8, 4, 2, 1)
_NARROWEST, _VOCABULARY = 32, 512  # of the copy: the residual stream, and the tokens that it knows at most
_LARGEST = 100_000_000  # numbers in a copy
_IDS = range(8, 20)
# fields of configurations that are widths, and so are divided; numbers of layers, heads, groups and experts are not
_STREAM = ("hidden_size", "n_embd", "d_model")
_WIDTH = re.compile(
    r"(hidden_size|intermediate_size|(?<!kernel)(?<!conv)_dim|_rank|d_model|n_embd|n_inner|d_ff|d_head|headdim|width|mrope_section)$|^dim$"
)
_TOKEN = re.compile(r"token_(id|index)$")


def miniature_layout(model: Any, loader: str, trust: bool) -> Architecture | None:
    """The layout of ``model``, which has no weights (`pretrained.skeleton`); None where no narrow copy of it can be made and run.

    Args:
        loader: the auto class of transformers that builds it.
        trust: whether code that comes with the model may be run.
    """
    for divisor in _DIVISORS:
        narrow = _narrow(model, loader, trust, divisor)
        if narrow is None or _axes(narrow) != _axes(model):
            continue
        try:
            return found_layout(narrow, _IDS)
        except NotFound:
            continue
    return None


def _narrow(model: Any, loader: str, trust: bool, divisor: int) -> Any:
    """The copy on the CPU in float32, with random weights; None where its widths cannot be divided by that."""
    import transformers

    build = getattr(transformers, loader).from_config
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            values = model.config.to_dict()
            values.pop("quantization_config", None)
            config = type(model.config).from_dict(_divided(values, divisor))
            with torch.device("meta"):
                bones = build(copy.deepcopy(config), trust_remote_code=trust)
            if sum(parameter.numel() for parameter in bones.parameters()) > _LARGEST:
                return None
            return _enlivened(build(config, trust_remote_code=trust, dtype=torch.float32))
    except Exception:  # whatever the library and its checks of a configuration raise
        return None


def _divided(values: Mapping[Any, Any], divisor: int) -> dict[Any, Any]:
    """A configuration with every width divided, and few tokens.

    Raises:
        ValueError: a width cannot be divided, or the copy would be too narrow to be told apart from noise.
    """
    return {key: _smaller(str(key), value, divisor) for key, value in values.items()}


def _smaller(name: str, value: Any, divisor: int) -> Any:
    if isinstance(value, Mapping):
        return _divided(value, divisor)
    if isinstance(value, list):
        return [_smaller(name, item, divisor) for item in value]
    if type(value) is not int:
        return value
    if _WIDTH.search(name) and value > 1:
        if value % divisor or (name in _STREAM and divisor > 1 and value // divisor < _NARROWEST):
            raise ValueError(f"{name} of {value} cannot be divided by {divisor}")
        return value // divisor
    if name == "vocab_size":
        return min(value, _VOCABULARY)
    return value % _VOCABULARY if _TOKEN.search(name) and value >= 0 else value


def _enlivened(model: Any) -> Any:
    """With random numbers so large that every matrix shows in what its layer says."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 or not bool(torch.isfinite(parameter).all()):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval().requires_grad_(False)


def _axes(model: nn.Module) -> dict[str, int]:
    """Of each parameter, by name, the number of its axes."""
    return {name: parameter.dim() for name, parameter in model.named_parameters()}
