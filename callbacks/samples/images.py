"""Grids of images that a module generates in validation, always for the same samples with the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ... import UsageError
from ...checkpoints.runs import run_folder
from .image_quality import as_bytes
from .validation_batches import ValidationCallback, corpora, fields_of, length, samples_of, select, valid

Pixels = NDArray[np.uint8]
SIDE = 128  # pixels; smaller images are enlarged by a whole factor
MARGIN = 8
LINE = 16


class Row(NamedTuple):
    """Row of a grid.

    Attributes:
        caption: Caption of the sample.
        pictures: Images by name of the network that generated them, (height, width, 3) each.
    """

    caption: str
    pictures: dict[str, Pixels]


class LogSamples(ValidationCallback):
    """Callback that generates images for the first samples of each validation corpus and logs them as a grid.

    The module must have ``draw_samples(batch) -> dict[str, Tensor]``, which returns images by name,
    (n, 3, height, width) in [0, 1]; the dict's order is that of the columns (original, A, B, ...). It gets a part of a
    validation batch in the batch's structure: a tensor, or a dict, list or tuple of tensors, of which the first
    determines the number of samples. A dict may have ``caption`` (a list of texts) and ``valid``; for other batches the
    module may return these from ``batch_fields(batch) -> dict``. Randomness should come from the batch (``seed``).
    Numbers from the global generator are also the same every time, and its state is restored.

    Images are generated with the weights that are validated, such as averaged ones. A grid goes to every logger that
    supports images (TensorBoard's ``add_image``, ``log_image`` of Weights & Biases) under ``samples/<corpus>``, and as
    a PNG file to the folder ``samples`` in the logger's folder. With several processes, the first generates images for
    its own share of the corpus; if the module is sharded (:class:`~rewurst.callbacks.FSDP`), the others take part.

    Args:
        samples: Number of rows in a grid.
        every_n_steps: Minimum number of global batches between grids, checked at validations (default: a grid at
            every validation).
        corpora: Names of the corpora (default: all).

    Raises:
        UsageError: A number is out of range, a corpus does not exist, or the module does not generate images.

    Example::

        Trainer(callbacks=[LogSamples(samples=8, every_n_steps=1000)])
    """

    def __init__(self, samples: int = 8, every_n_steps: int | None = None, corpora: list[str] | None = None) -> None:
        if samples < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise UsageError(f"LogSamples: samples {samples} and every_n_steps {every_n_steps} must be at least 1")
        self.samples, self.every_n_steps, self.corpora = samples, every_n_steps, corpora
        self._rows: dict[str, list[Row]] = {}
        self._drawn_at: int | None = None
        self._folder: Path | None = None

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints, which allows several of these callbacks."""
        return self._generate_state_key(samples=self.samples, every=self.every_n_steps, corpora=self.corpora)

    @property
    def _legacy_state_key(self) -> Any:
        return type(self).__name__  # the key in older checkpoints, which allowed only one

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last grid."""
        return {"drawn_at": self._drawn_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last grid."""
        self._drawn_at = state_dict["drawn_at"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module can generate images, and let all processes agree on the folder."""
        self._folder = run_folder(trainer)
        if not callable(getattr(pl_module, "draw_samples", None)):
            raise UsageError(
                f"LogSamples: {type(pl_module).__name__} has no draw_samples(batch) that returns images by name"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin new grids."""
        names = corpora(trainer)
        for wanted in self.corpora or []:
            if wanted not in names:
                raise UsageError(f"LogSamples: there is no validation corpus {wanted!r}, only {', '.join(names)}")
        due = self._is_due(trainer)
        if _draw_together(trainer):
            due = trainer.strategy.broadcast(due)
        self._rows = {name: [] for name in self.corpora or names} if due else {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Generate images for as many of the batch's samples as the grid still needs."""
        rows = self._rows.get(corpora(trainer)[dataloader_idx])
        if rows is None:
            return
        lacking = self.samples - len(rows)
        if _draw_together(trainer):
            lacking = trainer.strategy.broadcast(lacking)
        if lacking <= 0:
            return
        batch = samples_of(batch, pl_module, "LogSamples")
        chosen = valid(fields_of(batch, pl_module), length(batch))[: lacking if trainer.is_global_zero else 1]
        kept = trainer.is_global_zero and bool(chosen)
        part = select(batch, chosen or [0])  # all processes must take part, even with a discarded sample
        devices = [pl_module.device.index or 0] if pl_module.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            drawn = {name: _bytes(pictures) for name, pictures in pl_module.draw_samples(part).items()}  # type: ignore[operator]
        if not kept:
            return
        captions = fields_of(part, pl_module).get("caption", [""] * self.samples)
        for index in range(len(next(iter(drawn.values()), []))):
            rows.append(Row(captions[index], {name: pictures[index] for name, pictures in drawn.items()}))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the grids."""
        step = self.completed_steps(trainer)
        rows, self._rows = self._rows, {}
        if not trainer.is_global_zero:
            return
        for corpus, lines in rows.items():
            if not lines:
                rank_zero_warn(f"LogSamples: corpus {corpus!r} has no samples on the first process")
                continue
            self._drawn_at = step
            picture = grid(lines)
            if self._folder is not None:
                folder = self._folder / "samples"
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / f"{corpus}-step={step:07d}.png")
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(key=f"samples/{corpus}", images=[picture], step=step)
                    continue
                experiment: Any = getattr(logger, "experiment", None)
                if hasattr(experiment, "add_image"):
                    experiment.add_image(f"samples/{corpus}", np.asarray(picture), step, dataformats="HWC")

    def _is_due(self, trainer: Trainer) -> bool:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return False
        if self.every_n_steps is None or self._drawn_at is None or trainer.state.fn != "fit":
            return True
        return self.completed_steps(trainer) // self.every_n_steps > self._drawn_at // self.every_n_steps


def grid(rows: list[Row]) -> Image.Image:
    """Arrange images side by side under their names, with each row's caption below it."""
    names = list(rows[0].pictures)
    scale = max(1, SIDE // max(max(picture.shape[:2]) for row in rows for picture in row.pictures.values()))
    width = scale * max(picture.shape[1] for row in rows for picture in row.pictures.values())
    heights = [scale * max(picture.shape[0] for picture in row.pictures.values()) for row in rows]
    size = (len(names) * (width + MARGIN) + MARGIN, LINE + MARGIN + sum(heights) + len(rows) * (LINE + MARGIN))
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(LINE - 4)
    for column, name in enumerate(names):
        pen.text((MARGIN + column * (width + MARGIN), 2), name, fill="black", font=font)
    top = LINE + MARGIN // 2
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row.pictures.values()):
            shown = Image.fromarray(picture)
            shown = shown.resize((shown.width * scale, shown.height * scale), Image.Resampling.NEAREST)
            canvas.paste(shown, (MARGIN + column * (width + MARGIN), top))
        pen.text((MARGIN, top + height + 1), _shortened(row.caption, pen, font, size[0] - 2 * MARGIN), "black", font)
        top += height + LINE + MARGIN
    return canvas


def _shortened(text: str, pen: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    """Shorten a caption to fit on a line, replacing characters that the font lacks with question marks."""
    text = " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def _draw_together(trainer: Trainer) -> bool:
    """Return whether all processes must call the module together."""
    return bool(getattr(trainer.strategy, "computes_together", False))


def _bytes(pictures: Tensor) -> Pixels:
    return as_bytes(pictures).permute(0, 2, 3, 1).cpu().numpy()
