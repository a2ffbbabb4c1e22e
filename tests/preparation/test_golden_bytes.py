"""Prepared corpora keep their bytes from release to release: hashes of every file, written down once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewurst.train import main

GOLDEN = json.loads((Path(__file__).parent / "golden_bytes.json").read_text())
WORDS = ["river", "stone", "cloud", "window", "silver", "garden", "Straße", "naïve", "東京"]


def _text(seed: int) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(WORDS[k] for k in draw.integers(len(WORDS), size=int(draw.integers(5, 60)))) + "\n"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of texts, a file of JSON lines, and captioned pictures of which one is broken."""
    monkeypatch.chdir(tmp_path)  # sources are recorded in the index as they were typed
    Path("texts").mkdir()
    for i in range(12):
        Path(f"texts/{i:02d}.txt").write_text(_text(i), encoding="utf8")
    lines = [json.dumps({"text": _text(100 + i)}) + "\n" for i in range(300)]
    Path("lines.jsonl").write_text("".join(lines), encoding="utf8")
    Path("pictures").mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (16 + i % 5, 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(f"pictures/{i:02d}.png", compress_level=0)
        Path(f"pictures/{i:02d}.txt").write_text(f"picture {i}")
    Path("pictures/40.png").write_bytes(b"broken")
    Path("pictures/40.txt").write_text("broken")
    return tmp_path


def _hashes(folder: str) -> dict[str, str]:
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.usefixtures("sources")
def test_text_corpora_keep_their_bytes(workers: str) -> None:
    texts = ["texts", "lines.jsonl"]
    assert main(["prepare", "tokenizer", *texts, "--vocab_size", "300", "--out", "tok"]) == 0
    options = ["--tokenizer", "tok", "--sequence_length", "16", "--held_out", "0.2", "--rows_per_shard", "256"]
    assert main(["prepare", "text", *texts, *options, "--workers", workers, "--out", "out"]) == 0
    assert _hashes("tok") == GOLDEN["tok"]
    assert _hashes("out") == GOLDEN["text"]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.usefixtures("sources")
def test_image_corpora_keep_their_bytes(workers: str) -> None:
    options = ["--held_out", "0.2", "--samples_per_shard", "10", "--workers", workers]
    assert main(["prepare", "images", "pictures", *options, "--out", "out"]) == 0
    assert _hashes("out") == GOLDEN["images"]
