"""Where a model's parameters lie in its files, by the rules by which transformers loads them.

Files may hold a parameter under another name, one expert to a tensor, fused with others, transposed, or in fp8 with its scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from sphere_edit.errors import SphereEditError
from sphere_edit.files import plain_errors
from sphere_edit.models.source import StoredTensor


@dataclass(frozen=True)
class Piece:
    """A stored tensor that holds the numbers of a parameter.

    Attributes:
        index: of the part that it holds, along the first dimension; None where it holds all of it.
        transposed: the last two dimensions stand in the files the other way round.
    """

    tensor: StoredTensor
    index: int | None = None
    transposed: bool = False

    def of(self, parameter: Tensor) -> Tensor:
        """What the stored tensor has to be for the model to have ``parameter``."""
        part = parameter if self.index is None else parameter[self.index]
        return part.mT if self.transposed else part


@dataclass
class _Holding:
    """What of the files makes some parameters, by the patterns of a converter; one tensor and no converter where nothing is changed."""

    converter: Any = None
    tensors: list[tuple[str, StoredTensor]] = field(default_factory=list)


def joins_experts(model: Any) -> bool:
    """Whether files hold the experts of such a model one by one, and loading copies them into one parameter."""
    rules = (rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter))
    return any(isinstance(step, MergeModulelist) for rule in rules for step in rule.operations)


class StoredParameters:
    """The parameters of a model, with or without weights in memory, in a source's tensors (`stored_tensors`)."""

    def __init__(self, model: Any, tensors: Mapping[str, StoredTensor], quantiser: Any = None):
        """Match names.

        Args:
            quantiser: transformers' loader of the model's quantisation, where there is one.
        """
        self._model, self._quantiser = model, quantiser
        rules = get_model_conversion_mapping(model, hf_quantizer=quantiser)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        known, prefix = model.state_dict(), model.base_model_prefix
        self._holdings: dict[str, _Holding] = {}
        for stored in sorted(tensors, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
            if name not in known and stored in known:  # a name of the model itself that looks like an older one
                name, pattern = rename_source_key(stored, [], [], prefix, known)
            converter = None if pattern is None else by_pattern[pattern]
            holding = self._holdings.setdefault(name, _Holding(converter))
            holding.tensors.append((pattern or stored, tensors[stored]))

    def tensors(self, name: str) -> dict[str, StoredTensor]:
        """Everything in the files that makes a parameter, by its name there."""
        holding = self._holdings.get(name) or self._made_with(name)
        return {} if holding is None else {tensor.name: tensor for _, tensor in holding.tensors}

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The stored tensors that hold the numbers of a parameter; none where they are not in the files, or fused with others."""
        holding = self._holdings.get(name)
        if holding is None:
            return ()
        found = [tensor for _, tensor in holding.tensors]
        if holding.converter is None:
            return (Piece(found[0]),) if len(found) == 1 else ()
        rule = holding.converter
        if len(rule.operations) > 1 or len(rule.target_patterns) > 1 or len(rule.source_patterns) > 1:
            return ()
        step = rule.operations[0]
        if isinstance(step, MergeModulelist) and step.dim == 0:
            return tuple(Piece(tensor, index) for index, tensor in enumerate(found))
        shape = tuple(self._model.get_parameter(name).shape)
        last = {len(shape) - 2, len(shape) - 1}
        if isinstance(step, Transpose) and len(found) == 1 and {step.dim0 % len(shape), step.dim1 % len(shape)} == last:
            return (Piece(found[0], transposed=not (step.check_dims and found[0].shape == shape)),)
        return ()

    def read(self, name: str) -> Tensor:
        """A parameter as the model has it, but for the dtype, which is that of the files where they hold plain numbers.

        Raises:
            SphereEditError: the files do not hold it, or cannot be read.
        """
        holding = self._holdings.get(name) or self._made_with(name)
        if holding is None:
            raise SphereEditError(f"the files hold no '{name}'")
        if holding.converter is None:
            return _content(holding.tensors[0][1])
        converter = deepcopy(holding.converter)
        for pattern, tensor in holding.tensors:
            converter.add_tensor(name, tensor.name, pattern, _content(tensor))
        first = next(key for key, value in self._holdings.items() if value is holding)
        made = converter.convert(first, model=self._model, config=self._model.config, hf_quantizer=self._quantiser)
        found = made[name]
        return found[0] if isinstance(found, list) else found

    def _made_with(self, name: str) -> _Holding | None:
        """What makes a parameter along with another, whose name it goes by."""
        for first, holding in self._holdings.items():
            if holding.converter is not None:
                head, *others = holding.converter.target_patterns
                if any(first.replace(head, other) == name for other in others):
                    return holding
        return None


def _content(stored: StoredTensor) -> Tensor:
    try:
        with plain_errors(stored.file, "read"), safe_open(stored.file, framework="pt") as file:
            found: Tensor = file.get_tensor(stored.name)
            return found
    except SafetensorError as error:
        raise SphereEditError(f"{stored.file} cannot be read: {error}") from None
