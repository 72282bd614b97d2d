"""The floors of DESIGN.md: a module imports only from its own floor or from floors above it, without cycles."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import sphere_edit

ROOT = Path(sphere_edit.__file__).parent
FLOORS = [
    "numerics",
    "models",
    "facts",
    "editing",
    "evaluation",
    "runs",
    "reporting",
    "diagnosis",
    "exports",
    "editor",
    "preview",
    "trials",
    "tuning",
    "bench",
    "executors",
    "planning",
    "inspection",
    "studio",
    "cli",
    "__main__",
]
GROUND = [
    "_version",
    "errors",
    "counting",
    "text",
    "progress",
    "ranks",
    "files",
    "plugins",
]  # what every floor stands on


def imports() -> dict[str, set[str]]:
    graph = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sphere_edit."):
                found.add(node.module.removeprefix("sphere_edit."))
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name} imports relatively"
        graph[name] = found
    return graph


def floor(module: str) -> int:
    top = module.split(".")[0]
    return -1 if top in GROUND else FLOORS.index(top)


def test_modules_import_only_from_their_own_floor_or_those_above():
    for module, found in imports().items():
        if module == "__init__":
            continue
        for other in found:
            assert floor(other) <= floor(module), f"{module} imports {other}, which stands below it"


def test_there_are_no_cycles():
    graph = imports()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' → '.join((*path, module))}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_families_are_named_in_one_place_and_cuda_in_none():
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        if path.name != "architecture.py":
            assert "down_proj" not in text.replace("model.layers.4.mlp.down_proj", "").replace("4.mlp.down_proj", ""), (
                path
            )
            assert "gpt2" not in text.lower().replace("gpt-2", ""), path
        if path.name not in ("loading.py", "options.py"):
            assert "cuda" not in text.lower(), path


def test_help_needs_no_torch():
    code = "import sys, sphere_edit.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_python_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "sphere_edit", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"sphere-edit {sphere_edit.__version__}\n")


def test_foreign_text_reaches_a_terminal_in_one_way_only():
    """Rich's own Text and Console, and markup, are left to `sphere_edit.text`."""
    for path in ROOT.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        asks = {key.arg for node in calls for key in node.keywords if isinstance(key.value, ast.Constant) and key.value.value is True}  # fmt: skip
        if path.name != "text.py":
            assert not names & {"Text", "Console"}, path
        assert "markup" not in asks, path
