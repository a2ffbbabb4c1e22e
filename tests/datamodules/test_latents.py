"""LatentDataModule gives the samples of ImageTextDataModule in the same slots, also when stopped and resumed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn

from rewurst import UsageError
from rewurst.callbacks import ReplayScheduler
from rewurst.datamodules import Corpus, ImageTextDataModule, LatentDataModule
from rewurst.datamodules.corpora.images import ImageShards
from rewurst.datamodules.corpora.latents import EMPTY_TEXT_FILE, array_bytes
from rewurst.datamodules.imaging.geometry import buckets
from rewurst.preparation.index import index_shards
from rewurst.preparation.verify import verify
from rewurst.preparation.writing.destination import UNFINISHED, Target
from rewurst.preparation.writing.latent_writer import LatentFolder

QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": -1}
QUIET |= {"logger": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
Corpora = Callable[..., tuple[str, str]]


@pytest.fixture
def write_corpora(tmp_path: Path) -> Corpora:
    """Write images and, instead of encoding them, arrays in which z is filled with the row's number."""

    def write(
        name: str,
        count: int,
        corrupt: tuple[int, ...] = (),
        sizes: list[tuple[int, int]] | None = None,
        maker: str = "x",
    ) -> tuple[str, str]:
        folder, out = tmp_path / name, tmp_path / f"{name}-latents"
        folder.mkdir()
        with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=7, verbose=0) as writer:
            for row in range(count):
                content = io.BytesIO()
                Image.new("RGB", (96, 64) if row % 3 == 0 else (64, 64), (row, row, row)).save(content, "png")
                data = content.getvalue()[: -60 if row in corrupt else None]
                writer.write({"__key__": f"{row:06d}", "png": data, "txt": f"{name} {row}"})
        index_shards([str(folder)], progress=False)
        images = ImageShards(folder)
        described = {"what": ("z", "text"), "dtype": "float16", "sizes": tuple(sizes or [(64, 64)])}
        described |= {"images_sha256": images.index.fingerprint(), "compressor_sha256": maker, "compressor_source": "b"}
        target = LatentFolder(Target(str(out)), images, 8, described)
        target.target.write(EMPTY_TEXT_FILE, array_bytes(np.full((3, 2), -1, np.float16)))
        entries = []
        for shard in range(target.shards):
            samples: list[dict[str, bytes]] = []
            for row in target.rows(shard):
                if row in corrupt:
                    samples.append({"json": b'{"left_out": "cut"}'})
                    continue
                about = json.dumps({"crop": [0, 0, 64, 64], "original_size": [64, 64]}).encode()
                arrays = {"z.npy": np.full((4, 2, 2), row, np.float16), "text.npy": np.full((3, 2), row, np.float16)}
                files = {suffix: array_bytes(array) for suffix, array in arrays.items()}
                samples.append({"txt": f"{name} {row}".encode(), "json": about, **files})
            entries.append(target.write(shard, samples))
        target.finish(entries)
        target.target.remove(UNFINISHED)
        return str(folder), str(out)

    return write


class Reader(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches: list[dict[str, Any]] = []
        self.seen: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: Any, steps: int, path: Path | None = None, save: Path | None = None, **options: Any) -> Reader:
    model = Reader()
    callbacks = [ReplayScheduler(0.3)] if data.replay_corpora else []
    run = Trainer(**QUIET | {"max_steps": steps, "callbacks": callbacks} | options)
    run.fit(model, data, ckpt_path=path, weights_only=True)
    if save is not None:
        run.save_checkpoint(save)
    return model


def described(batches: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    columns = ("corpus", "row", "seed", "caption", "replaced")
    return [
        tuple(np.asarray(batch[name])[i] for name in columns) for batch in batches for i in range(len(batch["row"]))
    ]


@pytest.mark.filterwarnings("ignore:corrupt image replaced")
@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_in_the_slots_of_the_images(write_corpora: Corpora, workers: int) -> None:
    new, old = write_corpora("new", 37, corrupt=(3, 20)), write_corpora("old", 23)
    runs = []
    for kind, (one, other) in ((ImageTextDataModule, (new[0], old[0])), (LatentDataModule, (new[1], old[1]))):
        corpora = {"new": Corpus(one), "old": Corpus(other, replay=True)}
        options = {"micro_batch_size": 4, "global_batch_size": 8, "seed": 5, "caption_dropout": 0.3}
        options |= {"num_workers": workers, "max_corrupt": 0.5}
        options |= {"image_size": 64, "random_crop": False} if kind is ImageTextDataModule else {}
        runs.append(
            fit(kind("d", corpora, {"val": one}, **options), 12, val_check_interval=24, check_val_every_n_epoch=None)
        )
    pixels, latents = runs
    assert described(latents.batches) == described(pixels.batches)
    assert any(batch["replaced"].any() for batch in latents.batches)
    assert {corpus for corpus, *_ in described(latents.batches)} == {0, 1}
    for batch in latents.batches:
        shown = batch["z"][:, 0, 0, 0]
        captions = [f"{('new', 'old')[c]} {int(row)}" for c, row in zip(batch["corpus"], shown, strict=True)]
        kept = [caption != "" for caption in batch["caption"]]
        assert [c for c, keep in zip(captions, kept, strict=True) if keep] == [c for c in batch["caption"] if c]
        states = torch.where(torch.tensor(kept), shown, -1.0)
        assert torch.equal(batch["text"][:, 0, 0].float(), states)
        assert batch["z"].dtype == torch.float32
    for one, other in zip(pixels.seen, latents.seen, strict=True):
        assert torch.equal(one["row"], other["row"])
        assert torch.equal(one["valid"], other["valid"])
        assert np.array_equal(one["seed"], other["seed"])
        assert all(other["caption"])


def shapes(batch: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(part.shape), str(part.dtype)) for name, part in batch.items() if hasattr(part, "dtype")}


