"""GGUF files of tiny Llama models, as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from transformers import AutoModelForCausalLM, AutoTokenizer

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def save_gguf(folder: Path, file: Path, kind: str) -> Path:
    """A saved tiny Llama as one file whose matrices are of a type; queries and keys in the order that llama.cpp rotates them in."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    core = tokenizer.backend_tokenizer
    known = {index: text for text, index in tokenizer.get_vocab().items()}
    tokens = [known.get(index, f"[unused{index}]") for index in range(config.vocab_size)]
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [
            TokenType.CONTROL if i in special else TokenType.NORMAL if i in known else TokenType.UNUSED
            for i in range(len(tokens))
        ]
    )
    merges = json.loads(core.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, value in model.state_dict().items():
        writer_name, array = _renamed(name), value.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = _rotated(array, heads)
        stored = GGMLQuantizationType[kind if array.ndim == 2 and "token_embd" not in writer_name else "F32"]
        if kind in _BLOCKS and array.shape[-1] % 256:
            stored = GGMLQuantizationType.F32  # blocks have 256 numbers
        content = _blocks(array.shape, kind) if stored.name in _BLOCKS else quants.quantize(array, stored)
        writer.add_tensor(writer_name, content, raw_dtype=stored)
    return _written(writer, file)


def save_experts(file: Path, weights: dict[str, np.ndarray], depth: int, kind: str) -> Path:
    """Some stacked matrices ``[E, d_out, d_in]`` by GGUF's names as a file of a Qwen3 mixture, of a type; without all else that is one."""
    writer = GGUFWriter(file, "qwen3moe")
    writer.add_block_count(depth)
    stored = GGMLQuantizationType[kind]
    for name, array in weights.items():
        writer.add_tensor(name, quants.quantize(array, stored), raw_dtype=stored)
    return _written(writer, file)


def _written(writer: GGUFWriter, file: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


# K-quants by the bytes of a block of 256 numbers, and where its scales are: of 16 bits each, and what to put there
_BLOCKS = {"Q4_K": (144, {0: 2e-4, 2: 1.5e-3}), "Q6_K": (210, {208: 1e-4})}


def _blocks(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Random blocks, since the gguf package reads these types and does not write them: the file is the model then."""
    size, scales = _BLOCKS[kind]
    found = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // 256, size), np.uint8)
    for place, scale in scales.items():
        found[:, :, place : place + 2] = np.array([scale], np.float16).view(np.uint8)
    return found.reshape(shape[0], -1)


def _renamed(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, layer, *path, _ = name.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(path)]}.weight"


def _rotated(array: np.ndarray, heads: int) -> np.ndarray:
    rows = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))
