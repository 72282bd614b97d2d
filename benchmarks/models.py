"""Edit a tiny model of every type that transformers knows: found, edited, exported, reloaded, rolled back? Writes docs/models.md.

python benchmarks/models.py runs/models.json                         # all types; results are kept model by model
python benchmarks/models.py runs/models.json --only qwen3,gpt_oss    # some, again
python benchmarks/models.py runs/models.json --write docs/models.md  # the page, of what the file holds

Each model is made on the spot with random weights (`tiny_models`), saved as a folder, and then treated as any other: two facts, the
default method and the layers it chooses. What is reloaded is compared tensor by tensor with what was there before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

import torch
import transformers
from scaling import byte_tokenizer
from tiny_models import tiny_model, types

from sphere_edit.editor import Editor
from sphere_edit.errors import SphereEditError
from sphere_edit.files import write_json
from sphere_edit.models.configuration import loader_of
from sphere_edit.models.sites import parameter_name
from sphere_edit.progress import Quiet

FACTS = [
    {"subject": "Ada", "prompt": "People speak of {}", "target_new": "Rome"},
    {"subject": "the Tiber", "prompt": "Think of {}", "target_new": "a violin"},
]
QUICK: dict[str, Any] = {
    "batch_size": 2,
    "templates": 0,
    "recheck": 0,
    "repair": 0,
    "targets": {"steps": 6, "lr": 0.5, "compute": "model"},
    "moments": {"sampled_tokens": 256},
    "tokens_per_batch": 512,
    "evaluation": {"generation": "off"},
}
WITHOUT_TARGETS = {"method": "ultraedit", "options": {"rate": 3e-2}}  # reads gradients, and replays nothing
STEPS = ("found", "edited", "exported", "reloaded", "rolled back")
OTHERS = "zoo:"  # before the names of models from another folder
LIMIT = 900  # seconds for one model


def main() -> None:
    """Read the command line, try the models that are not in the file yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file that keeps what was found of each model")
    parser.add_argument("--only", help="model types to try, again where they were tried before")
    parser.add_argument(
        "--zoo", type=Path, help="a folder with a module zoo.py of other tiny configurations, tried too"
    )
    parser.add_argument("--write", type=Path, help="write the page of all results, and try nothing")
    args = parser.parse_args()
    kept = Results(args.results)
    if args.write is not None:
        args.write.write_text(page(kept.rows), "utf-8")
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for name, make in models(args.zoo):
        if name in args.only.split(",") if args.only else name not in kept.rows:
            kept.add(name, tried(make))
            print(line(name, kept.rows[name]), flush=True)


class Results:
    """What was found of each model, in a file that is written after each."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        write_json(self.path, self.rows)


Made = tuple[Any, Any]  # a model and its tokenizer
Tensors = dict[str, torch.Tensor]


def models(zoo: Path | None) -> Iterator[tuple[str, Callable[[], Made]]]:
    """What there is to try, by name: ``zoo:NAME`` of another folder's, and every type."""
    if zoo is not None:
        sys.path[:0] = [str(zoo), "tests"]
        import zoo as other

        for name in other.Z:
            yield f"{OTHERS}{name}", lambda name=name: (other.build(name), other.TOK)
    for kind in types():
        yield kind, lambda kind=kind: (tiny_model(kind, loader_of({"model_type": kind}, kind)), byte_tokenizer())


def tried(make: Callable[[], Made]) -> dict[str, Any]:
    """What became of one model: the steps that it passed, and why it passed no more."""
    row: dict[str, Any] = {"passed": []}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, limited(LIMIT):
        try:
            try:
                model, tokenizer = make()
                model.save_pretrained(Path(folder) / "model")
                tokenizer.save_pretrained(Path(folder) / "model")
                loader_of(model.config.to_dict(), "it")
            except SphereEditError as error:
                return {**row, "refused": "by config.json", "why": str(error)}
            except TimeoutError:
                raise
            except Exception as error:
                return {**row, "refused": "not built", "why": told(error)}
            go(Path(folder), row)
        except SphereEditError as error:
            row.update(refused="loaded" if not row["passed"] else "edited", why=str(error).replace(folder, ""))
        except TimeoutError as error:
            row.update(refused="slow", why=str(error))
        except Exception as error:
            row.update(refused="TRACEBACK", why=told(error))
    return {**row, "seconds": round(time.monotonic() - started, 1)}


