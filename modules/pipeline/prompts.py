"""Arguments of a pipeline call: prompts, seeds, steps; checked, and brought into the form the loops take."""

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from ... import UsageError
from ..networks import TextEncoder, diffusion


def read_prompts(argument: str) -> list[str]:
    """Return the prompt that ``argument`` is, or with ``@FILE`` the file's lines, empty ones left out.

    Raises:
        UsageError: The file is missing, is not text, or has no prompt.
    """
    if not argument.startswith("@"):
        return [argument]
    try:
        lines = Path(argument[1:]).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{argument[1:]} cannot be read: give a text file with one prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{argument[1:]} holds no prompt: give a text file with one prompt a line")
    return prompts


def listed_texts(texts: str | Sequence[str], name: str) -> list[str]:
    """Return one or several texts as a list."""
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed or not all(isinstance(text, str) for text in listed):
        raise UsageError(f"{name}={texts!r} is not text: give a string or a list of strings")
    return listed


def paired(
    prompt: str | Sequence[str] | None, negative_prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None
) -> tuple[list[str], list[str]]:
    """Return the prompts (empty ones where there are states instead) and what to guide each away from."""
    if prompt is not None and prompt_embeds is None:
        prompts = listed_texts(prompt, "prompt")
    elif prompt is None and prompt_embeds is not None:
        prompts = [""] * len(prompt_embeds)
    else:
        raise UsageError("give either prompt or prompt_embeds")
    negatives = listed_texts(negative_prompt or "", "negative_prompt")
    negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
    if len(negatives) != len(prompts):
        raise UsageError(f"got {len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one each")
    return prompts, negatives


def text_states(
    encoder: TextEncoder, sets: Sequence[tuple[list[str], Tensor | None]], num_images_per_prompt: int
) -> Float[Tensor, "texts n c"]:
    """Encode sets of texts, one after another as guidance needs them, each text repeated for its images.

    Args:
        encoder: Of the stage.
        sets: Texts, and states given instead of them.
        num_images_per_prompt: How often each text's states stand in the result.

    Raises:
        UsageError: States that were given do not fit.
    """
    encoded = []
    for texts, given in sets:
        if given is None:
            different = list(dict.fromkeys(texts))
            states = encoder.encode(different)[[different.index(text) for text in texts]]
        else:
            states = given.to(next(encoder.parameters()).device)
        if states.shape[0] != len(texts) or states.shape[2] != encoder.width:
            needed = (len(texts), encoder.length, encoder.width)
            raise UsageError(f"text states have shape {tuple(states.shape)}: this call and model need {needed}")
        encoded.append(states.repeat_interleave(num_images_per_prompt, dim=0))
    return torch.cat(encoded)


def checked_times(times: Sequence[float] | None, steps: int, name: str) -> Sequence[float]:
    """Return the times given, or ``steps`` even ones."""
    if times is None and steps < 1:
        raise UsageError(f"{name}={steps} is too few: give at least 1")
    return diffusion.timesteps(steps) if times is None else times


def randomness_of(
    seed: SupportsIndex | Iterable[Any] | None,
    generator: Generator | Sequence[Generator] | None,
    images: int,
) -> diffusion.Randomness:
    """Return a generator for each image's seed, or what was given.

    Raises:
        UsageError: Both are given, seeds are not whole numbers, or there are more or fewer than images.
    """
    if seed is None:
        return generator
    if generator is not None:
        raise UsageError("give either seed or generator")
    seeds = _seeds(seed, images)
    if len(seeds) != images:
        raise UsageError(f"got {len(seeds)} seeds for {images} images: give one, or one for each image")
    try:
        return [Generator().manual_seed(one) for one in seeds]
    except (RuntimeError, OverflowError, ValueError):
        raise UsageError(f"seed={seed!r:.60} is too large: give whole numbers of 64 bits") from None


def _seeds(seed: SupportsIndex | Iterable[Any], images: int) -> list[int]:
    """Return whole numbers, whatever type they have: of Python, NumPy or torch."""
    try:
        try:
            first = operator.index(seed)  # type: ignore[arg-type]  # several have no index
        except TypeError:
            return [operator.index(one) for one in seed]  # type: ignore[union-attr]
    except TypeError:
        raise UsageError(f"seed={seed!r:.60} is wrong: give a whole number, or one for each image") from None
    return list(range(first, first + images))
