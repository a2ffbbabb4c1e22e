"""Checkpoints of language models as Hugging Face folders, and text from those."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ... import UsageError
from ..networks.weight_files import read_file
from .initial_weights import build, lightning_state


def export_hugging_face(checkpoint: Path, out: Path, tokenizer: Path | None = None, overwrite: bool = False) -> None:
    """Write a checkpoint of CausalLM as a folder that transformers loads.

    Args:
        checkpoint: Lightning checkpoint of CausalLM.
        out: Folder to write; it appears whole or not at all.
        tokenizer: Folder of the tokenizer (default: the one the data was prepared with).
        overwrite: Replace an export that is there.

    Raises:
        UsageError: No checkpoint of a causal language model, the tokenizer is gone, ``out`` exists.
    """
    content = read_file(checkpoint)
    if "model_config" not in content:
        raise UsageError(f"{checkpoint} holds no causal language model: it was not saved by rewurst's CausalLM")
    if out.exists() and not (overwrite and (out / "config.json").is_file()):
        raise UsageError(f"{out} exists already: choose another folder, or --overwrite an export")
    tokenizer = tokenizer or _recorded_tokenizer(content, checkpoint)
    model = build(dict(content["model_config"]))
    model.load_state_dict(lightning_state(content, checkpoint))
    write_folder(model, tokenizer, out)


def write_folder(model: Any, tokenizer: Path, out: Path) -> None:
    """Write a model and its tokenizer as a folder that transformers loads, whole or not at all.

    Args:
        model: Causal language model of transformers.
        tokenizer: Folder of the tokenizer.
        out: Folder to write; one that is there is replaced.

    Raises:
        UsageError: The tokenizer cannot be loaded.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        model.save_pretrained(folder)
        _load_tokenizer(tokenizer).save_pretrained(folder)
        if out.exists():
            shutil.rmtree(out)
        os.replace(folder, out)


def generate_text(
    folder: str,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """Continue a prompt with a language model.

    Args:
        folder: Hugging Face folder or hub name.
        prompt: Text to continue.
        max_new_tokens: Largest number of tokens to add.
        temperature: Temperature of the draw; 0 takes the likeliest token.
        top_p: Probability of the likeliest tokens to draw from, in (0, 1].
        seed: Seed of the draw; the global random state stays as it is.

    Returns:
        Prompt and continuation.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise UsageError(
            f"temperature {temperature} must not be below 0, top_p {top_p} must lie in (0, 1] and max_new_tokens "
            f"{max_new_tokens} be at least 1"
        )
    model: Any = build(folder).eval()
    tokenizer = _load_tokenizer(Path(folder))
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = _generate(model, tokenizer, prompt, max_new_tokens, temperature, top_p)
    return str(tokenizer.decode(output, skip_special_tokens=True))


@torch.no_grad()
def continuations(
    model: Any, tokenizer: str, prompts: Sequence[str], max_new_tokens: int, temperature: float, top_p: float = 0.95
) -> list[str]:
    """Continues prompts, each by itself, with a model in training; draws from the global generator.

    Args:
        model: A causal language model of transformers; it stays in the mode that it is in.
        tokenizer: Its tokenizer's folder.
        prompts: Texts.
        max_new_tokens: Most tokens added to each.
        temperature: 0 takes the likeliest token each time.
        top_p: Draw from the likeliest tokens that hold this probability together.

    Returns:
        What was added to each prompt.
    """
    words, training = _load_tokenizer(Path(tokenizer)), model.training
    try:
        model.eval()
        texts = []
        for prompt in prompts:
            output = _generate(model, words, prompt, max_new_tokens, temperature, top_p)
            added = output[len(_ids(words, prompt)[0]) :]
            texts.append(str(words.decode(added, skip_special_tokens=True)))
    finally:
        model.train(training)
    return texts


def _ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(prompt or tokenizer.bos_token or tokenizer.eos_token, return_tensors="pt")[
        "input_ids"
    ]
    return ids


def _generate(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float, top_p: float
) -> torch.Tensor:
    """Tokens (length,) of a prompt and its continuation."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    ids = _ids(tokenizer, prompt).to(model.device)
    output: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    return output[0]


def _recorded_tokenizer(content: dict[str, Any], checkpoint: Path) -> Path:
    recorded = content.get("TextDataModule", {}).get("tokenizer")
    if recorded is None:
        raise UsageError(f"{checkpoint} records no tokenizer: name its folder with --tokenizer")
    if not Path(recorded).is_dir():
        raise UsageError(f"the tokenizer of {checkpoint} is no longer at {recorded}: name its folder with --tokenizer")
    return Path(recorded)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no tokenizer: {str(error).splitlines()[0]}") from error
