"""Checkpoints of language models as Hugging Face folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ... import UsageError
from ...checkpoints.newest import newest_checkpoint
from ...checkpoints.sharded_files import is_sharded
from ..networks.weight_files import read_file
from .building import rebuild
from .generation import begin_tokens_of, load_auto_tokenizer
from .initial_weights import fill, lightning_state


def export_hugging_face(
    checkpoint: Path,
    out: Path,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Write a checkpoint of CausalLM as a folder that transformers loads.

    Config, generation config and tokenizer name the same end, begin and padding tokens: those of the training data.

    Args:
        checkpoint: Lightning checkpoint of CausalLM, or auto:RUN for the newest one under a run's folder.
        out: Folder to write; it appears whole or not at all.
        tokenizer: Folder of the tokenizer (default: the one the data was prepared with).
        overwrite: Replace an export that is there.
        dtype: Precision of the exported weights.

    Raises:
        UsageError: No checkpoint of a causal language model, the tokenizer is gone, ``out`` exists.
    """
    checkpoint = _resolve(checkpoint)
    content = read_file(checkpoint)
    if "model_config" not in content:
        raise UsageError(f"{checkpoint} holds no causal language model: it was not saved by rewurst's CausalLM")
    if out.exists() and not (overwrite and (out / "config.json").is_file()):
        raise UsageError(f"{out} exists already: choose another folder, or --overwrite an export")
    words = load_auto_tokenizer(tokenizer or _recorded_tokenizer(content, checkpoint))
    model: Any = rebuild(content["model_config"])
    fill(model, lightning_state(content, checkpoint), str(checkpoint))
    data = content.get("TextDataModule", {})
    align_tokens(model, words, data.get("end_token"), data.get("begin_tokens"))
    model = model.to(getattr(torch, dtype))
    write_folder(model, words, out)


def write_folder(model: Any, words: Any, out: Path) -> None:
    """Write a model and its tokenizer as a folder that transformers loads, whole or not at all.

    Args:
        model: Causal language model of transformers.
        words: Tokenizer of transformers.
        out: Folder to write; one that is there is replaced.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        if out.exists():
            shutil.rmtree(out)
        os.replace(folder, out)


def align_tokens(model: Any, tokenizer: Any, end_token: int | None, begin_tokens: Sequence[int] | None) -> None:
    """Have a model's configs and a tokenizer name the same end, begin and padding tokens.

    Args:
        model: A causal language model of transformers.
        tokenizer: Tokenizer of transformers.
        end_token: Token after each document of the data, none for the tokenizer's.
        begin_tokens: Tokens before each document of the data, none for the tokenizer's.
    """
    text_config = model.config.get_text_config()
    if end_token is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_token)
    if begin_tokens:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(begin_tokens[-1])
    if begin_tokens is not None and list(begin_tokens) != list(begin_tokens_of(tokenizer)) and len(begin_tokens) < 2:
        tokenizer.add_bos_token = bool(begin_tokens)
    pad = getattr(text_config, "pad_token_id", None)
    if tokenizer.pad_token_id is None and isinstance(pad, int) and 0 <= pad < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    numbers = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "bos", "pad")}
    for config in (model.config, text_config, model.generation_config):
        for name, number in numbers.items():
            setattr(config, name, number)


def _resolve(checkpoint: Path) -> Path:
    run = str(checkpoint).removeprefix("auto:")
    if run != str(checkpoint):
        newest = newest_checkpoint([run])
        if newest is None:
            raise UsageError(f"{checkpoint}: there is no whole checkpoint under {run}")
        return newest
    if checkpoint.is_dir() and not is_sharded(checkpoint):
        raise UsageError(f"{checkpoint} is a folder: give a .ckpt file, or auto:{checkpoint} for its newest")
    return checkpoint


def _recorded_tokenizer(content: dict[str, Any], checkpoint: Path) -> Path:
    recorded = content.get("TextDataModule", {}).get("tokenizer")
    if recorded is None:
        raise UsageError(f"{checkpoint} records no tokenizer: name its folder with --tokenizer")
    if not Path(recorded).is_dir():
        raise UsageError(f"the tokenizer of {checkpoint} is no longer at {recorded}: name its folder with --tokenizer")
    return Path(recorded)
