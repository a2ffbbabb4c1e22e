"""Corpora on a server give the same batches as local ones, with workers, failures and the node's cache."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from rewurst import UsageError
from rewurst.callbacks import ReplayScheduler
from rewurst.datamodules import Corpus, ImageTextDataModule, TextDataModule
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.datamodules.storage import remote as remote_module
from rewurst.preparation.images import prepare_images
from rewurst.preparation.index import index_shards
from rewurst.preparation.verify import verify

_QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": -1}


class Hashes(LightningModule):
    """Module that keeps a hash of every micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        tensor = batch["input_ids"] if "input_ids" in batch else batch["image"]
        self.seen.append(zlib.crc32(tensor.numpy().tobytes()))
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REWURST_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def serve(loopback: Any, folder: str | Path, name: str) -> str:
    """Put a folder on the server and return its URL."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            loopback.behaviour.objects[f"/{name}/{path.relative_to(folder)}"] = path.read_bytes()
    url: str = loopback.url(f"/{name}")
    return url


def batches(new: str, old: str, workers: int = 0) -> list[int]:
    module = Hashes()
    corpora = {"new": Corpus(new), "old": Corpus(old, replay=True)}
    data = TextDataModule("d", corpora, {}, 8, 4, 8, num_workers=workers)
    trainer = Trainer(accelerator="cpu", max_steps=5, logger=False, callbacks=[ReplayScheduler(0.3)], **_QUIET)
    trainer.fit(module, data)
    return module.seen


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_over_http_are_those_of_the_disk(
    write_corpus: Callable[..., str], loopback: Any, monkeypatch: pytest.MonkeyPatch, workers: int, tmp_path: Path
) -> None:
    """Two corpora whose shards have the same names, a server that fails now and then, and two loader processes."""
    old = write_corpus("code", seed=1)
    Path(old).rename(tmp_path / "old")
    new, old = write_corpus("code", seed=2), str(tmp_path / "old")
    assert sorted(path.name for path in Path(new).iterdir()) == sorted(path.name for path in Path(old).iterdir())
    monkeypatch.setattr(remote_module, "sleep", lambda seconds: None)
    loopback.behaviour.failures = [500, 500, 500]
    urls = serve(loopback, new, "new"), serve(loopback, old, "old")
    assert batches(*urls, workers) == batches(new, old)


def test_a_row_costs_a_range_and_not_a_shard(
    write_corpus: Callable[..., str], loopback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_corpus("code", rows=2000)
    shards = TokenShards(serve(loopback, folder, "code"))
    before = len(loopback.behaviour.ranges)
    np.testing.assert_array_equal(shards.read(np.array([1234])), TokenShards(folder).read(np.array([1234])))
    asked = loopback.behaviour.ranges[before:]
    assert len(asked) <= 4  # what the shard is, its sidecar, one block
    again = len(loopback.behaviour.ranges)
    np.testing.assert_array_equal(shards.read(np.array([1235])), TokenShards(folder).read(np.array([1235])))
    assert len(loopback.behaviour.ranges) == again  # from the node's cache


def test_verification_reads_a_server(write_corpus: Callable[..., str], loopback: Any) -> None:
    url = serve(loopback, write_corpus("code"), "code")
    problems = verify(url)
    assert problems == [f"{url}/tokenizer/tokenizer.json: missing; the copy of the tokenizer belongs to the corpus"]
    path = next(path for path in loopback.behaviour.objects if path.endswith("000001.tar"))
    content = bytearray(loopback.behaviour.objects[path])
    content[700] ^= 1
    loopback.behaviour.objects[path] = bytes(content)
    loopback.behaviour.etag = '"two"'
    assert any("000001.tar: SHA-256 is" in problem for problem in verify(url))


def test_foreign_images_on_a_server(loopback: Any, tmp_path: Path) -> None:
    """The server has only tars; the index is made locally and contains their addresses."""
    prepare_images("builtin:shapes", tmp_path / "shapes", pictures=1, progress=False)
    tar = next((tmp_path / "shapes/val").glob("*.tar"))
    loopback.behaviour.objects["/x/pictures.tar"] = tar.read_bytes()
    index_shards([loopback.url("/x/pictures.tar")], out=tmp_path / "index", progress=False)

    def seen(path: str) -> list[int]:
        module = Hashes()
        data = ImageTextDataModule("d", {"a": Corpus(path)}, {}, 64, 4, 8)
        Trainer(accelerator="cpu", max_steps=3, logger=False, **_QUIET).fit(module, data)
        return module.seen

    assert seen(str(tmp_path / "index")) == seen(str(tmp_path / "shapes/val"))


def test_missing_corpora(loopback: Any) -> None:
    with pytest.raises(UsageError, match=r"no corpus at http://127.0.0.1:\d+/none: it has no index.json; "):
        TokenShards(loopback.url("/none"))


def test_a_corpus_in_s3(write_corpus: Callable[..., str], bucket: Any) -> None:
    folder = write_corpus("code")
    for path in Path(folder).iterdir():
        bucket.put_object(Bucket="corpora", Key=f"code/{path.name}", Body=path.read_bytes())
    rows = np.arange(50)
    np.testing.assert_array_equal(TokenShards("s3://corpora/code").read(rows), TokenShards(folder).read(rows))
