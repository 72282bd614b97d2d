"""Parameters are found in files that name, split, fuse or quantise them otherwise, and are written back there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from families import save_tiny
from images import IMAGE_TEXT_MODELS, LAYERS, save_image_text
from mixtures import save_mixture
from sphere_edit import SphereEditError
from sphere_edit.exports.hf import loaded_by, write_hf
from sphere_edit.exports.shipment import Shipment
from sphere_edit.models import checkpoint
from sphere_edit.models.architecture import EXPERTS
from sphere_edit.models.checkpoint import Checkpoint
from sphere_edit.models.configuration import CAUSAL, IMAGE_TEXT, loader_of
from sphere_edit.models.dequantising import quantiser
from sphere_edit.models.identity import tensor_bytes
from sphere_edit.models.loading import load_model
from sphere_edit.models.pretrained import from_pretrained, skeleton
from sphere_edit.models.source import read_config, stored_tensors
from sphere_edit.models.stored import StoredParameters
from sphere_edit.models.weights import EditedWeights
from sphere_edit.runs.layout import Layout

# family: what its MLPs' output matrix of layer 1 is called in the model, and in the files
NAMES = {
    "llama": ("model.layers.1.mlp.down_proj.weight", ["model.layers.1.mlp.down_proj.weight"]),
    "gemma3": (f"{LAYERS}.1.mlp.down_proj.weight", ["language_model.model.layers.1.mlp.down_proj.weight"]),
    "llava": (f"{LAYERS}.1.mlp.down_proj.weight", ["language_model.model.layers.1.mlp.down_proj.weight"]),
    "qwen2_vl": (f"{LAYERS}.1.mlp.down_proj.weight", ["model.layers.1.mlp.down_proj.weight"]),
    "qwen3_5": (f"{LAYERS}.1.mlp.down_proj.weight", [f"{LAYERS}.1.mlp.down_proj.weight"]),
    "qwen3_vl_moe": (f"{LAYERS}.1.mlp.experts.down_proj", [f"{LAYERS}.1.mlp.experts.down_proj"]),  # but transposed
    "mixtral": (
        "model.layers.1.mlp.experts.down_proj",
        [f"model.layers.1.block_sparse_moe.experts.{index}.w2.weight" for index in range(4)],
    ),
    "qwen3_moe": (
        "model.layers.1.mlp.experts.down_proj",
        [f"model.layers.1.mlp.experts.{index}.down_proj.weight" for index in range(4)],
    ),
    "gpt_oss": ("model.layers.1.mlp.experts.down_proj", ["model.layers.1.mlp.experts.down_proj"]),
}


def save(family: str, folder: Path) -> Path:
    if family == "qwen3_vl_moe":  # whose published files have the experts the other way round
        file = save_image_text(family, folder) / "model.safetensors"
        tensors = load_file(file)
        turned = {name: tensor.mT.contiguous() if ".experts." in name else tensor for name, tensor in tensors.items()}
        save_file(turned, file, {"format": "pt"})
        return folder
    if family in IMAGE_TEXT_MODELS:
        return save_image_text(family, folder)
    return save_tiny(family, folder) if family == "llama" else save_mixture(family, folder)


@pytest.mark.parametrize("family", NAMES)
def test_every_parameter_is_read_from_the_files_as_the_model_has_it(family, tmp_path):
    folder = save(family, tmp_path / "model")
    loaded = load_model(folder, "cpu")
    config = read_config(folder)
    stored = StoredParameters(skeleton(str(folder), loader_of(config, "x")), stored_tensors(folder))
    for name, parameter in loaded.model.state_dict().items():
        assert torch.equal(stored.read(name), parameter), name
    name, files = NAMES[family]
    pieces = stored.pieces(name)
    assert [piece.tensor.name for piece in pieces] == files
    assert list(stored.tensors(name)) == files
    whole = loaded.model.state_dict()[name]
    for number, piece in enumerate(pieces):
        assert piece.index == (number if len(files) > 1 else None)
        assert piece.transposed == (family == "qwen3_vl_moe")
        assert piece.tensor.content() == tensor_bytes(piece.of(whole))
    assert stored.pieces("model.layers.1.mlp.nothing") == ()


def test_a_parameter_that_the_files_hold_in_another_form_has_no_pieces(tmp_path):
    folder = save_mixture("qwen3_moe", tmp_path / "model")
    stored = StoredParameters(skeleton(str(folder), CAUSAL), stored_tensors(folder))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert stored.pieces(name) == ()
    assert len(stored.tensors(name)) == 8


@pytest.mark.parametrize("family", NAMES)
def test_an_export_has_the_edited_matrix_in_the_source_s_own_files_and_nothing_else_changed(family, tmp_path):
    source, out = save(family, tmp_path / "model"), tmp_path / "out"
    loaded = load_model(source, "cpu")
    role = EXPERTS if "experts" in NAMES[family][0] else "down"
    edited = loaded.architecture.module_name(1, role)
    weights = EditedWeights(loaded.model, loaded.architecture, [edited])
    known = Layout.of(loaded.architecture).architecture()
    assert torch.equal(Checkpoint(str(source), known).weight(edited), weights.original(edited))
    weights.set(edited, weights.original(edited) + 0.1)
    assert write_hf(Shipment(loaded, weights, lambda note: "# Card"), out) == []
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(NAMES[family][1])
    assert (out / "config.json").read_text() == (source / "config.json").read_text()
    if family in IMAGE_TEXT_MODELS:
        assert (out / "preprocessor_config.json").is_file()
    assert loaded_by(out).startswith(IMAGE_TEXT if family in IMAGE_TEXT_MODELS else CAUSAL)
    auto: Any = getattr(transformers, loader_of(read_config(out), "x"))
    again = auto.from_pretrained(out)
    assert type(again) is type(loaded.model)
    for name, parameter in again.state_dict().items():
        assert torch.equal(parameter, loaded.model.state_dict()[name]), name


def test_files_of_a_model_whose_layout_is_known_are_read_without_loading_it(tmp_path, monkeypatch):
    source = save_mixture("qwen3_moe", tmp_path / "model")
    loaded = load_model(source, "cpu")
    name = loaded.architecture.module_name(1, EXPERTS)
    weight = EditedWeights(loaded.model, loaded.architecture, [name]).original(name)
    known = Layout.of(loaded.architecture).architecture()
    assert Layout.of(known) == Layout.of(loaded.architecture)
    assert torch.equal(Checkpoint(str(source)).weight(name), weight)  # found by running it
    monkeypatch.setattr(checkpoint, "load_model", None)
    assert torch.equal(Checkpoint(str(source), known).weight(name), weight)
    assert Checkpoint(str(source), known).names([1]) == [name]


# --- quantised ----------------------------------------------------------------------------------------------------

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens"]}


def quantised(folder: Path, method: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))


def compare(folder: Path, method: dict[str, Any], plain: dict[str, torch.Tensor]) -> None:
    """What loading makes of a folder, and what is read of it a matrix at a time."""
    _, model = from_pretrained("x", str(folder), torch.bfloat16, quantised=method)
    blank = skeleton(str(folder), CAUSAL, dtype=torch.bfloat16)
    stored = StoredParameters(blank, stored_tensors(folder), quantiser(method))
    weights = model.state_dict()
    assert all(weight.dtype == torch.bfloat16 for name, weight in weights.items() if "bias" not in name)
    for name, weight in plain.items():
        assert torch.equal(weights[name], weight), name
        assert torch.equal(stored.read(name).bfloat16(), weight), name


def test_experts_in_fp8_one_to_a_tensor(tmp_path):
    """As DeepSeek and Qwen publish them; 48 columns are one block of 32 and half of another."""
    folder = save_mixture("qwen3_moe", tmp_path / "model", torch.bfloat16)
    tensors, plain = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = tensors[name].shape
        scales = torch.rand(-(-rows // 32), -(-columns // 32)) + 0.5
        spread = scales.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
        tensors[name] = tensors[name].float().div(spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        plain[name] = (tensors[name].float() * spread).bfloat16()
    quantised(folder, FP8, tensors)
    stacked = {}
    for layer in range(4):
        experts = f"model.layers.{layer}.mlp.experts"
        of = {
            role: torch.stack([plain[f"{experts}.{index}.{role}_proj.weight"] for index in range(4)])
            for role in ("gate", "up", "down")
        }
        stacked[f"{experts}.down_proj"] = of["down"]
        stacked[f"{experts}.gate_up_proj"] = torch.cat([of["gate"], of["up"]], 1)
    compare(folder, FP8, stacked)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_experts_that_are_no_plain_floats_and_of_which_the_configuration_says_nothing(dtype, tmp_path):
    folder = save_mixture("gpt_oss", tmp_path / "model", torch.bfloat16)
    loaded, file = load_model(folder, "cpu"), folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.down_proj"
    save_file({**tensors, name: tensors[name].to(dtype)}, file, {"format": "pt"})
    known = Layout.of(loaded.architecture).architecture()
    with pytest.raises(SphereEditError, match="is quantised"):
        Checkpoint(str(folder), known).weight(name)
    with pytest.raises(SphereEditError, match=f"{name} is stored as (F8_E4M3|I8)"):
        load_model(folder, "cpu")


def test_experts_in_mxfp4(tmp_path):
    """As gpt-oss is published: two numbers a byte, 32 to a scale 2^(s − 127), output by input."""
    folder = save_mixture("gpt_oss", tmp_path / "model", torch.bfloat16)
    tensors, plain = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(16, (experts, outputs, inputs // 32, 32), generator=generator)
        scales = torch.randint(120, 126, (experts, outputs, inputs // 32), generator=generator)
        tensors[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
        values = FP4[codes] * torch.exp2(scales.float() - 127)[..., None]
        plain[name] = values.flatten(2).mT.contiguous().bfloat16()
    quantised(folder, MXFP4, tensors)
    assert len(plain) == 8
    compare(folder, MXFP4, plain)


# --- every configuration that was tried (`../shared/families`) ---------------------------------------------------------


@pytest.mark.slow
def test_parameters_of_every_family_are_read_as_the_model_has_them(shared, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(shared / "families")
    import zoo

    read = 0
    for family in zoo.Z:
        if family == "gemma3n":  # needs timm
            continue
        model = zoo.build(family)
        folder = tmp_path / family
        model.save_pretrained(folder)
        stored = StoredParameters(skeleton(str(folder), loader_of(read_config(folder), family)), stored_tensors(folder))
        for name, parameter in model.state_dict().items():
            if name not in model.all_tied_weights_keys:
                assert torch.equal(stored.read(name), parameter), (family, name)
                assert all(piece.tensor.content() == tensor_bytes(piece.of(parameter)) for piece in stored.pieces(name))
        read += 1
    assert read > 120
