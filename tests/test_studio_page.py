"""The studio in a browser, from an empty folder to an export: Debian's Chromium, driven by Playwright, on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import fact_records
from families import save_tiny
from sphere_edit.runs.folder import RunFolder
from test_studio import HOSTILE, SETTINGS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
_MANY = 400  # facts: more than can be edited before somebody stops it
PATIENCE = 240_000  # milliseconds, on a machine that does other things too


class Server:
    """The command in a process of its own, which can be killed."""

    def __init__(self, root: Path):
        self.root = root
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self, given: Path) -> None:
        command = [sys.executable, "-m", "sphere_edit", "studio", given, "--port", self.port]
        command += ["--folder", self.root, "--config", self.root / "settings.yaml"]
        self.log = (self.root / "log").open("a")
        self.process = subprocess.Popen([str(part) for part in command], stdout=self.log, stderr=self.log)
        end = time.monotonic() + PATIENCE / 1000
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.root / "log").read_text()
            with socket.socket() as door:
                if door.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        pytest.fail("the studio did not start")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()


class Tab:
    """A page of the studio, with everything that went wrong in it."""

    def __init__(self, browser: Any, url: str, width: int = 1280, **options: Any):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.wrong: list[str] = []
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(f"a dialog: {dialog.message}"))
        self.page.on(
            "request", lambda request: self.wrong.append(request.url) if self._foreign(request.url, url) else None
        )
        self.page.goto(url)

    @staticmethod
    def _foreign(asked: str, url: str) -> bool:
        return not asked.startswith((url, "data:", "blob:", url.replace("http", "ws")))

    def open(self, tab: str) -> None:
        found = self.page.get_by_role("tab", name=tab, exact=True)
        if not found.count():  # of a narrow page, in a menu
            self.page.get_by_label("More tabs").click()
            found = self.page.get_by_text(tab, exact=True).last
        found.click()

    def fill(self, name: str, text: str) -> None:
        self.page.locator(f"#{name} textarea:visible, #{name} input:visible").first.fill(text)

    def click(self, name: str) -> None:
        self.page.locator(f"#{name}").click()

    def shows(self, name: str, text: str | re.Pattern[str]) -> None:
        playwright.expect(self.page.locator(f"#{name}")).to_contain_text(text, timeout=PATIENCE)

    def holds(self, name: str, text: str | re.Pattern[str]) -> None:
        field = self.page.locator(f"#{name} textarea, #{name} input").first
        playwright.expect(field).to_have_value(re.compile(text) if isinstance(text, str) else text, timeout=PATIENCE)

    def enabled(self, name: str, yes: bool) -> None:
        button = playwright.expect(self.page.locator(f"#{name}"))
        (button.to_be_enabled if yes else button.to_be_disabled)(timeout=PATIENCE)

    def close(self) -> None:
        """Leave, if nothing went wrong: no console error, no dialog, no request to another host."""
        self.context.close()
        assert self.wrong == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as works:
        found = works.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    save_tiny("llama", root / "model")
    (root / "settings.yaml").write_text(yaml.safe_dump({**SETTINGS, "targets": {"steps": 150, "lr": 0.1}}))
    return root


def test_the_whole_way(browser, root, monkeypatch):
    monkeypatch.setenv("SPHERE_EDIT_CACHE", str(root / "cache"))
    server = Server(root)
    server.start(root / "model")
    try:
        run = _edits_and_is_killed(browser, server, root)
        server.start(run)
        _comes_back(browser, server, run)
        _reads_nothing_else(browser, server)
        assert (root / "out" / "sphere_edit.json").is_file()
    finally:
        server.kill()
    outside = subprocess.run(["grep", "-c", "Traceback", root / "log"], capture_output=True, text=True, check=False)
    assert outside.stdout.strip() == "0", (root / "log").read_text()


def _edits_and_is_killed(browser: Any, server: Server, root: Path) -> Path:
    tab = Tab(browser, server.url)
    tab.shows("status", "is loaded, and unedited")
    tab.open("Edit")
    # one fact, typed: what the model says now; preview, and nothing kept
    tab.fill("subject", "Ada")
    tab.fill("prompt", "{} plays the")
    tab.fill("answer", "football")
    tab.holds("says-now", "probability of 'football': ")
    tab.click("add")
    tab.shows("draft", "good")
    tab.click("preview")
    tab.shows("previewed", "Ada plays the")
    tab.shows("status", "0 batches, 0 facts edited")
    tab.shows("status", "1 withdrawn; finished")
    # a bad file: its fault stands beside its row
    bad = root / "bad.jsonl"
    bad.write_text('{"subject": "Ada"}\n' + json.dumps({"subject": HOSTILE[0], "prompt": "{} is", "target_new": "x"}))
    tab.page.get_by_text("Several facts: paste them").click()
    tab.page.locator("#file input[type=file]").set_input_files(bad)
    tab.shows("draft", "'prompt' is missing (found: subject)")
    tab.shows("draft", HOSTILE[0])
    tab.click("edit")
    tab.shows("notice", "1 row cannot be edited; the first is row 2")
    tab.fill("rows-out", "2-3")
    tab.click("take-out")
    plain = {"prompt": "People speak of {}", "paraphrases": [], "neighbors": []}
    records = [{**fact, **plain, "subject": f"{fact['subject']} {n}"} for n, fact in enumerate(fact_records(_MANY))]
    tab.fill("pasted", "\n".join(map(json.dumps, records)))
    tab.click("paste")
    tab.page.get_by_text(f"{_MANY + 1} facts, 0 with faults").wait_for()
    # two tabs: the second sees the work, and cannot start its own
    other = Tab(browser, server.url, width=390, color_scheme="dark")
    other.open("Edit")
    tab.enabled("edit", True)
    tab.click("edit")
    other.shows("status", f"At work: editing {_MANY + 1} facts")
    other.enabled("edit", False)
    other.shows("status", re.compile(r"Batch \d+:"))
    _is_readable_at_390(other)
    other.click("stop")
    tab.shows("status", "stopped after batch")
    tab.shows("status", "facts waiting")
    tab.click("go-on")
    tab.shows("status", "At work: going on")
    other.close()
    (run,) = [path.parent for path in root.glob("*/journal.jsonl")]
    before = RunFolder.open(run).history.head
    while RunFolder.open(run).history.head < before + 1:
        time.sleep(0.05)
    tab.close()
    server.kill()
    return run


def _is_readable_at_390(tab: Tab) -> None:
    for name in ("Start", "Look", "Edit"):
        tab.open(name)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390, name
    red, green, blue = map(
        int, re.findall(r"\d+", tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
    )
    assert max(red, green, blue) < 100, "dark where the system is"


def _comes_back(browser: Any, server: Server, run: Path) -> None:
    left = RunFolder.open(run).history
    assert left.pending
    tab = Tab(browser, server.url)
    tab.shows("status", f"interrupted, {len(left.pending)} facts waiting")
    # back to batch 2: it is asked first, and told what is withdrawn
    tab.open("Look")
    tab.shows("timeline", "facts came")
    tab.fill("batch", "2")
    tab.click("roll-back")
    tab.holds("roll-back-asks", re.compile(r"Go back to after batch 2\?\nTaken back, bit for bit: \d+ batch"))
    assert RunFolder.open(run).history.head == left.head
    tab.enabled("roll-back-yes", True)
    tab.page.wait_for_function("!document.querySelector('#status').innerText.includes('At work')")
    tab.click("roll-back-yes")
    tab.shows("status", "rolling back to batch 2: done")
    # hostile facts are text, wherever they are shown
    tab.open("Edit")
    hostile = [
        {"subject": f"{text} {n}", "prompt": "{} plays the", "target_new": text}
        for n, text in enumerate(HOSTILE)
        if "\x1b" not in text
    ]
    tab.page.get_by_text("Several facts: paste them").click()
    tab.fill("pasted", json.dumps([*hostile, {"subject": "Long", "prompt": "{} is", "target_new": "x" * 1_000_000}]))
    tab.click("paste")
    tab.shows("draft", "1,000,000 characters; at most 10,000 are allowed")
    tab.fill("rows-out", str(len(hostile) + 1))
    tab.click("take-out")
    tab.page.get_by_text(f"{len(hostile)} facts, 0 with faults").wait_for()
    _is_reached_by_keyboard(tab, "edit")
    tab.page.keyboard.press("Enter")
    tab.shows("status", f"editing {len(hostile)} facts: done")
    tab.open("Look")
    tab.fill("search", "<script>")
    tab.shows("facts", "<script>alert(1)</script>")
    tab.shows("answers", "Did the edits take?")
    tab.fill("search", "")
    # one fact: its story, and its removal
    number = RunFolder.open(run).history.retained[0]
    tab.fill("fact", str(number))
    tab.click("show-fact")
    tab.page.get_by_text("What the model says", exact=True).first.wait_for()
    tab.click("remove")
    tab.holds("remove-asks", re.compile(r"^Take this back\?"))
    tab.click("remove-yes")
    tab.shows("status", f"removing fact {number}: done")
    assert RunFolder.open(run).history.removed == {number}
    # both models, side by side
    tab.open("Compare")
    tab.fill("compare-prompt", f"{HOSTILE[1]} 1 plays the")
    tab.fill("new-answer", "football")
    tab.click("ask")
    tab.shows("chances", "football")
    # out of the house
    tab.open("Ship")
    tab.fill("export-name", "../out")
    tab.click("export")
    tab.shows("notice", "cannot be a folder's name here")
    tab.fill("export-name", "out")
    tab.click("export")
    tab.holds("shipped", "out holds it, with a card and a manifest")
    tab.click("verify")
    tab.holds("shipped", "is whole")
    tab.close()


def _is_reached_by_keyboard(tab: Tab, name: str) -> None:
    tab.enabled(name, True)
    tab.page.locator("#subject textarea, #subject input").first.focus()
    for _ in range(80):
        if tab.page.evaluate("document.activeElement.id") == name:
            return
        tab.page.keyboard.press("Tab")
    pytest.fail(f"{name} is not reached by the keyboard")


def _reads_nothing_else(browser: Any, server: Server) -> None:
    """Gradio's own routes give no file of this machine: not of /etc, not of the model, not of the run, not from elsewhere."""
    asked = browser.new_context().request
    root = server.root
    for path in ("/etc/passwd", root / "settings.yaml", root / "model" / "config.json", Path(__file__)):
        assert asked.get(f"{server.url}gradio_api/file={path}").status >= 400, path
    assert asked.get(f"{server.url}gradio_api/proxy=https://example.org/").status >= 400
