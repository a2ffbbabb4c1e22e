"""Checkpoints of language models as Hugging Face folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from ... import UsageError
from ...checkpoints.newest import newest_checkpoint
from ...checkpoints.sharded_files import is_sharded
from ...tokenizer_meaning import PROBES
from ..networks.weight_files import read_file
from .building import build, rebuild
from .configs import config_from_stored
from .generation import begin_tokens_of, load_auto_tokenizer
from .initial_weights import check_weights, fill, lightning_state, load_initial_weights
from .limits import extend_vocabulary, vocabulary_of
from .lora import add_adapters, merge_adapters, save_adapter, trained_names


def export_hugging_face(
    checkpoint: Path,
    out: Path,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    adapter: bool = False,
) -> None:
    """Write a checkpoint of CausalLM as a folder that transformers loads.

    Config, generation config and tokenizer name the same end, begin and padding tokens: those of the training data.

    Args:
        checkpoint: Lightning checkpoint of CausalLM, or auto:RUN for the newest one under a run's folder.
        out: Folder to write; it appears whole or not at all.
        tokenizer: Folder of the tokenizer (default: the one the data was prepared with).
        overwrite: Replace an export that is there.
        dtype: Precision of the exported weights.
        adapter: Write the adapters of a run with lora as a folder of peft, instead of merging them.

    Raises:
        UsageError: No checkpoint of a causal language model, the tokenizer is gone, ``out`` exists.
    """
    checkpoint = _resolve(checkpoint)
    content = read_file(checkpoint)
    if "model_config" not in content:
        raise UsageError(f"{checkpoint} holds no causal language model: it was not saved by rewurst's CausalLM")
    if out.exists() and not (
        overwrite and any((out / name).is_file() for name in ("config.json", "adapter_config.json"))
    ):
        raise UsageError(f"{out} exists already: choose another folder, or --overwrite an export")
    if adapter and "lora" not in content:
        raise UsageError(f"{checkpoint} holds no adapters: it was trained without lora")
    words = load_auto_tokenizer(tokenizer or _recorded_tokenizer(content, checkpoint))
    if adapter:
        _export_adapter(content, checkpoint, out)
        return
    model = _trained_model(content, checkpoint)
    data = content.get("TextDataModule", {})
    align_tokens(model, words, data.get("end_token"), data.get("begin_tokens"))
    model = model.to(getattr(torch, dtype))
    write_folder(model, words, out, data.get("end_token"), data.get("begin_tokens"))


def write_folder(
    model: Any, words: Any, out: Path, end_token: int | None = None, begin_tokens: Sequence[int] | None = None
) -> None:
    """Write a model and its tokenizer as a folder that transformers loads, whole or not at all.

    Args:
        model: Causal language model of transformers.
        words: Tokenizer of transformers.
        out: Folder to write; one that is there is replaced.
        end_token: Token that ends documents, if the data says so.
        begin_tokens: Tokens before each document, if the data says so.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        model.config.save_pretrained(folder)
        words.save_pretrained(folder)
        if _take_padding_of(words, folder):
            align_tokens(model, words, end_token, begin_tokens)
            words.save_pretrained(folder)
        model.save_pretrained(folder)
        if out.exists():
            shutil.rmtree(out)
        os.replace(folder, out)


def _trained_model(content: dict[str, Any], checkpoint: Path) -> Any:
    """Return the model of a checkpoint, its adapters merged."""
    lora, state = content.get("lora"), lightning_state(content, checkpoint)
    if lora is None:
        model: Any = rebuild(content["model_config"])
        fill(model, state, str(checkpoint))
        return model
    if lora["adapter_only"]:
        model = build(lora["model"])
        if lora["init_from"] is not None:
            load_initial_weights(model, lora["init_from"])
        tokens = config_from_stored(content["model_config"]).get_text_config().vocab_size
        if tokens > vocabulary_of(model):
            extend_vocabulary(model, tokens)
        add_adapters(model, lora["settings"])
        trained = trained_names(model)
        own = {name: tensor for name, tensor in model.state_dict().items() if name in trained}
        check_weights(own, state, str(checkpoint))
        model.load_state_dict(dict(state), strict=False)
    else:
        model = rebuild(content["model_config"])
        add_adapters(model, lora["settings"])
        fill(model, state, str(checkpoint))
    merge_adapters(model)
    return model


def _export_adapter(content: dict[str, Any], checkpoint: Path, out: Path) -> None:
    lora, state = content["lora"], lightning_state(content, checkpoint)
    if not lora["adapter_only"]:
        raise UsageError(f"{checkpoint}: its adapters belong to a model that was never saved: export it merged")
    base = lora["init_from"] or lora["model"]
    tied = bool(getattr(config_from_stored(content["model_config"]).get_text_config(), "tie_word_embeddings", False))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        save_adapter(state, lora["settings"], base, tied, folder)
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
    if tokenizer.pad_token_id is None and pad in tokenizer.added_tokens_decoder:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    numbers = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "bos", "pad")}
    for config in (model.config, text_config, model.generation_config):
        for name, number in numbers.items():
            setattr(config, name, number)


def _take_padding_of(tokenizer: Any, folder: Path) -> bool:
    """Take the padding token that ``AutoTokenizer`` gives a saved tokenizer by the model's class, and say if it did.

    Warn if that class cuts texts into other tokens: transformers then does not read the tokenizer that is there.
    """
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer.from_pretrained(str(folder))
    if any(auto(text)["input_ids"] != tokenizer(text)["input_ids"] for text in PROBES):
        rank_zero_warn(
            f"AutoTokenizer reads the tokenizer of this model as a {type(auto).__name__}, which cuts texts into other "
            "tokens than the training data: load it with PreTrainedTokenizerFast.from_pretrained"
        )
    number = auto.pad_token_id
    if tokenizer.pad_token_id is not None or number is None or number not in tokenizer.added_tokens_decoder:
        return False
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(number)
    return True


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
