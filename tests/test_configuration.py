"""What is read from a configuration: of models whose text decoder has one of its own, and which class builds a model."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from families import _LLAMA, tiny_model
from sphere_edit.models.attention import use_plain_attention
from sphere_edit.models.configuration import positions, text_config

TEXT: dict[str, Any] = {**_LLAMA, "head_dim": 8, "vocab_size": 416, "initializer_range": 0.2, "pad_token_id": 0}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
IMAGES = {"image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302, "mm_tokens_per_image": 4}


def tiny_gemma3(**text: Any) -> Any:
    """An image-text model, whose text decoder has a configuration of its own."""
    torch.manual_seed(0)
    text = {**TEXT, "query_pre_attn_scalar": 8, "sliding_window": 16, **text}
    return AutoModelForImageTextToText.from_config(
        AutoConfig.for_model("gemma3", text_config=text, vision_config=VISION, **IMAGES)
    )


def test_values_of_the_text_decoder_are_read_from_its_own_configuration():
    nested = tiny_gemma3()
    assert (positions(nested), text_config(nested).hidden_size) == (256, 32)
    plain, _ = tiny_model("llama")
    assert (positions(plain), text_config(plain)) == (256, plain.config)
    bloom = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", vocab_size=99, hidden_size=32, n_layer=1, n_head=4)
    )
    assert positions(bloom) == sys.maxsize  # a model that reads rows of any length


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
@torch.no_grad()
def test_plain_attention_gives_the_logits_of_a_nested_model_and_of_one_with_attention_sinks(family):
    if family == "gemma3":
        model = tiny_gemma3()
    else:
        torch.manual_seed(0)
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TEXT, **experts))
        for name, sinks in model.named_parameters():
            sinks.copy_(torch.randn_like(sinks) * (1 if name.endswith("sinks") else 0.2))
    ids = torch.arange(3, 24).repeat(2, 1)
    mask = (ids < torch.tensor([[24], [15]])).long()
    expected = model.eval()(input_ids=ids, attention_mask=mask, use_cache=False).logits
    use_plain_attention(model)
    assert text_config(model)._attn_implementation == "sphere_edit_grouped"
    plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(plain[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
