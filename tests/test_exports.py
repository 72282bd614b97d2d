"""Every form of export, from runs of tiny models: what it holds, what loads it, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, quants
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import fact_records
from families import FAMILIES, save_tiny
from ggufs import save_experts, save_gguf
from hub import TOKEN, Repo, hub
from mixtures import save_mixture
from sphere_edit import SphereEditError
from sphere_edit import editor as editor_module
from sphere_edit.cli import app
from sphere_edit.editor import Editor, opened
from sphere_edit.exports import delta
from sphere_edit.exports.forms import Wanted, write
from sphere_edit.exports.manifest import file_digest
from sphere_edit.files import write_tensors
from sphere_edit.models.loading import load_model
from sphere_edit.progress import Quiet
from sphere_edit.runs.folder import RunFolder
from torture import in_child

QUICK: dict[str, Any] = {
    "batch_size": 2,
    "layers": [1, 2],
    "targets": {"steps": 3, "lr": 0.3},
    "moments": {"sampled_tokens": 256},
    "tokens_per_batch": 256,
    "evaluation": {"generation": "off"},
}
OPTIONS = {"alphaedit": {"l2": 0.1, "null_space": "quantile", "null_space_threshold": 0.8}}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Finished runs of four facts in two batches, each made once: its folder, beside that of its model."""

    @cache
    def made(method: str = "alphaedit", family: str = "llama", dtype: str = "float32") -> Path:
        place = tmp_path_factory.mktemp("place")
        model = save_tiny(family, place / "model", getattr(torch, dtype))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPHERE_EDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
            options = {**QUICK, "method": method, "options": OPTIONS.get(method, {})}
            editor = Editor.from_pretrained(model, place / "run", reporter=Quiet(), **options)
            editor.edit(fact_records(4))
            editor.close()
        return place / "run"

    return made


def command(*arguments: object) -> str:
    """What a command says; its error is raised."""
    result = CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- delta --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "family", "dtype"),
    [
        ("alphaedit", "llama", "float32"),
        ("rect", "llama", "float32"),
        ("prune", "llama", "bfloat16"),
        ("alphaedit", "gpt2", "bfloat16"),
    ],
)
def test_a_delta_gives_the_bits_of_the_whole_export_on_a_machine_that_never_saw_the_run(
    run_of, tmp_path, method, family, dtype
):
    run = run_of(method, family, dtype)
    command("export", run, "-o", tmp_path / "whole")
    said = command("export", run, "--as", "delta", "-o", tmp_path / "delta")
    assert "shows which subjects were edited" in said
    base = shutil.copytree(run.parent / "model", tmp_path / "elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPHERE_EDIT_CACHE", str(tmp_path / "no-cache"))
        command("apply", tmp_path / "delta", base, "-o", tmp_path / "applied")
    whole, applied = contents(tmp_path / "whole"), contents(tmp_path / "applied")
    assert whole.keys() == applied.keys()
    for name, content in whole.items():
        if name != "sphere_edit.json":  # which names the base as each found it
            assert applied[name] == content, name
    ours, theirs = (json.loads(side["sphere_edit.json"]) for side in (whole, applied))
    assert {**ours, "base": None} == {**theirs, "base": None}
    assert "its weights are those of" in command("verify", tmp_path / "delta", "--against", run)


def test_factors_are_kept_where_they_are_smaller_and_few_entries_beside_them(run_of, tmp_path):
    command("export", run_of(), "--as", "delta", "-o", tmp_path / "thin")
    command("export", run_of("rect"), "--as", "delta", "-o", tmp_path / "full")
    thin, full = (load_file(tmp_path / name / delta.FILE) for name in ("thin", "full"))
    assert any(name.endswith("/left") for name in thin)
    assert not any(name.endswith("/delta") for name in thin)
    assert all(name.endswith(("/delta", "/where", "/values")) for name in full)
    for tensors in (thin, full):
        entries = sum(value.numel() for name, value in tensors.items() if name.endswith("/values"))
        assert entries < 0.25 * 2 * 32 * 64