def test_an_example_is_like_a_batch_of_training(write_corpora: Corpora) -> None:
    images, latents = write_corpora("new", 20)
    for kind, path, options in ((ImageTextDataModule, images, {"image_size": 64}), (LatentDataModule, latents, {})):
        data = kind("d", {"new": Corpus(path)}, {}, micro_batch_size=4, global_batch_size=8, **options)  # type: ignore[arg-type]
        example = data.example_batch(4)
        [batch, *_] = fit(data, 1).batches
        assert set(example) == set(batch)
        assert shapes(example) == shapes(batch)
        assert len(example["caption"]) == 4
    nowhere = ImageTextDataModule("d", {"new": Corpus("nowhere")}, {}, 64, 4, 8, shapes=[(32, 32), (64, 48)])
    assert nowhere.example_batch(2)["image"].shape == (2, 3, 64, 48)


def test_a_resumed_run_continues(write_corpora: Corpora, tmp_path: Path) -> None:
    _, path = write_corpora("new", 30)

    def data() -> LatentDataModule:
        return LatentDataModule("d", {"new": Corpus(path)}, {}, 4, 8, seed=1)

    whole = fit(data(), 9)

    class Save(Reader):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step == 4 and not (tmp_path / "a.ckpt").exists():
                self.trainer.save_checkpoint(tmp_path / "a.ckpt")

    model = Save()
    Trainer(**QUIET | {"max_steps": 5}).fit(model, data())
    rest = fit(data(), 9, tmp_path / "a.ckpt")
    assert described(whole.batches)[32:] == described(rest.batches)


def test_shapes_are_buckets(write_corpora: Corpora) -> None:
    shapes = buckets(64, 16, 2.0)
    images, latents = write_corpora("new", 40, sizes=shapes)
    runs = []
    for kind, path in ((ImageTextDataModule, images), (LatentDataModule, latents)):
        options: dict[str, Any] = {"micro_batch_size": 4, "global_batch_size": 4, "seed": 2}
        if kind is ImageTextDataModule:
            options |= {"image_size": 64, "random_crop": False, "max_aspect": 2.0, "bucket_multiple": 16}
        runs.append(fit(kind("d", {"new": Corpus(path)}, {}, **options), 10))
    assert described(runs[0].batches) == described(runs[1].batches)
    shown = {tuple(batch["image"].shape[2:]) for batch in runs[0].batches}
    assert len(shown) == 2
    _, wide = write_corpora("wide", 1, sizes=shapes)
    mixed = LatentDataModule("d", {"new": Corpus(latents), "wide": Corpus(wide)}, {}, 4, 4)
    with pytest.raises(UsageError, match=r"corpus 'wide' has no latents of 64x64 pixels, which others have"):
        fit(mixed, 1)


def test_corpora_must_be_alike(write_corpora: Corpora) -> None:
    _, one = write_corpora("one", 9)
    _, other = write_corpora("other", 9, maker="y")
    _, larger = write_corpora("larger", 9, sizes=[(128, 128)])
    with pytest.raises(UsageError, match=r"other-latents was made by the compressor of b, .*one-latents by another"):
        fit(LatentDataModule("d", {"one": Corpus(one), "other": Corpus(other)}, {}, 4, 4), 1)
    with pytest.raises(UsageError, match=r"larger-latents has latents of sizes \[\[128, 128\]\]"):
        fit(LatentDataModule("d", {"one": Corpus(one)}, {"larger": larger}, 4, 4), 1)
    images, _ = write_corpora("images", 9)
    with pytest.raises(UsageError, match="kind is 'images', expected 'latents'"):
        fit(LatentDataModule("d", {"images": Corpus(images)}, {}, 4, 4), 1)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves them open
def test_shards_are_plain_and_verified(write_corpora: Corpora) -> None:
    _, path = write_corpora("new", 20, corrupt=(3,))
    assert verify(path) == []
    shards = sorted(map(str, Path(path).glob("*.tar")))
    samples = list(wds.WebDataset(shards, shardshuffle=False).decode())
    assert len(samples) == 20
    assert samples[5]["z.npy"].tolist() == np.full((4, 2, 2), 5.0).tolist()
    assert samples[3]["json"] == {"left_out": "cut"}
    content = bytearray(Path(shards[0]).read_bytes())
    at = content.index(np.full(1, 2, np.float16).tobytes() * 8)
    content[at : at + 2] = np.float16("nan").tobytes()
    Path(shards[0]).write_bytes(content)
    (Path(path) / "empty_text.npy").unlink()
    problems = verify(path)
    assert len(problems) == 3
    assert "SHA-256 is" in problems[0]
    assert "000000002.txt has values that are not finite" in problems[1]
    assert "empty_text.npy: missing" in problems[2]
    with pytest.raises(UsageError, match=r"do not say what made them: copy the index\.json too"):
        index_shards([path], Path(path) / "again", progress=False)
