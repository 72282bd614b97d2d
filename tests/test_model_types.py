"""Models without a row: edited, exported, reloaded in plain transformers and rolled back (`benchmarks/models.py`, which tries all)."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import families  # so that benchmarks/families.py does not take its name  # noqa: F401
from sphere_edit.editor import Editor
from sphere_edit.models.configuration import loader_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# what writes into the residual stream, whether targets run whole rows, and whether there is a vision tower
TYPES = {
    "granite": ("mlp.down_proj", False, False),  # scaled residuals and logits
    "olmo2": ("mlp.down_proj", False, False),  # norms after the MLP
    "cohere2": ("mlp.down_proj", False, False),  # attention and MLP side by side
    "opt": ("fc2", False, False),  # a batch flattened
    "bloom": ("mlp.dense_4h_to_h", False, False),  # ALiBi, a row for each text and head
    "gpt_oss": ("mlp.experts.down_proj", False, False),  # experts alone, stored transposed
    "deepseek_v3": ("mlp.down_proj", False, False),  # dense first, then shared experts beside routed ones
    "qwen3_5": ("mlp.down_proj", True, True),  # linear attention, images
    "gemma3": ("mlp.down_proj", False, True),  # images, norms after the MLP
    "mamba": ("mixer.out_proj", True, False),  # no attention, and no MLP
}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("models")


def tried(bench: ModuleType, kind: str) -> dict[str, Any]:
    def make() -> tuple[Any, Any]:
        return bench.tiny_model(kind, loader_of({"model_type": kind}, kind)), bench.byte_tokenizer()

    row: dict[str, Any] = bench.tried(make)
    return row


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_without_a_row_is_edited_exported_reloaded_and_rolled_back(kind, bench):
    row = tried(bench, kind)
    assert row["passed"] == list(bench.STEPS), row["why"]
    assert (row["path"], row["whole_rows"], row["tower"]) == TYPES[kind]
    assert (row["row"], row["method"]) == (False, "frugal")
    before, after = row["losses"]
    assert after < before


def test_an_export_in_which_more_was_changed_is_noticed(bench, monkeypatch):
    save = Editor.save_pretrained

    def save_too_much(editor: Editor, folder: Path) -> None:
        norm = editor.model.get_submodule(editor.loaded.architecture.final_norm)
        norm.weight.data += 1
        editor.loaded.source = "in memory"
        save(editor, folder)

    monkeypatch.setattr(Editor, "save_pretrained", save_too_much)
    row = tried(bench, "smollm3")
    assert row["passed"] == ["found", "edited", "exported"]
    assert "other tensors changed: ['model.norm.weight']" in row["why"]


def test_a_rollback_that_leaves_something_is_noticed(bench, monkeypatch):
    monkeypatch.setattr(Editor, "rollback", lambda editor, to: None)
    row = tried(bench, "smollm3")
    assert row["passed"] == ["found", "edited", "exported", "reloaded"]
    assert "rollback did not give the original's bits" in row["why"]


@pytest.mark.parametrize(
    ("kind", "when", "why"),
    [
        ("bert", "by config.json", "an encoder, which reads text"),
        ("whisper", "by config.json", "an encoder–decoder"),
        ("deepseek_v4", "by config.json", "its layers hand on 4 vectors a token (hc_mult)"),
        ("qwen4_exp", "by config.json", "its layers hand on 4 vectors a token (hc_count)"),
        ("gemma3n", "by config.json", "its layers hand on 4 vectors a token (altup_num_inputs)"),
        ("blip-2", "by config.json", "its forward pass needs pixel_values"),
        ("kosmos-2", "loaded", "a text alone does not run through it"),
        ("openai-gpt", "loaded", "where a norm is expected"),
        ("xlnet", "loaded", "where one vector a token is expected"),
    ],
)
def test_a_type_that_is_refused_says_why(kind, when, why, bench):
    row = tried(bench, kind)
    assert (row["passed"], row["refused"]) == ([], when)
    assert why in row["why"]


def test_the_page_counts_what_was_passed(bench):
    found = {"type": "a", "class": "A", "row": False, "path": "mlp.down", "layers": "4 of 4", "one_layer": False}
    found |= {"whole_rows": True, "writer": "down", "method": "frugal"}
    rows = {
        "qwen3": {**found, "passed": list(bench.STEPS)},
        "opt": {
            **found,
            "passed": ["found"],
            "refused": "edited",
            "why": "'/m' (model type 'opt') cannot be edited: no.",
        },
        "bert": {"passed": [], "refused": "by config.json", "why": "it is an encoder; expected a decoder"},
        "git": {"passed": [], "refused": "not built", "why": "ValueError: a | b"},
        "zoo:one": {**found, "passed": list(bench.STEPS)},
    }
    page = bench.page(rows)
    assert "| 53 families that users bring | 2 | 1 | 1 | 1 | 1 |" in page
    assert "| 1 configurations of the second set | 1 | 1 | 1 | 1 | 1 |" in page
    assert "| 2 model types that can be made tiny | 2 | 1 | 1 | 1 | 1 |" in page
    assert "| opt | when it was edited | no. |" in page
    assert "| bert | by its config.json | it is an encoder |" in page
    assert "| git | no tiny model could be made | ValueError: a / b |" in page


@pytest.mark.slow
def test_every_type(bench, shared, tmp_path, monkeypatch):
    """Takes a quarter of an hour."""
    monkeypatch.syspath_prepend(str(shared / "families"))
    monkeypatch.setattr(sys, "argv", ["models.py", str(tmp_path / "found.json"), "--zoo", str(shared / "families")])
    bench.main()
    rows = json.loads((tmp_path / "found.json").read_text())
    whole = {name for name, row in rows.items() if bench.whole(row)}
    assert not [name for name, row in rows.items() if row.get("refused") == "TRACEBACK"]
    assert sum(name.startswith("zoo:") for name in whole) >= 115
    assert len(whole.intersection(bench.FAMILIES)) >= 50
