"""A long stream of facts on a tiny random model: what a batch, a file and a command cost at its end against its beginning.

python benchmarks/long_stream.py                          # 20,000 facts in batches of 100
python benchmarks/long_stream.py --facts 2000 --keep DIR  # shorter, and the run stays in DIR
python benchmarks/long_stream.py --recheck 0              # earlier facts are not asked, and so none is written again

The model is far too small to know so many facts: what is measured is the tool around it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scaling import byte_tokenizer, made
from transformers import LlamaConfig, LlamaForCausalLM

from sphere_edit import Editor
from sphere_edit.editor import opened
from sphere_edit.progress import Quiet
from sphere_edit.reporting.report import write_report
from sphere_edit.reporting.results import draw
from sphere_edit.reporting.views import of_run
from sphere_edit.runs.folder import RunFolder
from sphere_edit.text import Screen


def main() -> None:
    """The stream, then what stands on the disk, then the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--recheck", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"allocator: {', '.join(f'{k}={v}' for k, v in os.environ.items() if k.startswith('MALLOC_')) or 'as it is'}\n"
    )
    with tempfile.TemporaryDirectory() as root:
        folder = args.keep or Path(root)
        stream(folder, args.facts, args.batch_size, args.recheck)
        sizes(folder / "run")
        commands(folder / "run")


class Watch(Quiet):
    """Notes the clock and the memory whenever a batch begins."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def say(self, text: str, style: str = "") -> None:
        """One line for each batch."""
        if text.startswith("Batch "):
            self.seen.append((time.process_time(), resident()))
            if len(self.seen) % 10 == 0:
                print(f"<!-- {text}, {resident():.3f} GB -->", flush=True)


def resident() -> float:
    """GB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def stream(folder: Path, count: int, batch_size: int, recheck: int) -> None:
    """Edit, and tell of batches near the beginning and near the end."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    settings: dict[str, Any] = {
        "method": "frugal", "batch_size": batch_size, "layers": [1], "templates": 0, "recheck": recheck, "repair": 20,
        "targets": {"steps": 2, "compute": "model"}, "moments": {"sampled_tokens": 2048},
        "evaluation": {"generation": "off", "every": 50, "sample": 200},
    }  # fmt: skip
    watch = Watch()
    editor = Editor.from_pretrained(folder / "model", folder / "run", reporter=watch, **settings)
    began = time.process_time()
    editor.edit([{"subject": f.subject, "prompt": f.prompt, "target_new": f.target_new} for f in made(count)])
    print(f"{count} facts in {time.process_time() - began:.0f} s of CPU, with everything that ends a stream\n")
    seconds = [after[0] - before[0] for before, after in zip(watch.seen, watch.seen[1:], strict=False)]
    batches = count // batch_size
    print("| batch | seconds of CPU (median of nine around it) | memory when it begins, GB |\n|---|---|---|")
    for mark in sorted({2, *(m for m in (batches // 4, batches // 2, 3 * batches // 4, batches - 1) if m > 2)}):
        around = median(seconds[max(0, mark - 5) : mark + 4])
        print(f"| {mark} | {around:.3f} | {watch.seen[mark - 1][1]:.3f} |")
    editor.close()


def sizes(run: Path) -> None:
    """What the run's files take, folder by folder."""
    print("\n| file or folder | files | MB |\n|---|---|---|")
    for path in sorted(run.iterdir()):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        print(f"| {path.name} | {len(files)} | {sum(file.stat().st_size for file in files) / 1e6:.2f} |")


def commands(run: Path) -> None:
    """Seconds that commands take on the finished run, without the start of Python."""
    print("\n| command | seconds of CPU |\n|---|---|")
    screen = Screen(quiet=True)
    timed("open the folder", lambda: RunFolder.open(run))
    timed("show", lambda: [screen.print(draw(view)) for view in of_run(run, 5)])
    timed("report", lambda: write_report([run], run / "report.html", run / "figures"))
    print(f"| (the page, MB) | {(run / 'report.html').stat().st_size / 1e6:.2f} |")
    timed("edit --resume, nothing to do", lambda: at_work(run, Editor.resume))
    head = RunFolder.open(run).history.head
    timed("rollback by one batch", lambda: at_work(run, lambda editor: editor.rollback(head - 1)))
    timed("rollback to batch 1", lambda: at_work(run, lambda editor: editor.rollback(1)))


def at_work(run: Path, work: Callable[[Editor], object]) -> None:
    """Open the run, model and all, and do something."""
    with opened(run, Quiet()) as editor:
        work(editor)


def timed(name: str, work: Callable[[], object]) -> None:
    """A row of the table."""
    began = time.process_time()
    work()
    print(f"| {name} | {time.process_time() - began:.2f} |", flush=True)


if __name__ == "__main__":
    main()
