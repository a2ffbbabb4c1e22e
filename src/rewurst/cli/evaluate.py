"""``rewurst evaluate``: benchmark tasks and perplexity of a language model, pictures of a cascade."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .. import UsageError
from .parser import Parser

if TYPE_CHECKING:
    from ..evaluation.results import Results

Parsed = argparse.Namespace
DESCRIPTION = "Evaluates an exported model: --tasks and --corpus of a language model, --images of a cascade."


def run(args: list[str]) -> None:
    """``evaluate FOLDER ...``: writes OUT/results.json and TensorBoard's events, and prints what was found."""
    from ..evaluation.results import Results

    parsed = _parser().parse_args(args[1:])
    if not (parsed.tasks or parsed.corpus or parsed.images):
        raise UsageError("nothing to evaluate: give --tasks, --corpus or --images")
    if parsed.batch_size < 1 or (parsed.limit is not None and parsed.limit < 1):
        raise UsageError(f"batch_size {parsed.batch_size} and limit {parsed.limit} must be at least 1")
    out = parsed.out or Path("runs/evaluate") / Path(parsed.folder).name
    results = Results(out, parsed.folder)
    if parsed.corpus:
        _corpora(parsed, results)
    if parsed.tasks:
        _tasks(parsed, results)
    if parsed.images:
        _images(parsed, results)
    print(results.path)


def _parser() -> Parser:
    parser = Parser(prog="rewurst evaluate", description=DESCRIPTION)
    parser.add_argument("folder", metavar="FOLDER", help="Hugging Face folder or hub name, or an exported cascade")
    parser.add_argument("--tasks", type=_listed, help="names of lm-eval's tasks, comma-separated")
    parser.add_argument("--task_folder", help="folder with more tasks in lm-eval's format")
    parser.add_argument("--num_fewshot", type=int, help="examples before each question (default: the task's)")
    parser.add_argument("--corpus", nargs="+", metavar="DIR", help="prepared corpora, [NAME=]DIR, for the perplexity")
    parser.add_argument("--images", nargs="+", metavar="DIR", help="indexed shards of captioned images, [NAME=]DIR")
    parser.add_argument("--image_size", type=int, default=512, help="side in pixels at which images are compared")
    parser.add_argument("--inception", metavar="FILE", help="torch-fidelity's Inception weights, for FID")
    parser.add_argument("--clip", metavar="MODEL", help="folder or hub name of a CLIP model, for the CLIP score")
    parser.add_argument("--prior", help="folder of the prior, where it lies apart")
    parser.add_argument("--prior_steps", type=int, default=60, help="steps of Stage C")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance of Stage C")
    parser.add_argument("--steps", type=int, default=12, help="steps of Stage B")
    parser.add_argument("--limit", type=int, help="questions of each task, or images (default: all)")
    parser.add_argument("--batch_size", type=int, default=8, help="questions, rows or images at once")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of the weights")
    parser.add_argument("--out", type=Path, help="folder of results.json (default: runs/evaluate/NAME)")
    return parser


def _listed(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _named(folders: list[str]) -> dict[str, str]:
    """Folders by name: given as NAME=DIR, or the shortest end of the path that tells them apart."""
    named: dict[str, str] = {}
    for folder in folders:
        name, equals, path = folder.rpartition("=")
        parts = Path(folder).parts
        name = name if equals else "/".join(parts[-2:] if parts[-1:] in (("train",), ("val",)) else parts[-1:])
        if name in named:
            raise UsageError(f"{path} and {named[name]} would both be called {name!r}: say NAME={path}")
        named[name] = path
    return named


def _corpora(args: Parsed, results: Results) -> None:
    from ..evaluation.text import evaluate_corpora

    found = evaluate_corpora(args.folder, _named(args.corpus), args.batch_size, args.device, args.dtype)
    results.add("corpora", found)
    for name, scores in found.items():
        print(f"{name}: loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.4g}, {scores['tokens']:,} tokens")


def _tasks(args: Parsed, results: Results) -> None:
    from ..evaluation.text import evaluate_tasks

    options = {name: getattr(args, name) for name in ("task_folder", "num_fewshot", "limit", "batch_size", "device")}
    found = evaluate_tasks(args.folder, args.tasks, dtype=args.dtype, **options)
    results.add("tasks", found)
    for task, scores in found.items():
        print(f"{task}: " + ", ".join(f"{name} {value}" for name, value in scores.items() if value is not None))


def _images(args: Parsed, results: Results) -> None:
    from ..evaluation.images import Drawing, evaluate_images, table

    drawing = Drawing(args.prior_steps, args.guidance, args.steps)
    options = {name: getattr(args, name) for name in ("prior", "limit", "batch_size", "inception", "clip", "device")}
    missing: list[str] = []
    for name, path in _named(args.images).items():
        found, missing = evaluate_images(
            args.folder, path, args.image_size, drawing=drawing, dtype=args.dtype, **options
        )
        results.add("images", {name: found})
        print(f"{name}, {found['images']} images of {found['image_size']} pixels:\n{table(found)}")
    for line in missing:
        print(f"left out: {line}")
