"""Streamed images: each once per pass, filtered and corrupt ones counted, and an exact resume."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from save_at import SaveAt
from text_reading import _QUIET
from torch import Tensor, nn

from rewurst import UsageError
from rewurst.datamodules import Corpus, Filters, ImageTextDataModule, LatentDataModule

SHARDS, IMAGES = 4, 6


def png(number: int, side: int = 16) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), number, dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def stream(tmp_path: Path) -> str:
    for shard in range(SHARDS):
        with wds.TarWriter(str(tmp_path / f"i-{shard}.tar")) as writer:
            for i in range(IMAGES):
                number = shard * IMAGES + i
                writer.write({"__key__": f"{number:03d}", "png": png(number), "txt": f"picture {number}"})
    return str(tmp_path / f"i-{{0..{SHARDS - 1}}}.tar")


@pytest.fixture
def make(stream: str) -> Callable[..., ImageTextDataModule]:
    def build(**changes: Any) -> ImageTextDataModule:
        arguments: dict[str, Any] = {
            "dataset": "web",
            "corpora": {"web": Corpus(stream=stream)},
            "val": {},
            "image_size": 8,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "max_corrupt": 0.5,
        }
        return ImageTextDataModule(**{**arguments, **changes})

    return build


class Viewer(LightningModule):
    """Writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, str]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen += zip(batch["image"][:, 0, 0, 0].tolist(), batch["caption"], strict=True)
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def view(data: Any, steps: int, *callbacks: Any, ckpt_path: Path | None = None) -> tuple[list[tuple[int, str]], Any]:
    module = Viewer()
    trainer = Trainer(accelerator="cpu", max_steps=steps, logger=False, callbacks=[*callbacks], **_QUIET)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*corrupt image replaced.*")
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module.seen, trainer


EVERY = {(number, f"picture {number}") for number in range(SHARDS * IMAGES)}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_comes_once_per_pass_with_its_caption(
    make: Callable[..., ImageTextDataModule], workers: int
) -> None:
    seen, _ = view(make(num_workers=workers), 12)
    assert set(seen[:24]) == set(seen[24:]) == EVERY
    assert seen[:24] != seen[24:]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exact_resume(make: Callable[..., ImageTextDataModule], tmp_path: Path, workers: int) -> None:
    whole, _ = view(make(num_workers=workers), 10)
    view(make(num_workers=workers), 10, SaveAt(6, tmp_path / "a.ckpt"))
    assert view(make(num_workers=workers), 10, ckpt_path=tmp_path / "a.ckpt")[0] == whole[12:]


def test_filtered_and_corrupt_images_are_counted_and_replaced_by_the_next(
    make: Callable[..., ImageTextDataModule], tmp_path: Path
) -> None:
    with wds.TarWriter(str(tmp_path / "x.tar")) as writer:
        for i in range(12):
            members = {"png": png(i), "txt": f"picture {i}"}
            if i in (2, 7):
                members = {"png": png(i, side=4), "txt": "small"}
            if i == 5:
                members = {"png": b"broken", "txt": "broken"}
            if i == 9:
                members = {"png": png(i)}  # no caption
            writer.write({"__key__": f"{i:03d}", **members})
    corpora = {"web": Corpus(stream=str(tmp_path / "x.tar"))}
    seen, trainer = view(make(corpora=corpora, filters=Filters(min_size=8)), 4)
    whole = [(i, f"picture {i}") for i in (0, 1, 3, 4, 6, 8, 10, 11)]
    assert sorted(seen[:8]) == sorted(seen[8:]) == whole
    # Two passes, but for what comes after the last image of the second one.
    assert 3 <= float(trainer.logged_metrics["data/left_out"]) <= 6
    assert 1 <= float(trainer.logged_metrics["data/corrupt"]) <= 2


def test_what_image_streams_cannot_do(make: Callable[..., ImageTextDataModule], stream: str) -> None:
    with pytest.raises(UsageError, match="corpus 'web' is a stream, which has one shape; leave max_aspect and shapes"):
        view(make(shapes=[(8, 8), (8, 16)]), 2)
    with pytest.raises(UsageError, match="corpus 'web' is a stream, which latents cannot be"):
        view(LatentDataModule("web", {"web": Corpus(stream=stream)}, {}, 2, 4), 2)
