"""Foreign text is seen and never acts: on a terminal, in LaTeX, CSV, figures, Markdown; and in every command."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from matplotlib.cbook import is_math_text
from rich.table import Table

from conftest import fact_records
from sphere_edit.exports.card import Note, model_card
from sphere_edit.facts.readers import facts_from
from sphere_edit.progress import RichReporter
from sphere_edit.reporting.comparison import Row, as_csv, columns_of
from sphere_edit.reporting.comparison import latex as latex_table
from sphere_edit.reporting.comparison import markdown as markdown_table
from sphere_edit.runs.history import History
from sphere_edit.runs.records import RunConfig
from sphere_edit.text import Screen, code, csv_cell, label, latex, markdown, public_name, terminal, visible
from test_admission import CONFIG

HOSTILE = [
    "[/x]",
    "[red]Louvre[/red]",
    "[link=file:///etc]Rome[/link]",
    "\x1b[31mRome\x1b[0m \x1b]8;;file:///\x1b\\here\x1b]8;;\x1b\\",
    "\x9b31mRome",
    "Prado\u202e drawkcab\u2069",
    ":bomb: @home",
    "| Uffizi |\n# heading\n| a | b |",
    "# heading",
    "- item",
    "1. item",
    "<img src=x onerror=alert(1)>",
    "[here](javascript:alert(1)) ![x](http://a.b/c.png)",
    "https://a.example www.a.example",
    "`code` ``more``",
    "**bold** _it_ ~~gone~~ &lt; $x^2$",
    '=HYPERLINK("http://a")',
    "+1+1",
    "\t=1",
    r"\input{/etc/passwd} 50 % & {a_b}^~#",
    "byte \udcff",
    "\ud800",
    "line\u2028separator",
    "\\",
]
ACTING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def drawn(print_it) -> str:
    screen = Screen(file=io.StringIO(), force_terminal=True, width=300)
    print_it(screen)
    return screen.file.getvalue()


def plain(text: str) -> str:
    """What a terminal was sent, without our own bold and colours."""
    return re.sub("\x1b\\[[0-9;]*m", "", text)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_terminal_shows_it_as_it_is(text):
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    table.add_row(terminal(text, "red"))
    for shown in (
        drawn(lambda screen: screen.print(text)),
        drawn(lambda screen: screen.print(table)),
        drawn(lambda screen: RichReporter(screen).say(text, "bold red")),
    ):
        assert not ACTING.search(plain(shown))
        assert "\x1b]" not in shown
        if "\n" not in text:
            assert visible(text) in plain(shown)

    def work(screen: Screen) -> None:
        with RichReporter(screen).bar(text, 1, "fact") as advance:
            advance(1)

    lines = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", drawn(work)).replace("\r", "")
    assert not ACTING.search(lines)
    assert visible(text) in lines


def test_ordinary_words_of_any_language_stay_as_they_are():
    for text in ("Zürich", "東京は", "القاهرة", "می‌خواهم", "👩‍🔬", "ΔW → 4 × η", "a_b (c) 5%"):
        assert visible(text) == text
        assert text in drawn(lambda screen, text=text: screen.print(text))


def test_bytes_that_are_no_utf8_are_told_by_their_code():
    assert visible(os.fsdecode(b"r\xffn")) == r"r\xffn"
    assert visible("\x1b\u202e\n") == r"\x1b\u202e\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_has_no_structure_from_it(text):
    parser = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    for page in (f"- {markdown(text)}", f"- a {markdown(text)} **{markdown(text)}**", f"| a |\n|---|\n| {markdown(text)} |"):  # fmt: skip
        tokens = parser.parse(page)
        kinds = [token.type for token in tokens] + [part.type for token in tokens for part in token.children or ()]
        ours = {"strong_open", "strong_close"} if "**" in page else set()
        allowed = {"bullet_list", "list_item", "paragraph", "table", "thead", "tbody", "tr", "th", "td"}
        assert {kind.rsplit("_", 1)[0] for kind in kinds} - allowed <= {"inline", "text", "text_special"} | {
            kind.rsplit("_", 1)[0] for kind in ours
        }, (page, kinds)
        assert kinds.count("bullet_list_open") <= 1
        words = "".join(part.content for token in tokens for part in token.children or ())
        assert visible(text).strip() in words
    assert not re.search(r"(?<!\\)://|www\.", markdown(text)), "a bare address would become a link"
    spans = [part for token in parser.parse(f"a {code(text)} b") for part in token.children or ()]
    assert [part.type for part in spans] == ["text", "code_inline", "text"]
    assert spans[1].content == visible(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_latex_has_no_command_from_it(text):
    shown = latex(text)
    for part in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}", r"\textless{}", r"\textgreater{}"):
        shown = shown.replace(part, "")
    shown = re.sub(r"\\[&%_#${}]", "", shown)
    assert not re.search(r"[\\&%_#${}~^\n]", shown)


def test_latex_keeps_our_own_symbols():
    assert latex("a_b × 50 % α") == r"a\_b $\times$ 50 \% $\alpha$"


def test_a_formula_gets_a_quote_and_a_number_stays_one():
    for text in ("=1+1", "+1+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", " =1", "＝1"):
        assert csv_cell(text).startswith("'")
    for value in ("-1.5", "+2e-3", "1", "a=b", "", -1.5, 3, None):
        assert csv_cell(value) == value


@pytest.mark.parametrize("text", HOSTILE)
def test_a_label_is_no_formula_of_matplotlib(text):
    shown = label(text)
    assert not is_math_text(shown)
    assert not ACTING.search(shown)
    assert not shown.startswith("_")


def test_a_path_is_published_by_its_last_component():
    for source, name in [
        ("/home/ada/models/tiny", "tiny"),
        ("C:\\models\\tiny", "tiny"),
        ("/home/ada/a.gguf", "a.gguf"),
        ("owner/name", "owner/name"),
        ("smollm2", "smollm2"),
        ("/", "/"),
    ]:
        assert public_name(source) == name


def test_tables_of_a_bench_are_inert():
    values = dict.fromkeys(("efficacy", "generalization", "specificity", "score"), 50.0)
    for text in HOSTILE:
        row = Row(text, text, "frugal", text, 1, dict(values), {}, {})
        (line,) = [line for line in markdown_table([row]).split("\n") if line.startswith("| ") and "| 1 |" in line]
        assert len(re.findall(r"(?<!\\)\|", line)) == 3 + len(columns_of([row]))
        assert "\n\\toprule" in latex_table([row])
        assert latex_table([row]).split("\n")[0].startswith("% ")
        cells = list(csv.reader(io.StringIO(as_csv([row]))))
        assert len(cells) == 2
        assert not ACTING.search("".join(cells[1]))


def test_a_model_card_is_inert_and_tells_no_path():
    spelt = [
        text for text in HOSTILE if not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    ]  # others are refused
    facts = facts_from([{**fact_records(1)[0], "target_new": text} for text in spelt]).facts
    content = {
        **CONFIG,
        "settings": {"method": "<b>", "seed": 0},
        "model": {**CONFIG["model"], "source": "/home/ada/# [x](y)", "fingerprint": "`f`"},
        "method_options": {"a": "`<script>`"},
        "matrices": ["m`\n# x"],
        "corpus": {**CONFIG["corpus"], "origin": "<i>corpus</i>"},
        "versions": {"torch": "<2>"},
    }
    card = model_card(RunConfig.model_validate(content), History(), facts, None, Note())
    assert "/home" not in card
    body = card.split("---\n", 2)[2]
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(body)
    kinds = [part.type for token in tokens for part in [token, *(token.children or ())]]
    assert not {"html_inline", "html_block", "link_open", "image", "fence", "hr", "table_open"} & set(kinds)
    assert kinds.count("heading_open") == 2
    assert kinds.count("list_item_open") == 6 + len(facts)
    assert not ACTING.search(card)


def test_json_and_text_with_names_that_are_no_utf8(tmp_path: Path):
    from sphere_edit.files import write_json

    name = os.fsdecode(b"r\xffn")
    write_json(tmp_path / "a.json", {"source": name})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"source": name}
