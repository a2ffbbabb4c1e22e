"""A local preparation that is killed repeatedly resumes and gives the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewurst.preparation.tokenizer import train_tokenizer
from rewurst.train import main

# Every file that is written or moved into place counts; the process kills itself just before or just after the n-th.
DYING = """
import os, sys
from rewurst.preparation.engine import image_units, text_units
from rewurst.preparation.writing.destination import Target
from rewurst.train import main

text_units.PART_CHARS, image_units.UNIT_PICTURES = 2000, 4
left, after = int(sys.argv[1]), sys.argv[2] == "after"

def dying(method):
    def called(*arguments):
        global left
        left -= 1
        if left == 0 and not after:
            os.kill(os.getpid(), 9)
        method(*arguments)
        if left == 0:
            os.kill(os.getpid(), 9)
    return called

Target.write, Target.publish, Target.remove = dying(Target.write), dying(Target.publish), dying(Target.remove)
sys.exit(main(sys.argv[3:]))
"""


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    words = ["river", "stone", "cloud", "Straße", "window"]
    lines = [" ".join(np.random.default_rng(i).choice(words, size=20)) for i in range(120)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "b.txt").write_text("\n".join(lines[:40]))
    train_tokenizer([str(tmp_path / "b.txt")], 280, tmp_path / "tokenizer", progress=False)
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--sequence_length", "4", "--rows_per_shard", "256"]
    return ["prepare", "text", str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt"), *options, "--held_out", "0.2"]


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/{i:02d}.png")
        (tmp_path / f"pictures/{i:02d}.txt").write_text(f"picture {i}")
    return ["prepare", "images", str(tmp_path / "pictures"), "--held_out", "0.3", "--samples_per_shard", "5"]


@pytest.mark.parametrize("kind", ["text", "images"])
def test_killed_preparations_give_the_same_bytes(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    command = request.getfixturevalue(kind)
    assert main([*command, "--out", str(tmp_path / "undisturbed")]) == 0
    draw = random.Random(kind)
    kills = 0
    while True:
        moment = [str(draw.randint(3, 12)), draw.choice(["before", "after"])]
        run = [sys.executable, "-c", DYING, *moment, *command, "--out", str(tmp_path / "killed")]
        status = subprocess.run(run, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert kills >= 5
    assert _contents(tmp_path / "killed") == _contents(tmp_path / "undisturbed")