def test_the_sum_of_products_is_that_of_float64_and_does_not_depend_on_blocks(monkeypatch):
    torch.manual_seed(0)
    weight, left, right = torch.randn(70, 33), torch.randn(70, 9), torch.randn(9, 33)
    parts = {"left": left, "right": right, "batches": torch.tensor([4, 5])}
    none = {"where": torch.zeros(0, dtype=torch.int64), "values": torch.zeros(0)}
    found = delta.rebuilt(weight, {**parts, **none}, torch.float32)
    first = (weight.double() + left[:, :4].double() @ right[:4].double()).float()
    torch.testing.assert_close(
        found, (first.double() + left[:, 4:].double() @ right[4:].double()).float(), rtol=1e-6, atol=0
    )
    monkeypatch.setattr(delta, "_ROWS", 7)
    assert torch.equal(found, delta.rebuilt(weight, {**parts, **none}, torch.float32))
    experts = {**parts, **none, "right": torch.stack([right, 2 * right])}
    both = delta.rebuilt(torch.stack([weight, weight]), experts, torch.float32)
    assert torch.equal(both[0], found)
    assert torch.equal(both[1], delta.rebuilt(weight, {**parts, **none, "right": 2 * right}, torch.float32))
    fixed = {"where": torch.tensor([5]), "values": torch.tensor([3.5])}
    assert delta.rebuilt(weight, {**parts, **fixed}, torch.float32).flatten()[5] == 3.5


def test_a_wrong_base_a_damaged_delta_and_a_taken_folder_are_refused(run_of, tmp_path):
    command("export", run_of(), "--as", "delta", "-o", tmp_path / "delta")
    other = save_tiny("llama", tmp_path / "other", seed=1)
    with pytest.raises(SphereEditError, match="is not the model that .* was made from"):
        command("apply", tmp_path / "delta", other, "-o", tmp_path / "out")
    base = run_of().parent / "model"
    with pytest.raises(SphereEditError, match="exists already"):
        command("apply", tmp_path / "delta", base, "-o", tmp_path / "other")
    with pytest.raises(SphereEditError, match="is no export"):
        command("apply", tmp_path / "other", base, "-o", tmp_path / "out")
    command("export", run_of(), "-o", tmp_path / "whole")
    with pytest.raises(SphereEditError, match="is an export as hf, not a delta"):
        command("apply", tmp_path / "whole", base, "-o", tmp_path / "out")
    with pytest.raises(SphereEditError, match="--dtype is for --as hf, not for --as delta"):
        command("export", run_of(), "--as", "delta", "--dtype", "bfloat16", "-o", tmp_path / "out")
    path = tmp_path / "delta" / delta.FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(SphereEditError, match="is not what was written there"):
        command("apply", tmp_path / "delta", base, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- lora ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "family", "dtype"),
    [("alphaedit", "llama", "float32"), ("alphaedit", "gpt2", "float32"), ("prune", "llama", "bfloat16")],
)
def test_peft_loads_the_adapter_and_at_full_rank_gives_the_runs_logits(run_of, tmp_path, method, family, dtype):
    run, ids = run_of(method, family, dtype), torch.arange(3, 43)[None]
    command("export", run, "-o", tmp_path / "whole")

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(ids).logits

    def loaded(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )  # so that no rounding of bfloat16 is compared

    wanted, before = logits(loaded(tmp_path / "whole")), logits(loaded(run.parent / "model"))
    distances = []
    for rank in (2, 32):
        command("export", run, "--as", "lora", "--rank", rank, "-o", tmp_path / f"rank-{rank}")
        found = logits(PeftModel.from_pretrained(loaded(run.parent / "model"), tmp_path / f"rank-{rank}"))
        distances.append(float((found - wanted).norm() / (before - wanted).norm()))
        said = command("verify", tmp_path / f"rank-{rank}", "--against", run)
        assert "its weights are those of" in said
    assert distances[1] < 1e-4
    assert distances[1] < distances[0]  # how near it is elsewhere than at the facts is not said


