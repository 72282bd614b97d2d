"""Tiny mixtures of experts with random weights, of many families, built in memory; and where each keeps its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from families import LINEAR, tiny_tokenizer
from sphere_edit.models.loading import LoadedModel, prepare

WIDTH, DEPTH = 32, 4

_BASE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
_HEADS = {**_BASE, "head_dim": 8}
_GROUPS = {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_LATENT = {
    **_BASE,
    **_GROUPS,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_layer_freq": 1,
}
_SHARED = {**_HEADS, "shared_expert_intermediate_size": 40}

# family: its configuration, the path of its experts within a layer, and that of a shared expert where it has one
MIXTURES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "mixtral": (_HEADS, "mlp", None),
    "qwen3_moe": (_HEADS, "mlp", None),
    "gpt_oss": ({**_HEADS, "sliding_window": 16}, "mlp", None),
    "deepseek_v3": (_LATENT, "mlp", "mlp.shared_experts"),
    "llama4_text": (
        {
            **_HEADS,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 64,
        },
        "feed_forward",
        "feed_forward.shared_expert",
    ),
    "deepseek_v2": (_LATENT, "mlp", "mlp.shared_experts"),
    "glm4_moe": ({**_HEADS, **_GROUPS}, "mlp", "mlp.shared_experts"),
    "olmoe": (_HEADS, "mlp", None),
    "qwen2_moe": (_SHARED, "mlp", "mlp.shared_expert"),
    "phimoe": (_HEADS, "mlp", None),
    "minimax_m2": ({**_HEADS, "rotary_dim": 8}, "mlp", None),
    "qwen3_next": ({**_SHARED, **LINEAR}, "mlp", "mlp.shared_expert"),
    "granitemoe": ({**_HEADS, "residual_multiplier": 0.22}, "block_sparse_moe", None),
    "lfm2_moe": (
        {**_HEADS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
        "feed_forward",
        None,
    ),
    "ernie4_5_moe": (
        {**_HEADS, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
        "mlp",
        "mlp.shared_experts",
    ),
}
TRANSPOSED = {"gpt_oss", "llama4_text"}
FEW = list(MIXTURES)[:5]  # that differ most in how keys come about


def mixture(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, PreTrainedTokenizerFast]:
    """A model of the family with random weights, and its tokenizer."""
    config, _, _ = MIXTURES[family]
    tokenizer = tiny_tokenizer(bos=True)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=len(tokenizer) + 16, initializer_range=0.2, **ids, **config)
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # transformers leaves experts empty, or at zero
        if parameter.dim() == 3 and parameter.shape[-1] > 4:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval().requires_grad_(False), tokenizer


def tiny_mixture(family: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A tiny mixture ready to be edited."""
    return prepare(*mixture(family, dtype), f"tiny-{family}")


def save_mixture(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny mixture as a folder that can be loaded by name."""
    model, tokenizer = mixture(family, dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
