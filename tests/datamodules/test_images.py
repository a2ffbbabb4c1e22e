"""Global batches of ImageTextDataModule in a real Trainer are the same however they are split, stopped, resumed."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections import Counter
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
from rewurst.datamodules import Corpus, Filters, ImageTextDataModule
from rewurst.datamodules.image_reader import ImageReader
from rewurst.datamodules.sampling.micro_batches import EvaluationRows, MicroBatches, SampleIndices
from rewurst.preparation.index import index_shards

_QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": -1}
_QUIET |= {"logger": False, "num_sanity_val_steps": 0}
Pictures = list[tuple[int, int]]


def jpeg(width: int, height: int, shade: int = 128) -> bytes:
    content = io.BytesIO()
    pixels = np.full((height, width, 3), shade, np.uint8)
    pixels[: height // 2, : width // 2] = (shade + 90) % 256
    Image.fromarray(pixels).save(content, "jpeg", quality=95)
    return content.getvalue()


def bomb() -> bytes:
    """Return a PNG of a few kilobytes whose header says 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., str]:
    """Write shards like those of the large public sets with webdataset's writer, and index them."""

    def write(
        name: str, sizes: Pictures, scores: dict[int, dict[str, Any]] | None = None, corrupt: tuple[int, ...] = ()
    ) -> str:
        folder = tmp_path / "corpora" / name
        folder.mkdir(parents=True)
        with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=7, verbose=0) as writer:
            for number, (width, height) in enumerate(sizes):
                content = jpeg(width, height, number % 160)
                if number in corrupt:
                    content = content[:-30]  # the header is whole, the picture is not
                about = {"original_width": 4 * width, "original_height": 4 * height, "pwatermark": 0.1, "punsafe": 0.0}
                about |= {"aesthetic": 6.0, "caption": f"{name} {number}", **(scores or {}).get(number, {})}
                sample = {"jpg": content, "txt": f"{name} {number}", "json": about}
                writer.write({"__key__": f"{number:09d}", **sample})
        index_shards([str(folder)], progress=False)
        return str(folder)

    return write


