"""Checkpoints whose quantisation is undone on loading, on every machine alike: fp8 and mxfp4, by transformers' own operations.

Left to itself, transformers dequantises where the machine's kernels are missing, and keeps the quantised weights where they are
not. Its fp8 operation takes the size of a block from the number of scales, which is wrong at a matrix's edge: 192 rows in blocks
of 128 have two scales, for 128 and 64 rows (arXiv:2412.19437, section 3.3). Here the configuration's block size decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

_FP8 = "sphere-edit-fp8"


class PlainFP8(Fp8Dequantize):
    """fp8 times the scale of its block, also where a block is cut short by the matrix's edge."""

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: Any = None,
        **others: Any,
    ) -> dict[str, Any]:
        """Plain weights in the dtype of the model's parameter, those among them that were plain before; float8 without scales stays."""
        found = super().convert(input_dict, full_layer_name=full_layer_name, model=model, **others)
        dtype = self._get_target_dtype(model, full_layer_name)
        return {name: _cast(weights, dtype) for name, weights in found.items()}

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        rows, columns = quantized.shape[-2:]
        block = self.hf_quantizer.quantization_config.weight_block_size
        if block is None or scales.dim() < 2 or (rows % block[0] == 0 and columns % block[1] == 0):
            return super()._dequantize_one(quantized, scales, output_dtype=output_dtype)
        more = (-rows % block[0], -columns % block[1])
        if scales.shape[-2:] != ((rows + more[0]) // block[0], (columns + more[1]) // block[1]):
            return super()._dequantize_one(quantized, scales, output_dtype=output_dtype)  # blocks of another size
        whole = torch.nn.functional.pad(quantized.float(), (0, more[1], 0, more[0]))
        plain: Tensor = super()._dequantize_one(whole, scales, output_dtype=output_dtype)
        return plain[..., :rows, :columns].contiguous()


def _cast(weights: Tensor | list[Tensor], dtype: torch.dtype | None) -> Any:
    if isinstance(weights, list):
        return [_cast(weight, dtype) for weight in weights]
    return weights.to(dtype) if weights.is_floating_point() and weights.element_size() > 1 else weights


@register_quantization_config(_FP8)
class PlainFP8Config(FineGrainedFP8Config):
    """What ``quantization_config`` says of an fp8 checkpoint."""


@register_quantizer(_FP8)
class PlainFP8Quantizer(FineGrainedFP8HfQuantizer):
    """transformers' loader of fp8 checkpoints with our operation."""

    def update_weight_conversions(self, *args: Any) -> list[Any]:
        """transformers' rules of loading, with our operation in the place of its own."""
        rules: list[Any] = super().update_weight_conversions(*args)
        for rule in rules:
            if hasattr(rule, "operations"):
                rule.operations = [PlainFP8(self) if type(step) is Fp8Dequantize else step for step in rule.operations]
        return rules


def undo(config: Any, found: Mapping[str, Any]) -> None:
    """Let ``from_pretrained`` of a transformers ``config`` undo the quantisation that its file describes in ``found``."""
    nested = config.get_text_config(decoder=True)
    if nested is not config and hasattr(nested, "quantization_config"):
        del nested.quantization_config
    config.quantization_config = _undone(found)


def quantiser(found: Mapping[str, Any]) -> Any:
    """transformers' loader of a checkpoint that is quantised as ``found`` says, set to undo it."""
    return AutoHfQuantizer.from_config(_undone(found), pre_quantized=True)


def _undone(found: Mapping[str, Any]) -> dict[str, Any]:
    method = found["quant_method"] if found["quant_method"] == "mxfp4" else _FP8
    return {**found, "quant_method": method, "dequantize": True}
