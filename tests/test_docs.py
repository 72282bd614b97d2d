"""What the documentation shows runs as written: Python, commands, settings, facts and links."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from conftest import fact_records
from families import save_tiny
from sphere_edit import read_facts
from sphere_edit.cli import app
from sphere_edit.editing.settings import make_settings
from sphere_edit.numerics.projection import Sphere

sys.path.append(str(Path(__file__).parents[1] / "docs"))
import generate
import prose

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [*prose.pages(), ROOT / "docs" / "LOG.md"]}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    return [content for kind, content in FENCE.findall((ROOT / page).read_text()) if kind == language]


def commands(page: str) -> list[str]:
    """The command lines that a page shows, in blocks of code without a language or indented."""
    text = PAGES[page].read_text()
    shown = "\n".join(blocks(page, "") + re.findall(r"^    (.*)$", text, re.MULTILINE))
    lines = shown.replace("\\\n", " ").splitlines()
    found = [re.sub(r"\s+#\s.*", "", line.split(" | ")[-1]).strip() for line in lines]
    return [line for line in found if line.startswith("sphere-edit ") and "…" not in line]


# --- Python -------------------------------------------------------------------------------------------------------


def test_readme_example_runs_as_written(smollm2, tmp_path, monkeypatch, capsys):
    (example,) = blocks("README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 5
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert "Vienna" in capsys.readouterr().out
    assert (tmp_path / "runs" / "readme" / "metrics.json").is_file()


@pytest.mark.slow
def test_quickstart_example_runs_as_written(smollm2, tmp_path, monkeypatch, capsys):
    (example,) = blocks("docs/quickstart.md", "python")
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert "Vienna" in capsys.readouterr().out
    assert (tmp_path / "edited-in-python" / "model.safetensors").is_file()


def test_example_of_energies_runs_as_written(capsys):
    (energies,) = blocks("docs/concepts/sphere.md", "python")
    exec(energies, {})
    before, after = map(float, capsys.readouterr().out.split())
    assert before == pytest.approx(after, rel=0.01)
    assert before != after


def test_example_of_a_method_alone_runs_as_written(capsys):
    _, solving = blocks("docs/methods.md", "python")  # the first is run by test_plugins.py
    names: dict[str, Any] = {}
    exec(solving, names)
    assert capsys.readouterr().out == "torch.Size([64, 256])\n"
    assert not torch.equal(names["update"].dense(), torch.zeros(64, 256))


def test_examples_of_formats_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    monkeypatch.setattr("sphere_edit.facts.shapes.FORMATS", {})
    for block in blocks("docs/howto/format.md", "python"):
        exec(block, names)
    said = capsys.readouterr().out.splitlines()
    assert "'Where does Big Ben stand?'" in said[0]
    assert said[1:] == ["['Graz']"]
    (tmp_path / "more.json").write_text(
        '[{"entity": "Big Ben", "question": "Big Ben is in", "gold": ["Graz"], "was": ""}]'
    )
    assert read_facts(tmp_path / "more.json").facts[0].target_new == "Graz"


def test_every_python_block_is_run():
    """A page with a new block of Python gets a test here."""
    found = {page: len(blocks(page, "python")) for page in PAGES if blocks(page, "python")}
    assert found == {
        "README.md": 1,
        "docs/quickstart.md": 1,
        "docs/concepts/sphere.md": 1,
        "docs/methods.md": 2,
        "docs/howto/format.md": 4,
    }


# --- commands, settings, facts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_are_understood(page):
    """Every command line of the documentation has the arguments and options that the program knows."""
    group: Any = get_command(app)
    for line in commands(page):
        words = shlex.split(line)[1:]
        while words[0] == "--plugin":
            words = words[2:]
        assert words[0] in group.commands, line
        group.commands[words[0]].make_context(words[0], words[1:])


SMALL = """
method: memit
batch_size: 2
templates: 0
targets: {steps: 3}
moments: {sampled_tokens: 256}
tokens_per_batch: 512
evaluation: {generation: "off"}
"""


@pytest.fixture(scope="module")
def edited(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model, and a folder with a run of the quickstart's facts on it."""
    folder = tmp_path_factory.mktemp("docs")
    model = save_tiny("llama", folder / "tiny")
    (folder / "small.yaml").write_text(SMALL)
    (folder / "facts.jsonl").write_text(blocks("docs/quickstart.md", "json")[0])
    for number, record in enumerate(fact_records(2)):
        (folder / f"week{number + 1}.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "wrong.jsonl").write_text((folder / "facts.jsonl").read_text().splitlines()[1] + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        follow("sphere-edit edit smollm2 facts.jsonl -o runs/first", model)
    return model, folder


def follow(line: str, model: Path) -> None:
    """Run a command line of the documentation, on a tiny model and with small settings."""
    words = [str(model) if word == "smollm2" else word for word in shlex.split(line)[1:]]
    if words[0] == "edit" and "-o" in words:
        words += ["--config", "small.yaml"]
    result = CliRunner().invoke(app, words, input="Big Ben stands in the city of\n", env={"COLUMNS": "200"})
    limits = {0, 4} if words[0] == "eval" else {0}  # the tiny model keeps no limit
    assert result.exit_code in limits, (line, result.output, result.exception)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["quickstart", "howto/own-data", "howto/weekly", "howto/remove", "howto/serve"])