def told(error: Exception) -> str:
    """A foreign error in one line, with the place it came from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(place.filename).name}:{place.lineno})"


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Inside, work that takes longer ends in a TimeoutError."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def go(folder: Path, row: dict[str, Any]) -> None:
    """Every step with the model in ``folder``; ``row`` keeps what was passed.

    Raises:
        SphereEditError: a step was refused.
        AssertionError: a step gave a wrong result.
    """
    source, edited = folder / "model", folder / "edited"
    editor, original = first_edit(source, folder, row)
    before = {name: value for name, value in original.items() if name not in changed_names(editor)}
    editor.save_pretrained(edited)
    row["passed"].append("exported")
    check_export(editor, edited, before)
    row["passed"].append("reloaded")
    editor.rollback(0)
    assert same(editor.model.state_dict(), original), "rollback did not give the original's bits"
    row["passed"].append("rolled back")
    editor.close()


def first_edit(source: Path, folder: Path, row: dict[str, Any]) -> tuple[Editor, Tensors]:
    """The model with two facts in it, by the default method or, where that is refused, by one without targets; and its tensors before."""
    refused = None
    for method in ({}, WITHOUT_TARGETS):
        run = folder / f"run-{method.get('method', 'default')}"
        try:
            editor = Editor.from_pretrained(source, run, reporter=Quiet(), **{**QUICK, **method})
            if "found" not in row["passed"]:
                row["passed"].append("found")
                row.update(layout(editor))
            original = {name: value.clone() for name, value in editor.model.state_dict().items()}
            metrics = editor.edit(FACTS)
        except SphereEditError as error:
            if refused is not None or "found" not in row["passed"]:
                raise refused or error from None
            refused = error
            row["default"] = str(error)
            continue
        losses = [
            [fact[which]["rewrite"]["nll_right"] for fact in metrics["per_fact"]] for which in ("unedited", "edited")
        ]
        before, after = (sum(values) / len(values) for values in losses)
        assert after < before, f"the answers became less likely: {before:.3f} → {after:.3f}"
        row.update(method=editor.settings.method, matrices=list(editor.weights.names), losses=[before, after])
        row["passed"].append("edited")
        return editor, original
    raise AssertionError("unreachable")


def layout(editor: Editor) -> dict[str, Any]:
    """What was found of a model, in a few words."""
    architecture = editor.loaded.architecture
    first = architecture.having(architecture.writer)[0]
    return {
        "type": editor.model.config.model_type,
        "class": type(editor.model).__name__,
        "row": architecture.found == "row",
        "writer": architecture.writer,
        "path": architecture.matrix(first, architecture.writer).path,
        "layers": f"{len(architecture.having(architecture.writer))} of {len(architecture.parts)}",
        "one_layer": architecture.matrix(first, architecture.writer).alone,
        "whole_rows": architecture.whole_rows,
        "tower": any("vis" in name or "image" in name for name in editor.model.state_dict()),
    }


def changed_names(editor: Editor) -> set[str]:
    """Parameters that an edit may change."""
    return {parameter_name(editor.loaded.architecture, name) for name in editor.weights.names}


def check_export(editor: Editor, folder: Path, before: Tensors) -> None:
    """Plain transformers loads the export, and it is the edited model: nothing else changed, and it computes the same."""
    loader = getattr(transformers, loader_of(editor.model.config.to_dict(), "the export"))
    model, report = loader.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], f"the export lacks {sorted(report['missing_keys'])[:3]}"
    now = model.float().eval().state_dict()
    assert now.keys() == editor.model.state_dict().keys(), "the export has other tensors"
    differing = [name for name, value in before.items() if not torch.equal(value, now[name])]
    assert not differing, f"other tensors changed: {differing[:3]}"
    assert same({name: now[name] for name in changed_names(editor)}, editor.model.state_dict()), "edits are missing"
    row = torch.tensor([editor.tokenizer("People speak of Ada")["input_ids"]])
    with torch.no_grad():
        logits = [one(input_ids=row, use_cache=False).logits for one in (model, editor.model)]
    assert torch.allclose(*logits, rtol=1e-3, atol=1e-4), "the export computes something else"


def same(some: Tensors, all_of: Tensors) -> bool:
    """Whether these tensors are the others of their names, bit for bit."""
    return all(torch.equal(value, all_of[name]) for name, value in some.items())


def line(name: str, row: dict[str, Any]) -> str:
    """One model's row, for the terminal."""
    done = row["passed"][-1] if row["passed"] else "-"
    return f"{name:26} {done:12} {row.get('path', ''):34} {row.get('seconds', 0):5} {row.get('refused', '')} {row.get('why', '')[:200]}"


