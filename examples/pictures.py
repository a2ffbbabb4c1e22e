"""Würstchen on drawn shapes, from pixels to pictures of prompts: the second half of the demo.

Stage A, Stage B with its compressor, latents made once, Stage C, an export, and pictures for prompts of combinations
that training showed and of combinations that it never showed. What a picture shows is read by the nearest of all
drawable renderings, which knows nothing of any model. What is there already is not done again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import report
from PIL import Image, ImageDraw

from rewurst.preparation.sources.pictures import shapes

CONFIGS = Path("configs/wuerstchen/shapes")
DATA, NEW_DATA = Path("data/shapes"), Path("data/shapes-new")  # what the configs name
RUNS = Path("runs/wuerstchen/shapes")
SIDE, SEEN = 64, 200
FIGURE_PROMPTS = 8

Command = Callable[..., None]


@dataclass(frozen=True)
class Drawn:
    """Combinations asked for, and the pictures (n, 64, 64, 3) that came."""

    asked: list[shapes.Shape]
    pictures: np.ndarray[Any, Any]

    def right(self, families: Sequence[str] = ("builtin:shapes",)) -> dict[str, float]:
        """Share of the pictures in which each attribute, and all of them, are as asked; of all that may be drawn."""
        read = shapes.Judge(SIDE, families=families).read(self.pictures)
        pairs = list(zip(read, self.asked, strict=True))
        shares = {
            name: float(np.mean([getattr(found, name) == getattr(asked, name) for found, asked in pairs]))
            for name in shapes.Shape._fields
        }
        return shares | {"all": float(np.mean([found == asked for found, asked in pairs]))}


def run(command: Command, out: Path) -> dict[str, Any]:
    """All steps; returns what ``report.json`` says of them."""
    begin = time.monotonic()
    prepare(command)
    for stage in ("a", "b"):
        command("fit", "--config", str(CONFIGS / f"stage_{stage}.yaml"))
    latents(command)
    command("fit", "--config", str(CONFIGS / "stage_c.yaml"))
    folder = export(command)
    seen, unseen = draw(folder)
    figure = out / "pictures.png"
    draw_figure(seen, unseen, figure)
    shares, of_unseen = seen.right(), unseen.right()
    summary: dict[str, Any] = {
        "stage_a": {"psnr": final("a", "val/psnr/unseen"), "codebook_used": codes_used()},
        "stage_b": {"psnr": final("b", "val/psnr/unseen")},
        "stage_c": {**shares, "unseen_all": of_unseen["all"], "chance_all": 1 / len(shapes.combinations())},
        "stage_c_unseen": of_unseen,
        "seconds": round(time.monotonic() - begin, 1),
        "pipeline_folder": str(folder),
        "figure": str(figure),
    }
    return summary


def markdown(summary: dict[str, Any]) -> str:
    """Return the report's second half."""
    names = [*shapes.Shape._fields, "all"]
    rows = {"seen combinations": summary["stage_c"], "unseen combinations": summary["stage_c_unseen"]}
    lines = [
        "",
        "# Würstchen: pictures of shapes from text",
        "",
        f"Stage A {summary['stage_a']['psnr']:.2f} dB and Stage B, from 48 times fewer numbers than pixels,",
        f"{summary['stage_b']['psnr']:.2f} dB on held-out ones. Share of the pictures drawn for prompts in which the",
        f"nearest of all drawable renderings reads what was asked for. The whole took {summary['seconds']:.0f} s.",
        "",
        f"| prompts | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        *(f"| {title} | {' | '.join(f'{shares[name]:.2f}' for name in names)} |" for title, shares in rows.items()),
        "",
        f"![pictures under their prompts]({Path(summary['figure']).name})",
        "",
    ]
    return "\n".join(lines)


def prepare(command: Command) -> None:
    """Prepare drawn pictures of both families and a tokenizer of their captions; Stage C may continue on the second."""
    for source, folder in (("builtin:shapes", DATA), ("builtin:shapes-new", NEW_DATA)):
        if not all((folder / side / "index.json").exists() for side in ("train", "val", "unseen")):
            command("prepare", "images", source, "--out", str(folder), "--overwrite")
    tokenizer = DATA / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        captions = sorted(str(shard) for folder in (DATA, NEW_DATA) for shard in (folder / "train").glob("*.tar"))
        command("prepare", "tokenizer", *captions, "--vocab_size", "400", "--out", str(tokenizer))


def latents(command: Command) -> None:
    """Write the compressor's embedding of every picture, once."""
    for side in ("train", "val", "unseen"):
        options = ["--stage_b", str(checkpoint("b")), "--image_size", str(SIDE), "--out", str(DATA / "latents" / side)]
        command("prepare", "latents", str(DATA / side), *options)


def export(command: Command) -> Path:
    """Return the three stages as a folder that diffusers and ``TextToImage`` load."""
    folder = RUNS / "pipeline"
    if not folder.exists():
        stages = [option for stage in "abc" for option in (f"--stage_{stage}", str(checkpoint(stage)))]
        command("export", "diffusers", *stages, str(folder))
    return folder


def checkpoint(stage: str) -> Path:
    return RUNS / f"stage_{stage}" / "checkpoints" / "last.ckpt"


def draw(folder: Path) -> tuple[Drawn, Drawn]:
    """Pictures of combinations drawn at random from those that training showed, and of all that it never showed."""
    from rewurst.modules import TextToImage

    pipeline = TextToImage.from_folder(folder)
    unseen = shapes.held_out()
    shown = [shape for shape in shapes.combinations() if shape not in set(unseen)]
    asked = [random.Random(0).sample(shown, SEEN), unseen]
    drawn = []
    for combinations in asked:
        pictures: list[Any] = []
        for first in range(0, len(combinations), 50):
            prompts = [shapes.caption(shape) for shape in combinations[first : first + 50]]
            pictures += pipeline(
                prompts,
                height=SIDE,
                width=SIDE,
                prior_num_inference_steps=25,
                prior_guidance_scale=2.0,
                num_inference_steps=12,
                seed=first,
            ).images
        drawn.append(Drawn(combinations, np.stack([np.asarray(picture) for picture in pictures])))
    return drawn[0], drawn[1]


def final(stage: str, tag: str) -> float:
    """Return the last value that a stage logged."""
    return round(report.scalars(RUNS / f"stage_{stage}", tag)[-1][1], 4)


def codes_used() -> float:
    """Share of the codes that Stage A uses on held-out pictures."""
    return final("a", "val/codebook_usage/unseen")


def draw_figure(seen: Drawn, unseen: Drawn, path: Path) -> None:
    """Pictures under their prompts, as they come."""
    rows = [*zip(seen.asked, seen.pictures, strict=True)][:FIGURE_PROMPTS]
    rows += [*zip(unseen.asked, unseen.pictures, strict=True)][:FIGURE_PROMPTS]
    width, height = 4 * 250, 4 * (2 * SIDE + 40)
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (asked, picture) in enumerate(rows):
        left, top = number % 4 * 250 + 10, number // 4 * (2 * SIDE + 40) + 5
        canvas.paste(Image.fromarray(picture).resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST), (left, top))
        words = shapes.caption(asked).replace(" on a", "\non a")
        pen.text((left, top + 2 * SIDE + 2), ("" if number < FIGURE_PROMPTS else "(unseen) ") + words, "black")
    canvas.save(path)
