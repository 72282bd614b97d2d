"""Exports are the source's own files but for the edited tensors; what a killed export leaves is found and removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import tiny, tiny_model
from sphere_edit import SphereEditError
from sphere_edit.exports.card import whole_card
from sphere_edit.exports.hf import write_hf
from sphere_edit.exports.manifest import Manifest
from sphere_edit.exports.shipment import Shipment
from sphere_edit.files import folder_in_place
from sphere_edit.models.loading import LoadedModel, load_model
from sphere_edit.models.source import Companions, stored_tensors, weight_files
from sphere_edit.models.spelling import both_config, both_tokenizer
from sphere_edit.models.weights import EditedWeights

CARD = "---\nlibrary_name: transformers\n---\n\n# Edited\n"
THETA = 100_000.0


def save_source(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model as a folder that transformers 4 could have written, in shards, with what comes with models."""
    model, tokenizer = tiny_model(family, dtype)
    model.save_pretrained(folder, max_shard_size="30KB")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None)
    if rope is not None and "rope_theta" in rope:
        config["rope_theta"] = THETA
    elif rope is not None:
        config |= {"rope_theta": THETA, "rope_local_base_freq": 10_000.0}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    if family == "gpt2":  # whose files leave out the name of the model around the layers
        for file in weight_files(folder):
            short = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
            save_file(short, file, {"format": "pt"})
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"] = {name.removeprefix("transformer."): file for name, file in index["weight_map"].items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("LICENSE", "USE_POLICY.md", "chat_template.jinja", "tokenizer.model", "NOTICE"):
        (folder / name).write_text(f"the text of {name}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("---\nlicense: mit\nmodel-index: []\n---\n# The original's card\n")
    return folder


def edited(source: Path | LoadedModel, dtype: str = "auto") -> tuple[LoadedModel, EditedWeights]:
    """A model two of whose matrices are changed."""
    loaded = source if isinstance(source, LoadedModel) else load_model(source, "cpu", dtype)
    weights = EditedWeights(
        loaded.model, loaded.architecture, [loaded.architecture.module_name(layer, "down") for layer in (1, 2)]
    )
    torch.manual_seed(1)
    for name in weights.names:
        weights.set(name, weights.original(name) + torch.randn_like(weights.original(name)) / 10)
    return loaded, weights


def export_model(loaded: LoadedModel, weights: EditedWeights, folder: Path, card: str, dtype=None) -> list[str]:
    return write_hf(Shipment(loaded, weights, lambda note: card), folder, dtype)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(torch.arange(3, 43)[None]).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3_text", "phi3", "gpt_neox"])
def test_only_the_bytes_of_edited_tensors_and_the_card_differ(family, tmp_path):
    source = save_source(family, tmp_path / "source")
    assert len(weight_files(source)) > 2
    loaded, weights = edited(source)
    assert export_model(loaded, weights, tmp_path / "out", CARD) == []
    before, after = contents(source), contents(tmp_path / "out")
    assert {*before, Manifest.NAME} == after.keys()
    tensors = stored_tensors(source)
    tails = [f"{name.split('.', 1)[-1]}.weight" for name in weights.names]
    places = [tensor for name, tensor in tensors.items() if name.endswith(tuple(tails))]
    assert len(places) == 2
    assert {name for name in before if before[name] != after[name]} == {"README.md", *(p.file.name for p in places)}
    for file in weight_files(source):
        cleared = {name: bytearray(side[file.name]) for name, side in (("before", before), ("after", after))}
        for place in places:
            if place.file == file:
                for content in cleared.values():
                    content[place.start : place.end] = bytes(place.end - place.start)
        assert cleared["before"] == cleared["after"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    ours = loaded.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_model_loaded_in_other_numbers_keeps_all_but_its_weights_and_says_so(tmp_path):
    source = save_source("llama", tmp_path / "source")
    loaded, weights = edited(source, "float32")
    (told,) = export_model(loaded, weights, tmp_path / "out", CARD)
    assert "loaded as float32, and its files are bfloat16" in told
    before, after = contents(source), contents(tmp_path / "out")
    same = {name for name in before if before[name] == after.get(name)}
    assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "LICENSE", "generation_config.json"} <= same
    old, new = json.loads(before["config.json"]), json.loads(after["config.json"])
    assert new == {**old, "torch_dtype": "float32"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in model.state_dict().items())


def test_other_numbers_can_be_asked_for_and_the_sources_own_are_its_files(tmp_path):
    """A model of bfloat16 files, edited in float32: as bfloat16 it is the source but for the edited tensors; as float16 it is cast."""
    source = save_source("llama", tmp_path / "source")
    loaded, weights = edited(source, "float32")
    assert export_model(loaded, weights, tmp_path / "own", CARD, torch.bfloat16) == []
    before, after = contents(source), contents(tmp_path / "own")
    assert before["config.json"] == after["config.json"]
    assert sum(before[name] != after.get(name) for name in before) <= 3, "two shards and the card"
    (told,) = export_model(loaded, weights, tmp_path / "half", CARD, torch.float16)
    assert "is wanted as float16, and its files are bfloat16" in told
    expected = loaded.model.state_dict()
    for folder, dtype in (("own", torch.bfloat16), ("half", torch.float16)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert model.dtype == dtype
        assert all(torch.equal(value, expected[name].to(dtype)) for name, value in model.state_dict().items())
    assert loaded.dtype == torch.float32, "the model in memory stays as it was"
    weights.set(weights.names[0], weights.original(weights.names[0]) * 1e6)
    with pytest.raises(SphereEditError, match="does not fit float16"):
        export_model(loaded, weights, tmp_path / "large", CARD, torch.float16)
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma3_text"])
def test_a_model_without_files_is_cast_too(family, tmp_path):
    loaded, weights = edited(tiny(family))
    export_model(loaded, weights, tmp_path / "out", CARD, torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = loaded.model.state_dict()
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in model.state_dict().items())


def test_weights_that_the_files_do_not_hold_so_are_written_anew(tmp_path):
    """Another program changed the files, or they hold the matrix in another form: nothing is written over blindly."""
    source = save_source("llama", tmp_path / "source")
    loaded, weights = edited(source)
    place = stored_tensors(source)[f"{weights.names[0]}.weight"]
    with place.file.open("rb+") as file:
        file.seek(place.start)
        file.write(b"\0\0")
    (told,) = export_model(loaded, weights, tmp_path / "out", CARD)
    assert "in another form" in told
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in model.state_dict().items())


def test_shards_that_are_gone_leave_a_whole_model_all_the_same(tmp_path):
    source = save_source("llama", tmp_path / "source")
    loaded, weights = edited(source)
    weight_files(source)[0].unlink()
    (told,) = export_model(loaded, weights, tmp_path / "out", CARD)
    assert "lacks 1 of the" in told
    assert load_model(tmp_path / "out", "cpu").fingerprint != loaded.fingerprint
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Paris") == loaded.tokenizer("Paris")


def test_a_model_without_files_is_written_for_both_transformers_and_names_no_path(tmp_path):
    loaded, weights = edited(tiny("llama"))
    loaded.model.config._name_or_path = str(tmp_path)
    (told,) = export_model(loaded, weights, tmp_path / "out", CARD)
    assert "written anew" in told
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert (
        json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    for name, content in contents(tmp_path / "out").items():
        assert str(tmp_path).encode() not in content, name
        assert b"local_files_only" not in content, name
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Paris") == loaded.tokenizer("Paris")


def test_pickles_code_other_weights_and_links_to_elsewhere_stay_behind(tmp_path):
    source = save_source("llama", tmp_path / "source")
    (tmp_path / "secret.json").write_text("{}")
    (source / "settings.json").symlink_to(tmp_path / "secret.json")
    (tmp_path / "secret.md").write_text("a secret")
    (source / "README.md").unlink()
    (source / "README.md").symlink_to(tmp_path / "secret.md")
    for name in ("pytorch_model.bin", "optimizer.pt", "consolidated.safetensors", "modeling_llama.py", "model.gguf"):
        (source / name).write_bytes(b"x")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "original").mkdir()
    loaded, weights = edited(source)
    (told,) = export_model(loaded, weights, tmp_path / "out", CARD)
    left = contents(source).keys() - contents(tmp_path / "out").keys()
    assert left == {
        "settings.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "optimizer.pt",
        "consolidated.safetensors",
        "modeling_llama.py",
        "model.gguf",
    }
    assert all(name in told for name in (*left, "original", "README.md"))
    assert "a secret" not in (tmp_path / "out" / "README.md").read_text()


def test_files_of_a_hub_cache_are_links_and_come_along(tmp_path):
    """A snapshot's files link to blobs beside it."""
    plain = save_source("llama", tmp_path / "plain")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    for path in plain.rglob("*"):
        if path.is_file():
            blob = tmp_path / "models--a--b" / "blobs" / path.name
            blob.write_bytes(path.read_bytes())
            link = snapshot / path.relative_to(plain)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    assert export_model(*edited(snapshot), tmp_path / "out", CARD) == []
    assert contents(tmp_path / "out").keys() == {*contents(plain), Manifest.NAME}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_the_card_keeps_licence_and_text_of_the_original(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, de]\nmodel-index: [{name: x}]\n---\n# Original\nIts text.\n"
    )
    card = whole_card(CARD, "maker/model", Companions((), (), tmp_path / "README.md"))
    front, text = card.removeprefix("---\n").split("---\n", 1)
    assert front.splitlines()[0] == "license: apache-2.0"
    assert "base_model: maker/model" in front
    assert "model-index" not in card, "what the original measured is not measured on the edited model"
    assert text.index("# Edited") < text.index("# Original\nIts text.")
    (tmp_path / "README.md").write_text("---\n*[&\n---\nText")
    assert whole_card(CARD, None, Companions((), (), tmp_path / "README.md")).startswith(
        "---\nlibrary_name: transformers\n---\n\n# Edited"
    )