def test_an_adapter_that_was_not_made_of_the_run_is_told(run_of, tmp_path):
    """Its files are whole, and its manifest names the run; but its product is elsewhere."""
    out = tmp_path / "out"
    command("export", run_of(), "--as", "lora", "--rank", 4, "-o", out)
    tensors = load_file(out / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    write_tensors(out / "adapter_model.safetensors", {**tensors, name: 1.01 * tensors[name]})
    manifest = json.loads((out / "sphere_edit.json").read_text())
    manifest["files"]["adapter_model.safetensors"] = file_digest(out / "adapter_model.safetensors")
    (out / "sphere_edit.json").write_text(json.dumps(manifest))
    assert "is whole" in command("verify", out)
    result = CliRunner().invoke(app, ["verify", str(out), "--against", str(run_of())], env={"COLUMNS": "300"})
    assert "was not made of what the run changed" in result.output
    assert result.exit_code == 4


def test_an_adapter_keeps_the_rules_of_vllm(run_of, tmp_path):
    """As its loader reads them: full names of linear modules, one rank, no bias, no saved modules, no DoRA, no rank scaling."""
    command("export", run_of(), "--as", "lora", "--rank", 8, "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"], config["peft_type"]) == (8, 8, "none", "LORA")
    assert not any(config[name] for name in ("modules_to_save", "use_dora", "use_rslora", "lora_bias", "rank_pattern"))
    matrices = json.loads((run_of() / "config.json").read_text())["matrices"]
    assert config["target_modules"] == matrices
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(set(modes.values())) == 1, "a server of another user reads the tensors too"
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.{name}.lora_{part}.weight" for name in matrices for part in "AB"}
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    said = command("export", run_of(), "--as", "lora", "--rank", 3, "-o", tmp_path / "odd")
    assert "Rank 3 is not one of vLLM's" in said
    assert "--max-lora-rank 8" in said


