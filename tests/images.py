"""Tiny image-text models with random weights, built in memory; their text decoders stand where others do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from families import _LLAMA, LINEAR, tiny_tokenizer

LAYERS = "model.language_model.layers"  # of all of them
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT: dict[str, Any] = {**_LLAMA, "head_dim": 8, "vocab_size": 416, "initializer_range": 0.2, **_IDS}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
_QWEN_VISION = {"depth": 2, "num_heads": 4, "embed_dim": 32, "hidden_size": 32, "out_hidden_size": 32, "patch_size": 4}
_TOKENS = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

IMAGE_TEXT_MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "query_pre_attn_scalar": 8, "sliding_window": 16},
        "vision_config": _VISION,
        "image_token_index": 300,
        "boi_token_index": 301,
        "eoi_token_index": 302,
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_VISION},
        "image_token_index": 300,
    },
    "qwen2_vl": {"text_config": {**TEXT, "rope_parameters": _ROPE}, "vision_config": _QWEN_VISION, **_TOKENS},
    "qwen3_vl_moe": {
        "text_config": {
            **TEXT,
            "rope_parameters": {**_ROPE, "mrope_interleaved": True},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
        },
        "vision_config": {
            **_QWEN_VISION,
            "intermediate_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_TOKENS,
    },
    "qwen3_5": {
        "text_config": {**TEXT, **LINEAR},
        "vision_config": {**_QWEN_VISION, "intermediate_size": 64, "num_position_embeddings": 16},
        **_TOKENS,
    },
}


def tiny_image_text(family: str) -> Any:
    """A model of the family."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, tie_word_embeddings=False, **IMAGE_TEXT_MODELS[family])
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():  # transformers leaves experts empty
        if parameter.dim() == 3:
            parameter.data.normal_(std=0.2)
    return model


def save_image_text(family: str, folder: Path) -> Path:
    """A model of the family as a folder, with a processor's file."""
    tiny_image_text(family).save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    return folder
