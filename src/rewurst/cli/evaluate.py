"""``rewurst evaluate``: benchmark tasks and perplexity of a language model, pictures of a cascade."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from .. import UsageError


def evaluate(
    folder: str,
    tasks: tuple[str, ...] | None = None,
    task_folder: str | None = None,
    num_fewshot: int | None = None,
    corpus: Sequence[str] | None = None,
    images: Sequence[str] | None = None,
    image_size: int = 512,
    inception: str | None = None,
    clip: str | None = None,
    prior: str | None = None,
    prior_steps: int = 60,
    guidance: float = 4.0,
    steps: int = 12,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    out: Path | None = None,
) -> str:
    """Evaluate an exported model: tasks and corpora for a language model, images for a cascade.

    Args:
        folder: Hugging Face folder or hub name, or an exported cascade.
        tasks: Names of lm-eval's tasks, separated by commas.
        task_folder: Folder with more tasks in lm-eval's format.
        num_fewshot: Number of examples before each question (default: the task's).
        corpus: Prepared corpora, [NAME=]DIR, to measure the perplexity on.
        images: Indexed shards of captioned images, [NAME=]DIR.
        image_size: Side in pixels at which images are compared.
        inception: File with torch-fidelity's Inception weights, for FID.
        clip: Folder or hub name of a CLIP model, for the CLIP score.
        prior: Folder of the prior if it is not part of FOLDER.
        prior_steps: Sampling steps of Stage C.
        guidance: Guidance scale of Stage C.
        steps: Sampling steps of Stage B.
        limit: Number of questions per task, or of images (default: all).
        batch_size: Number of questions, rows or images at once.
        device: Device to run on, such as cuda.
        dtype: Precision of the weights.
        out: Folder for results.json and TensorBoard's events (default: runs/evaluate/NAME).
    """
    if not (tasks or corpus or images):
        raise UsageError("nothing to evaluate: give --tasks, --corpus or --images")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UsageError(f"batch_size {batch_size} and limit {limit} must be at least 1")
    from ..evaluation.results import Results

    results = Results(out or Path("runs/evaluate") / Path(folder).name, folder)
    if corpus:
        from ..evaluation.text import evaluate_corpora

        found = evaluate_corpora(folder, _named(corpus), batch_size, device, dtype)
        results.add("corpora", found)
        for name, scores in found.items():
            numbers = f"loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.4g}"
            print(f"{name}: {numbers}, {scores['tokens']:,} tokens")
    if tasks:
        from ..evaluation.text import evaluate_tasks

        shared: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "device": device, "dtype": dtype}
        answered = evaluate_tasks(folder, list(tasks), task_folder=task_folder, num_fewshot=num_fewshot, **shared)
        results.add("tasks", answered)
        for task, values in answered.items():
            print(f"{task}: " + ", ".join(f"{name} {value}" for name, value in values.items() if value is not None))
    if images:
        from ..evaluation.images import Drawing, evaluate_images, table

        options: dict[str, Any] = {
            "prior": prior,
            "limit": limit,
            "batch_size": batch_size,
            "inception": inception,
            "clip": clip,
        }
        options |= {"drawing": Drawing(prior_steps, guidance, steps), "device": device, "dtype": dtype}
        missing: list[str] = []
        for name, path in _named(images).items():
            measured, missing = evaluate_images(folder, path, image_size, **options)
            results.add("images", {name: measured})
            print(f"{name}, {measured['images']} images of {measured['image_size']} pixels:\n{table(measured)}")
        for line in missing:
            print(f"left out: {line}")
    return str(results.path)


def _named(folders: Sequence[str]) -> dict[str, str]:
    """Return folders by name: NAME of NAME=DIR, or the shortest end of the path that tells them apart."""
    named: dict[str, str] = {}
    for folder in folders:
        name, equals, path = folder.rpartition("=")
        parts = Path(folder).parts
        name = name if equals else "/".join(parts[-2:] if parts[-1:] in (("train",), ("val",)) else parts[-1:])
        if name in named:
            raise UsageError(f"{path} and {named[name]} would both be called {name!r}: say NAME={path}")
        named[name] = path
    return named