def test_without_a_rank_the_least_within_the_points_is_taken_and_all_tried_are_told(run_of, tmp_path):
    command("export", run_of(), "--as", "lora", "--within", 0, "--measure", "-o", tmp_path / "near")
    command("export", run_of(), "--as", "lora", "--within", 1000, "-o", tmp_path / "far")
    near, far = (json.loads((tmp_path / name / "sphere_edit.json").read_text())["details"] for name in ("near", "far"))
    assert far["rank"] == 8
    assert list(far["measured"]) == ["the whole edit", "rank 8"]
    assert near["rank"] >= 8
    assert [name for name in near["measured"] if name.startswith("rank")][-1] == f"rank {near['rank']}, loaded by PEFT"
    metrics = json.loads((run_of() / "metrics.json").read_text())["edited"]
    for name in ("efficacy_strict", "specificity", "perplexity"):
        assert near["measured"]["the whole edit"][name] == pytest.approx(metrics[name], rel=1e-5)
        merged, loaded = (near["measured"][f"rank {near['rank']}{how}"][name] for how in ("", ", loaded by PEFT"))
        assert merged == pytest.approx(loaded, rel=1e-3)
    card = (tmp_path / "near" / "README.md").read_text()
    assert f"| the whole edit | rank {near['rank']}" in card or "| the whole edit | rank 8" in card
    with opened(run_of(), Quiet(), only_to_read=True) as editor:
        before = {name: editor.weights.deployed(name) for name in editor.weights.names}
        editor.export(tmp_path / "again", "lora", within=1000.0, measure=True)
        assert all(torch.equal(editor.weights.deployed(name), weight) for name, weight in before.items())
        assert not [name for name, _ in editor.model.named_modules() if "lora" in name], "PEFT is gone again"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--rank", 0], "a rank is 1 or more; 0 is not"),
        (["--rank", 33], "a rank is from 1 to 32, which leaves nothing out; 33 is not"),
        (["--rank", 8, "--within", 2], "give one of them"),
        (["--dtype", "bfloat16"], "--dtype is for --as hf, not for --as lora"),
    ],
)
def test_what_cannot_be_asked_of_an_adapter_is_told(run_of, tmp_path, asked, told):
    with pytest.raises(SphereEditError, match=told):
        command("export", run_of(), "--as", "lora", *asked, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_run_without_facts_is_refused(run_of, tmp_path):
    copy = shutil.copytree(run_of(), tmp_path / "run")
    command("rollback", copy, "--to", 0)
    with pytest.raises(SphereEditError, match="this run knows no facts now"):
        command("export", copy, "--as", "lora", "--rank", 4, "-o", tmp_path / "out")


def test_without_peft_the_command_says_what_to_install(run_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SphereEditError, match=r"pip install 'sphere-edit\[export\]'"):
        command("export", run_of(), "--as", "lora", "--rank", 8, "-o", tmp_path / "out")


# --- gguf ---------------------------------------------------------------------------------------------------------


def told(file: Path) -> tuple[dict[str, bytes], dict[str, tuple[str, bytes]]]:
    """A GGUF file's metadata, and its tensors with their types."""
    reader = GGUFReader(file)
    fields = {name: b"".join(part.tobytes() for part in field.parts) for name, field in reader.fields.items()}
    return fields, {one.name: (one.tensor_type.name, one.data.tobytes()) for one in reader.tensors}


@pytest.mark.parametrize(
    ("kind", "becomes"), [("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"), ("Q8_0", "Q8_0"), ("Q4_1", "Q8_0")]
)
def test_only_the_edited_tensors_of_a_gguf_file_are_replaced_and_it_loads_with_them(run_of, tmp_path, kind, becomes):
    run = run_of()
    base = save_gguf(run.parent / "model", tmp_path / f"{kind}.gguf", kind)
    measure = ["--measure"] if kind in ("F32", "F16") else []
    said = command("export", run, "--as", "gguf", "--base", base, *measure, "-o", tmp_path / "out")
    file = tmp_path / "out" / f"{kind}-edited.gguf"
    assert ("are Q8_0 now" in said) == (kind == "Q4_1")
    (fields, before), (same_fields, after) = told(base), told(file)
    assert fields == same_fields
    assert list(before) == list(after)
    matrices = json.loads((run / "config.json").read_text())["matrices"]
    edited = {f"blk.{name.split('.')[2]}.ffn_down.weight": name for name in matrices}
    assert {name for name in before if before[name] != after[name]} == edited.keys()
    if kind == becomes:
        assert file.stat().st_size == base.stat().st_size
    loaded = load_model(file, "cpu")
    with opened(run, Quiet(), only_to_read=True) as editor:
        for stored, name in edited.items():
            assert after[stored][0] == becomes
            wanted, found = editor.weights.deployed(name), loaded.model.get_submodule(name).weight.detach()
            rounding = {"F32": 0.0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 1e-2}[becomes]
            assert float((found - wanted).norm()) <= rounding * float(wanted.norm())
    assert "its weights are those of" in command("verify", tmp_path / "out", "--against", run)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: gguf" in card
    if measure:
        row = next(line for line in card.splitlines() if line.startswith("| Perplexity") and line.count("|") == 3)
        metrics = json.loads((run / "metrics.json").read_text())["edited"]
        assert float(row.split("|")[2]) == pytest.approx(metrics["perplexity"], abs=0.011 if kind == "F32" else 0.05)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_a_run_of_a_file_in_k_quants_leaves_as_that_file_with_the_edited_tensors_in_q8_0(tmp_path, monkeypatch, kind):
    """The file is the model that is edited; all other tensors of it keep their K-quants."""
    config, tokenizer = FAMILIES["llama"]
    monkeypatch.setitem(FAMILIES, "llama", ({**config, "intermediate_size": 256}, tokenizer))
    base = save_gguf(save_tiny("llama", tmp_path / "model"), tmp_path / "base.gguf", kind)
    monkeypatch.setenv("SPHERE_EDIT_CACHE", str(tmp_path / "cache"))
    editor = Editor.from_pretrained(base, tmp_path / "run", reporter=Quiet(), **{**QUICK, "method": "memit"})
    editor.edit(fact_records(2))
    wanted = {name: editor.weights.deployed(name) for name in editor.weights.names}
    editor.close()
    said = command("export", tmp_path / "run", "--as", "gguf", "-o", tmp_path / "out")
    assert "2 tensors of base.gguf round more coarsely than an edit changes, and are Q8_0 now" in said
    (fields, before), (same_fields, after) = told(base), told(tmp_path / "out" / "base-edited.gguf")
    edited = {f"blk.{name.split('.')[2]}.ffn_down.weight" for name in wanted}
    assert fields == same_fields
    assert {name for name in before if before[name] != after[name]} == edited
    assert {before[name][0] for name in edited} == {kind}
    assert sorted(kept for kept, _ in after.values()).count(kind) == 2, "the other two layers' are as they were"
    loaded = load_model(tmp_path / "out" / "base-edited.gguf", "cpu")
    for name, weight in wanted.items():
        found = loaded.model.get_submodule(name).weight.detach()
        assert float((found - weight).norm()) <= 1e-2 * float(weight.norm())
    assert "its weights are those of" in command("verify", tmp_path / "out", "--against", tmp_path / "run")


def test_a_gguf_file_of_another_model_and_what_is_none_are_refused(run_of, tmp_path):
    run = run_of()

    def refused(base: object, message: str) -> None:
        with pytest.raises(SphereEditError, match=message):
            command("export", run, "--as", "gguf", *(["--base", base] if base else []), "-o", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    other = save_gguf(save_tiny("llama", tmp_path / "other", seed=1), tmp_path / "other.gguf", "F16")
    refused(other, "is of another model: blk.1.ffn_down.weight .* away from model.layers.1")
    refused(None, "needs --base FILE.gguf")
    refused(tmp_path / "gone.gguf", "there is no file")
    (tmp_path / "text.gguf").write_text("GGUF")
    refused(tmp_path / "text.gguf", "cannot be read as GGUF")
    right = save_gguf(run.parent / "model", tmp_path / "right.gguf", "F16")
    half = tmp_path / "half.gguf"
    half.write_bytes(right.read_bytes()[: right.stat().st_size // 2])
    refused(half, "cannot be read as GGUF")
    embedding = tmp_path / "embedding.gguf"
    data = bytearray(right.read_bytes())
    tensor = next(one for one in GGUFReader(right).tensors if one.name == "token_embd.weight")
    data[tensor.data_offset : tensor.data_offset + tensor.n_bytes // 2] = bytes(tensor.n_bytes // 2)
    embedding.write_bytes(bytes(data))
    refused(embedding, "away from the token embedding")


# --- push ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A hub on this machine, in the place of the real one."""
    from huggingface_hub import constants

    with hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_an_export_is_pushed_whole_and_private_and_the_next_replaces_it(run_of, tmp_path, stand_in):
    said = command("export", run_of(), "--push", "ada/edited", "-o", tmp_path / "whole")
    assert f"{stand_in.url}/ada/edited/commit" in said
    repo = stand_in.repos["ada/edited"]
    assert repo.private
    assert repo.commits == ["Edited model as hf, after batch 2"]
    assert {name: data for name, data in repo.files.items() if name != ".gitattributes"} == contents(tmp_path / "whole")
    command("export", run_of(), "--as", "delta", "--push", "ada/edited", "-o", tmp_path / "delta")
    assert repo.files.keys() - {".gitattributes"} == contents(tmp_path / "delta").keys()
    command("export", run_of(), "--as", "delta", "--push", "ada/seen", "--public", "-o", tmp_path / "seen")
    assert not stand_in.repos["ada/seen"].private


@pytest.mark.parametrize(
    ("name", "token", "told"),
    [
        ("ada/edited", "", "takes nothing without a token: run hf auth login, or set HF_TOKEN"),
        ("ada/edited", "hf_other", "does not take this token"),
        ("edited", TOKEN, "takes owner/name, not 'edited'"),
        ("ada/--x", TOKEN, "is no name for the hub"),
        ("ada/theirs", TOKEN, "holds something that is no export of sphere-edit"),
        ("ada/public", TOKEN, "is public; add --public"),
    ],
)
def test_a_push_that_would_fail_is_refused_before_anything_is_written(
    run_of, tmp_path, stand_in, monkeypatch, name, token, told
):
    monkeypatch.setenv("HF_TOKEN", token)
    stand_in.repos["ada/theirs"] = Repo(True, {"model.safetensors": b"x"})
    stand_in.repos["ada/public"] = Repo(False, {"sphere_edit.json": b"{}"})
    with pytest.raises(SphereEditError, match=told):
        command("export", run_of(), "--as", "delta", "--push", name, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "ada/edited" not in stand_in.repos


def test_a_push_that_fails_on_the_way_leaves_the_export_and_says_how_to_send_it(
    run_of, tmp_path, stand_in, monkeypatch
):
    stand_in.failing = "/commit/"
    with pytest.raises(SphereEditError, match="hf upload ada/edited"):
        command("export", run_of(), "--as", "delta", "--push", "ada/edited", "-o", tmp_path / "out")
    assert "is whole" in command("verify", tmp_path / "out")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SphereEditError, match="cannot be reached|could not be sent"):
        command("export", run_of(), "--as", "delta", "--push", "ada/edited", "-o", tmp_path / "other")
    with pytest.raises(SphereEditError, match="add --push owner/name"):
        command("export", run_of(), "--public", "-o", tmp_path / "other")


# --- every form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hf", "delta", "lora", "gguf"])
def test_a_target_that_cannot_be_written_or_is_taken_is_told_before_the_model_is_loaded(
    run_of, tmp_path, monkeypatch, form
):
    monkeypatch.setattr(editor_module, "session_of", lambda *args: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SphereEditError, match="exists already"):
        command("export", run_of(), "--as", form, "-o", tmp_path / "file")
    with pytest.raises(SphereEditError, match="could not be written"):
        command("export", run_of(), "--as", form, "-o", tmp_path / "file" / "out")
    real = tempfile.TemporaryFile

    def refused(*args: Any, **options: Any) -> Any:
        if options.get("dir") == tmp_path / "read-only":
            raise OSError(30, "Read-only file system")
        return real(*args, **options)

    (tmp_path / "read-only").mkdir()
    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(SphereEditError, match="Read-only file system"):
        command("export", run_of(), "--as", form, "-o", tmp_path / "read-only" / "out")
    assert not list((tmp_path / "read-only").iterdir())


def test_an_export_of_an_export_has_a_manifest_of_its_own(run_of, tmp_path):
    """The whole model that came out is edited again: what the first export said of itself does not come along."""
    command("export", run_of(), "-o", tmp_path / "first")
    options = {**QUICK, "method": "memit"}
    editor = Editor.from_pretrained(tmp_path / "first", tmp_path / "run", reporter=Quiet(), **options)
    editor.edit(fact_records(1, start=6))
    editor.export(tmp_path / "second")
    editor.close()
    first, second = (json.loads((tmp_path / name / "sphere_edit.json").read_text()) for name in ("first", "second"))
    assert first["state"]["run"] != second["state"]["run"]
    assert "is whole" in command("verify", tmp_path / "second", "--against", tmp_path / "run")


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_experts_leave_whole_and_as_a_delta_and_are_proven(tmp_path, family):
    save_mixture(family, tmp_path / "model")
    options = {
        **QUICK,
        "layers": {"experts": [1]},
        "method": "memit",
        "templates": 0,
        "moments": {"sampled_tokens": 600},
    }
    editor = Editor.from_pretrained(tmp_path / "model", tmp_path / "run", reporter=Quiet(), **options)
    editor.edit(fact_records(2))
    editor.close()
    assert "1 of 1 batch rebuilt" in command("verify", tmp_path / "run")
    command("export", tmp_path / "run", "-o", tmp_path / "whole")
    command("export", tmp_path / "run", "--as", "delta", "-o", tmp_path / "delta")
    command("apply", tmp_path / "delta", tmp_path / "model", "-o", tmp_path / "applied")
    assert contents(tmp_path / "whole") == {**contents(tmp_path / "applied")}
    for name in ("whole", "delta"):
        assert "its weights are those of" in command("verify", tmp_path / name, "--against", tmp_path / "run")
    with pytest.raises(SphereEditError, match="an adapter of experts is not written yet"):
        command("export", tmp_path / "run", "--as", "lora", "--rank", 4, "-o", tmp_path / "lora")
    if family == "qwen3_moe":
        _stacked_experts_leave_in_a_gguf_file(tmp_path)


def _stacked_experts_leave_in_a_gguf_file(place: Path) -> None:
    """GGUF stacks a layer's experts in one tensor of three dimensions."""
    with opened(place / "run", Quiet(), only_to_read=True) as editor:
        (name,) = editor.weights.names
        before, after = editor.weights.original(name), editor.weights.deployed(name)
    layer = f"blk.{name.split('.')[2]}.ffn_down_exps.weight"
    for kind in ("F16", "F32"):
        stacked = {layer: before.numpy(), "blk.0.ffn_up_exps.weight": before.numpy()}
        base = save_experts(place / f"{kind}.gguf", stacked, 4, kind)
        command("export", place / "run", "--as", "gguf", "--base", base, "-o", place / kind)
        (stored,) = (one for one in GGUFReader(place / kind / f"{kind}-edited.gguf").tensors if one.name == layer)
        assert stored.tensor_type.name == kind
        found = torch.from_numpy(quants.dequantize(stored.data, stored.tensor_type).copy()).view_as(after)
        assert float((found - after).norm()) < 0.1 * float((before - after).norm())
        assert "its weights are those of" in command("verify", place / kind, "--against", place / "run")


# --- kills --------------------------------------------------------------------------------------------------------


FORMS = {
    "hf": partial(write, Wanted()),
    "delta": partial(write, Wanted("delta")),
    "lora": partial(write, Wanted("lora", rank=4)),
    "gguf": lambda session, run, folder: write(
        Wanted("gguf", base=run.path.parent / "base.gguf"), session, run, folder
    ),
    "gguf anew": lambda session, run, folder: write(
        Wanted("gguf", base=run.path.parent / "coarse.gguf"), session, run, folder
    ),
    "apply": lambda session, run, folder: delta.apply_delta(
        run.path.parent / "delta", str(run.path.parent / "model"), folder, Quiet()
    ),
}


@pytest.mark.skipif(os.name != "posix", reason="kills processes")
@pytest.mark.parametrize(
    ("form", "every"),
    [*((form, False) for form in FORMS), *(pytest.param(f, True, marks=pytest.mark.slow) for f in FORMS)],
)
def test_killed_at_any_write_an_export_is_whole_or_not_there_and_the_next_leaves_nothing_else(
    run_of, tmp_path, form, every
):
    """The process is killed at events of the file system that change something: a few of them, or in the slow checks each."""
    with opened(run_of(), Quiet(), only_to_read=True) as editor:
        session, run, work = editor.session, RunFolder.open(run_of()), FORMS[form]
        if form == "apply" and not (run.path.parent / "delta").exists():
            editor.export(run.path.parent / "delta", "delta")
        for file, kind in (("base.gguf", "F16"), ("coarse.gguf", "Q4_1")):
            if form.startswith("gguf") and not (run.path.parent / file).exists():
                save_gguf(run.path.parent / "model", run.path.parent / file, kind)
        work(session, run, tmp_path / "first" / "out")
        wanted = contents(tmp_path / "first" / "out")
        said, events = in_child(lambda: work(session, run, tmp_path / "second" / "out"), changing=True)
        assert said == "well"
        assert contents(tmp_path / "second" / "out") == wanted, "the same export twice is the same bytes"
        assert events > 10
        killed = 0
        for event in range(1, events + 1, 1 if every else max(1, events // 6)):
            place = tmp_path / "killed" / str(event)
            said, _ = in_child(lambda place=place: work(session, run, place / "out"), None, event, True)
            killed += said == "killed"
            if (place / "out").exists():
                assert contents(place / "out") == wanted, f"event {event} of {events}"
                work(session, run, place / "next")
                shutil.rmtree(place / "next")
            else:
                work(session, run, place / "out")
                assert contents(place / "out") == wanted
            assert [path.name for path in place.iterdir()] == ["out"], f"event {event} of {events}"
        assert killed > 4
        print(f"{form}: killed at {killed} of {events} events")