class Reader(LightningModule):
    """Module that records the contents of every micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.samples: list[tuple[Any, ...]] = []
        self.shapes: list[tuple[int, ...]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        hashes = [zlib.crc32(image.numpy().tobytes()) for image in batch["image"]]
        self.samples += list(
            zip(
                batch["corpus"].tolist(),
                batch["row"].tolist(),
                batch["seed"].tolist(),
                map(tuple, batch["crop"].tolist()),
                batch["caption"],
                hashes,
                strict=True,
            )
        )
        self.shapes += [tuple(batch["image"].shape[2:])] * len(hashes)
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make(corpora: dict[str, Corpus], **changes: Any) -> ImageTextDataModule:
    arguments: dict[str, Any] = {"dataset": "one", "corpora": corpora, "val": {}, "image_size": 32}
    arguments |= {"micro_batch_size": 4, "global_batch_size": 8, "caption_dropout": 0.25}
    return ImageTextDataModule(**{**arguments, **changes})


def fit(
    data: ImageTextDataModule, steps: int, *callbacks: Any, ckpt: Path | None = None, save: Path | None = None
) -> Reader:
    module = Reader()
    trainer = Trainer(accelerator="cpu", max_steps=steps, callbacks=list(callbacks), **_QUIET)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    if save is not None:
        trainer.save_checkpoint(save)
    return module


SQUARES = [(40, 40)] * 24
SHAPES = [(40, 40)] * 12 + [(64, 30)] * 16 + [(30, 64)] * 8


def test_every_image_once_per_epoch_and_crops_inside(write_images: Callable[..., str]) -> None:
    module = fit(make({"a": Corpus(write_images("a", [(50, 40), (40, 40), (33, 70)] * 8))}), 6)
    rows = [sample[1] for sample in module.samples]
    assert sorted(rows[:24]) == sorted(rows[24:]) == list(range(24))
    assert rows[:24] != rows[24:]
    for _, row, _, (top, left, height, width), _, _ in module.samples:
        stored = [(40, 50), (40, 40), (70, 33)][row % 3]
        assert (height, width) == (min(stored), min(stored))
        assert 0 <= top <= stored[0] - height
        assert 0 <= left <= stored[1] - width
    dropped = sum(sample[4] == "" for sample in module.samples)
    assert 0 < dropped < 24
    assert all(caption in ("", f"a {row}") for _, row, _, _, caption, _ in module.samples)


@pytest.mark.parametrize("shapes", [None, [(32, 32), (24, 48), (48, 24)]], ids=["squares", "shapes"])
def test_batches_do_not_depend_on_how_they_are_split(write_images: Callable[..., str], shapes: Any) -> None:
    sizes = SHAPES if shapes else SQUARES
    corpora = {"new": Corpus(write_images("new", sizes)), "old": Corpus(write_images("old", sizes), replay=True)}
    whole = fit(make(corpora, shapes=shapes, micro_batch_size=8), 9, ReplayScheduler(0.3))
    for changes in ({"micro_batch_size": 1}, {"micro_batch_size": 2, "num_workers": 2}):
        again = fit(make(corpora, shapes=shapes, **changes), 9, ReplayScheduler(0.3))
        assert again.samples == whole.samples
        assert again.shapes == whole.shapes
    assert abs(sum(sample[0] for sample in whole.samples) - 0.3 * 72) < 1
    if shapes:
        by_step = [set(whole.shapes[step * 8 : step * 8 + 8]) for step in range(9)]
        assert all(len(of_step) == 1 for of_step in by_step)
        assert {next(iter(of_step)) for of_step in by_step} == set(shapes)


@pytest.mark.parametrize("world_size", range(1, 33))
def test_ranks_share_the_same_global_batch(write_images: Callable[..., str], world_size: int) -> None:
    data = make({"a": Corpus(write_images("a", SHAPES[::4]))}, max_aspect=2.0, image_size=32, bucket_multiple=8)
    data.setup("fit")
    buckets, orders, sources = data._buckets(), data._orders(), data._sources()
    read = Written()
    size = 32 * 4
    buckets.mixture.global_batch_size = size
    of_rank = size // world_size
    whole = MicroBatches(buckets, orders, sources, read, range(size))
    for step in (0, 7):
        parts = [
            MicroBatches(buckets, orders, sources, read, range(size)[rank * of_rank : (rank + 1) * of_rank])[step]
            for rank in range(world_size)
        ]
        together = [row for part in parts for row in part["row"].tolist()]
        assert together == whole[step]["row"].tolist()[: len(together)]
        seeds = [seed for part in parts for seed in part["seed"].tolist()]
        assert seeds == whole[step]["seed"].tolist()[: len(seeds)]


class Written:
    """A reader that reads nothing."""

    def __call__(self, picks: SampleIndices) -> dict[str, Any]:
        return {"seed": picks.seed}


def test_resume_with_shapes_and_replay_is_exact(write_images: Callable[..., str], tmp_path: Path) -> None:
    corpora = {"new": Corpus(write_images("new", SHAPES)), "old": Corpus(write_images("old", SQUARES), replay=True)}
    options: dict[str, Any] = {"shapes": [(32, 32), (24, 48), (48, 24)]}
    whole = fit(make(corpora, **options), 12, ReplayScheduler(0.4))
    checkpoint = tmp_path / "five.ckpt"

    class Save(Reader):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 5:
                self.trainer.save_checkpoint(checkpoint)

    trainer = Trainer(accelerator="cpu", max_steps=6, callbacks=[ReplayScheduler(0.4)], **_QUIET)
    trainer.fit(Save(), make(corpora, **options))
    state = torch.load(checkpoint, weights_only=True)["ImageTextDataModule"]
    assert len(json.dumps(state)) < 1024
    rest = fit(make(corpora, micro_batch_size=2, **options), 12, ReplayScheduler(0.4), ckpt=checkpoint)
    assert rest.samples == whole.samples[40:]


def test_replay_repeats_the_first_reading_of_every_shape(write_images: Callable[..., str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"shapes": [(32, 32), (24, 48), (48, 24)], "caption_dropout": 0.0}
    old = write_images("old", SHAPES)
    checkpoint = tmp_path / "old.ckpt"
    first = Reader()

    class Save(Reader):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 3:
                self.trainer.save_checkpoint(checkpoint)

    first = Save()
    Trainer(accelerator="cpu", max_steps=3, **_QUIET).fit(first, make({"old": Corpus(old)}, **options))
    corpora = {"new": Corpus(write_images("new", SHAPES)), "old": Corpus(old, replay=True)}
    second = fit(make(corpora, dataset="two", **options), 12, ReplayScheduler(0.5), ckpt=checkpoint)
    replayed = Counter(sample[1] for sample in second.samples if sample[0] == 1)
    learnt = {sample[1] for sample in first.samples}
    assert set(replayed) <= learnt
    assert sum(replayed.values()) == 36


def test_a_corpus_without_a_shape_gives_its_nearest(write_images: Callable[..., str]) -> None:
    corpora = {"new": Corpus(write_images("new", SHAPES)), "old": Corpus(write_images("old", SQUARES), replay=True)}
    module = fit(make(corpora, shapes=[(32, 32), (24, 48), (48, 24)]), 9, ReplayScheduler(0.5))
    shown = {shape for sample, shape in zip(module.samples, module.shapes, strict=True) if sample[0] == 1}
    assert shown == {(32, 32), (24, 48), (48, 24)}
    old = [sample[1] for sample in module.samples if sample[0] == 1]
    assert len(set(old[:24])) == 24


def test_filters_are_applied_and_reported(write_images: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    scores = {0: {"pwatermark": 0.9}, 1: {"aesthetic": 4.0}, 2: {"punsafe": 1.0}, 3: {"original_width": 20}}
    filters = Filters(min_size=30, max_watermark=0.5, min_aesthetic=5, max_unsafe=0.99)
    with caplog.at_level("INFO"):
        module = fit(make({"a": Corpus(write_images("a", SQUARES, scores))}, filters=filters), 5)
    assert {sample[1] for sample in module.samples} == set(range(4, 24))
    told = "corpus 'a': 20 of 24 images; left out: min_size 1, max_watermark 1, min_aesthetic 1, max_unsafe 1"
    assert told in caplog.text


def test_validation_crops_the_center_with_every_caption(write_images: Callable[..., str]) -> None:
    data = make({"a": Corpus(write_images("a", [(64, 32)] * 10))}, caption_dropout=1.0, flip=1.0)
    data.setup("fit")
    source = data._sources()[0]
    first, second = (EvaluationRows(source, data.reader([source]), 4)[2] for _ in range(2))
    assert first["caption"][:2] == ["a 8", "a 9"]
    assert first["valid"].tolist() == [True, True, False, False]
    assert first["crop"][0].tolist() == [0, 16, 32, 32]
    assert torch.equal(first["image"], second["image"])
    assert first["seed"].tolist() == second["seed"].tolist()
    assert len(set(first["seed"][:2].tolist())) == 2


@pytest.mark.filterwarnings("ignore:corrupt image replaced")
def test_corrupt_images_are_replaced_counted_and_bounded(write_images: Callable[..., str]) -> None:
    corpora = {"a": Corpus(write_images("a", SQUARES, corrupt=(3,)))}
    data = make(corpora, max_corrupt=0.2)
    module = fit(data, 30)
    assert data.corrupt_images == 10  # once in each of ten epochs
    assert [sample[1] for sample in module.samples].count(3) == 10  # its slots; what they show is another image
    same = fit(make(corpora, max_corrupt=0.2, micro_batch_size=2), 30)
    assert same.samples == module.samples
    with pytest.raises(UsageError, match=r"8 of 200 images are corrupt, more than max_corrupt 0.01 allows"):
        fit(make(corpora, max_corrupt=0.01), 30)


@pytest.mark.filterwarnings("ignore:corrupt image replaced")
def test_corrupt_validation_images_do_not_count(write_images: Callable[..., str]) -> None:
    data = make({"a": Corpus(write_images("a", SQUARES, corrupt=(1,)))})
    data.setup("fit")
    source = data._sources()[0]
    batch = EvaluationRows(source, data.reader([source]), 4)[0]
    assert batch["valid"].tolist() == [True, False, True, True]


def test_only_corrupt_images_stop_the_run(write_images: Callable[..., str]) -> None:
    data = make({"a": Corpus(write_images("a", SQUARES, corrupt=tuple(range(24))))})
    with pytest.raises(
        UsageError, match=r"32 images in a row cannot be decoded, the last is .*\.tar, \d+\.jpg: "
    ) as error:
        fit(data, 5)
    assert "\n" not in str(error.value)


def test_a_bomb_is_left_out_of_the_index(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(12):
            image = {"png": bomb()} if number == 5 else {"jpg": jpeg(40, 40)}
            writer.write({"__key__": f"{number}", "txt": "a picture", **image})
    said = index_shards([str(tmp_path)], progress=False)
    assert "1 unreadable, which are left out: " in said
    assert "50000" in said
    assert {sample[1] for sample in fit(make({"a": Corpus(str(tmp_path))}), 6).samples} == set(range(12)) - {5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": [(32, 32), (8, 200)]}, "shapes: no new image is nearest to 8x200; leave it out"),
        ({"filters": Filters(min_size=1000)}, "none of its 24 images is left to train on; left out: min_size 24"),
        ({"max_upscale": 0.5}, "none of its 24 images is left to train on; left out: max_upscale 24"),
        ({"caption_dropout": 1.5}, "caption_dropout 1.5 must lie between 0 and 1"),
        ({"image_size": 0}, "image_size 0 must be at least 1"),
        ({"shapes": []}, "shapes [] must be heights and widths"),
        ({"max_aspect": 2.0, "image_size": 100}, "image_size is 100, expected a multiple of 64"),
    ],
)
def test_bad_settings(write_images: Callable[..., str], changes: dict[str, Any], message: str) -> None:
    path = write_images("a", SQUARES)
    with pytest.raises(UsageError) as error:
        fit(make({"a": Corpus(path)}, **changes), 2)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_captions_under_a_key(write_images: Callable[..., str], tmp_path: Path) -> None:
    folder = write_images("a", SQUARES)
    index_shards([folder], out=tmp_path / "keyed", progress=False, options={"caption_key": "caption"})
    module = fit(make({"a": Corpus(str(tmp_path / "keyed"))}, caption_dropout=0.0), 3)
    assert all(caption == f"a {row}" for _, row, _, _, caption, _ in module.samples)
    with pytest.raises(UsageError, match="caption_key is 'captoin', which no sample has; did you mean 'caption'"):
        index_shards([folder], out=tmp_path / "wrong", progress=False, options={"caption_key": "captoin"})


def test_text_shards_are_refused_as_images(write_corpus: Callable[..., str]) -> None:
    with pytest.raises(UsageError, match="kind is 'text', expected 'images'"):
        fit(make({"a": Corpus(write_corpus("a"))}), 2)


def test_readers_survive_pickling(write_images: Callable[..., str]) -> None:
    import pickle

    data = make({"a": Corpus(write_images("a", SQUARES))})
    data.setup("fit")
    source = data._sources()[0]
    reader = data.reader([source])
    picks = SampleIndices(np.zeros(2, int), np.arange(2), np.arange(2), 0, training=True)
    copy: ImageReader = pickle.loads(pickle.dumps(reader))
    assert torch.equal(copy(picks)["image"], reader(picks)["image"])
