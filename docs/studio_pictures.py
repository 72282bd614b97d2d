"""Take the pictures of docs/studio.md and the film strip of the README, of the studio at work on a run of the demo.

python docs/studio_pictures.py http://127.0.0.1:7860 docs

The studio must be there, with a copy of a demo's run open, for a fact is previewed in it. Needs Chromium and Playwright.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

WIDTH, HEIGHT = 1100, 860
PATIENCE = 900_000  # milliseconds
SECONDS = 5  # a frame of the film


class Camera:
    """Takes pictures of whole pages, and cuts a film from them."""

    def __init__(self, page: Page, folder: Path):
        self.page, self.folder = page, folder

    def picture(self, name: str) -> None:
        self.page.wait_for_timeout(1500)
        found = Image.open(io.BytesIO(self.page.screenshot(full_page=True))).convert("RGB")
        small = found.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
        small.save(self.folder / f"studio-{name}.png", optimize=True)


def film(folder: Path) -> None:
    """Six frames, as a browser window shows them: the top of each picture, and the end of the one with the preview."""
    frames = []
    for name, end in (("start", 0), ("edit", 0), ("edit", 1), ("compare", 0), ("look", 0), ("ship", 0)):
        whole = Image.open(folder / f"studio-{name}.png").convert("RGB")
        top = max(0, whole.height - HEIGHT) if end else 0
        window = Image.new("RGB", (WIDTH, HEIGHT), whole.getpixel((0, 0)))
        window.paste(whole.crop((0, top, WIDTH, min(top + HEIGHT, whole.height))))
        small = window.resize((WIDTH * 3 // 4, HEIGHT * 3 // 4), Image.Resampling.LANCZOS)
        frames.append(small.convert("P", palette=Image.Palette.ADAPTIVE, colors=48))
    first, *rest = frames
    first.save(folder / "studio.gif", save_all=True, append_images=rest, duration=1000 * SECONDS, loop=0, optimize=True)


def fill(page: Page, name: str, text: str) -> None:
    page.locator(f"#{name} textarea:visible, #{name} input:visible").first.fill(text)


def shown(page: Page, name: str, text: str) -> None:
    expect(page.locator(f"#{name}")).to_contain_text(text, timeout=PATIENCE)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def typed(page: Page) -> None:
    """A fact in the form."""
    fill(page, "subject", "Taj Mahal")
    fill(page, "prompt", "The {} is located in the city of")
    fill(page, "answer", "Lisbon")


def story(page: Page, camera: Camera) -> None:
    """Look at what was found of the model, preview a fact, ask both models, look at the facts, verify."""
    shown(page, "status", "done")
    page.get_by_text("What was found of the model").click()
    camera.picture("start")
    tab(page, "Edit")
    typed(page)
    page.wait_for_function("document.querySelector('#says-now textarea').value.includes('Lisbon')")
    page.locator("#add").click()
    shown(page, "draft", "good")
    typed(page)  # the form is empty again, and would be so in the picture
    page.locator("#preview").click()
    shown(page, "previewed", "Taj Mahal")
    camera.picture("edit")
    looks(page, camera)


def looks(page: Page, camera: Camera) -> None:
    """What needs no edit."""
    tab(page, "Compare")
    fill(page, "compare-prompt", "Big Ben is located in the city of")
    fill(page, "old-answer", "London")
    fill(page, "new-answer", "Vienna")
    page.locator("#ask").click()
    shown(page, "chances", "London")
    camera.picture("compare")
    tab(page, "Look")
    shown(page, "answers", "Did the edits take?")
    fill(page, "fact", "0")
    page.locator("#show-fact").click()
    page.get_by_text("What the model says", exact=True).first.wait_for()
    camera.picture("look")
    tab(page, "Ship")
    page.locator("#verify").click()
    page.wait_for_function("document.querySelector('#shipped textarea').value.includes('whole')")
    camera.picture("ship")


def main(url: str, folder: Path, act: Callable[[Page, Camera], None] = story) -> None:
    """Take them all."""
    with sync_playwright() as works:
        browser = works.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        act(page, Camera(page, folder))
        browser.close()
    film(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
