"""A sharded run killed during a save resumes from the previous checkpoint with the same command."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from process_pool import DEADLINE_SECONDS, Pool

from rewurst.checkpoints.newest import newest_checkpoint
from rewurst.checkpoints.sharded_files import is_whole, read_meta

STEPS = 32


@pytest.fixture
def command(write_corpus: Callable[..., str], tmp_path: Path) -> Callable[[str], list[str]]:
    """Return the command of a run of two sharding processes with dropout, averaged weights and frequent checkpoints."""
    code = write_corpus("code", 60)

    def write(name: str) -> list[str]:
        folder = tmp_path / name
        folder.mkdir()
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
                    {"class_path": "SaveOnSignal"},
                    {"class_path": "WeightAverage", "init_args": {"decay": 0.8}},
                    {"class_path": "fsdp_scenarios.StepLog", "init_args": {"path": str(folder / "log.txt")}},
                    {"class_path": "ModelCheckpoint", "init_args": {
                        "filename": "{step}", "every_n_train_steps": 2, "save_top_k": 1, "save_last": True}},
                ],
            },
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return ["fit", "--config", str(folder / "config.yaml")]

    return write


def lines(folder: Path) -> list[str]:
    path = folder / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def begin(pool: Pool, args: list[str], reached: Callable[[], bool]) -> list[int]:
    """Start a run of two processes, wait until a condition holds, and return their ids."""
    processes = pool.pids(2)
    pool.start("command_line", 2, args=args)
    end = time.monotonic() + DEADLINE_SECONDS
    while not reached():
        assert not pool.has_answered(0.0005), "the run has come to its end before"
        assert time.monotonic() < end, "the run hangs"
    return processes


def kill_within_a_save(pool: Pool, args: list[str], folder: Path, batches: int) -> None:
    """Run until the given batch, and kill both processes during the next save."""
    wanted = len(lines(folder)) + batches
    processes = begin(pool, args, lambda: len(lines(folder)) >= wanted and any(folder.rglob(".*.tmp")))
    for kill in (signal.SIGSTOP, signal.SIGKILL):  # at the same moment, so that none reports the other's failure
        for process in processes:
            os.kill(process, kill)
    assert pool.pids(2) != processes  # they are gone when others have taken their places


def test_killed_within_five_saves(pool: Pool, command: Callable[[str], list[str]], tmp_path: Path) -> None:
    assert pool.run("command_line", 2, args=command("whole")) == 0
    chance, folder, args = random.Random(0), tmp_path / "killed", command("killed")
    steps = []
    for _ in range(5):
        kill_within_a_save(pool, args, folder, chance.randint(2, 6))
        newest = newest_checkpoint([folder])
        assert newest is None or is_whole(newest)
        steps.append(0 if newest is None else read_meta(newest)["global_step"])
        assert steps == sorted(steps)
    before = lines(folder)
    assert pool.run("command_line", 2, args=args) == 0
    assert len(lines(folder)) - len(before) == 2 * (STEPS - steps[-1]), "it resumed from the newest complete checkpoint"
    assert set(lines(folder)) == set(lines(tmp_path / "whole")), "the losses of the run that was never killed"
    assert not list(folder.rglob(".*.tmp")), "what killed saves have left is removed"


def test_a_signal_to_one_process_saves_all_shards(
    pool: Pool, command: Callable[[str], list[str]], tmp_path: Path
) -> None:
    folder, args = tmp_path / "signalled", command("signalled")
    _, second = begin(pool, args, lambda: len(lines(folder)) >= 5)
    os.kill(second, signal.SIGUSR1)
    assert [answer["ok"] for answer in pool.answers(2)] == [0, 0]
    [saved] = folder.rglob("signal.ckpt")
    assert is_whole(saved)
    assert 2 * read_meta(saved)["global_step"] == len(lines(folder)) < 2 * STEPS
    assert pool.run("command_line", 2, args=args) == 0
    assert len(lines(folder)) == 2 * STEPS, "nothing is done twice or left out"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--construct_on_rank_zero=false"], "is sharded: give --trainer.strategy rewurst.callbacks.FSDP"),
        ([], "construct_on_rank_zero needs the strategy rewurst.callbacks.FSDP"),
    ],
)
def test_a_command_without_the_strategy(
    pool: Pool, command: Callable[[str], list[str]], tmp_path: Path, options: list[str], expected: str
) -> None:
    args = command("run")
    sharded = tmp_path / "run" / "step=2.ckpt"
    sharded.mkdir()
    for name in (".metadata", "meta.pt"):
        (sharded / name).touch()
    args += ["--trainer.strategy=auto", "--trainer.devices=1", f"--ckpt_path={sharded}", *options]
    assert expected in pool.run("command_line", 1, args=args)["usage"]
