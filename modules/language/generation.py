"""Text from causal language models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ... import UsageError
from ...tokenizer_files import prefix
from .building import build


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
            f"temperature {temperature} must not be below 0, top_p {top_p} must be in (0, 1] and max_new_tokens "
            f"{max_new_tokens} be at least 1"
        )
    model: Any = build(folder).eval()
    tokenizer = load_auto_tokenizer(Path(folder))
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        ids = _ids(tokenizer, prompt, begin_tokens_of(tokenizer))
        output = _generate(model, tokenizer, ids, max_new_tokens, temperature, top_p)
    return str(tokenizer.decode(output, skip_special_tokens=True))


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: str,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    top_p: float = 0.95,
    *,
    end_token: int | None = None,
    begin_tokens: Sequence[int] | None = None,
) -> list[str]:
    """Continue prompts, each by itself, with a model in training; draws from the global generator.

    Args:
        model: A causal language model of transformers; it stays in the mode that it is in.
        tokenizer: Folder of its tokenizer.
        prompts: Texts.
        max_new_tokens: Largest number of tokens added to each.
        temperature: Temperature of the draw; 0 takes the likeliest token each time.
        top_p: Probability of the likeliest tokens to draw from.
        end_token: Token that ends a text (default: the tokenizer's).
        begin_tokens: Tokens before a text (default: the tokenizer's).

    Returns:
        What was added to each prompt.
    """
    words, training = load_auto_tokenizer(Path(tokenizer)), model.training
    if end_token is not None:
        words.eos_token = words.convert_ids_to_tokens(end_token)
    begin = begin_tokens_of(words) if begin_tokens is None else begin_tokens
    try:
        model.eval()
        texts = []
        for prompt in prompts:
            ids = _ids(words, prompt, begin)
            output = _generate(model, words, ids, max_new_tokens, temperature, top_p)
            texts.append(str(words.decode(output[len(ids[0]) :], skip_special_tokens=True)))
    finally:
        model.train(training)
    return texts


def begin_tokens_of(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that a tokenizer of transformers puts before a text."""
    whole, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return prefix(whole, text)


def _ids(tokenizer: Any, prompt: str, begin_tokens: Sequence[int]) -> torch.Tensor:
    """Return the tokens (1, length) of a prompt as a document of the training data begins with them."""
    ids = [*begin_tokens, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    ids = ids or tokenizer(tokenizer.bos_token or tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids])


def _generate(
    model: Any, tokenizer: Any, ids: torch.Tensor, max_new_tokens: int, temperature: float, top_p: float
) -> torch.Tensor:
    """Return the tokens (length,) of a prompt and its continuation."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    ids = ids.to(model.device)
    output: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    return output[0]


def load_auto_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder or hub name.

    Raises:
        UsageError: There is none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer goes by the model's class: it reads any tokenizer next to a Qwen 2 as Qwen's
    kind: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no tokenizer: {str(error).splitlines()[0]}") from error
