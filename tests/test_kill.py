"""After kill -9 at any moment the same command gives the same losses, bit for bit, and reads nothing twice."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
STEPS, SOAK_STEPS, DEADLINE_SECONDS = 60, 120, 120

LOG = """
import os
import zlib

from lightning.pytorch import Callback


def weights(*modules):
    tensors = [tensor for module in modules for _, tensor in sorted(module.state_dict().items())]
    return zlib.crc32(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors))


class Log(Callback):
    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rows = ",".join(f"{c}:{r}" for c, r in zip(batch["corpus"].tolist(), batch["row"].tolist()))
        loss = float(outputs["loss"]).hex() if outputs else "manual"
        averages = [c._average_model for c in trainer.callbacks if getattr(c, "_average_model", None) is not None]
        state = weights(module, *averages)
        os.write(self.file, f"{trainer.global_step} {batch_idx} {loss} {state} {rows}\\n".encode())
"""

Parts = dict[str, Any]
Process = fork_server.Popen | subprocess.Popen[bytes]
Start = Callable[..., Process]


def language_model(write_corpus: Callable[..., str], tmp_path: Path) -> Parts:
    """Write the config of a language model with dropout and replay."""
    prose, code = write_corpus("prose", 40), write_corpus("code", 60, seed=1)
    model = {
        "model_type": "gpt_neox", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16,
        "hidden_dropout": 0.1, "attention_dropout": 0.1,
    }  # fmt: skip
    data = {
        "dataset": "code", "val": {"prose": prose}, "sequence_length": 8,
        "corpora": {"code": {"path": code}, "prose": {"path": prose, "replay": True}},
    }  # fmt: skip
    return {"model": part("CausalLM", model=model), "data": part("TextDataModule", **data)}


def streamed(write_corpus: Callable[..., str], tmp_path: Path) -> Parts:
    """Tars without an index, new ones and replayed ones: text that is tokenized as it comes."""
    import webdataset as wds

    from rewurst.preparation.tokenizer import train_tokenizer

    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 40)
    train_tokenizer([str(tmp_path / "a.txt")], 264, tmp_path / "tokenizer", progress=False)
    for name in ("new", "old"):
        for shard in range(4):
            with wds.TarWriter(str(tmp_path / f"{name}-{shard}.tar")) as writer:
                for i in range(12):
                    writer.write({"__key__": f"{i:03d}", "txt": f"{name} cat {shard} sat on mat {i} " * 4})
    parts = language_model(write_corpus, tmp_path)
    parts["model"]["init_args"]["model"] |= {"vocab_size": 264}
    corpora = {
        name: {"stream": str(tmp_path / f"{name}-{{0..3}}.tar"), "replay": name == "old"} for name in ("new", "old")
    }
    data = {"dataset": "new", "corpora": corpora, "val": {}, "sequence_length": 8}
    more = {"tokenizer": str(tmp_path / "tokenizer"), "cache_dir": str(tmp_path / "cache")}
    return parts | {"data": part("TextDataModule", **data, **more)}


def write_shapes(tmp_path: Path) -> None:
    """Write old and new drawn shapes."""
    from rewurst.preparation.images import prepare_images
    from rewurst.preparation.steps.recoding import Recoding

    for name in ("shapes", "shapes-new"):
        out = tmp_path / name
        prepare_images(f"builtin:{name}", out, recoding=Recoding(image_size=32), pictures=1, progress=False)


def pictures(tmp_path: Path) -> Parts:
    """Drawn shapes, the new ones with replay of the old."""
    write_shapes(tmp_path)
    corpora = {"new": {"path": str(tmp_path / "shapes-new/unseen")}}
    corpora["old"] = {"path": str(tmp_path / "shapes/unseen"), "replay": True}  # type: ignore[dict-item]
    val = {"old": str(tmp_path / "shapes/unseen")}
    return part("ImageTextDataModule", dataset="new", corpora=corpora, val=val, image_size=32, caption_dropout=0.2)


def stage_a(write_corpus: Callable[..., str], tmp_path: Path) -> Parts:
    """Both optimizers, the discriminator from the middle on, revived codes, dropped quantisation."""
    model = part(
        "StageA",
        vqgan={"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 32},
        discriminator={"c_hidden": 16, "depth": 3},
        perceptual_weight=0.0,
        adversarial_start=30,
        revive_after=5,
    )
    return {"model": model, "data": pictures(tmp_path), "average": part("WeightAverage", decay=0.9, start_step=10)}


def stage_b(write_corpus: Callable[..., str], tmp_path: Path) -> Parts:
    """Dropout, averaged weights, BatchNorm in the compressor."""
    from rewurst.modules.networks import VQGAN

    VQGAN.from_preset("tiny", embed_dim=16, num_vq_embeddings=32).save(tmp_path / "vqgan")
    model = part(
        "StageB",
        stage_a=str(tmp_path / "vqgan"),
        unet={"preset": "tiny", "dropout": [0.1, 0.1]},
        compressor="tiny",
        text_length=4,
        sampling_steps=2,
    )
    return {"model": model, "data": pictures(tmp_path), "average": part("WeightAverage", decay=0.9, start_step=10)}


def stage_c(write_corpus: Callable[..., str], tmp_path: Path) -> Parts:
    """Latents made beforehand, a text encoder that is trained along, dropout in both networks, averaged weights."""
    from rewurst.modules.networks import SemanticCompressor
    from rewurst.preparation.latents import prepare_latents
    from rewurst.preparation.tokenizer import train_tokenizer

    write_shapes(tmp_path)
    compressor, tokenizer = tmp_path / "compressor", tmp_path / "tokenizer"
    SemanticCompressor.from_preset("tiny", widths=[8, 16, 16], c_latent=4).save(compressor)
    train_tokenizer([str(tmp_path / "shapes/unseen")], 300, tokenizer, progress=False)
    for name in ("shapes", "shapes-new"):
        prepare_latents(str(tmp_path / name / "unseen"), tmp_path / f"{name}-z", str(compressor), 32, progress=False)
    text = {"tokenizer": str(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = part(
        "StageC",
        stage_b=str(compressor),
        prior={"preset": "tiny", "c_in": 4, "c": 32, "c_cond": 16, "nhead": 2, "dropout": 0.1},
        text_encoder=text | {"num_attention_heads": 2, "max_position_embeddings": 16, "attention_dropout": 0.1},
        latent_mean=None,
        latent_std=None,
    )
    old, new = (str(tmp_path / f"{name}-z") for name in ("shapes", "shapes-new"))
    corpora = {"new": {"path": new}, "old": {"path": old, "replay": True}}
    data = part("LatentDataModule", dataset="new", corpora=corpora, val={"old": old}, caption_dropout=0.2)
    return {"model": model, "data": data, "average": part("WeightAverage", decay=0.9, start_step=10)}


KINDS = {
    "language model": language_model,
    "stream": streamed,
    "stage A": stage_a,
    "stage B": stage_b,
    "stage C": stage_c,
}


def part(class_path: str, /, **arguments: Any) -> Parts:
    return {"class_path": class_path, "init_args": arguments}


@pytest.fixture
def start(request: pytest.FixtureRequest, write_corpus: Callable[..., str], tmp_path: Path) -> Start:
    """Start a run with replay, accumulation and frequent checkpoints and validations."""
    (tmp_path / "kill_log.py").write_text(LOG)
    parts = KINDS[getattr(request, "param", "language model")](write_corpus, tmp_path)

    def begin(name: str, workers: int, steps: int, popen: Callable[..., Process] = fork_server.Popen) -> Process:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        data = parts["data"]["init_args"] | {"micro_batch_size": 4, "global_batch_size": 8, "num_workers": workers}
        schedule = part("WarmupCosine", peak=1e-2, minimum=1e-3, warmup=0.1)
        config = {
            "seed_everything": 0,
            "ckpt_path": "auto",
            "model": parts["model"],
            "data": part(parts["data"]["class_path"], **data),
            "trainer": {
                "accelerator": "cpu", "devices": 1, "max_steps": steps, "max_epochs": -1, "val_check_interval": 14,
                "limit_val_batches": 3,
                "check_val_every_n_epoch": None, "num_sanity_val_steps": 1, "log_every_n_steps": 1,
                "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder),
                "logger": part("CSVLogger", save_dir=str(folder), name="run"),
                "callbacks": [
                    part("LRRewarming", length=steps, schedule=schedule),
                    part("ReplayScheduler", share=0.3),
                    *([parts["average"]] if "average" in parts else []),
                    {"class_path": "ExactResume"},
                    part("kill_log.Log", path=str(folder / "log.txt")),
                    part("ModelCheckpoint", filename="{step}", every_n_train_steps=3, save_top_k=1, save_last=True),
                ],
            },
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(folder / "config.yaml")]
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        with (folder / "said.txt").open("ab") as said:
            return popen(command, stdout=said, stderr=said, env={**environment, "OMP_NUM_THREADS": "1"})

    return begin


def lines(folder: Path) -> list[str]:
    path = folder / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def kill_when(process: Process, reached: Callable[[], bool]) -> bool:
    """Kill the process as soon as a condition holds; return whether it was still running."""
    for _ in range(DEADLINE_SECONDS * 500):
        if reached():
            process.kill()
        try:
            process.wait(timeout=0.002)
            return process.returncode == -9
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    raise AssertionError("the run neither ended nor came to where it was to be killed")


def survive(
    start: Start,
    tmp_path: Path,
    steps: int,
    kills: int,
    seed: int,
    popen: Callable[..., Process] = fork_server.Popen,
    workers: int = 2,
) -> None:
    """Compare a run that is killed several times with one that is not; ``popen`` starts the last process.

    Every third kill comes within a save; the others come at any moment. Every other part is read by loader workers.
    """
    reference = start("whole", 0, steps)
    assert reference.wait(timeout=DEADLINE_SECONDS) == 0, (tmp_path / "whole/said.txt").read_text()[-2000:]
    whole = lines(tmp_path / "whole")
    assert len(whole) == 2 * steps

    chance, folder = random.Random(seed), tmp_path / "killed"
    for number in range(kills):
        seen = len(lines(folder))
        target = seen + chance.randint(15, max(16, 2 * steps // (kills + 1)))
        within_save = number % 3 == 1

        def reached(target: int = target, within_save: bool = within_save) -> bool:
            if len(lines(folder)) < target:
                return False
            return not within_save or any(folder.rglob(".*.tmp"))

        newest = newest_step(folder)
        if not kill_when(start("killed", workers * (number % 2), steps), reached):
            break  # it ended first
        first = first_step_since(folder, seen)
        assert first is None or number == 0 or first > 0
        assert first is None or first >= newest, "it began before the last whole checkpoint"
    seen, newest = len(lines(folder)), newest_step(folder)
    assert newest > 0, "it was killed before anything was saved"
    last = start("killed", 0, steps, popen)
    assert last.wait(timeout=DEADLINE_SECONDS) == 0, (folder / "said.txt").read_text()[-2000:]
    first = first_step_since(folder, seen)
    assert first is None or first >= newest, "it began before the last whole checkpoint"
    assert set(lines(folder)) == set(whole), "a step that was done twice gave the same loss from the same rows"
    assert lines(folder)[-1] == whole[-1]


def newest_step(folder: Path) -> int:
    from rewurst.checkpoints.newest import newest_checkpoint

    path = newest_checkpoint([folder])
    return 0 if path is None else int(torch.load(path, weights_only=True)["global_step"])


def first_step_since(folder: Path, seen: int) -> int | None:
    """Return the completed steps before the first batch of the last process."""
    since = lines(folder)[seen:]
    return (int(since[0].split()[1])) // 2 if since else None


def test_killed_and_started_again_by_a_new_interpreter(start: Start, tmp_path: Path) -> None:
    survive(start, tmp_path, STEPS, kills=2, seed=0, popen=subprocess.Popen)


@pytest.mark.parametrize("start", ["stream"], indirect=True)
def test_a_stream_killed(start: Start, tmp_path: Path) -> None:
    survive(start, tmp_path, STEPS, kills=2, seed=0, workers=0)


@pytest.mark.parametrize("start", ["stage A", "stage B", "stage C"], indirect=True)
def test_stages_killed(start: Start, tmp_path: Path) -> None:
    survive(start, tmp_path, STEPS, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("start", KINDS, indirect=True)
@pytest.mark.parametrize("seed", range(4))
def test_killed_twenty_times(start: Start, tmp_path: Path, seed: int, request: pytest.FixtureRequest) -> None:
    # The place in a stream belongs to the number of workers; other corpora are read alike by any.
    workers = 0 if "stream" in request.node.callspec.id else 2
    survive(start, tmp_path, SOAK_STEPS, kills=5, seed=seed + 1, workers=workers)
