"""Edit: gather facts, see what stands against them, preview, edit, stop, go on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from sphere_edit.errors import SphereEditError
from sphere_edit.studio.room import Room, good, grid
from sphere_edit.studio.views_of import Refreshed

if TYPE_CHECKING:
    from sphere_edit.facts.readers import FactSet

_PASTED = 2_000_000  # characters
_ROWS = ["row", "subject", "prompt", "new answer", "what stands against it"]


def edit_tab(room: Room, notice: Any, refreshed: Refreshed) -> None:
    """Build it."""
    _form(room, notice)
    _several(room, notice)
    _draft(room, notice, refreshed)
    _work(room, notice, refreshed)


def _form(room: Room, notice: Any) -> None:
    """One fact, typed."""
    gr.Markdown("### A fact")
    with gr.Row():
        subject = gr.Textbox("", label="Subject", placeholder="Big Ben", min_width=160, elem_id="subject")
        prompt = gr.Textbox(
            "",
            label="Prompt, {} for the subject",
            placeholder="{} stands in the city of",
            min_width=220,
            elem_id="prompt",
        )
        answer = gr.Textbox("", label="New answer", placeholder="Vienna", min_width=120, elem_id="answer")
    now = gr.Textbox("", label="What the model says now", interactive=False, lines=2, elem_id="says-now")
    with gr.Accordion("Paraphrases and neighbours: prompts to measure by, a line each", open=False):
        paraphrases = gr.Textbox("", label="Paraphrases: the same in other words", lines=3, elem_id="paraphrases")
        neighbours = gr.Textbox(
            "", label="Neighbours: about other things, which must not change", lines=3, elem_id="neighbours"
        )
        suggest = gr.Button("Let the model suggest some", elem_id="suggest")
    add = gr.Button("Add this fact", elem_id="add")

    def peek(subject: str, prompt: str, answer: str) -> Any:
        if not (subject.strip() and prompt.strip()):
            return None
        return room.desk.compare(_filled(subject, prompt), [answer] if answer.strip() else [], new_tokens=12)

    def said(found: Any) -> list[str]:
        return [room.look.says_now(found)]

    fields = [subject, prompt, answer]
    gr.on(
        [field.change for field in fields],
        room.wait(peek, said, 1, quiet=True),
        fields,
        [notice, now],
        trigger_mode="always_last",
        show_progress="hidden",
        concurrency_limit=8,
        api_visibility="private",
    )

    def suggestions(found: Any) -> list[str]:
        others, things = found
        return ["\n".join(others), "\n".join(things)]

    suggest.click(
        room.wait(lambda subject, prompt: room.desk.suggest(subject, prompt), suggestions, 2),
        [subject, prompt],
        [notice, paraphrases, neighbours],
        concurrency_limit=8,
        api_visibility="private",
    )

    def added(subject: str, prompt: str, answer: str, paraphrases: str, neighbours: str) -> list[Any]:
        room.desk.add(_typed(subject, prompt, answer, paraphrases, neighbours))
        return ["", "", "", "", ""]

    every = [*fields, paraphrases, neighbours]
    add.click(room.tell(added, 5), every, [notice, *every], api_visibility="private")


def _typed(subject: str, prompt: str, answer: str, paraphrases: str, neighbours: str) -> FactSet:
    """What was typed, as a file with one record is read."""
    from sphere_edit.facts.readers import facts_from

    record: dict[str, Any] = {"prompt": prompt, "target_new": answer}
    record |= {"subject": subject} if subject.strip() else {}
    more = {"paraphrases": paraphrases, "neighbors": neighbours}
    record |= {
        name: lines for name, text in more.items() if (lines := [one for one in text.split("\n") if one.strip()])
    }
    try:
        return facts_from([record])
    except SphereEditError as error:
        raise SphereEditError(str(error).split("record 1: ")[-1]) from None


def _filled(subject: str, prompt: str) -> str:
    return prompt.replace("{}", subject.strip())


def _several(room: Room, notice: Any) -> None:
    """Several facts, pasted or from a file."""
    with gr.Accordion("Several facts: paste them, or give a file", open=False):
        text = gr.Textbox(
            "",
            label="JSON, JSONL or CSV, as in a file", lines=4, max_length=_PASTED, elem_id="pasted",
            placeholder=json.dumps({"subject": "Big Ben", "prompt": "{} stands in the city of", "target_new": "Vienna"}),
        )  # fmt: skip
        paste = gr.Button("Add what was pasted", elem_id="paste")
        file = gr.File(
            label="A .json, .jsonl or .csv file",
            file_types=[".json", ".jsonl", ".csv"],
            type="filepath",
            elem_id="file",
        )

    def pasted(text: str) -> list[str]:
        from sphere_edit.facts.readers import read_pasted

        if len(text) > _PASTED:
            raise SphereEditError(f"{len(text):,} characters are too much to paste; give a file")
        room.desk.add(read_pasted(text, "what was pasted"))
        return [""]

    def read(path: str | None) -> list[Any]:
        from sphere_edit.facts.readers import read_named

        if path is None:
            return [None]
        room.desk.add(read_named(Path(path), Path(path).name))
        return [None]

    paste.click(room.tell(pasted, 1), [text], [notice, text], api_visibility="private")
    file.upload(room.tell(read, 1), [file], [notice, file], api_visibility="private")


def _draft(room: Room, notice: Any, refreshed: Refreshed) -> None:
    """The facts that were gathered."""
    words = gr.Markdown("### To be edited")
    table = gr.Dataframe(interactive=False, wrap=True, datatype="str", elem_id="draft", headers=_ROWS, max_height=420)
    with gr.Row():
        page = gr.Number(label="Page", value=1, precision=0, minimum=1, min_width=80)
        out = gr.Textbox("", label="Rows to take out: 2, 5-7", min_width=140, elem_id="rows-out")
        take = gr.Button("Take out", min_width=100, elem_id="take-out")
        clear = gr.Button("Take out all", min_width=100)

    def drawn(page: Any) -> list[Any]:
        found = room.look.drafted(room.desk, int(page or 1))
        return [f"### To be edited: {found.words}", grid(found.grid)]

    def taken(rows: str) -> list[str]:
        room.desk.draft.take_out(_numbers(rows))
        room.desk.check()
        return [""]

    refreshed.add(drawn, [page], [words, table])
    page.change(room.tell(drawn, 2), [page], [notice, words, table], show_progress="hidden", api_visibility="private")
    take.click(room.tell(taken, 1), [out], [notice, out], api_visibility="private")
    clear.click(room.tell(lambda: room.desk.draft.clear(), 0), None, [notice], api_visibility="private")


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.replace(",", " ").split():
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise SphereEditError(f"'{part}' names no rows; write numbers, or spans like 5-7")
        found += range(int(first), min(int(last or first), int(first) + 1_000_000) + 1)
    return found


def _work(room: Room, notice: Any, refreshed: Refreshed) -> None:
    """The buttons that change the model."""
    with gr.Row():
        preview = gr.Button("Preview: edit, show, take back", min_width=160, elem_id="preview")
        edit = gr.Button("Edit and keep", variant="primary", min_width=160, elem_id="edit")
        stop = gr.Button("Stop after this batch", variant="stop", min_width=160, elem_id="stop")
        resume = gr.Button("Go on with what waits", min_width=160, elem_id="go-on")
    with gr.Column(visible=False) as shown:
        gr.Markdown("### Preview: nothing of this was kept. *Edit and keep* writes the same bits again.")
        rows = gr.Dataframe(interactive=False, wrap=True, datatype="str", elem_id="previewed", max_height=420)
        text = gr.Dataframe(interactive=False, wrap=True, datatype="str", label="Ordinary text")

    def drawn() -> list[Any]:
        desk, look = room.desk, room.look
        busy, run, found = desk.worker.writing, desk.run(), look.previewed(desk)
        free = desk.loaded and not busy
        waits = run is not None and not run.history.finished
        return [
            gr.update(interactive=free and bool(desk.draft.rows)),
            gr.update(interactive=free and bool(desk.draft.rows)),
            gr.update(interactive=busy),
            gr.update(visible=waits, interactive=free),
            gr.update(visible=desk.previewed is not None),
            grid(found[0]),
            grid(found[1]),
        ]

    def begin(work: str) -> tuple[()]:
        getattr(room.desk, work)()
        return ()

    def stopped() -> str:
        room.desk.stop()
        return good("It ends after this batch; what is left waits in the run.")

    refreshed.add(drawn, [], [preview, edit, stop, resume, shown, rows, text])
    for button, work in ((preview, "preview"), (edit, "edit"), (resume, "go_on")):
        button.click(room.tell(partial(begin, work), 0), None, [notice], api_visibility="private")
    stop.click(stopped, None, [notice], api_visibility="private")
