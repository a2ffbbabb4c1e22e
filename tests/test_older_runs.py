"""A checkpoint and a saved config of an earlier layout of the package still resume, step for step."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from token_corpora import write_tokens

from rewurst.train import main

BEFORE = Path(__file__).parent / "fixtures" / "before_rooms"
LOSSES = [4.173022747039795, 4.163600921630859, 4.141161918640137]  # of steps 4 to 6, where the layout was the old one
FORGETTING = -0.0053562587499618175


def test_a_run_saved_before_the_folders_had_rooms_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("old", "new")):
        write_tokens(Path(), name, np.random.default_rng(seed).integers(64, size=401))
    options = ["--ckpt_path", str(BEFORE / "step=3.ckpt"), "--trainer.max_steps", "6"]
    assert main(["fit", "--config", str(BEFORE / "config.yaml"), *options]) == 0
    [metrics] = Path("runs/before").rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.read_text().splitlines()))
    assert [float(row["train/loss"]) for row in rows if row["train/loss"]] == pytest.approx(LOSSES, abs=1e-5)
    [forgetting] = [float(row["forgetting/old"]) for row in rows if row["forgetting/old"]]
    assert forgetting == pytest.approx(FORGETTING, abs=1e-5)
