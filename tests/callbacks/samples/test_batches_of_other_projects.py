"""Batches of other projects: tuples, lists, tensors, nested dicts, and custom objects."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.callbacks import ExactResume, Forgetting, LogSamples, LogText, Throughput, WeightAverage
from rewurst.callbacks.monitoring.throughput import samples_in
from rewurst.callbacks.samples.validation_batches import select

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty", "ignore:.*dataloader is not resumable", "ignore:The dirpath has changed"
)
Pair = namedtuple("Pair", "image label")


@dataclass
class Own:
    image: Tensor


def image_of(batch: Any) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, dict):
        return image_of(next(iter(batch.values())))
    return batch.image if isinstance(batch, (Own, Pair)) else batch[0]  # type: ignore[no-any-return]


class Draws(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.drawn: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight * image_of(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss/prose", self.weight * 1.0, batch_size=1)
        self.log("val/loss/code", self.weight * 2.0, batch_size=1)

    def draw_samples(self, batch: Any) -> dict[str, Tensor]:
        self.drawn.append(batch)
        return {"image": image_of(batch)}

    def continue_text(self, prompts: list[str], *_: Any) -> list[str]:
        return ["" for _ in prompts]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


IMAGES, LABELS = torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 3, 8, 8), torch.arange(4)
BATCHES: dict[str, Any] = {
    "tensor": IMAGES,
    "tuple": (IMAGES, LABELS),
    "list": [IMAGES, LABELS],
    "named tuple": Pair(IMAGES, LABELS),
    "dict": {"image": IMAGES, "label": LABELS, "caption": ["a", "b", "c", "d"], "scale": 3.0},
    "nested dict": {"inputs": {"image": IMAGES}, "label": LABELS},
    "a tuple with texts": (IMAGES, ["a", "b", "c", "d"]),
    "own": Own(IMAGES),
}


def fit(folder: Path, module: LightningModule, batch: Any, *callbacks: Any, **options: Any) -> None:
    loaders = [DataLoader([batch], batch_size=None, collate_fn=lambda it: it) for _ in range(2)]  # type: ignore[list-item]
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )  # fmt: skip
    trainer.fit(module, *loaders, **options)


@pytest.mark.parametrize("kind", [kind for kind in BATCHES if kind != "own"])
def test_every_kind_of_batch_is_drawn_in_its_own_structure(tmp_path: Path, kind: str) -> None:
    module = Draws()
    fit(tmp_path, module, BATCHES[kind], LogSamples(2), Throughput())
    assert type(module.drawn[0]) is type(BATCHES[kind])
    assert torch.equal(image_of(module.drawn[0]), IMAGES[:2])
    picture = np.asarray(Image.open(next(iter((tmp_path / "samples").glob("0-step=0000001.png")))))
    assert picture.size
    assert samples_in(BATCHES[kind]) == 4


def test_captions_go_with_their_samples() -> None:
    part = select(BATCHES["dict"], [1, 3])
    assert part["caption"] == ["b", "d"]
    assert part["scale"] == 3.0
    assert select(BATCHES["a tuple with texts"], [2])[1] == ["c"]
    assert torch.equal(select(BATCHES["nested dict"], [0])["inputs"]["image"], IMAGES[:1])


def test_unknown_batches_are_reported_and_a_hook_describes_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a validation batch is a Own, but must be a tensor, or a dict.*batch_fields"):
        fit(tmp_path, Draws(), BATCHES["own"], LogSamples(2))

    class Told(Draws):
        def batch_fields(self, batch: Own) -> dict[str, Any]:
            return {"image": batch.image, "valid": [False, True, True, True]}

    module = Told()
    fit(tmp_path, module, BATCHES["own"], LogSamples(2))
    assert torch.equal(module.drawn[0]["image"], IMAGES[1:3])

    class Fields(Draws):
        def batch_fields(self, batch: Any) -> dict[str, Any]:
            return {"image": batch[0], "caption": ["a"] * len(batch[0]), "valid": batch[1] > 1}

    module = Fields()
    fit(tmp_path, module, BATCHES["tuple"], LogSamples(3))
    assert [len(batch[0]) for batch in module.drawn] == [2, 2]


def test_two_callbacks_of_one_class_each_keep_their_state(tmp_path: Path) -> None:
    def pairs() -> list[Any]:
        return [
            LogSamples(1), LogSamples(2, every_n_steps=7), LogText(["a"]), LogText(["b"], every_n_steps=7),
            WeightAverage(0.5), WeightAverage(0.9), Forgetting(["prose"], ["code"]), Forgetting(["code"]),
            ExactResume(),
        ]  # fmt: skip

    first, second = pairs(), pairs()
    fit(tmp_path, Draws(), BATCHES["dict"], *first, ModelCheckpoint(tmp_path, "a"))
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert len(content["callbacks"]) == 10
    fit(tmp_path, Draws(), BATCHES["dict"], *second, ModelCheckpoint(tmp_path, "b"), ckpt_path=tmp_path / "a.ckpt",
        weights_only=True)  # fmt: skip
    for one, other in zip(first[:8], second[:8], strict=True):
        assert one.state_dict() == other.state_dict()
