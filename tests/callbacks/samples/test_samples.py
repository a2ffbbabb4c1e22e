"""Grids of samples: choice of samples, weights, loggers, and arbitrary captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import Tensor, nn

from rewurst import UsageError
from rewurst.callbacks import LogSamples, WeightAverage
from rewurst.callbacks.samples.images import Row, grid

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*", "ignore:.*exists and is not empty")


class Draws(LightningModule):
    """Module that records its requests and draws noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.asked: list[dict[str, Any]] = []
        self.noise: list[Tensor] = []
        self.weights: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight - torch.rand(())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        torch.rand(())

    def draw_samples(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.asked.append(batch)
        self.noise.append(torch.rand(len(batch["image"]), 3, 16, 24))
        self.weights.append(float(self.weight.detach()))
        return {"original": batch["image"].float() / 255, "A": self.noise[-1]}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(folder: Path, data: Any, *callbacks: Any, logger: Any = None, steps: int = 6) -> Draws:
    torch.manual_seed(0)
    module = Draws()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=list(callbacks),
        logger=logger or CSVLogger(folder),
        enable_progress_bar=False, enable_model_summary=False, val_check_interval=2, check_val_every_n_epoch=None,
        enable_checkpointing=False, num_sanity_val_steps=1, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, data)
    return module


def test_the_same_samples_with_the_same_noise_every_time(picture_data: Any, tmp_path: Path) -> None:
    module = fit(tmp_path, picture_data(4, 4, val=6), LogSamples(5))
    assert [batch["caption"] for batch in module.asked[:4]] == [
        [f"disc {row}" for row in rows] for rows in ([0, 1, 2, 3], [4]) * 2
    ]
    assert len(module.asked) == 3 * 4, "3 validations, 2 corpora, 2 batches; the sanity check draws nothing"
    for begin in (4, 8):
        for first, later in zip(module.noise[:4], module.noise[begin : begin + 4], strict=True):
            assert torch.equal(first, later)
    assert all(
        (batch["seed"] == other["seed"]).all() for batch, other in zip(module.asked, module.asked[4:], strict=False)
    )


def test_training_draws_the_same_random_numbers(picture_data: Any, tmp_path: Path) -> None:
    with_grids, without = (fit(tmp_path, picture_data(4, 4), *callbacks) for callbacks in ([LogSamples(2)], []))
    assert torch.equal(with_grids.weight, without.weight)


def test_averaged_weights_draw(picture_data: Any, tmp_path: Path) -> None:
    for order in (lambda a, b: (a, b), lambda a, b: (b, a)):
        module = fit(tmp_path, picture_data(4, 4), *order(LogSamples(1, corpora=["seen"]), WeightAverage(0.5)))
        plain = fit(tmp_path, picture_data(4, 4), LogSamples(1, corpora=["seen"]))
        assert len(module.weights) == len(plain.weights) == 3
        assert all(ours != theirs for ours, theirs in zip(module.weights, plain.weights, strict=True))


def test_png_files_and_tensorboard(picture_data: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="run")
    fit(tmp_path, picture_data(4, 4), LogSamples(2, every_n_steps=4), logger=logger)
    names = sorted(path.name for path in (Path(logger.log_dir) / "samples").iterdir())
    assert names == [f"{corpus}-step={step:07d}.png" for corpus in ("seen", "unseen") for step in (2, 4)]
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ["samples/seen", "samples/unseen"]
    assert [event.step for event in events.Images("samples/seen")] == [2, 4]


def test_pictures_are_at_their_places() -> None:
    wide, tall = np.zeros((20, 40, 3), np.uint8), np.zeros((64, 32, 3), np.uint8)
    wide[..., 0], tall[..., 2] = 200, 90  # no gray of the font
    captions = ["a plain one", "two\nlines and " + "very " * 80 + "long", "日本語 \N{PILE OF POO}"]
    picture = grid([Row(caption, {"original": wide, "B": tall}) for caption in captions])
    pixels = np.asarray(picture)
    assert (pixels == (200, 0, 0)).all(axis=2).sum() == 3 * wide.shape[0] * wide.shape[1] * 2**2
    assert (pixels == (0, 0, 90)).all(axis=2).sum() == 3 * tall.shape[0] * tall.shape[1] * 2**2
    assert picture.width < 200


def test_large_pictures_are_not_enlarged() -> None:
    assert grid([Row("", {"A": np.zeros((300, 200, 3), np.uint8)})]).width < 220
    assert isinstance(grid([Row("", {"A": np.zeros((8, 8, 3), np.uint8)})]), Image.Image)


def test_bad_use(picture_data: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="samples 0 and every_n_steps None must be at least 1"):
        LogSamples(0)
    with pytest.raises(UsageError, match="there is no validation corpus 'sean', only seen, unseen"):
        fit(tmp_path, picture_data(4, 4), LogSamples(corpora=["sean"]))

    class Plain(LightningModule):
        pass

    with pytest.raises(UsageError, match=r"LogSamples: Plain has no draw_samples\(batch\)"):
        LogSamples().setup(Trainer(accelerator="cpu", logger=False), Plain(), "fit")
