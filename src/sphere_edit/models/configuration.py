"""What a model's configuration says: where its text decoder's values stand, and which class builds it whole."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

from sphere_edit.errors import SphereEditError

CAUSAL, IMAGE_TEXT = "AutoModelForCausalLM", "AutoModelForImageTextToText"
# heads that give no words: a class, a score, a span
_HEADS = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction)$|Reward|ForScore")
# fields that say how many vectors a token has between layers
_STREAMS = ("hc_mult", "hc_count", "altup_num_inputs")
_ENCODER = "an encoder, which reads text and does not go on with it"
# what a type of model is that can be no language model, by the first list of transformers' auto classes that has it
_KINDS = (
    (
        "a model of sound",
        [
            "SPEECH_SEQ_2_SEQ",
            "CTC",
            "RNNT",
            "TDT",
            "AUDIO_CLASSIFICATION",
            "AUDIO_FRAME_CLASSIFICATION",
            "AUDIO_XVECTOR",
            "TEXT_TO_SPECTROGRAM",
            "TEXT_TO_WAVEFORM",
            "MULTIMODAL_LM",
        ],
    ),
    ("an encoder–decoder", ("SEQ_TO_SEQ_CAUSAL_LM", "VISION_2_SEQ")),
    (_ENCODER, ("MASKED_LM", "TEXT_ENCODING")),
    (
        "a model of images",
        [
            "IMAGE",
            "IMAGE_CLASSIFICATION",
            "MASKED_IMAGE_MODELING",
            "CAUSAL_IMAGE_MODELING",
            "IMAGE_SEGMENTATION",
            "BACKBONE",
            "DEPTH_ESTIMATION",
            "VIDEO_CLASSIFICATION",
            "OBJECT_DETECTION",
            "ZERO_SHOT_OBJECT_DETECTION",
            "ZERO_SHOT_IMAGE_CLASSIFICATION",
            "MASK_GENERATION",
        ],
    ),
)


def text_config(model: Any) -> Any:
    """The configuration of a model's text decoder: the model's own, or a part of an image-text model's."""
    return model.config.get_text_config(decoder=True)


def positions(model: Any) -> int:
    """How many tokens a row may have; as many as there are numbers, where the configuration does not say."""
    return getattr(text_config(model), "max_position_embeddings", None) or sys.maxsize


def loader_of(config: Mapping[str, Any], source: str, trust: bool = False) -> str:
    """Which of transformers' auto classes builds the model of a ``config.json`` whole: `CAUSAL` or `IMAGE_TEXT`.

    A type for which there are both, such as Qwen 3.5, is loaded with its vision tower unless ``architectures`` names the class
    without it. Code that comes with a model is asked only if the user trusts it.

    Args:
        source: what the user called the model.
        trust: whether its own code may be run.

    Raises:
        SphereEditError: what is described there is no decoder of text, or unknown to the installed transformers.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = config.get("model_type")
    code = config.get("auto_map")
    own = [name for name in (CAUSAL, IMAGE_TEXT) if trust and isinstance(code, Mapping) and name in code]
    if own:
        return own[0]
    if not isinstance(kind, str) or not kind:
        raise SphereEditError(
            f"the config.json of '{source}' names no model_type, so that nothing tells what the model is; expected the folder or "
            "the name of a language model in Hugging Face format"
        )
    if kind not in CONFIG_MAPPING:
        raise _unknown(kind, source, isinstance(code, Mapping), trust)
    values = CONFIG_MAPPING[kind]
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    if _HEADS.search(architecture):
        raise _no_decoder(f"its head ({architecture}) gives scores or classes, and no words", kind, source)
    causal, whole = _classes("CAUSAL_LM", kind), _classes("IMAGE_TEXT_TO_TEXT", kind)
    if _value("is_encoder_decoder", config, values) and architecture not in causal:
        raise _no_decoder("it is an encoder–decoder", kind, source)
    if _classes("MASKED_LM", kind) and not _value("is_decoder", config, values):
        raise _no_decoder(f"it is {_ENCODER}", kind, source)
    _refuse_streams(config, values, kind, source)
    if values in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and architecture not in causal - whole:
        _refuse_without_text(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[values], kind, source)
        return IMAGE_TEXT
    if values in MODEL_FOR_CAUSAL_LM_MAPPING:
        return CAUSAL
    found = next((words for words, lists in _KINDS if any(_classes(name, kind) for name in lists)), None)
    raise _no_decoder(f"it is {found}" if found else "transformers has no language model of this type", kind, source)


def _refuse_streams(config: Mapping[str, Any], values: Any, kind: str, source: str) -> None:
    """Refuse a decoder whose layers hand on several vectors a token (hyper-connections, AltUp)."""
    from transformers import CONFIG_MAPPING, AutoConfig

    part = config.get("text_config")
    inner = values.sub_configs.get("text_config")
    if isinstance(part, Mapping) and (inner is None or inner is AutoConfig):
        inner = CONFIG_MAPPING[part["model_type"]] if part.get("model_type") in CONFIG_MAPPING else None
    own = part if isinstance(part, Mapping) else config
    for name in _STREAMS:
        count = own.get(name, getattr(inner or values, name, 1))
        if isinstance(count, int) and count > 1:
            raise SphereEditError(
                f"'{source}' (model type '{kind}') cannot be edited: its layers hand on {count} vectors a token ({name}) where one is "
                "expected, so that there is no place to set a target"
            )


def _refuse_without_text(built: Any, kind: str, source: str) -> None:
    """Refuse an image-text model whose forward pass does not run on a text alone."""
    first = built[0] if isinstance(built, tuple) else built
    asked = list(inspect.signature(first.forward).parameters.values())[1:]
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [one.name for one in asked if one.default is inspect.Parameter.empty and one.kind not in open_ended]
    if needed := [name for name in needed if name != "input_ids"]:
        raise SphereEditError(
            f"'{source}' (model type '{kind}') cannot be edited: a text alone does not run through it, for its forward pass needs "
            f"{' and '.join(needed)}"
        )


def _classes(task: str, kind: str) -> set[str]:
    """The classes of a model type in one of transformers' lists."""
    from transformers.models.auto import modeling_auto

    named = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).get(kind, ())
    return {named} if isinstance(named, str) else set(named)


def _value(name: str, config: Mapping[str, Any], values: Any) -> bool:
    """A yes or no of a configuration; where it does not say, what its class takes by default."""
    return bool(config.get(name, getattr(values, name, False)))


def _unknown(kind: str, source: str, code: bool, trust: bool) -> SphereEditError:
    from transformers import __version__ as version

    known = f"'{source}' is of the type '{kind}', which transformers {version} does not know"
    if not code:
        return SphereEditError(f"{known}; a newer transformers may know it (pip install -U transformers)")
    if trust:
        return SphereEditError(f"{known}, and the code that comes with it offers no {CAUSAL} and no {IMAGE_TEXT}")
    return SphereEditError(
        f"{known}; code comes with the model that does. Read it, and give --trust-remote-code if it may run on this machine"
    )


def _no_decoder(what: str, kind: str, source: str) -> SphereEditError:
    return SphereEditError(
        f"'{source}' (model type '{kind}') cannot be edited: {what}; expected a decoder, which writes text token by token "
        f"(transformers' {CAUSAL} or {IMAGE_TEXT})"
    )
