"""Latents are complete only if they match the request, and too many corrupt images never get an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rewurst import UsageError
from rewurst.datamodules import Corpus, ImageTextDataModule, LatentDataModule
from rewurst.datamodules.corpora.latents import LatentShards
from rewurst.modules.networks import VQGAN, SemanticCompressor
from rewurst.preparation.images import prepare_images
from rewurst.preparation.latents import prepare_latents


def network(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    made = SemanticCompressor.from_preset("tiny", widths=[8, 16, 16], c_latent=4)
    made.mapper[1].running_var.fill_(0.05)
    made.save(folder)
    return str(folder)


def pictures(folder: Path, captions: str = "no {}", count: int = 6, corrupt: int = 0) -> str:
    """Prepare pictures of two shapes; the pixels of the last ones are cut off."""
    source = folder.with_name(f"{folder.name}.source")
    source.mkdir(exist_ok=True)
    for row in range(count):
        pixels = np.random.default_rng(row).integers(0, 256, (40, 32 + 18 * (row % 2), 3)).astype(np.uint8)
        Image.fromarray(pixels).save(source / f"{row}.png")
        (source / f"{row}.txt").write_text(captions.format(row))
    prepare_images([str(source)], folder, progress=False, overwrite=folder.exists())
    tar = folder / "train" / next(path.name for path in (folder / "train").glob("*.tar"))
    if corrupt:
        _break(tar, corrupt)
        from rewurst.preparation.index import index_shards

        index_shards([str(tar)], overwrite=True, progress=False)
    return str(folder / "train")


def _break(tar: Path, corrupt: int) -> None:
    """Change bytes of the pixels, which no header shows."""
    data = bytearray(tar.read_bytes())
    at = 0
    for _ in range(corrupt):
        at = data.index(b"IDAT", at) + 4
        data[at + 20 : at + 40] = bytes(20)
    tar.write_bytes(data)


BASE: dict[str, Any] = {"image_size": 32, "progress": False, "bucket_multiple": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 40}, r"sizes \(\(32, 32\),\), not \[\(40, 40\)\]|sizes .*32, 32.* not .*40, 40"),
        ({"dtype": "float32"}, "was made with dtype float16, not float32"),
        ({"what": ("z", "a")}, "was made with what"),
        ({"resize": 36}, "was made with resize 0, not 36"),
        ({"max_aspect": 2.0}, "was made with sizes"),
        ({"samples_per_shard": 2}, "was made with samples_per_shard 6, not 2"),
    ],
)
def test_other_options_are_not_complete_already(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    images, compressor = pictures(tmp_path / "images"), network(tmp_path / "b", 1)
    VQGAN.from_preset("tiny").save(tmp_path / "a")
    options = BASE | {"stage_b": compressor, "stage_a": str(tmp_path / "a")}
    prepare_latents(images, tmp_path / "out", **options)
    assert prepare_latents(images, tmp_path / "out", **options).endswith("complete already")
    with pytest.raises(UsageError, match=message) as error:
        prepare_latents(images, tmp_path / "out", **options | changes)
    assert str(error.value).endswith("add --overwrite to make the latents again, or choose another folder")
    assert "\n" not in str(error.value)
    assert "6 rows" in prepare_latents(images, tmp_path / "out", overwrite=True, **options | changes)
    assert prepare_latents(images, tmp_path / "out", **options | changes).endswith("complete already")


def test_other_captions_images_and_networks_are_not_complete_already(tmp_path: Path) -> None:
    images, compressor = pictures(tmp_path / "images"), network(tmp_path / "b", 1)
    prepare_latents(images, tmp_path / "out", compressor, **BASE)
    pictures(tmp_path / "images", captions="a new caption {}")
    with pytest.raises(UsageError, match="out was made from other images or captions than there are now; add"):
        prepare_latents(images, tmp_path / "out", compressor, **BASE)
    prepare_latents(images, tmp_path / "out", compressor, overwrite=True, **BASE)
    shards = LatentShards(str(tmp_path / "out"))
    assert shards.index.captions(shards.members(1)) == ["a new caption 1"]
    network(tmp_path / "b", 2)
    with pytest.raises(UsageError, match="out was made by another compressor; add"):
        prepare_latents(images, tmp_path / "out", compressor, **BASE)


def test_a_missing_shard_or_another_corpus_is_not_complete(tmp_path: Path) -> None:
    images, compressor = pictures(tmp_path / "images"), network(tmp_path / "b", 1)
    prepare_latents(images, tmp_path / "out", compressor, **BASE)
    (tmp_path / "out" / "latents-000000.tar").unlink()
    with pytest.raises(UsageError, match=r"lists latents-000000\.tar, which is missing"):
        prepare_latents(images, tmp_path / "out", compressor, **BASE)
    with pytest.raises(UsageError, match=r"kind is 'images', expected 'latents'"):
        prepare_latents(images, images, compressor, **BASE)


def test_the_share_of_corrupt_images_is_checked_at_the_end(tmp_path: Path) -> None:
    images, compressor = pictures(tmp_path / "images", corrupt=2), network(tmp_path / "b", 1)
    with pytest.raises(UsageError, match=r"2 of 6 images are corrupt, more than max_corrupt 0\.05 allows; the first"):
        prepare_latents(images, tmp_path / "out", compressor, **BASE)
    assert not (tmp_path / "out" / "index.json").exists()
    said = prepare_latents(images, tmp_path / "out", compressor, max_corrupt=0.5, **BASE)
    assert "2 corrupt images have none" in said


def test_several_captions_are_drawn_as_training_from_pixels_draws_them(
    tmp_path: Path, text_encoder_folder: Path
) -> None:
    images = pictures(tmp_path / "images", captions="one {0}\ntwo {0}\n\nthree {0}\n")
    options = BASE | {"what": ("z", "text"), "text_encoder": str(text_encoder_folder), "dtype": "float32"}
    prepare_latents(images, tmp_path / "out", network(tmp_path / "b", 1), **options)
    shared: dict[str, Any] = {"micro_batch_size": 2, "global_batch_size": 2, "seed": 3, "caption_dropout": 0.2}
    pixels = ImageTextDataModule("d", {"a": Corpus(images)}, {}, 32, random_crop=False, **shared)
    latents = LatentDataModule("d", {"a": Corpus(str(tmp_path / "out"))}, {}, **shared)
    from rewurst.modules.networks import TextEncoder

    encoder = TextEncoder.from_pretrained(str(text_encoder_folder))
    found: dict[int, set[str]] = {}
    for shown, stored in zip(batches(pixels), batches(latents), strict=True):
        assert shown["caption"] == stored["caption"]
        torch.testing.assert_close(stored["text"], encoder.encode(stored["caption"]), atol=1e-5, rtol=1e-5)
        for row, caption in zip(shown["row"].tolist(), shown["caption"], strict=True):
            found.setdefault(row, set()).add(caption)
    for row in range(6):
        assert (
            {f"one {row}", f"two {row}", f"three {row}"}
            <= found[row]
            <= {
                f"one {row}",
                f"two {row}",
                f"three {row}",
                "",
            }
        )


def batches(data: ImageTextDataModule, epochs: int = 20) -> list[dict[str, Any]]:
    """Read the batches of many epochs without a trainer."""
    from rewurst.datamodules.sampling.micro_batches import MicroBatches

    [corpus] = data.corpora.values()
    data._opened[corpus.path] = data.open_corpus("a", corpus.path)
    sources = data._sources()
    rows = MicroBatches(data._buckets(), data._orders(), sources, data.reader(sources), range(2), seed=data.seed)
    return [rows[number] for number in range(3 * epochs)]
