"""Two processes read a stream: different tars, every row once, and both resume exactly."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from ranks import run_ranks

from rewurst.preparation.tokenizer import train_tokenizer

SCRIPT = """
import json, os, sys
sys.path.insert(0, sys.argv[2])
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from text_reading import Reader
from rewurst.datamodules import Corpus, TextDataModule

folder = sys.argv[1]
quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=-1, accelerator="cpu")

def read(steps, checkpoint=None, save=None):
    corpora = {"web": Corpus(stream=f"{folder}/s-{{0..3}}.tar")}
    data = TextDataModule("web", corpora, {}, 8, 2, 4, num_workers=1, tokenizer=f"{folder}/tokenizer", cache_dir=folder)
    callbacks = [ModelCheckpoint(folder, "a", every_n_train_steps=save)] if save else []
    trainer = Trainer(
        max_steps=steps, strategy="ddp", devices=2, callbacks=callbacks, enable_checkpointing=bool(save), **quiet
    )
    module = Reader()
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return [row[:2].tolist() for row in torch.cat(module.tokens)]

whole = read(6)
read(3, save=3)
rest = read(6, checkpoint=f"{folder}/a.ckpt")
with open(f"{folder}/rows-{os.environ['RANK']}.json", "w") as file:
    json.dump([whole, rest], file)
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 40)
    train_tokenizer([str(tmp_path / "a.txt")], 264, tmp_path / "tokenizer", progress=False)
    for shard in range(4):
        with wds.TarWriter(str(tmp_path / f"s-{shard}.tar")) as writer:
            rows = np.zeros((6, 9), dtype=np.uint16)
            rows[:, 0], rows[:, 1] = shard, np.arange(6)
            content = io.BytesIO()
            np.save(content, rows)
            writer.write({"__key__": f"{shard}", "npy": content.getvalue()})
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_ranks(script, str(tmp_path), str(Path(__file__).parents[2] / "support"), processes=2)
    parts = [json.loads((tmp_path / f"rows-{rank}.json").read_text()) for rank in (0, 1)]
    whole = [tuple(row) for rows, _ in parts for row in rows]
    assert sorted(whole) == [(shard, row) for shard in range(4) for row in range(6)]
    assert not {row[0] for row in parts[0][0]} & {row[0] for row in parts[1][0]}
    for rows, rest in parts:
        assert rest == rows[6:]
