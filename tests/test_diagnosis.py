"""`sphere-edit energy`: two checkpoints, or a run, compared without loading a model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import fact_records
from families import save_tiny
from sphere_edit import SphereEditError, hyperspherical_energy
from sphere_edit.editor import Editor
from test_cli import run
from test_runs import METHODS, QUICK


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("gpt2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def edited(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edited")
    editor = Editor.from_pretrained(model, folder / "run", **{**QUICK, **METHODS["alphaedit"]})
    editor.edit(fact_records(4))
    editor.save_pretrained(folder / "export")
    editor.close()
    return folder


def read(*args, tmp_path) -> list[dict]:
    run("energy", *args, "--json", tmp_path / "found.json")
    return json.loads((tmp_path / "found.json").read_text())


def test_a_run_is_compared_with_its_original_and_so_is_its_export(model, edited, tmp_path):
    by_run = read(edited / "run", tmp_path=tmp_path)
    assert [report["name"] for report in by_run] == [f"transformer.h.{layer}.mlp.c_proj" for layer in (1, 2)]
    by_export = read(model, "--against", edited / "export", "--layers", "1-2", tmp_path=tmp_path)
    by_model_and_run = read(model, "--against", edited / "run", tmp_path=tmp_path)
    assert by_model_and_run == by_run
    journal = [json.loads(line) for line in (edited / "run" / "journal.jsonl").read_text().splitlines()]
    last = [entry for entry in journal if entry["event"] == "batch"][-1]["matrices"]
    for ours, theirs in zip(by_run, by_export, strict=True):
        change = ours["change"]
        assert change["collateral_ratio"] == pytest.approx(last[ours["name"]]["collateral_ratio"], rel=1e-4)
        assert change["relative_norm"] == pytest.approx(last[ours["name"]]["relative_drift"], rel=1e-6)
        assert change["after"]["energy"] == pytest.approx(last[ours["name"]]["energy"], rel=1e-9)
        assert change["bounds"]["least_response"] <= change["bounds"]["response"]
        change["collateral_ratio"] = change["bounds"]["least_response"] = change["bounds"]["response"] = None
        assert theirs == ours, "an export has no second moments, and everything else in common"


def test_numbers_of_a_known_change(model, tmp_path):
    """One neuron of one matrix turned round: rank one, and everything else follows from its definition."""
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    name = next(key for key in tensors if key.endswith("h.2.mlp.c_proj.weight"))
    before = tensors[name].T.clone()
    after = before.clone()
    after[3] = after[3].flip(0)
    save_file(tensors | {name: after.T.contiguous()}, other / "model.safetensors", metadata={"format": "pt"})
    third, second = read(model, "--against", other, "--layers", "1,2", "--power", "2", tmp_path=tmp_path)[::-1]
    assert second["change"]["relative_norm"] == 0
    assert second["change"]["energy_change"] == 0
    change = third["change"]
    energies = [hyperspherical_energy(weight, 2).total for weight in (before, after)]
    assert third["before"]["energy"] == pytest.approx(energies[0])
    assert change["energy_change"] == pytest.approx(energies[1] - energies[0])
    assert change["update_effective_rank"] == pytest.approx(1)
    delta = (after - before).double()
    assert change["update_spectral_norm"] == pytest.approx(float(delta.norm()))
    assert third["before"]["spectral_norm"] == pytest.approx(float(torch.linalg.matrix_norm(before.double(), 2)))
    assert change["remainder"] == pytest.approx(change["energy_change"] - change["bounds"]["first_order"])


def test_csv_has_a_row_a_matrix(edited, tmp_path):
    said = run("energy", edited / "run", "--csv", tmp_path / "found.csv")
    assert "necessary for retention, not sufficient" in said
    with (tmp_path / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert float(rows[0]["relative_norm"]) > 0
    assert float(rows[0]["after_energy"]) > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{model}", "--against", "{run}/nowhere"], "nowhere"),
        (["{model}", "--layers", "9"], "has layers 0 to 3, not 9"),
        (["{model}", "--layers", "gate:1"], "--modules"),
        (["{model}", "--modules", "q_proj"], "has no matrix 'q_proj'; it has down (c_proj), up (c_fc)"),
        (["{run}", "--against", "{model}"], "leave out --against"),
        (["{llama}", "--against", "{run}"], "edits '{model}', not '{llama}'"),
        (["{model}", "--against", "{llama}"], "hold no 'transformer.h.0.mlp.c_proj'"),
    ],
)
def test_mistakes(model, edited, tmp_path, args, message):
    names = {"model": str(model), "run": str(edited / "run"), "llama": str(save_tiny("llama", tmp_path / "llama"))}
    with pytest.raises(SphereEditError) as caught:
        run("energy", *[arg.format(**names) for arg in args])
    assert message.format(**names) in str(caught.value)