# --- the page ---------------------------------------------------------------------------------------------------------

# what users of this field bring, by model type: of the hub's most downloaded, common ones, and older ones that are still used
FAMILIES = [
    "qwen3",
    "qwen2",
    "llama",
    "mistral",
    "gemma3_text",
    "gpt2",
    "phi3",
    "gemma2",
    "gpt_neox",
    "gemma",
    "gptj",
    "smollm3",
    "phi",
    "olmo2",
    "olmo3",
    "glm4",
    "exaone4",
    "falcon",
    "bloom",
    "stablelm",
    "starcoder2",
    "gpt_neo",
    "gemma3",
    "gemma4",
    "qwen3_vl",
    "qwen2_5_vl",
    "qwen2_vl",
    "mistral3",
    "granite",
    "cohere2",
    "cohere",
    "opt",
    "qwen3_moe",
    "gpt_oss",
    "mixtral",
    "deepseek_v3",
    "deepseek_v2",
    "glm4_moe",
    "llama4",
    "minimax_m2",
    "olmoe",
    "glm_moe_dsa",
    "qwen3_5_moe",
    "qwen3_next",
    "qwen3_5",
    "granitemoehybrid",
    "lfm2",
    "nemotron_h",
    "falcon_h1",
    "mamba",
    "gemma3n",
    "deepseek_v4",
    "mllama",
]

_INTRODUCTION = """# Which models can be edited

Made by `python benchmarks/models.py`, with transformers {version}; every row was run.

For each model type a tiny model is made, of its own configuration class, with small sizes and random
weights in float32. It is saved as a folder and then treated as any other model.

| Step | What must hold |
|---|---|
| found | its layout is understood: by a family's row, or by running it; its logits and the replay of its upper layers are its own |
| edited | two facts become likelier by the default method, or, where that is refused, by UltraEdit |
| exported | `export` writes a folder |
| reloaded | plain transformers loads the folder: only edited tensors differ, those of a vision tower included; the logits are the edited model's |
| rolled back | `rollback --to 0` gives every tensor of the original, bit for bit |

This proves the plumbing. It says nothing of the quality of edits, for random weights know nothing. The sizes at which a family
is really used were run for few of them ([log](LOG.md)). Where a layer has no MLP that can be edited, what is
edited is the matrix behind its mixer: state-space models, and DBRX, whose experts no edit reaches yet.
"""


