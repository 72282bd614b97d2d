"""A judge behind an endpoint that speaks OpenAI's HTTP: what it is asked, what is kept, and what it does not answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import fact_records
from families import save_tiny
from hub import serving
from sphere_edit.cli import app
from sphere_edit.editor import Editor
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.catalogue import EFFICACY, GENERALIZATION
from sphere_edit.evaluation.judging import Case, Judge, Verdict, check_url, judged, shares
from sphere_edit.progress import Quiet
from test_runs import METHODS, QUICK


class Stand:
    """A judge that says yes where the answer is one of those that are right; and what it was sent."""

    def __init__(self) -> None:
        self.url, self.requests, self.keys = "", [], []
        self.failing_after: int | None = None
        self.reply: Any = None

    def answer(self, body: dict[str, Any]) -> Any:
        self.requests.append(body)
        asked = body["messages"][-1]["content"]
        rights, said = re.search(r"any of:\n(.*)\nAnswer: (.*)\n\nIs", asked, re.DOTALL).groups()
        right = any(said.strip() == line.removeprefix("- ") for line in rights.splitlines())
        reply = self.reply or ("Yes." if right else "no, that is wrong")
        return {"choices": [{"message": {"content": reply}}]}


@contextmanager
def standing() -> Iterator[Stand]:
    stand = Stand()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            stand.keys.append(self.headers.get("Authorization"))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if stand.failing_after is not None and len(stand.requests) >= stand.failing_after:
                self.send_error(429, "too many requests")
                return
            content = json.dumps(stand.answer(body) if self.path == "/v1/chat/completions" else {"what": 1}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

    with serving(Handler) as address:
        stand.url = f"{address}/v1"
        yield stand


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    settings = {**QUICK, **METHODS["memit"], "evaluation": {"natural": 4, "generation": "off"}}
    editor = Editor.from_pretrained(save_tiny("llama", folder / "model"), folder / "run", reporter=Quiet(), **settings)
    editor.edit(fact_records(3))
    editor.close()
    return folder / "run"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def case(fact: int, part: Any, said: str, side: str = "edited") -> Case:
    return Case(fact, part, side, "Big Ben stands in", ("Rome", "the city of Rome"), said)


def test_replies_are_read_by_their_first_word():
    assert [Verdict.of(reply).right for reply in ("Yes", " yes, it is", "**No**.", "No.")] == [True, True, False, False]
    assert [Verdict.of(reply).right for reply in ("", "...", "I think yes", "yesterday")] == [None] * 4


def test_shares_are_over_a_facts_prompts_first_and_what_is_unclear_is_not_right():
    cases = [
        case(0, GENERALIZATION, "a"),
        case(0, GENERALIZATION, "b"),
        case(1, GENERALIZATION, "c"),
        case(1, EFFICACY, "d"),
    ]
    assert shares(cases, [True, False, None, True], "edited") == {GENERALIZATION: 25.0, EFFICACY: 100.0}
    assert shares(cases, [True, False, None, True], "unedited") == {}


def test_equal_questions_are_asked_once_and_what_came_before_a_failure_is_kept():
    with standing() as stand:
        cases = [case(0, EFFICACY, "Rome"), case(1, EFFICACY, "Rome", "unedited"), case(2, EFFICACY, "Paris")]
        kept: list[str] = []
        found = judged(Judge(stand.url, "m", "secret"), cases, {}, lambda asked, verdict: kept.append(asked), Quiet())
        assert found == [True, True, False]
        assert len(stand.requests) == len(kept) == 2
        assert set(stand.keys) == {"Bearer secret"}
        assert {request["temperature"] for request in stand.requests} == {0}
        stand.failing_after = 2
        with pytest.raises(SphereEditError, match="refuses: 429"):
            judged(Judge(stand.url, "m"), [case(3, EFFICACY, "Oslo")], {}, lambda *args: None, Quiet())
        assert stand.keys[-1] is None


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:9/v1", "cannot be asked"),
        ("ftp://there", "should begin with http"),
        ("WRONG", "sent no reply"),
    ],
)
def test_an_endpoint_that_is_none_is_told(url, words):
    with standing() as stand:
        address = stand.url.removesuffix("/v1") if url == "WRONG" else url

        def ask() -> None:
            check_url(address)
            Judge(address, "m", seconds=5)("Is the answer right?")

        with pytest.raises(SphereEditError, match=words):
            ask()


def test_the_command_judges_both_models_and_asks_nothing_twice(run, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with standing() as stand:
        command = ("judge", run, "--url", stand.url, "--model", "grader", "--key-env", "MY_KEY")
        result = invoke(*command, "--limit", 2)
        assert result.exit_code == 0, result.output
        assert "2 facts as 'grader' judges them" in result.output
        assert "Efficacy" in result.output
        assert "Specificity" not in result.output
        kept = (run / "judged.jsonl").read_text()
        lines = [json.loads(line) for line in kept.splitlines()]
        assert len(lines) == len(stand.requests) > 0
        assert all(set(line) == {"judge", "asked", "reply", "right"} for line in lines)
        assert "secret" not in kept
        first = len(stand.requests)
        (run / "judged.jsonl").write_text(kept + '{"judge": "gra')  # killed while it wrote
        assert invoke(*command, "--limit", 2).exit_code == 0
        assert len(stand.requests) == first
        stand.reply = "Perhaps"
        assert "were neither yes nor no, and count as no" in " ".join(invoke(*command).output.split())
        assert len(stand.requests) > first
        assert len((run / "judged.jsonl").read_text().splitlines()) == len(stand.requests) + 1, "one line was cut"


def test_a_run_without_answers_is_told_what_keeps_them(tmp_path):
    settings = {**QUICK, **METHODS["memit"], "evaluation": {"generation": "off"}}
    editor = Editor.from_pretrained(
        save_tiny("llama", tmp_path / "model"), tmp_path / "run", reporter=Quiet(), **settings
    )
    editor.edit(fact_records(2))
    editor.close()
    result = invoke("judge", tmp_path / "run", "--url", "http://127.0.0.1:9/v1", "--model", "m")
    assert isinstance(result.exception, SphereEditError)
    assert "evaluation: {natural: 64}" in str(result.exception)
