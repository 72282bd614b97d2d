"""What is said of a model's layout: by `sphere-edit inspect`, and by a run's config.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel

from conftest import fact_records
from families import save_tiny, tiny_tokenizer
from sphere_edit import SphereEditError
from sphere_edit.editor import Editor
from sphere_edit.models.architecture import Architecture, LayerParts, Matrix
from sphere_edit.progress import Quiet
from sphere_edit.runs import preparing
from sphere_edit.runs.layout import Layout
from sphere_edit.runs.records import parse_config
from test_cli import run

QUICK: dict[str, Any] = {
    "batch_size": 2,
    "templates": 0,
    "targets": {"steps": 2, "lr": 0.5},
    "moments": {"sampled_tokens": 128},
    "evaluation": {"generation": "off"},
    "recheck": 0,
    "repair": 0,
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    return save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))


def made(folder: Path, model_type: str, **options: Any) -> Path:
    tokenizer = tiny_tokenizer(bos=True)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2}
    common = {"vocab_size": len(tokenizer) + 16, "initializer_range": 0.2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**small, **common, **options}))
    for parameter in model.parameters():  # transformers leaves experts empty
        if parameter.dim() == 3:
            parameter.data = torch.randn(parameter.shape) * 0.2
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_what_is_said_of_a_model(gpt2, tmp_path):
    out = run("inspect", gpt2, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["kind"], found["layers"], found["depth"]) == ("gpt2", "transformer.h", 4)
    down, up = found["matrices"]
    assert (down["role"], down["path"], down["shape"], down["transposed"]) == ("down", "mlp.c_proj", [32, 64], True)
    assert (up["role"], up["layers"], up["shape"]) == ("up", [0, 1, 2, 3], [64, 32])
    by_method = {name: group["matrices"] for group in found["methods"] for name in group["names"]}
    assert by_method["memit"] == {"down": [1, 2]}
    assert found["calibrates"] is True
    assert found["weights"] == 4 * found["parameters"] < found["editing"]
    for words in ("known of its family", "32 × 64, stored transposed", "down:1–2", "found by calibration", "none"):
        assert words in out, words
    assert found["remarks"] == []


def test_a_mixture_with_a_gated_shared_expert(tmp_path):
    routed = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    model = made(tmp_path / "m", "qwen2_moe", **routed, shared_expert_intermediate_size=40)
    out = run("inspect", model, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {row["role"]: row for row in found["matrices"]}
    assert (rows["down"]["path"], rows["down"]["alone"]) == ("mlp.shared_expert.down_proj", True)
    assert (rows["experts"]["shape"], rows["experts"]["alone"]) == ([4, 32, 24], False)
    by_method = {name: group["matrices"] for group in found["methods"] for name in group["names"]}
    assert len(by_method["frugal"]["down"]) == 1
    assert "4 experts of 32 × 24" in out
    assert "one layer is edited and not several" in out
    assert "Their router is never edited" in out


def test_methods_that_cannot_edit_experts_are_named(tmp_path):
    routed = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    model = made(tmp_path / "m", "qwen3_moe", **routed)
    out = run("inspect", model, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    refused = [group for group in found["methods"] if group["why_not"]]
    assert [row["role"] for row in found["matrices"]] == ["experts"]
    assert refused
    for group in refused:
        assert "cannot edit routed experts" in group["why_not"]
        assert group["matrices"] == {}
    assert "nothing: it cannot edit routed experts" in out


def test_what_cannot_be_edited_is_told(tmp_path):
    torch.manual_seed(0)
    BertModel(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(SphereEditError, match="an encoder, which reads text"):
        run("inspect", tmp_path / "bert")
    model = made(tmp_path / "m", "opt", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False)
    with pytest.raises(SphereEditError, match=r"cannot be edited: .* longest list of layers is 'model.decoder.layers'"):
        run("inspect", model)


def test_a_run_is_told_as_such(gpt2, tmp_path):
    editor = Editor.from_pretrained(gpt2, tmp_path / "run", reporter=Quiet(), **QUICK)
    editor.edit(fact_records(2))
    editor.close()
    with pytest.raises(SphereEditError, match="is a run"):
        run("inspect", tmp_path / "run")


# --- a run's config.json ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edited(gpt2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPHERE_EDIT_CACHE", str(folder.parent / "cache"))
        editor = Editor.from_pretrained(gpt2, folder, reporter=Quiet(), **QUICK)
        editor.edit(fact_records(2))
        editor.close()
    return folder


def test_a_run_keeps_the_layout(edited):
    layout = json.loads((edited / "config.json").read_text())["layout"]
    assert (layout["layers"], layout["final_norm"], layout["found"]) == ("transformer.h", "transformer.ln_f", "row")
    assert layout["matrices"][0] == {
        "layers": [0, 1, 2, 3],
        "role": "down",
        "path": "mlp.c_proj",
        "transposed": True,
        "experts": False,
        "inside": False,
        "factor": 1.0,
        "after": None,
    }


def test_a_model_laid_out_otherwise_is_refused(edited, monkeypatch):
    real = preparing.load_model

    def other(*args: Any) -> Any:
        loaded = real(*args)
        return replace(loaded, architecture=replace(loaded.architecture, logit_scale=0.5))

    monkeypatch.setattr(preparing, "load_model", other)
    with pytest.raises(
        SphereEditError, match="laid out otherwise than when this run began: its logits are scaled by 0.5"
    ):
        Editor.open(edited, Quiet())


def test_a_config_from_before_layouts_were_kept_is_as_it_was(edited):
    """Its hash, which the journal and exports hold, must not change; that such runs open, `test_old_runs.py` shows."""
    content = json.loads((edited / "config.json").read_text())
    del content["layout"]
    config = parse_config(content, "a run")
    assert config.layout is None
    assert config.as_content() == content


def laid_out(**changes: Any) -> Layout:
    parts = LayerParts(
        MappingProxyType({"down": Matrix("mlp.down", factor=changes.pop("factor", 0.22)), "up": Matrix("mlp.up")})
    )
    return Layout.of(replace(Architecture("layers", "norm", (parts,) * 3, logit_scale=0.25), **changes))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"found": "probe"}, None),
        ({"factor": 0.2204}, None),  # what rounding does to a measured factor
        ({"logit_scale": 0.2501}, None),
        ({"factor": 0.5}, "layers.1.mlp.down is down"),
        ({"layers": "blocks"}, "its layers are at blocks"),
        ({"final_norm": "ln"}, "its final norm is ln"),
        ({"whole_rows": True}, "whole rows: True"),
        ({"silent": frozenset([2])}, "does not run through are [2]"),
        ({"parts": (LayerParts(MappingProxyType({})),) * 3}, "layers.1.mlp.down is not there"),
    ],
)
def test_what_differs_between_layouts(changes, found):
    differing = laid_out().differing(laid_out(**changes), ["layers.1.mlp.down"])
    assert differing is None if found is None else found in str(differing)