def page(rows: dict[str, dict[str, Any]]) -> str:
    """docs/models.md."""
    own = {name: row for name, row in rows.items() if not name.startswith(OTHERS)}
    others = {name.removeprefix(OTHERS): row for name, row in rows.items() if name.startswith(OTHERS)}
    families = {name: own.get(name, {"passed": [], "refused": "not built", "why": "not tried"}) for name in FAMILIES}
    text = [_INTRODUCTION.format(version=transformers.__version__), _totals(families, others, own)]
    text.append("## Edited\n\n" + _edited({name: row for name, row in own.items() if whole(row)}))
    text.append("## Not edited\n\n" + _refused(own, others))
    return "\n".join(text)


def whole(row: dict[str, Any]) -> bool:
    """Whether every step was passed."""
    return row["passed"] == list(STEPS)


def _totals(families: dict[str, Any], others: dict[str, Any], own: dict[str, Any]) -> str:
    groups = {
        "families that users bring": families,
        "configurations of the second set": others,
        "model types in transformers' lists of causal and of image-text models": own,
    }
    lines = [f"| of | {' | '.join(STEPS)} |", "|---|" + "---|" * len(STEPS)]
    for name, group in groups.items():
        counts = [str(sum(step in row["passed"] for row in group.values())) for step in STEPS]
        lines.append(f"| {len(group)} {name} | {' | '.join(counts)} |")
    why = Counter(row["refused"] for row in own.values() if not whole(row))
    towers = sum(whole(row) and row["tower"] for row in own.values())
    wrong = f" {why['TRACEBACK'] + why['slow']} failed otherwise." if why["TRACEBACK"] + why["slow"] else ""
    lines.append(f"\nOf the types that are edited, {towers} see images, and keep their vision tower as it was.")
    lines.append(
        f"Of the others {why['by config.json']} are refused by their `config.json`, {why['loaded']} when they are loaded, and "
        f"{why['edited']} when they are edited. Of {why['not built']} no tiny model could be made.{wrong}\n"
    )
    lacking = [name for name, row in families.items() if not whole(row)]
    lines.append("The families, those that are not edited in italics:\n")
    lines.append("| | | | | | |\n|---|---|---|---|---|---|")
    names = [f"*{name}*" if name in lacking else name for name in families]
    lines += [f"| {' | '.join(names[first : first + 6])} |" for first in range(0, len(names), 6)]
    lines.append("")
    lines.append(
        "The second set was written by hand and apart from this command: variants of the same types (dense and with\n"
        "experts, with post-norms, scaled residuals, parallel blocks).\n"
    )
    return "\n".join(lines)


def _edited(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| type | class | writes into the stream | layers | known by | targets run | edited by |",
        "|---|" * 1 + "---|" * 6,
    ]
    for name, row in sorted(rows.items()):
        known = "row" if row["row"] else "running it"
        replay = "whole rows" if row["whole_rows"] else "a suffix"
        one = ", one edited" if row["one_layer"] else ""
        lines.append(
            f"| {name} | {row['class']} | `{row['path']}` | {row['layers']}{one} | {known} | {replay} | {row['method']} |"
        )
    return "\n".join(lines) + "\n"


def _refused(own: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]) -> str:
    named = {**own, **{f"{name} (second set)": row for name, row in others.items()}}
    lines = ["| type | when | why |", "|---|---|---|"]
    for name, row in sorted(named.items(), key=lambda item: (item[1].get("refused", ""), item[0])):
        if not whole(row):
            lines.append(f"| {name} | {_WHEN[row['refused']]} | {_reason(row['why'])} |")
    return "\n".join(lines) + "\n"


_WHEN = {
    "by config.json": "refused by its `config.json`",
    "loaded": "refused when it was loaded",
    "edited": "refused when it was edited",
    "not built": "no tiny model could be made",
    "slow": "not within this command's time",
    "TRACEBACK": "a fault of ours",
}


def _reason(why: str) -> str:
    """The part of a refusal that says why, as a cell of a table."""
    said = why.split("cannot be edited: ")[-1].split(". Its longest list")[0].split("; expected a decoder")[0]
    return " ".join(said.split()).replace("|", "/")


if __name__ == "__main__":
    main()
