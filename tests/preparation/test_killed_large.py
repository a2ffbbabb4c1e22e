"""Large preparations, killed with SIGKILL at random moments and started again, give the bytes of undisturbed ones."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewurst.modules.networks import SemanticCompressor
from rewurst.preparation.tokenizer import train_tokenizer

pytestmark = pytest.mark.slow
TEXT_BYTES, PICTURES, KILLS = 200_000_000, 2000, 5


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 200 MB of documents in lines and in plain files, and captioned pictures of several sizes."""
    folder = tmp_path_factory.mktemp("sources")
    draw = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in draw.integers(26, size=draw.integers(2, 10))) for _ in range(20_000)]
    for number in range(10):
        with (folder / f"{number}.jsonl").open("w") as file:
            while file.tell() < TEXT_BYTES // 10:
                file.write(json.dumps({"text": " ".join(draw.choice(words, size=draw.integers(10, 2000)))}) + "\n")
    train_tokenizer([str(folder / "0.jsonl")], 2048, folder / "tokenizer", progress=False)
    (folder / "pictures").mkdir()
    for number in range(PICTURES):
        size = (int(draw.integers(64, 128)), int(draw.integers(64, 128)))
        small = Image.fromarray(draw.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        small.resize(size).save(folder / f"pictures/{number:04d}.png")
        (folder / f"pictures/{number:04d}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture(scope="module")
def commands(sources: Path) -> dict[str, list[str]]:
    """Return a command for each kind, without output and workers."""
    torch.manual_seed(0)
    SemanticCompressor.from_preset("tiny", widths=[8, 16, 16], c_latent=4).save(sources / "compressor")
    of_latents = ["--image_size", "64", "--stage_b", str(sources / "compressor"), "--samples_per_shard", "50"]
    texts = [str(path) for path in sorted(sources.glob("*.jsonl"))]
    return {
        "text": ["text", *texts, "--tokenizer", str(sources / "tokenizer"), "--sequence_length", "256"],
        "images": ["images", str(sources / "pictures"), "--held_out", "0.1", "--samples_per_shard", "100"],
        "latents": ["latents", str(sources / "shards" / "train"), *of_latents],
    }


def start(command: list[str], out: Path, workers: int) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "rewurst.train", "prepare", *command]
    arguments += ["--out", str(out), "--workers", str(workers)]
    return subprocess.Popen(arguments, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def progress(process: subprocess.Popen[bytes], out: Path) -> Iterator[int]:
    """Yield the number of finished units until the process ends."""
    pause = threading.Event()
    while process.poll() is None:
        # os.walk, unlike rglob, passes over folders that are deleted while it looks.
        yield sum(name.endswith(".json") for _, _, names in os.walk(out / ".preparing") for name in names)
        pause.wait(0.01)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ended(session: int) -> bool:
    """Return whether all processes of a session end within some seconds of their parent's death."""
    pause = threading.Event()
    for _ in range(300):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        pause.wait(0.1)
    return False


@pytest.mark.parametrize(
    ("kind", "workers"), [("text", 2), ("text", 1), ("images", 2), ("images", 1), ("latents", 0), ("latents", 2)]
)
def test_five_kills_change_no_byte(
    kind: str, workers: int, commands: dict[str, list[str]], sources: Path, tmp_path: Path
) -> None:
    shards = sources / "shards"
    if kind == "latents" and not shards.exists():
        assert start(commands["images"], shards, 2).wait() == 0
    undisturbed = start(commands[kind], tmp_path / "undisturbed", workers)
    units = max(progress(undisturbed, tmp_path / "undisturbed"))
    assert undisturbed.wait() == 0
    assert units > 2 * KILLS, "there must be something to interrupt"

    draw = random.Random(f"{kind}{workers}")
    moments = []
    for number in range(1, KILLS + 1):
        process = start(commands[kind], tmp_path / "killed", workers)
        moment = draw.uniform(number - 1, number) * units / (KILLS + 1)
        for done in progress(process, tmp_path / "killed"):
            if done >= moment:
                os.kill(process.pid, signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL
        assert ended(process.pid)
        moments.append(done)
    assert start(commands[kind], tmp_path / "killed", workers).wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    print(f"{kind}, {workers} workers: killed with {moments} of {units} units done")
