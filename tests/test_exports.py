"""Every form of export, from runs of tiny models: what it holds, what loads it, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from conftest import fact_records
from families import save_tiny
from sphere_edit import SphereEditError
from sphere_edit.cli import app
from sphere_edit.editor import Editor, opened
from sphere_edit.exports import delta
from sphere_edit.exports.hf import write_hf
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
    with pytest.raises(SphereEditError, match="--dtype is for --as hf"):
        command("export", run_of(), "--as", "delta", "--dtype", "bfloat16", "-o", tmp_path / "out")
    path = tmp_path / "delta" / delta.FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(SphereEditError, match="is not what was written there"):
        command("apply", tmp_path / "delta", base, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- kills --------------------------------------------------------------------------------------------------------


FORMS = {
    "hf": lambda shipment, run, folder: write_hf(shipment, folder),
    "delta": lambda shipment, run, folder: delta.write_delta(shipment, run, folder),
    "apply": lambda shipment, run, folder: delta.apply_delta(
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
    """The process is killed at events of the file system: a few, spread over the export, or in the slow checks each."""
    with opened(run_of(), Quiet(), only_to_read=True) as editor:
        shipment, run, write = editor.shipment(), RunFolder.open(run_of()), FORMS[form]
        if form == "apply" and not (run.path.parent / "delta").exists():
            delta.write_delta(shipment, run, run.path.parent / "delta")
        write(shipment, run, tmp_path / "first" / "out")
        wanted = contents(tmp_path / "first" / "out")
        said, events = in_child(lambda: write(shipment, run, tmp_path / "second" / "out"))
        assert said == "well"
        assert contents(tmp_path / "second" / "out") == wanted, "the same export twice is the same bytes"
        assert events > 10
        killed = 0
        for event in range(1, events + 1, 1 if every else max(1, events // 6)):
            place = tmp_path / "killed" / str(event)
            said, _ = in_child(lambda place=place: write(shipment, run, place / "out"), events=event)
            killed += said == "killed"
            if (place / "out").exists():
                assert contents(place / "out") == wanted, f"event {event} of {events}"
                write(shipment, run, place / "next")
                shutil.rmtree(place / "next")
            else:
                write(shipment, run, place / "out")
                assert contents(place / "out") == wanted
            assert [path.name for path in place.iterdir()] == ["out"], f"event {event} of {events}"
        assert killed > 4
