"""Limits that a pipeline sets, and prompts that are piped in: the commands `eval` and `chat`."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from conftest import fact_records
from families import save_tiny
from sphere_edit import SphereEditError
from sphere_edit.cli import app, talk
from sphere_edit.editor import Editor, opened
from sphere_edit.evaluation.limits import Limit, Verdict, judge, metrics_with_limits, read_limits
from sphere_edit.progress import Quiet
from sphere_edit.text import visible


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, two facts and their run."""
    place = tmp_path_factory.mktemp("place")
    model = save_tiny("llama", place / "model")
    (place / "facts.json").write_text(json.dumps(fact_records(2)))
    options = {"layers": [1, 2], "targets": {"steps": 3}, "moments": {"sampled_tokens": 256}, "tokens_per_batch": 256}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPHERE_EDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        editor = Editor.from_pretrained(model, place / "run", reporter=Quiet(), method="memit", **options)
        editor.edit(fact_records(2))
        editor.close()
    return place


def command(*arguments: object, stdin: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(one) for one in arguments], input=stdin, env={"COLUMNS": "300"})
    if isinstance(result.exception, SphereEditError):
        raise result.exception
    return result.exit_code, result.output


def test_a_limit_is_kept_at_its_bound_and_not_by_what_was_not_measured():
    limits = read_limits(["efficacy_strict=98", "generalization = 50"], ["perplexity_ratio=1.1", "perplexity=30"])
    assert limits[0] == Limit("efficacy_strict", 98.0, over=False)
    edited = {"efficacy_strict": 98.0, "generalization": None, "perplexity": 27.5}
    verdicts = judge(limits, {"edited": edited, "unedited": {"perplexity": 25.0}})
    assert [verdict.kept for verdict in verdicts] == [True, False, True, True]
    assert verdicts[2].value == pytest.approx(1.1)
    assert not Verdict(limits[0], 97.999).kept
    assert not Verdict(limits[2], 1.1000001).kept
    assert verdicts[1].words == "generalization ≥ 50: not measured"
    assert judge(limits[2:3], {"edited": {"perplexity": None}, "unedited": {"perplexity": 25.0}})[0].value is None


@pytest.mark.parametrize(
    "text", ["efficacy_strictest=9", "=9", "efficacy", "efficacy=", "efficacy=nan", "efficacy=much"]
)
def test_a_limit_that_cannot_be_read_is_told(text):
    with pytest.raises(SphereEditError, match="--fail-under") as told:
        read_limits([text], [])
    known = text.partition("=")[0] in metrics_with_limits()
    assert ("expected NAME=NUMBER" if known else "perplexity_ratio") in str(told.value)


def test_limits_end_in_a_status_of_their_own_with_json_and_junit(place, tmp_path):
    files = ["--json", tmp_path / "out.json", "--junit", tmp_path / "out.xml"]
    limits = ["--fail-under", "efficacy=0", "--fail-over", "perplexity_ratio=1e9"]
    status, said = command("eval", place / "run", place / "facts.json", *limits, *files)
    assert (status, "2 limits kept" in said) == (0, True), said
    assert ElementTree.parse(tmp_path / "out.xml").getroot().attrib["failures"] == "0"
    status, said = command(
        "eval", place / "run", place / "facts.json", *limits, "--fail-under", "specificity=101", *files
    )
    assert status == 4
    assert "specificity ≥ 101: " in said
    content = json.loads((tmp_path / "out.json").read_text())
    assert [limit["kept"] for limit in content["limits"]] == [True, False, True]
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    assert content["edited"]["perplexity"] == pytest.approx(metrics["edited"]["perplexity"], rel=1e-6)
    assert content["limits"][2]["value"] == content["edited"]["perplexity"] / content["unedited"]["perplexity"]
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()
    assert (suite.tag, suite.attrib["tests"], suite.attrib["failures"]) == ("testsuite", "3", "1")
    (failure,) = suite.iter("failure")
    assert failure.attrib["message"].startswith("specificity ≥ 101")


def test_a_plain_model_has_limits_to_its_facts_and_none_to_text(place):
    status, _ = command("eval", place / "model", place / "facts.json", "--fail-under", "efficacy=101")
    assert status == 4
    with pytest.raises(SphereEditError, match="limits to perplexity are for runs"):
        command("eval", place / "model", place / "facts.json", "--fail-over", "perplexity=9")
    with pytest.raises(SphereEditError, match="--junit says what became of limits"):
        command("eval", place / "model", place / "facts.json", "--junit", place / "out.xml")


def test_prompts_that_are_piped_in_are_answered_one_by_one_and_side_by_side(place):
    prompts = "The capital of France is\n\n[bold]x[/bold] of Paris\r\nBruno plays the"
    status, said = command("chat", place / "run", "--tokens", 3, stdin=prompts)
    assert status == 0
    with opened(place / "run", Quiet(), only_to_read=True) as editor:
        wanted = [
            visible(editor.generate(prompt, 3), "\n") for prompt in prompts.replace("\r", "").split("\n") if prompt
        ]
        with editor.weights.unedited():
            before = editor.generate("Bruno plays the", 3)
    assert len(wanted) == 3
    assert [line for line in said.splitlines() if line in wanted] == wanted
    status, said = command("chat", place / "run", "--tokens", 3, "--side-by-side", stdin=prompts)
    assert status == 0
    assert said.count("unedited") == 3
    assert "[bold]x[/bold] of Paris" in said
    assert " ".join(visible(before).split()) in " ".join(said.split())
    with pytest.raises(SphereEditError, match="has no chat template"):
        command("chat", place / "run", "--chat", stdin=prompts)


def test_line_breaks_of_both_answers_are_line_breaks(capsys):
    """Of the edited one they once were shown as codes."""
    answers = iter([" London.\n\nIt is old.", " Vienna.\n\nIt is \x1b[1mold."])
    editor = SimpleNamespace(
        weights=SimpleNamespace(unedited=contextlib.nullcontext), generate=lambda *asked: next(answers)
    )
    talk._answer(editor, "Big Ben stands in", True, False, 9)
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["London.", "Vienna."] in lines
    assert "\\n" not in said
    assert "\\x1b" in said
