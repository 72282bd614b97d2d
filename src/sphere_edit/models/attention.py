"""Attention in plain matrix products, for devices whose fused kernels have a slow backward pass, or are slow with many short rows."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.models.configuration import text_config

_NAME = "sphere_edit_grouped"
_SHORT_NAME = "sphere_edit_short"
_SHORT = 128  # keys in a row, up to which plain products are quicker on a CPU (docs/performance.md)
_WIDE = 256  # of the hidden states, from which on there is something to gain; narrower models keep the bits of earlier versions
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6}
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


@torch.no_grad()
def use_quicker_attention(model: Any) -> bool:
    """Let a model on a CPU that takes PyTorch's fused attention take plain products for short rows; whether it does now.

    Two rows, one of them padded, are run both ways. Where they differ, the model keeps what it had.
    """
    config = text_config(model)
    if getattr(config, "_attn_implementation", None) != "sdpa" or (getattr(config, "hidden_size", 0) or 0) < _WIDE:
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_SHORT_NAME, short_attention)
    AttentionMaskInterface.register(_SHORT_NAME, sdpa_mask)
    try:
        before = _said_to_short_rows(model)
        model.set_attn_implementation(_SHORT_NAME)
        now = _said_to_short_rows(model)
        fits = float((now - before).norm() / before.norm()) <= _TOLERANCES.get(model.dtype, 3e-2)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
        fits = False  # this family's attention is called with something else
    if not fits:
        model.set_attn_implementation("sdpa")
    return fits


def _said_to_short_rows(model: Any) -> Tensor:
    """Logits of two rows, one of them padded, where they have tokens; float32."""
    ids = torch.arange(10, 22).view(2, 6) % int(text_config(model).vocab_size)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[mask.bool()].float()


def short_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, Tensor | None]:
    """`grouped_attention` of rows with few keys, and PyTorch's fused attention of longer ones, and of what is changed on the way.

    Args:
        attention_mask: True where a key is seen, ``[B, 1, S, T]``; without one, those up to the query's own where the module is causal.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, columns = query.shape[2], key.shape[2]
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # behind a prefix and without a mask, which keys a query sees is the fused kernel's to say
    unseen = attention_mask is None and causal and rows not in (1, columns)
    changed = any(others.get(name) is not None for name in (*_CHANGING, "softcap", "cache"))
    if columns > _SHORT or unseen or changed or others.get("dropout"):
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return result
    if attention_mask is None and causal and rows > 1:
        attention_mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
    return grouped_attention(module, query, key, value, attention_mask, scaling=others.get("scaling"))


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
        attention_mask: added to the scores, ``[B, 1, S, T]``; or True where a key is seen.
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
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    output = weights.view(batch, groups, heads // groups * rows, columns) @ value
    return output.view(batch, heads, rows, -1).transpose(1, 2).contiguous(), weights
