"""Tiny randomly initialised models of every supported family, with tokenizers of several kinds, built in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sphere_edit.models.loading import LoadedModel, prepare

WIDTH, INNER, DEPTH, HEADS = 32, 64, 4, 4

_LLAMA: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GPT2: dict[str, Any] = {"n_embd": WIDTH, "n_inner": INNER, "n_layer": DEPTH, "n_head": HEADS, "n_positions": 256}
_GEMMA: dict[str, Any] = {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8}

# of hybrids whose every other layer is of linear attention
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

# family: its configuration, and what its tokenizer is like
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (_LLAMA, {"bos": True, "padding_side": "left"}),
    "mistral": ({**_LLAMA, "sliding_window": 16}, {"bos": True}),
    "qwen2": ({**_LLAMA, "tie_word_embeddings": True}, {}),
    "qwen3": ({**_LLAMA, "head_dim": 8}, {}),
    "gemma": ({**_LLAMA, "head_dim": 8}, {"bos": True}),
    "gemma2": ({**_GEMMA, "sliding_window": 16, "final_logit_softcapping": 3.0}, {"bos": True, "padding_side": "left"}),
    "gemma3_text": ({**_GEMMA, "sliding_window": 32}, {"bos": True}),
    "phi3": ({**_LLAMA, "pad_token_id": 0}, {"padding_side": "left"}),
    "gpt2": (_GPT2, {}),
    "gptj": ({**_GPT2, "rotary_dim": 8}, {}),
    "gpt_neox": (
        {
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 256,
        },
        {"eos": True},
    ),
}

_TEXT = """The capital of France is Paris. The capital of Italy is Rome, and the river there is the Tiber.
Ada plays the violin in Vienna; her brother Bruno plays football for a club in Madrid.
Where is the Eiffel Tower? It is located in the city of Paris. Mount Fuji stands in Japan.
The company makes cars in Germany. Its founder was born in Sweden and speaks Spanish and English. This is a test."""


def tiny_tokenizer(bos: bool = False, eos: bool = False, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([_TEXT], trainer)
    single = f"{'<bos> ' if bos else ''}$A{' <eos>' if eos else ''}"
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side=padding_side
    )


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, PreTrainedTokenizerFast]:
    """A model of the family with random weights, large enough that its layers matter, and its tokenizer."""
    config, kind = FAMILIES[family]
    tokenizer = tiny_tokenizer(**kind)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=len(tokenizer) + 16, initializer_range=0.2, **{**ids, **config})
    )
    return model.to(dtype), tokenizer


def tiny(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> LoadedModel:
    """A tiny model ready to be edited."""
    return prepare(*tiny_model(family, dtype, seed), f"tiny-{family}")


def save_tiny(family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A tiny model as a folder that can be loaded by name."""
    model, tokenizer = tiny_model(family, dtype, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