def test_both_spellings_agree():
    old = both_config(
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}, "dtype": "bfloat16"}
    )
    assert (old["rope_theta"], old["torch_dtype"]) == (5e5, "bfloat16")
    assert old["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    kinds = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
    gemma = both_config({"rope_parameters": kinds})
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1e6, 1e4)
    assert "rope_scaling" not in gemma
    assert both_config({"n_embd": 3, "_name_or_path": "/home/me"}) == {"n_embd": 3}
    assert both_tokenizer(
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "is_local": True}
    ) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
    }


_WRITER = """
import sys, time
from pathlib import Path
from sphere_edit.files import folder_in_place
with folder_in_place(Path(sys.argv[1])) as folder:
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    print("ready", flush=True)
    time.sleep(60)
"""


def _writer(target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_what_a_killed_export_leaves_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path):
    killed, living = _writer(tmp_path / "one"), _writer(tmp_path / "two")
    try:
        _end(killed)
        assert len(list(tmp_path.glob(".one.*"))) == 2, "the folder and its lock"
        with folder_in_place(tmp_path / "three") as folder:
            (folder / "x").write_text("x")
        assert not list(tmp_path.glob(".one.*"))
        assert not list(tmp_path.glob(".three.*"))
        assert len(list(tmp_path.glob(".two.*"))) == 2
        assert (tmp_path / "three" / "x").is_file()
    finally:
        _end(living)


