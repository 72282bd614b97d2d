"""Weights that are not what they seem are told from their files, in a sentence, before anything is loaded."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from families import save_tiny
from ggufs import save_gguf
from sphere_edit.errors import SphereEditError
from sphere_edit.exports.hf import write_hf
from sphere_edit.exports.shipment import Shipment
from sphere_edit.models.checkpoint import Checkpoint
from sphere_edit.models.loading import load_model, peak_memory
from sphere_edit.models.soundness import is_scale
from sphere_edit.models.weights import EditedWeights
from sphere_edit.progress import Quiet

MATRIX = "model.layers.1.mlp.down_proj"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_tiny("llama", tmp_path / "model", torch.bfloat16)


def configure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def store(folder: Path, **tensors: torch.Tensor) -> None:
    """Put tensors of the matrix into the folder's only shard: ``weight``, ``weight_scale``, …"""
    file = folder / "model.safetensors"
    named = {f"{MATRIX}.{name}": tensor for name, tensor in tensors.items()}
    save_file({**load_file(file), **named}, file, {"format": "pt"})


def loading(folder: Path) -> str:
    """What loading ends in."""
    with pytest.raises(SphereEditError) as caught:
        load_model(folder, "cpu")
    return str(caught.value)


def test_a_plain_model_loads(folder):
    assert load_model(folder, "cpu").dtype == torch.bfloat16
    assert Checkpoint(str(folder)).weight(MATRIX).shape == (32, 64)


@pytest.mark.parametrize("where", ["config.json", "a part of it", "hf_quant_config.json"])
def test_a_method_of_quantisation_that_transformers_does_not_know(folder, where):
    found = {"quant_method": "modelopt", "quant_algo": "FP8"}
    if where == "config.json":
        configure(folder, quantization_config=found, _name_or_path="maker/original")
    elif where == "a part of it":
        configure(folder, text_config={"quantization_config": found}, base_model="maker/original")
    else:
        configure(folder, _name_or_path="maker/original")
        (folder / where).write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {}}))
    said = loading(folder)
    assert "'modelopt'" in said
    assert "'maker/original'" in said
    assert "unquantised original" in said


LOSSY: dict[str, dict[str, object]] = {
    "bitsandbytes": {"load_in_4bit": True, "quant_method": "bitsandbytes"},
    "bitnet": {},
    **{name: {"bits": 4, "group_size": 32} for name in ("gptq", "awq", "hqq", "quanto", "torchao", "fbgemm_fp8")},
    **{name: {} for name in ("compressed-tensors", "aqlm", "nvfp4", "")},
}


@pytest.mark.parametrize("method", LOSSY)
@pytest.mark.parametrize("nested", [False, True])
def test_methods_that_cannot_be_undone_are_refused_from_the_configuration(folder, method, nested):
    """No advice to install a library, with which the model would be refused all the same."""
    found = {**({"quant_method": method} if method else {}), **LOSSY[method]}
    configure(folder, **({"text_config": {"quantization_config": found}} if nested else {"quantization_config": found}))
    configure(folder, _name_or_path="maker/original")
    said = loading(folder)
    assert (
        f"is quantised, by '{method}'" in said if method else "by a method that its configuration does not name" in said
    )
    assert "'maker/original'" in said
    assert "install" not in said


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def store_fp8(folder: Path, block: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """Store every projection as float8 with a scale a block, or one alone; what they are worth in bfloat16."""
    file = folder / "model.safetensors"
    tensors, plain = load_file(file), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        rows, columns = block or weight.shape
        scales = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                place = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
                weight[place] *= 10.0 ** (row - column)  # the blocks differ, so that a wrong scale shows
                scales[row, column] = weight[place].abs().max() / 448
        spread = scales.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)
        spread = spread[:, : weight.shape[1]]
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        plain[name] = (tensors[name].float() * spread).bfloat16()
    save_file(tensors, file, {"format": "pt"})
    configure(folder, quantization_config={**FP8, "weight_block_size": None if block is None else list(block)})
    return plain


class Telling(Quiet):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str, style: str = "") -> None:
        self.said.append(text)


