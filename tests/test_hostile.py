"""Every command on folders, files, facts and configs whose words would act, if they could."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from conftest import SHARED, fact_records
from families import save_tiny
from sphere_edit import SphereEditError
from sphere_edit.cli import main
from test_cli import run
from test_runs import METHODS, QUICK
from test_text import ACTING, HOSTILE

FOLDER = "[red]_x$y$[/z] \x1b[31m\u202e :bomb: =1"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder whose name has markup, codes and marks in it, with a model."""
    folder = tmp_path_factory.mktemp("hostile") / FOLDER
    save_tiny("llama", folder / "model[/x]")
    (folder / "settings.yaml").write_text(yaml.safe_dump({**QUICK, **METHODS["memit"]}))
    return folder


def records() -> list[dict]:
    shared = SHARED / "cases" / "hostile.jsonl"
    rows = [json.loads(line) for line in shared.read_text("utf-8").splitlines()] if shared.is_file() else []
    spelt = [text for text in HOSTILE if text.strip() and text.isprintable()]
    own = [{**record, "target_new": text} for record, text in zip(fact_records(len(spelt)), spelt, strict=True)]
    return [*rows, *own, {"subject": "[/b]", "prompt": "{} [/i] \u202e is", "target_new": "[link=file:///]x[/link]"}]


def shows(*args: object) -> str:
    """What a command prints; none of it acts."""
    said = run(*args)
    assert not ACTING.search(said), ACTING.search(said)
    return said


def test_every_command_on_a_folder_and_facts_that_would_act(place):
    model, folder, facts = place / "model[/x]", place / "run[/x]", place / "facts[b].jsonl"
    facts.write_text("".join(json.dumps(record) + "\n" for record in records()))
    common = (model, facts, "-o", folder, "--config", place / "settings.yaml", "--batch-size", 100, "--skip-bad")
    assert "Nothing was edited" in shows("edit", *common, "--dry-run")
    assert "Run folder" in shows("edit", *common)
    shown = shows("show", folder, "--facts", 100)
    assert r"\x1b[31m" in shown
    assert "[link=file:///]x[/link]" in shown
    shows("report", folder, "-o", place / "page.html")
    shows("eval", folder, facts, "--skip-bad", "--json", place / "scores.json")
    shows("energy", folder, "--json", place / "e.json", "--csv", place / "e.csv")
    assert "nothing to resume" in shows("edit", folder, "--resume")
    shows("export", folder, "-o", place / "exported[/x]")
    card = (place / "exported[/x]" / "README.md").read_text("utf-8")
    assert "<img" not in card
    assert str(place.parent) not in card
    assert not ACTING.search(card)
    assert "stands at batch 0" in shows("rollback", folder, "--to", 0)


def test_a_bench_of_names_that_would_act(place):
    facts = place / "few.json"
    facts.write_text(json.dumps(fact_records(4)))
    matrix = {
        "models": [str(place / "model[/x]")],
        "data": {"=1+1|[/d]$x$": {"source": str(facts)}},
        "methods": ["memit"],
        "variants": {"plain": {"sphere": {"enabled": False}}, "[/v]\x1b<b>$y$_": {}},
        "settings": {**QUICK, "options": METHODS["memit"]["options"]},
    }
    config = place / "bench.yaml"
    config.write_text(yaml.safe_dump(matrix, allow_unicode=True))
    shows("bench", config, "-o", place / "bench[/x]")
    table = (place / "bench[/x]" / "table.md").read_text("utf-8")
    assert "<b>" not in table
    assert "\x1b" not in table
    rows = list(csv.DictReader((place / "bench[/x]" / "table.csv").read_text("utf-8").splitlines()))
    assert {row["variant"] for row in rows} == {"", "plain", r"[/v]\x1b<b>$y$_"}


@pytest.mark.parametrize("arguments", [["show", "{}"], ["edit", "{}", "facts.json", "-o", "run"], ["rollback", "{}", "--to", "0"], ["{}"], ["export", "{}", "-o", "{}"], ["show", "x", "--{}"], ["show", "x", "{}"], ["rollback", "x", "--to", "{}"], ["edit", "x", "y", "--basis", "{}"]])  # fmt: skip
def test_mistakes_quote_foreign_text_without_acting(tmp_path, arguments, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for text in ("[/x]", "[red]x[/red]", "\x1b[31mx", "\u202ex", os.fsdecode(b"x\xff")):
        monkeypatch.setattr(sys, "argv", ["sphere-edit", *(argument.format(text) for argument in arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert said
        assert not ACTING.search(said), "in what typer says of a wrong argument too"


def test_names_that_are_no_utf8(place, tmp_path):
    odd = tmp_path / os.fsdecode(b"odd-\xff")
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    model, facts, folder = place / "model[/x]", odd / os.fsdecode(b"facts-\xff.json"), tmp_path / "run"
    facts.write_text(json.dumps(fact_records(2)))
    settings = odd / "settings.yaml"
    settings.write_text((place / "settings.yaml").read_text())
    shows("edit", model, facts, "-o", folder, "--config", settings)
    assert "nothing to resume" in shows("edit", model, facts, "-o", folder, "--resume")
    shows("report", folder, "-o", odd / "page.html")
    shows("eval", folder, facts, "--json", odd / "scores.json")
    for command in (("edit", model, facts, "-o", odd / "run"), ("export", folder, "-o", odd / "exported")):
        with pytest.raises(SphereEditError, match="must be UTF-8"):
            run(*command)