OLD = """
import sys, json, torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
found = {}
for folder in sys.argv[2:]:
    ids = AutoTokenizer.from_pretrained(folder)("The capital of France is Paris. Where is the Eiffel Tower?")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found[folder] = model(torch.arange(3, 43)[None]).logits
    found[folder + "#ids"] = torch.tensor(ids)
save_file(found, sys.argv[1])
"""


@pytest.mark.slow
def test_transformers_4_reads_exports_as_this_one_does(tmp_path, request):
    old = os.environ.get("SPHERE_EDIT_OLD_TRANSFORMERS")
    if not old:
        pytest.skip(
            "set SPHERE_EDIT_OLD_TRANSFORMERS to a folder made by: pip install --no-deps --target FOLDER "
            "'transformers<5' 'huggingface-hub<1' 'tokenizers<0.23'"
        )
    folders = []
    for family in ("llama", "gpt2", "gemma3_text", "phi3", "qwen3"):
        export_model(*edited(save_source(family, tmp_path / family)), tmp_path / f"{family}-out", CARD)
        export_model(*edited(tiny(family)), tmp_path / f"{family}-anew", CARD)
        folders += [tmp_path / f"{family}-out", tmp_path / f"{family}-anew"]
    assert export_model(*edited(request.getfixturevalue("smollm2")), tmp_path / "smollm2-out", CARD) == []
    folders.append(tmp_path / "smollm2-out")
    surroundings = {**os.environ, "PYTHONPATH": old}
    command = [sys.executable, "-c", OLD, str(tmp_path / "logits"), *map(str, folders)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "logits")
    for folder in folders:
        torch.testing.assert_close(
            theirs[str(folder)], logits(folder, torch.float32), rtol=1e-5, atol=1e-5, msg=str(folder)
        )
        ids = AutoTokenizer.from_pretrained(folder)("The capital of France is Paris. Where is the Eiffel Tower?")
        assert theirs[f"{folder}#ids"].tolist() == ids["input_ids"], folder