@pytest.mark.parametrize("block", [(128, 128), (16, 16), (24, 20), None])
def test_fp8_is_turned_into_plain_weights_and_exported_as_such(folder, tmp_path, block):
    """Also with blocks that are cut short by the matrix's edge: [32, 64] in blocks of [24, 20]."""
    plain, reporter = store_fp8(folder, block), Telling()
    loaded = load_model(folder, "cpu", reporter=reporter)
    assert len(plain) == 28
    for name, weight in plain.items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    size = sum(weight.numel() for weight in loaded.model.parameters()) * 2 / 1e9
    (told,) = [said for said in reporter.said if not said.startswith("Loading")]
    assert f"is stored as fp8; it is turned into bfloat16, takes {size:,.1f} GB" in told
    assert torch.equal(Checkpoint(str(folder)).weight(MATRIX), plain[f"{MATRIX}.weight"].float())
    weights = EditedWeights(loaded.model, loaded.architecture, [MATRIX])
    (told,) = write_hf(Shipment(loaded, weights, lambda note: "# Card"), tmp_path / "out")
    assert "its files are F8_E4M3" in told
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert load_model(tmp_path / "out", "cpu").fingerprint == loaded.fingerprint


def test_fp8_is_turned_into_the_dtype_that_was_asked_for(folder):
    plain = store_fp8(folder, (16, 16))
    loaded = load_model(folder, "cpu", "float32")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.model.state_dict()[f"{MATRIX}.weight"].bfloat16(), plain[f"{MATRIX}.weight"])


def test_fp8_without_the_scales_of_a_matrix(folder):
    store_fp8(folder, (16, 16))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{MATRIX}.weight_scale_inv"]
    save_file(tensors, file, {"format": "pt"})
    assert f"and no scales say how to read {MATRIX}.weight" in loading(folder)
    assert f"and no scales say how to read {MATRIX}" in energy(folder)


@pytest.mark.parametrize("block", [[24], [24, "x"], {"a": 1}])
def test_fp8_whose_blocks_do_not_fit(folder, block):
    store_fp8(folder, (24, 20))
    configure(folder, quantization_config={**FP8, "weight_block_size": block})
    for said in (loading(folder), energy(folder)):
        assert str(folder) in said
    assert "are not what its config.json says" in said


def test_a_quantised_shard_that_is_cut_short(folder):
    store_fp8(folder, (16, 16))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "is cut short" in loading(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.float64])
def test_stored_numbers_that_are_no_plain_floats(folder, dtype):
    store(folder, weight=torch.ones(32, 64).to(dtype))
    for said in (loading(folder), energy(folder)):
        assert f"{MATRIX}.weight is stored as" in said
        assert "float32, bfloat16, float16" in said


def energy(folder: Path) -> str:
    with pytest.raises(SphereEditError) as caught:
        Checkpoint(str(folder)).weight(MATRIX)
    return str(caught.value)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "input_scale", "weight_zero_point", "SCB"])
def test_scales_that_the_model_does_not_take(folder, name):
    store(folder, **{name: torch.ones(1)})
    for said in (loading(folder), energy(folder)):
        assert f"{MATRIX}.{name}" in said
        assert "quantised" in said


def test_packed_weights_in_the_place_of_a_matrix(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(f"{MATRIX}.weight")
    packed = {f"{MATRIX}.qweight": torch.ones(4, 4, dtype=torch.int32), f"{MATRIX}.scales": torch.ones(4)}
    save_file({**tensors, **packed}, file, {"format": "pt"})
    assert "quantised" in loading(folder)
    assert f"quantised, and holds {MATRIX}.qweight" in energy(folder)


def test_names_of_scales_and_of_other_tensors():
    scales = [
        "a.weight_scale",
        "a.weight.absmax",
        "a.weight.quant_state.bitsandbytes__nf4",
        "a.g_idx",
        "a.qzeros",
        "a.SCB",
    ]
    scales += ["a.k_scale", "a.weight_quantizer._amax", "a.scales", "a.weight_scale_2", "a.weight_packed"]
    assert all(map(is_scale, scales))
    others = ["a.mlp.down_proj.weight", "a.bias", "a.input_layernorm.weight", "a.rotary_emb.inv_freq", "lm_head.weight"]
    assert not any(map(is_scale, others))


def test_an_adapter_beside_the_weights_and_one_alone(folder, tmp_path):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "maker/base"}))
    assert "merge_and_unload" in loading(folder)
    (folder / "config.json").unlink()
    said = loading(folder)
    assert "is a LoRA adapter of 'maker/base'" in said
    assert "merge_and_unload" in said


