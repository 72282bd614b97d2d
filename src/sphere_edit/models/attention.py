"""Attention in plain matrix products, for devices whose fused kernels have a slow backward pass."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.models.configuration import text_config

_NAME = "sphere_edit_grouped"
_CHANGING = (
    "s_aux",
    "sinks",
    "indices",
    "position_bias",
    "block_indices",
)  # what some families add: sinks, sparse keys


def use_plain_attention(model: Any) -> None:
    """Let ``model`` compute attention in plain products from now on, with heads that share keys taken together."""
    config = text_config(model)
    if getattr(config, "num_key_value_heads", None) in (None, getattr(config, "num_attention_heads", None)):
        model.set_attn_implementation("eager")
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, grouped_attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    model.set_attn_implementation(_NAME)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention whose query heads stand as further rows beside the keys that they share.

    transformers' eager attention repeats keys and values for each query head of a group, and sums their gradients
    again; here neither exists. Scores are summed and normalised as there. Where a family changes the scores in a way of
    its own (`_CHANGING`), its own eager attention computes them.

    Args:
        query: ``[B, heads, S, D]``; key and value: ``[B, groups, T, D]``.
        attention_mask: added to the scores, ``[B, 1, S, T]``.
        softcap: scores are squeezed to ± this (Gemma 2).
        others: transformers' further arguments; those in `_CHANGING` change the scores, the rest do not.

    Returns:
        ``[B, S, heads, D]``, and the attention weights.
    """
    if any(others.get(name) is not None for name in _CHANGING):
        eager = sys.modules[type(module).__module__].eager_attention_forward
        result: tuple[Tensor, Tensor] = eager(module, query, key, value, attention_mask, scaling=scaling, **others)
        return result
    batch, heads, rows, width = query.shape
    groups, columns = key.shape[1], key.shape[2]
    scale = width**-0.5 if scaling is None else scaling
    scores = query.reshape(batch, groups, heads // groups * rows, width) @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.view(batch, heads, rows, columns)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    output = weights.view(batch, groups, heads // groups * rows, columns) @ value
    return output.view(batch, heads, rows, -1).transpose(1, 2).contiguous(), weights
