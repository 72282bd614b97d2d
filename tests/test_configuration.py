"""What is read from a configuration: of models whose text decoder has one of its own, and which class builds a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import __version__ as version

from families import tiny_model
from images import TEXT, tiny_image_text
from sphere_edit import SphereEditError
from sphere_edit.models import loading, soundness
from sphere_edit.models.attention import use_plain_attention
from sphere_edit.models.configuration import CAUSAL, IMAGE_TEXT, loader_of, positions, text_config


def test_values_of_the_text_decoder_are_read_from_its_own_configuration():
    nested = tiny_image_text("gemma3")
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
        model = tiny_image_text("gemma3")
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


# --- which class builds a model, and which model is none that can be edited ---------------------------------------


@pytest.mark.parametrize(
    ("kind", "architecture", "expected"),
    [
        ("llama", "LlamaForCausalLM", CAUSAL),
        ("llama", None, CAUSAL),
        ("gemma3_text", "Gemma3ForCausalLM", CAUSAL),
        ("gemma3", "Gemma3ForConditionalGeneration", IMAGE_TEXT),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", IMAGE_TEXT),
        ("llava", None, IMAGE_TEXT),
        # both classes exist, and the one for text alone would leave the vision tower out
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", IMAGE_TEXT),
        ("qwen3_5", None, IMAGE_TEXT),
        ("qwen3_5", "Qwen3_5ForCausalLM", CAUSAL),
        ("llama4", "Llama4ForConditionalGeneration", IMAGE_TEXT),
        ("mllama", "MllamaForConditionalGeneration", IMAGE_TEXT),
    ],
)
def test_the_class_that_builds_a_model_whole(kind, architecture, expected):
    config = {"model_type": kind} if architecture is None else {"model_type": kind, "architectures": [architecture]}
    assert loader_of(config, "x") == expected
    assert loader_of({**config, "auto_map": {"AutoModelForCausalLM": "m.M"}}, "x", trust=True) == CAUSAL


def test_an_encoder_made_a_decoder_is_one():
    assert loader_of({"model_type": "bert", "is_decoder": True}, "x") == CAUSAL


OWN_CODE = {"AutoConfig": "c.C", "AutoModel": "m.M"}
NO_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "encoder": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "it is an encoder, which reads text"),
    "encoder–decoder": ({"model_type": "t5"}, "it is an encoder–decoder"),
    "its decoder": ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "an encoder–decoder"),
    "vision": ({"model_type": "vit"}, "it is a model of images"),
    "head": ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "gives scores or classes"),
    "reward": ({"model_type": "qwen2", "architectures": ["Qwen2ForRewardModel"]}, "gives scores or classes"),
    "speech": ({"model_type": "whisper"}, "it is an encoder–decoder"),
    "sound": ({"model_type": "wav2vec2"}, "it is a model of sound"),
    "part": ({"model_type": "qwen2_vl_text"}, "transformers has no language model of this type"),
    "nothing": ({}, "names no model_type"),
    "new": ({"model_type": "llama9"}, f"transformers {version} does not know; a newer transformers may"),
    "own code": ({"model_type": "mine", "auto_map": OWN_CODE}, "code comes with the model that does"),
    "gptq": ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "is quantised, by 'gptq'"),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_cannot_be_edited_is_refused_before_anything_but_its_configuration_is_fetched(name, tmp_path, monkeypatch):
    config, expected = NO_MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = []

    def cached(model: str, file: str, fetch: bool = True) -> Path | None:
        asked.append(file)
        return tmp_path / file if file == "config.json" else None

    monkeypatch.setattr(soundness, "cached", cached)
    with pytest.raises(SphereEditError) as refused:
        loading.load_model("maker/model", "cpu")
    said = str(refused.value)
    assert expected in said
    assert "'maker/model'" in said
    assert "\n" not in said
    assert "pip install " not in said.replace("pip install -U transformers", "")
    assert asked == ["config.json", "adapter_config.json"]


def test_code_of_a_model_that_offers_no_language_model():
    with pytest.raises(SphereEditError, match="the code that comes with it offers no AutoModelForCausalLM"):
        loader_of({"model_type": "mine", "auto_map": OWN_CODE}, "x", trust=True)


@pytest.mark.parametrize("kind", ["clip", "an odd one"])
def test_a_gguf_file_of_an_architecture_that_transformers_does_not_read(tmp_path, kind):
    file = tmp_path / "model.gguf"
    writer = GGUFWriter(file, kind)
    writer.add_name("mmproj")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SphereEditError, match=f"architecture '{kind}', which transformers {version} does not read"):
        loading.load_model(file, "cpu")