def test_a_page_can_be_followed_from_top_to_bottom(page, edited, tmp_path, monkeypatch, blank_figures):
    model, prepared = edited
    shutil.copytree(prepared, tmp_path / "work", ignore=shutil.ignore_patterns("tiny"))
    monkeypatch.chdir(tmp_path / "work")
    lines = commands(f"docs/{page}.md")
    if any(" -o runs/first" in line for line in lines):  # a page that begins from nothing
        shutil.rmtree("runs")
    for line in lines:
        if not re.search(r"sphere-edit demo|RUN|DIR", line):
            follow(line, model)


def test_settings_files_are_understood():
    shown = [(page, block) for page in PAGES for block in blocks(page, "yaml")]
    assert shown
    for page, block in shown:
        content = yaml.safe_load(block)
        settings = content.get("settings", {}) if "models" in content else content
        assert make_settings(settings), page


def test_facts_are_understood(tmp_path):
    for page in ("README.md", "docs/quickstart.md", "docs/howto/own-data.md", "docs/facts.md"):
        for block in blocks(page, "json"):
            file = tmp_path / "facts.json"
            file.write_text("[" + re.sub(r"\}\n(?=\{)", "},\n", block) + "]")
            assert read_facts(str(file)).facts, page


# --- links and generated pages ------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as they are made on the site and by code hosts."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_between_pages_lead_somewhere(page):
    text, folder = PAGES[page].read_text(), PAGES[page].parent
    made = {(ROOT / "docs" / name).resolve() for name in GENERATED}
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if target.startswith(("http", "mailto")):
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else PAGES[page]
        assert file.exists() or file in made, f"{page} links to {target}"
        if anchor and file.suffix == ".md" and file not in made:
            assert re.sub("-+", "-", anchor) in {re.sub("-+", "-", one) for one in anchors(file.read_text())}, (
                f"{page} links to {target}, and there is no such heading"
            )


SCHEMAS = ("config", "journal", "metrics", "settings")
GENERATED = ("reference/cli.md", "reference/settings.md", *(f"reference/{name}.schema.json" for name in SCHEMAS))


def test_generated_pages_name_every_command_and_setting():
    pages = generate.pages()
    assert set(pages) == set(GENERATED)
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"## sphere-edit {name}\n" in pages["reference/cli.md"]
    for name in ("`batch_size`", "`targets.steps`", "`moments.corpus`", "`evaluation.every`", "`sphere.eta`"):
        assert f"| {name} |" in pages["reference/settings.md"]
    assert "[default: frugal]" in pages["reference/cli.md"]
    schema = json.loads(pages["reference/metrics.schema.json"])
    assert {"after", "unedited", "edited", "per_fact"} <= set(schema["required"])


def test_field_guide_names_every_method():
    from sphere_edit.editing.methods import METHODS

    text = PAGES["docs/field-guide.md"].read_text()
    missing = [name for name in METHODS if f"**`{name}`**" not in text and not name.startswith("test")]
    assert not missing
    assert Sphere().eta == 0.5  # as the page on SPHERE says