def test_adapter_weights_without_their_configuration(folder):
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    assert "adapter_model.safetensors, a LoRA adapter, which would be left out" in loading(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pointers_of_git_lfs(folder, name):
    (folder / name).write_text(POINTER)
    said = loading(folder)
    assert f"{name} is a Git LFS pointer" in said
    assert "git lfs pull" in said


def test_a_gguf_file_that_is_a_pointer(tmp_path):
    (tmp_path / "model.gguf").write_text(POINTER)
    assert "git lfs pull" in loading(tmp_path / "model.gguf")


def test_pickled_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = loading(folder)
    assert "pytorch_model.bin is a pickle" in said
    assert "save_pretrained(OTHER)" in said
    assert "is a pickle" in loading(folder / "pytorch_model.bin")


def test_one_file_of_a_model(folder):
    assert "give the folder" in loading(folder / "model.safetensors")


def test_a_shard_that_is_cut_short(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert f"is cut short: {len(whole) - 100} of {len(whole)} bytes" in loading(folder)
    for damaged in (whole[:5], b"", b"\xff" * 1000, whole[:8] + b"x" + whole[9:]):
        file.write_bytes(damaged)
        assert "no safetensors file, or a damaged one" in loading(folder)


def test_a_shard_that_is_not_there_or_elsewhere(folder):
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index.write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    assert "lacks 1 of the 2 shards" in loading(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    assert "outside its folder" in loading(folder)
    for damaged in ("{}", '{"weight_map": {"a": 1}}', "[]", "{"):
        index.write_text(damaged)
        assert "is damaged" in loading(folder)


# --- a configuration that describes what is not there -------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_hidden_layers": 2**63}, "says num_hidden_layers: 9223372036854775808, where 1,024 is the most"),
        ({"text_config": {"n_layer": 10**30}}, "says n_layer: 1000000000000000000000000000000"),
        ({"num_labels": 10**12}, "says num_labels"),
        ({"model_type": ["llama"]}, "names no model_type"),
        ({"num_hidden_layers": 900}, "lacks weights that its config.json describes"),
        ({"intermediate_size": 10**12}, "lacks weights that its config.json describes"),
        ({"head_dim": 10**9}, "lacks weights that its config.json describes"),
        ({"vocab_size": 10**11}, "lacks weights that its config.json describes"),
    ],
)
def test_sizes_that_no_file_holds_are_refused_before_anything_is_made(folder, said, message):
    configure(folder, **said)
    started, before = time.monotonic(), peak_memory(torch.device("cpu"))
    assert message in loading(folder)
    assert time.monotonic() - started < 10
    assert (peak_memory(torch.device("cpu")) or 0) - (before or 0) < 1 << 30


def test_tables_that_a_configuration_asks_for_are_bounded(tmp_path):
    folder = save_tiny("gptj", tmp_path / "model")
    configure(folder, n_positions=10**9)
    assert "asks for tables of" in loading(folder)


def test_extra_tokens_are_bounded(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_ids": 10**9}))
    assert "tokenizer_config.json of model" in loading(folder)


def test_quantised_weights_of_a_known_method_are_bounded_too(folder):
    """Where a byte may hold eight weights, and no more."""
    configure(folder, quantization_config={"quant_method": "fp8"}, intermediate_size=10**9)
    assert "lacks weights that its config.json describes" in loading(folder)


def test_a_hub_model_is_checked_by_its_files_before_it_is_built(folder, tmp_path, monkeypatch):
    """By a cache made by hand, as if it had been fetched."""
    commit = "0" * 40
    home = tmp_path / "hub" / "models--maker--model"
    configure(folder, num_hidden_layers=900)
    shutil.copytree(folder, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SphereEditError, match="lacks weights that its config.json describes"):
        load_model("maker/model", "cpu")
    configure(home / "snapshots" / commit, num_hidden_layers=4)
    assert load_model("maker/model", "cpu").source == "maker/model"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("llama.block_count", 4_000_000_000, r"says llama.block_count: 4000000000, where 1,024 is the most"),
        ("llama.block_count", 500, "lacks weights that its header describes"),
        ("llama.feed_forward_length", 1_000_000_000, "lacks weights that its header describes"),
        ("llama.feed_forward_length", None, None),
    ],
)
def test_a_gguf_header_that_describes_what_is_not_there_is_refused(folder, tmp_path, field, value, message):
    file = save_gguf(folder, tmp_path / "model.gguf", "F32")
    if value is None:
        assert load_model(str(file), "cpu").source == str(file)
        return
    opened = GGUFReader(file, "r+")
    header = opened.fields[field]
    header.parts[header.data[0]][0] = value
    opened.data.flush()
    with pytest.raises(SphereEditError, match=message):
        load_model(str(file), "cpu")
