"""kill -9 of a sharded run within a save: the checkpoint before is chosen, and the same command again goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rewurst.callbacks.checkpoints import newest_checkpoint
from rewurst.callbacks.shard_files import is_whole, read_meta

ROOT = Path(__file__).parent.parent
STEPS, DEADLINE_SECONDS = 40, 120

LOG = """
import os

from lightning.pytorch import Callback


class Log(Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.is_global_zero:
            with open(self.path, "a") as file:
                file.write(f"{trainer.global_step} {float(outputs['loss']).hex()}\\n")
"""


@pytest.fixture
def start(write_corpus: Callable[..., str], tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """Starts a run of two sharding processes with dropout, averaged weights and frequent checkpoints."""
    (tmp_path / "sharded_log.py").write_text(LOG)
    code = write_corpus("code", 60)

    def begin(name: str) -> subprocess.Popen[bytes]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = {
            "seed_everything": 0,
            "ckpt_path": "auto",
            "construct_on_rank_zero": True,
            "model": {"class_path": "CausalLM", "init_args": {"model": {
                "model_type": "gpt_neox", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2,
                "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16,
                "hidden_dropout": 0.1, "attention_dropout": 0.1,
            }}},
            "data": {"class_path": "TextDataModule", "init_args": {
                "dataset": "code", "val": {}, "sequence_length": 8, "micro_batch_size": 2, "global_batch_size": 8,
                "corpora": {"code": {"path": code}},
            }},
            "trainer": {
                "accelerator": "cpu", "devices": 2, "strategy": "rewurst.callbacks.FSDP", "max_steps": STEPS,
                "max_epochs": -1, "enable_progress_bar": False, "enable_model_summary": False,
                "default_root_dir": str(folder),
                "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "run"}},
                "callbacks": [
                    {"class_path": "LRRewarming", "init_args": {"length": STEPS, "schedule": {
                        "class_path": "WarmupCosine", "init_args": {"peak": 1e-2, "minimum": 1e-3, "warmup": 0.1}}}},
                    {"class_path": "ExactResume"},
                    {"class_path": "WeightAverage", "init_args": {"decay": 0.8}},
                    {"class_path": "sharded_log.Log", "init_args": {"path": str(folder / "log.txt")}},
                    {"class_path": "ModelCheckpoint", "init_args": {
                        "filename": "{step}", "every_n_train_steps": 2, "save_top_k": 1, "save_last": True}},
                ],
            },
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(folder / "config.yaml")]
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        with (folder / "said.txt").open("ab") as said:
            return subprocess.Popen(
                command, stdout=said, stderr=said, start_new_session=True, env={**environment, "OMP_NUM_THREADS": "1"}
            )

    return begin


def lines(folder: Path) -> list[str]:
    path = folder / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def kill_within_a_save(process: subprocess.Popen[bytes], folder: Path, after: int) -> bool:
    """Kills both processes while a save is under way; whether the run had not ended before."""
    for _ in range(DEADLINE_SECONDS * 2000):
        if len(lines(folder)) >= after and any(folder.rglob(".*.tmp")):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        try:
            process.wait(timeout=0.0005)
        except subprocess.TimeoutExpired:
            continue
        return False
    raise AssertionError("the run hangs")


def go_on(start: Callable[..., subprocess.Popen[bytes]], folder: Path) -> None:
    """Runs to the end, from the newest whole checkpoint; what was done after it is done again, to the bit."""
    newest = newest_checkpoint([folder])
    step = 0 if newest is None else read_meta(newest)["global_step"]
    before = lines(folder)
    last = start(folder.name)
    assert last.wait(timeout=DEADLINE_SECONDS) == 0, (folder / "said.txt").read_text()[-2000:]
    since = lines(folder)[len(before) :]
    assert len(since) == 2 * (STEPS - step)
    after = {line for line in before if int(line.split()[0]) > step}
    assert after <= set(since), "a step that was done twice gave another loss"
    assert not list(folder.rglob(".*.tmp")), "what killed saves left is removed"


def test_killed_within_a_save(start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    assert kill_within_a_save(start("killed"), folder, 9)
    newest = newest_checkpoint([folder])
    assert newest is None or is_whole(newest)
    go_on(start, folder)


@pytest.mark.slow
def test_killed_within_five_saves(start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    reference = start("whole")
    assert reference.wait(timeout=DEADLINE_SECONDS) == 0, (tmp_path / "whole/said.txt").read_text()[-2000:]
    chance, folder = random.Random(0), tmp_path / "killed"
    for _ in range(5):
        seen = len(lines(folder))
        assert kill_within_a_save(start("killed"), folder, seen + chance.randint(5, 12))
        newest = newest_checkpoint([folder])
        assert newest is None or is_whole(newest)
    go_on(start, folder)
    assert set(lines(folder)) == set(lines(tmp_path / "whole")), "the losses of the run that was never killed"
