"""sphere-edit: change thousands of facts inside open-weight language models, and keep the model.

    from sphere_edit import Editor

The command line is ``sphere-edit --help``.
"""

from sphere_edit._version import __version__

__all__ = [
    "Editor",
    "Fact",
    "Settings",
    "Sphere",
    "SphereEditError",
    "__version__",
    "hyperspherical_energy",
    "read_facts",
    "register_format",
    "register_method",
]

_HOMES = {
    "Editor": "sphere_edit.editor",
    "Fact": "sphere_edit.facts.fact",
    "Settings": "sphere_edit.editing.settings",
    "Sphere": "sphere_edit.numerics.projection",
    "SphereEditError": "sphere_edit.errors",
    "hyperspherical_energy": "sphere_edit.numerics.energy",
    "read_facts": "sphere_edit.facts.readers",
    "register_format": "sphere_edit.facts.shapes",
    "register_method": "sphere_edit.editing.methods",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that ``sphere-edit --help`` need not wait for PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sphere_edit' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
