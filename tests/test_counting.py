"""Counts with their nouns, and that no text of the package forms them by itself."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

import sphere_edit
from sphere_edit import progress
from sphere_edit.counting import counted, every, often, several
from sphere_edit.text import Screen

_NOUNS = "facts|batches|prompts|records|rows|runs|steps|times|tokens|passages|matrices|files|limits|sessions"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (counted(0, "fact"), "0 facts"),
        (counted(1, "fact"), "1 fact"),
        (counted(1050, "earlier fact"), "1,050 earlier facts"),
        (counted(1, "matrix"), "1 matrix"),
        (counted(2, "matrix"), "2 matrices"),
        (counted(2, "batch"), "2 batches"),
        (several(1, "was"), "was"),
        (several(3, "was"), "were"),
        (every(1, "fact"), "1 fact"),
        (every(60, "fact"), "All 60 facts"),
        (often(0), "never"),
        (often(1), "once"),
        (often(2), "twice"),
        (often(3), "3 times"),
    ],
)
def test_a_count_has_the_noun_that_goes_with_it(said, expected):
    assert said == expected


def test_every_count_is_formed_in_one_place():
    """``f"{n} facts"`` says "1 facts" one day. Upper limits, which are never 1, may stand as they are."""
    written = re.compile(rf"""f["'][^"'\n]*\{{(?!MOST)[^{{}}\n]+\}} (?!in )(?:\w+ )?(?:{_NOUNS})\b""")
    found = {
        f"{path.name}: {match[0]}"
        for path in Path(sphere_edit.__file__).parent.rglob("*.py")
        for match in written.finditer(path.read_text())
        if path.name != "counting.py"
    }
    assert not found


def test_in_a_log_a_long_task_says_how_far_it_is(monkeypatch):
    log = Screen(file=io.StringIO(), width=100)

    def work() -> str:
        with progress.RichReporter(log).bar("sampling text", 4, "token") as advance:
            for _ in range(4):
                advance(1)
        return log.file.getvalue()

    assert len(work().splitlines()) == 1, "short tasks say only that they are done"
    monkeypatch.setattr(progress, "_EVERY", 0)
    lines = work().splitlines()[1:]
    assert [re.sub(" +", " ", line).split(",")[0] for line in lines[:3]] == [
        f" sampling text {done} of 4 tokens" for done in (1, 2, 3)
    ]
    assert all(line.endswith("about 0 s left") for line in lines[:3])
    assert " 4 tokens " in lines[3]


def test_one_fact_is_one_fact_in_a_log():
    log = Screen(file=io.StringIO(), width=100)
    with progress.RichReporter(log).bar("targets", 1, "fact") as advance:
        advance(1)
    assert " 1 fact " in log.file.getvalue()
