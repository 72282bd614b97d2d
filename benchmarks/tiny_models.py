"""A tiny model of any type that transformers knows: its own configuration class, with every size made small.

Sizes are known by the names that configurations give them, so that a type needs a line here only where sizes must fit one another in
a way of its own. Weights are random and the tokenizer knows a few words: such a model tells whether an edit works, and nothing of
its quality.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

VOCABULARY, WIDTH, INNER, DEPTH, HEADS = 416, 32, 64, 4, 4
_MOST = 20_000_000  # parameters of a model that is still tiny

# by what the name of a field says; of the text decoder, and of what stands beside it (images, sound) where that is another
_SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embed_dim", "out_hidden_size", "word_embed_proj_dim"], WIDTH),
    **dict.fromkeys(["text_hidden_size", "projector_hidden_size", "projection_dim", "encoder_hidden_size"], WIDTH),
    **dict.fromkeys(["lru_width", "attention_hidden_size", "embedding_size", "vision_output_dim", "dim"], WIDTH),
    **dict.fromkeys(["projector_input_dim", "projector_output_dim", "output_proj_dims", "mm_embed_dim"], WIDTH),
    **dict.fromkeys(["projection_hidden_size", "projection_hidden_dim", "emb_dim", "adapter_in_dim"], WIDTH),
    **dict.fromkeys(["vision_hidden_size", "adapter_out_dim", "image_text_hidden_size", "hidden_dim"], WIDTH),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "mlp_dim", "dff", "d_inner"], INNER),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "block_ff_dim", "intermediate_size_mlp"], INNER),
    **dict.fromkeys(["shared_intermediate_size", "dense_intermediate_size", "dim_ff"], INNER),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "moe_hidden_size"], 48),
    **dict.fromkeys(["shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"], 40),
    **dict.fromkeys(["share_expert_dim", "shared_experts_intermediate_size"], 40),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth"], DEPTH),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], HEADS),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "kv_n_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "kv_channels", "attention_head_size", "dim_head", "d_head"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx"], 256),
    **dict.fromkeys(["sliding_window", "window_size", "attention_window_size", "attention_chunk_size"], 32),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"], 2),
    **dict.fromkeys(["num_shared_experts", "n_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "n_group", "topk_group"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["index_n_heads", "indexer_n_heads"], 2),
    **dict.fromkeys(["index_head_dim", "indexer_head_dim"], 16),
    "index_topk": 64,
    "rotary_dim": 8,
    "zero_expert_num": 2,
    "query_pre_attn_scalar": 8,
    "linear_conv_kernel_dim": 4,
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "mamba_headdim"], 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 8),
    **dict.fromkeys(["mamba_n_groups", "n_groups", "mamba_ngroups"], 1),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 16),
    "mamba_d_ssm": 64,
    "mamba_dt_rank": 4,
    "hidden_size_per_layer_input": 8,
    "adapter_rank": 4,
}
_BESIDE: dict[str, Any] = {
    **dict.fromkeys(["num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers", "n_layers"], 2),
    **dict.fromkeys(["image_size"], 32),
    **dict.fromkeys(["patch_size"], 16),
    **dict.fromkeys(["num_key_value_heads"], HEADS),
    "num_position_embeddings": 16,
    "vocab_size": 64,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "max_position_embeddings": 64,
}
_LATENT = {"num_key_value_heads": "num_attention_heads", "head_dim": "qk_rope_head_dim"}
_NUMBERED = ("_token_id", "_token_index", "_index", "_id")  # fields that name a token


def types() -> list[str]:
    """Every model type of transformers' lists of causal and of image-text models."""
    lists = (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return sorted({kind for names in lists for kind in names})


def tiny_model(kind: str, loader: str) -> Any:
    """A model of a type with random weights, built by an auto class of transformers.

    Raises:
        ValueError: its sizes could not be made small.
    """
    config = configuration(kind)
    build = getattr(transformers, loader).from_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in build(config).parameters())
        if size > _MOST:
            raise ValueError(f"{size / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        return enlivened(build(config))


def enlivened(model: Any) -> Any:
    """The same in float32, with random numbers wherever weights are empty, broken, or so small that layers would do nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        weak = parameter.dim() > 1 and not float(parameter.detach().float().std()) > 0.1
        if weak or not torch.isfinite(parameter).all():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.float().eval()


def configuration(kind: str) -> PreTrainedConfig:
    """The tiny configuration of a model type."""
    return CONFIG_MAPPING[kind](**values(CONFIG_MAPPING[kind]))


def values(cls: type[PreTrainedConfig], beside: bool = False) -> dict[str, Any]:
    """What a configuration class is given to be tiny; ``beside``: it is not of the text decoder."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    sizes = {**_SIZES, **_BESIDE} if beside else _SIZES
    fields = {field.name: _default(field) for field in dataclasses.fields(cls) if field.name not in inherited}
    found = {name: sizes[name] for name, default in fields.items() if name in sizes}
    if not beside:
        found |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    numbers = iter(range(300, VOCABULARY))
    for name, default in fields.items():
        if name.endswith(_NUMBERED) and type(default) is int and default >= 300 and name not in found:
            found[name] = next(numbers)
    for name, part in _parts(cls).items():
        found[name] = part
    if (
        "kv_lora_rank" in fields
    ):  # attention with latent keys has one for each head, whose rotary part is the width of a head
        found |= {name: _SIZES[key] for name, key in _LATENT.items() if name in fields}
    for name in ("initializer_range", "init_std"):
        if name in fields:
            found[name] = 0.2
    return {**found, **_OVERRIDES.get(cls.model_type, {})}


def _parts(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """The configurations within one, tiny too."""
    specs = getattr(cls, "sub_configs_defaults", None) or {}
    found = {}
    for name, spec in specs.items():
        beside = not any(word in name for word in ("text", "decoder", "llm", "thinker"))
        inner = spec.config_class
        if inner is AutoConfig:
            kind = spec.model_type
            if kind is None:
                continue
            inner = CONFIG_MAPPING[kind]
        found[name] = {"model_type": inner.model_type, **values(inner, beside)}
    return found


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


_WIDE = {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16}
_MULTIHEAD = {"num_key_value_heads": HEADS}
_ALTERNATING = ["sliding_attention", "full_attention"] * 3
_HYBRID = ["linear_attention", "full_attention"] * 2
_QSA = {"indexer_kv_heads": 1, "indexer_budget": 64, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# sizes that must fit one another in a way of the type's own, by its name or that of its part
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HYBRID},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "blt_local_encoder": {"hidden_size_global": WIDTH, "vocab_size": VOCABULARY},
    "blt_local_decoder": {"hidden_size_global": WIDTH, "vocab_size": VOCABULARY},
    "blt_patcher": {"vocab_size": VOCABULARY},
    "chameleon": {"vocabulary_map": {"<image>": 300}},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 64, "latent_channels": 32},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "cosmos3_edge_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "dbrx": {
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "emu3": {"vocabulary_map": {"<image>": 300, "<|extra_200|>": 301}},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [48, 48],
        "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
    },
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 64},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "intermediate_size": [INNER] * 6,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 6,
        "layer_types": _ALTERNATING,
        "altup_num_inputs": 2,
    },
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "glm4v_text": {"rope_parameters": _SECTIONS},
    "glm4v_moe_text": {"rope_parameters": _SECTIONS},
    "glm_ocr_text": {"rope_parameters": _SECTIONS},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 64, "latent_channels": 32},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "minicpm3": {"num_key_value_heads": HEADS},
    "molmo2": {"image_size": [32, 32]},
    "molmo2_adapter": {"vision_feature_layer": [0, 1]},
    "molmo2_vision": {"image_size": [32, 32]},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16, 16, 16, 16]},
    "nemotron_h": {"layers_block_type": ["mamba", "mlp", "attention", "moe"]},
    "paddleocr_vl_text": {"rope_parameters": _SECTIONS},
    "qwen2_5_omni_text": {"rope_parameters": _SECTIONS},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 400},
    "qwen2_5_vl_text": {"rope_parameters": _SECTIONS},
    "qwen2_vl_text": {"rope_parameters": _SECTIONS},
    "qwen3_omni_moe_text": {"rope_parameters": _SECTIONS},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 400},
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "qwen3_next": {"layer_types": _HYBRID},
    "qwen4_exp_text": _QSA,
    "radio": {"video_temporal_patch_size": 2},
    "recurrent_gemma": {"num_hidden_layers": 6},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "hybrid", "mamba"] * 2,
        "num_key_value_heads": 4,
        **_WIDE,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
