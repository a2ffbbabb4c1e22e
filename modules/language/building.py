"""Build transformers models: from a config with fresh weights, or from a folder or hub name. Nothing is executed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ... import UsageError
from ...hints import did_you_mean
from .configs import config_from_settings, config_from_stored, first_line


def build(model: str | dict[str, Any]) -> nn.Module:
    """Return a causal language model from a hub name or folder (with its weights) or from a config (fresh weights).

    Weights are float32, whatever the config or the files say: weights in bfloat16 lose most updates of training. Say
    ``Trainer(precision="bf16-true")`` to train such weights anyway.

    Args:
        model: Hub name (``name@revision`` for a revision), folder, or settings with ``model_type``.

    Raises:
        UsageError: An unknown ``model_type``, a wrong setting, no such folder or name, weights that do not fit.
    """
    if isinstance(model, dict):
        return _from_config(config_from_settings(model))
    return _from_folder(model)


def rebuild(stored: dict[str, Any]) -> nn.Module:
    """Return a model with fresh weights from the config that a checkpoint stored.

    Raises:
        UsageError: This version of transformers cannot build it.
    """
    return _from_config(config_from_stored(stored))


def untie(model: nn.Module) -> None:
    """Give the output head a weight of its own, with the same values, and have the config say so."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    head.weight = nn.Parameter(head.weight.detach().clone())
    _say_untied(model)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the names of weights that are the same tensor as an earlier one, and that one's."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (other := first.setdefault(id(parameter), name)) != name:
            tied[name] = other
    return tied


def some(names: list[str], most: int = 3) -> str:
    """Return the first names of a list, and how many more there are."""
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _from_config(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-any-return,no-untyped-call]
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # models raise whatever their own checks and divisions do
        raise UsageError(f"model settings of {config.model_type}: {first_line(error)}") from error


def _from_folder(model: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    name, revision = _name_and_revision(model)
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=torch.float32, **options)
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"model {model!r} could not be loaded: {_reason(error)}") from error
    built: nn.Module = loaded[0]
    _require_all(model, loaded[1])
    _forget_quantization(model, built)
    _notice_untied(built)
    return built


def _reason(error: Exception) -> str:
    """Return one line, also of the error that lists every class that transformers has."""
    line = first_line(error)
    if "Unrecognized configuration class" in line:
        return "it is not a causal language model"
    return line if len(line) <= 400 else f"{line[:400]}..."


def _require_all(model: str, found: dict[str, Any]) -> None:
    """Refuse weights that are missing, unexpected or of another shape: transformers would draw random ones."""
    wrong = sorted(found.get("mismatched_keys", ()))
    if wrong:
        name, theirs, ours = wrong[0]
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UsageError(
            f"model {model!r}: {name} has shape {tuple(theirs)}, its config.json makes that {tuple(ours)}{more}"
        )
    missing, unexpected = (sorted(found.get(f"{kind}_keys", ())) for kind in ("missing", "unexpected"))
    if missing or unexpected:
        raise UsageError(
            f"model {model!r}: its weights do not fit its config.json, missing {some(missing)}, "
            f"unexpected {some(unexpected)}"
        )
    if errors := found.get("error_msgs"):
        raise UsageError(f"model {model!r} could not be loaded: {str(errors[0]).splitlines()[0]}")


def _forget_quantization(model: str, built: Any) -> None:
    """Let a model whose weights were expanded when they were read be an ordinary one, and refuse one that is packed."""
    method = getattr(built.config, "quantization_config", None)
    if method is None:
        return
    tensors = [*built.parameters(), *(buffer for buffer in built.buffers() if buffer.numel() > 1)]
    if any(tensor.element_size() < 4 or not tensor.is_floating_point() for tensor in tensors):
        raise UsageError(
            f"model {model!r} is quantized, so that its weights cannot be trained: take the model that it was made from"
        )
    del built.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        built.__dict__.pop(name, None)
    built.is_quantized = False


def _notice_untied(model: Any) -> None:
    """Set the config right where the files hold two matrices that it ties: transformers then leaves them untied."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [getattr(part, "weight", None) for part in (embeddings, head)]
    if head is not None and weights[0] is not weights[1] and same_shape(*weights):
        _say_untied(model)


def _say_untied(model: Any) -> None:
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    head = next((name for name, part in model.named_modules() if part is model.get_output_embeddings()), "head")
    getattr(model, "all_tied_weights_keys", {}).pop(f"{head}.weight", None)
    rank_zero_info("the weights hold an output head of their own: head and embeddings are not tied")


def _name_and_revision(model: str) -> tuple[str, str]:
    """Split ``name@revision``; a path that looks like one and is not there would be asked of the hub."""
    path = Path(model)
    if path.expanduser().is_dir():
        return str(path.expanduser()), "main"
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UsageError(f"model folder {model} does not exist{did_you_mean(path)}")
    name, _, revision = model.partition("@")
    return name, revision or "main"


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the table that transformers prints of weights that do not fit, and its progress bar."""
    from transformers.utils import logging as of_transformers

    logging: Any = of_transformers
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
            logging.enable_progress_bar()


def same_shape(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether both are tensors of one shape."""
    return a is not None and b is not None and a.shape == b.shape


def same_values(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same values; of tensors without values, whether their shapes agree."""
    if a.shape != b.shape:
        return False
    if a.device.type == "meta" or b.device.type == "meta":
        return True
    return bool(torch.equal(a, b.to(a.dtype)))
