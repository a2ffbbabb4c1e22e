"""Prepared latents give the losses of pixels and the same bytes from any number of processes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from lightning.pytorch import Trainer
from PIL import Image

from rewurst import UsageError
from rewurst.datamodules import Corpus, ImageTextDataModule, LatentDataModule
from rewurst.modules import StageC
from rewurst.modules.networks import VQGAN, SemanticCompressor
from rewurst.preparation import latents
from rewurst.preparation.engine.resumable_units import Unit
from rewurst.preparation.index import index_shards
from rewurst.preparation.latents import prepare_latents
from rewurst.preparation.steps.encoding_latents import LatentOptions, LatentWork
from rewurst.preparation.verify import verify
from rewurst.train import main

Write = Callable[..., str]


@pytest.fixture
def write_images(tmp_path: Path) -> Write:
    """Write captioned images of three shapes, some of them truncated."""

    def write(name: str = "images", count: int = 40, corrupt: tuple[int, ...] = ()) -> str:
        folder = tmp_path / name
        folder.mkdir()
        with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=16, verbose=0) as writer:
            for row in range(count):
                size = [(40, 32), (32, 50), (32, 32)][row % 3]
                pixels = np.random.default_rng(row).integers(0, 256, (*size, 3)).astype(np.uint8)
                content = io.BytesIO()
                Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(content, "png")
                data = content.getvalue()
                writer.write(
                    {"__key__": f"{row:05d}", "png": data[:-100] if row in corrupt else data, "txt": f"no {row}"}
                )
        index_shards([str(folder)], progress=False)
        return str(folder)

    return write


@pytest.fixture
def compressor(tmp_path: Path) -> str:
    torch.manual_seed(1)
    network = SemanticCompressor.from_preset("tiny", widths=[8, 16, 16], c_latent=4)
    network.mapper[1].running_var.fill_(0.05)
    network.save(tmp_path / "compressor")
    return str(tmp_path / "compressor")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def losses(compressor: str, clip: Path, data: Any) -> list[float]:
    torch.manual_seed(0)
    prior = {"preset": "tiny", "c_in": 4, "c": 32, "c_cond": 32, "nhead": 2}
    module = StageC(compressor, prior, str(clip), latent_mean=None, latent_std=None)
    found: list[float] = []
    kept = module.record

    def record(loss: torch.Tensor, batch: Any) -> torch.Tensor:
        found.append(float(loss.detach()))
        return kept(loss, batch)

    module.record = record  # type: ignore[method-assign]
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", max_steps=12, max_epochs=-1, logger=False, **quiet).fit(module, data)
    return found


@pytest.mark.parametrize(("dtype", "within"), [("float16", 1e-4), ("float32", 1e-6)])
@pytest.mark.parametrize("aspect", [1.0, 2.0])
def test_losses_are_those_of_pixels(
    write_images: Write,
    compressor: str,
    text_encoder_folder: Path,
    tmp_path: Path,
    dtype: str,
    within: float,
    aspect: float,
) -> None:
    images = write_images()
    options: dict[str, Any] = {"text_encoder": str(text_encoder_folder), "what": ("z", "text"), "batch_size": 6}
    options |= {"max_aspect": aspect, "bucket_multiple": 8, "dtype": dtype, "progress": False}
    prepare_latents(images, tmp_path / "latents", compressor, 32, **options)
    shared: dict[str, Any] = {"micro_batch_size": 4, "global_batch_size": 8, "seed": 3, "caption_dropout": 0.2}
    shapes = {"image_size": 32, "random_crop": False, "max_aspect": aspect, "bucket_multiple": 8}
    pixels = ImageTextDataModule("d", {"a": Corpus(images)}, {}, **shared, **shapes)
    latents = LatentDataModule("d", {"a": Corpus(str(tmp_path / "latents"))}, {}, **shared)
    expected = losses(compressor, text_encoder_folder, pixels)
    assert losses(compressor, text_encoder_folder, latents) == pytest.approx(expected, rel=within)
    assert len(set(expected)) == 24


def test_other_makers_are_refused(
    write_images: Write, compressor: str, text_encoder_folder: Path, tmp_path: Path
) -> None:
    prepare_latents(write_images(count=8), tmp_path / "latents", compressor, 32, progress=False)
    torch.manual_seed(2)
    SemanticCompressor.from_preset("tiny", widths=[8, 16, 16], c_latent=4).save(tmp_path / "other")
    data = LatentDataModule("d", {"a": Corpus(str(tmp_path / "latents"))}, {}, 4, 4)
    with pytest.raises(
        UsageError, match=r"compressor of \S+other did not make the latents of \S+latents, which were made"
    ):
        losses(str(tmp_path / "other"), text_encoder_folder, data)


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_the_work_and_make_the_same_bytes(
    write_images: Write, compressor: str, tmp_path: Path, workers: int
) -> None:
    images = write_images(corrupt=(7,))
    VQGAN.from_preset("tiny").save(tmp_path / "a")
    options: dict[str, Any] = {"what": ("z", "a"), "stage_a": str(tmp_path / "a"), "samples_per_shard": 7}
    options |= {"batch_size": 4, "progress": False, "max_aspect": 2.0, "bucket_multiple": 8}
    said = prepare_latents(images, tmp_path / "alone", compressor, 32, **options)
    assert "1 corrupt images have none" in said
    for number in (2, 0, 1):
        prepare_latents(images, tmp_path / "shared", compressor, 32, shard_of=(number, 3), workers=workers, **options)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert verify(tmp_path / "alone") == []
    assert prepare_latents(images, tmp_path / "alone", compressor, 32, **options).endswith("complete already")


def test_a_killed_preparation_of_latents_resumes(write_images: Write, compressor: str, tmp_path: Path) -> None:
    """Killed while writing the third shard; complete shards are kept, and the bytes are those of an undisturbed one."""
    images = write_images()
    arguments = [
        "prepare",
        "latents",
        images,
        "--stage_b",
        compressor,
        "--image_size",
        "32",
        "--samples_per_shard",
        "6",
    ]
    script = (
        "import os, sys; from rewurst.preparation.writing.shard_file import ShardFile; from rewurst.train import main\n"
        "close = ShardFile.close\n"
        "def dying(self):\n"
        "    if '000002' in self.path.name: os.kill(os.getpid(), 9)\n"
        "    return close(self)\n"
        "ShardFile.close = dying\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, *arguments, "--out", str(tmp_path / "killed")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    before = contents(tmp_path / "killed")
    assert [name for name in before if name.endswith(".idx") and name[0] != "."] == [
        f"latents-00000{i}.idx" for i in (0, 1)
    ]
    assert "index.json" not in before
    times = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in before if name.startswith("latents")}
    assert main([*arguments, "--out", str(tmp_path / "killed")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in times} == times, "they were kept"


def test_a_machine_that_finds_another_network_is_refused(write_images: Write, compressor: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "what": ("z",),
        "text_encoder": None,
        "stage_a": None,
        "max_aspect": 1.0,
        "bucket_multiple": 64,
    }
    options |= {"resize": None, "batch_size": 4, "workers": 0, "device": "cpu", "dtype": "float16"}
    options |= {"source": write_images(count=8), "out": str(tmp_path / "out"), "stage_b": compressor}
    job = latents.job_of(LatentWork(LatentOptions(image_size=32, samples_per_shard=None, **options)))
    record = latents.make_shard(job, Unit("000000", "0", 0))
    assert (record["rows"], record["seen"], record["corrupt"]) == (8, 8, [])
    torch.manual_seed(2)
    SemanticCompressor.from_preset("tiny", widths=[8, 16, 16], c_latent=4).save(tmp_path / "other")
    elsewhere = job._replace(options=replace(job.options, stage_b=str(tmp_path / "other")))
    with pytest.raises(
        UsageError, match=r"out: compressor_sha256 is \w+ on this machine of the cluster, expected \w+: "
    ):
        latents.make_shard(elsewhere, Unit("000000", "0", 0))


def test_another_preparation_into_the_same_folder_is_refused(
    write_images: Write, compressor: str, tmp_path: Path
) -> None:
    images = write_images()
    out = tmp_path / "out"
    prepare_latents(images, out, compressor, 32, samples_per_shard=9, shard_of=(0, 2), progress=False)
    with pytest.raises(UsageError, match=r"out was started with sizes \[\[32, 32\]\], not \[\[40, 40\]\]: give"):
        prepare_latents(images, out, compressor, 40, samples_per_shard=9, progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(UsageError, match="full is not empty; choose another folder or add --overwrite"):
        prepare_latents(images, tmp_path / "full", compressor, 32, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "z,b"], "what 'b' is unknown: choose among z, a, text"),
        (["--what", "a"], "what a lacks z"),
        (["--what", "z,text"], "what names text: give text_encoder"),
        (["--what", "z,a"], "names no Stage A: give stage_a"),
        (["--shard_of", "3/3"], "shard_of 3/3: the number must be at least 0 and below 3"),
        (["--shard_of", "0/2", "--overwrite"], "overwrite would delete the shards of the other processes"),
        (["--shard_of", "x"], "--shard_of: 'x' must be I/N, such as 0/4"),
        (["--batch_size", "0"], "batch_size 0 must be at least 1"),
    ],
)
def test_bad_arguments(
    write_images: Write,
    compressor: str,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = ["--stage_b", compressor, "--image_size", "32", "--out", str(tmp_path / "out")]
    assert main(["prepare", "latents", write_images(count=3), *known, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_too_many_corrupt_images(write_images: Write, compressor: str, tmp_path: Path) -> None:
    images = write_images(count=210, corrupt=tuple(range(0, 60, 2)))
    with pytest.raises(UsageError, match=r"30 of \d+ images are corrupt, more than max_corrupt 0.05 allows; the first"):
        prepare_latents(images, tmp_path / "out", compressor, 32, progress=False)
