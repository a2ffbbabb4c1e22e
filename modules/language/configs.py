"""Configs of transformers models: from settings that a user wrote, or from what a checkpoint stored."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from ... import UsageError
from ...hints import closest

HISTORY = frozenset({
    "architectures", "attn_implementation", "auto_map", "dtype", "torch_dtype", "transformers_version",
    "use_bfloat16", "rope_scaling", "rope_theta", "rope_parameters", "rope_interleaved", "is_llama_config",
    "use_mrope", "max_window_layers", "n_ctx", "pruned_heads", "pretraining_tp", "max_length", "do_sample",
    "top_k", "top_p", "temperature", "repetition_penalty", "task_specific_params",
})  # fmt: skip
"""Keys that published files carry for other programs or other versions of transformers."""


def config_from_settings(settings: dict[str, Any]) -> Any:
    """Return the config of a dict that a user wrote, in which a misspelled key is an error.

    Keys that the model does not read are accepted with a warning if the dict is a copy of a published ``config.json``
    or if they are like no key that it reads.

    Args:
        settings: Settings with ``model_type``.

    Raises:
        UsageError: The ``model_type`` or a key is unknown, or a value does not fit.
    """
    kind = _config_class(settings)
    model_type = settings["model_type"]
    known = {*kind().to_dict(), *kind.attribute_map}  # GPT-2 calls num_hidden_layers n_layer, and knows both
    unread = [name for name in settings.keys() - known - {"model_type"} - _read_by(kind) if not _is_published(name)]
    copied = bool(settings.keys() & {"architectures", "transformers_version"})  # a published file, not typed by hand
    for name in () if copied else unread:
        if hint := closest(name, known):
            raise UsageError(f"model setting {name!r} is unknown to {model_type}{hint}")
    if unread:
        rank_zero_warn(f"model: {model_type} does not read {', '.join(sorted(unread))}; is the spelling right?")
    return config_from_stored(settings)


def config_from_stored(settings: dict[str, Any]) -> Any:
    """Return the config of a stored dict, whatever other keys it holds: they were there when the model was trained.

    Args:
        settings: What ``config.to_dict()`` gave, or the content of a ``config.json``.

    Raises:
        UsageError: The ``model_type`` is unknown, or a value does not fit.
    """
    kind = _config_class(settings)
    try:
        return kind.from_dict({name: value for name, value in settings.items() if name != "model_type"})
    except Exception as error:  # dataclasses of transformers raise whatever their checks do
        raise UsageError(f"model settings of {settings['model_type']}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _is_published(name: str) -> bool:
    return name in HISTORY or name.startswith("_") or name.endswith("_token_id") or "." in name


def _config_class(settings: dict[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    model_type = settings.get("model_type")
    if model_type not in CONFIG_MAPPING:
        hint = closest(str(model_type), CAUSAL) or "; gpt_neox and llama are two that exist"
        raise UsageError(f"model_type {model_type!r} is unknown to transformers{hint}")
    if model_type not in CAUSAL:
        raise UsageError(f"model_type {model_type!r} is not a causal language model; gpt_neox and llama are two")
    return CONFIG_MAPPING[str(model_type)]


def _read_by(kind: type) -> set[str]:
    """Return the names of settings that a config class, its bases or its model's code read."""
    modules = {sys.modules[base.__module__] for base in kind.__mro__ if base.__module__.startswith("transformers")}
    text = "".join(inspect.getsource(module) for module in modules)
    text += _modeling_source(kind)
    return {*re.findall(r"config\.(\w+)", text), *re.findall(r"config, [\"'](\w+)[\"']", text)} | {
        *re.findall(r"kwargs\.(?:get|pop)\([\"'](\w+)[\"']", text)
    }


def _modeling_source(kind: type) -> str:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    try:
        return inspect.getsource(sys.modules[getattr(transformers, CAUSAL[kind.model_type]).__module__])  # type: ignore[attr-defined]
    except (AttributeError, ImportError, KeyError, OSError):
        return ""
