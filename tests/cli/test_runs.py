"""The checkpoint and folder of a run are found with every logger."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rewurst.checkpoints.newest import newest_checkpoint
from rewurst.train import main

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:.*Checkpoint directory .* exists and is not empty"
)
Fit = Callable[..., int]
TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"
PROJECT = "project_logger.ProjectLogger"


@pytest.fixture
def fit(write_corpus: Any, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Run `fit` for some steps with a logger, on a corpus of 50 rows."""
    monkeypatch.chdir(tmp_path)
    path = write_corpus("prose")

    def run(steps: int, logger: Any, *options: str, dataset: str = "prose", command: str = "fit") -> int:
        config = {
            "ckpt_path": "auto",
            "model": {"class_path": "CausalLM", "init_args": {"model": tiny_config}},
            "data": {
                "class_path": "TextDataModule",
                "init_args": {
                    "dataset": dataset, "corpora": {"prose": {"path": path}}, "val": {"prose": path},
                    "sequence_length": 8, "micro_batch_size": 5, "global_batch_size": 5,
                },
            },
            "trainer": {
                "accelerator": "cpu", "max_steps": steps, "logger": logger, "enable_progress_bar": False,
                "enable_model_summary": False, "log_every_n_steps": 1, "num_sanity_val_steps": 0,
                "val_check_interval": 2, "check_val_every_n_epoch": None,
                "callbacks": [
                    {"class_path": "ModelCheckpoint",
                     "init_args": {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}}
                ],
            },
        }  # fmt: skip
        Path("config.yaml").write_text(yaml.safe_dump(config))
        return main([command, "--config", "config.yaml", *options])

    return run


def logger_of(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": {"save_dir": "runs", **arguments}}


def steps_in(folder: str | Path) -> list[int]:
    return sorted(torch.load(path, weights_only=True)["global_step"] for path in Path(folder).rglob("*.ckpt"))


LOGGERS = {
    "none": False,
    "tensorboard": logger_of(TENSORBOARD, name="a"),
    "a chosen version": logger_of(TENSORBOARD, name="a", version="mine"),
    "a version of number 0": logger_of(TENSORBOARD, name="a", version=0),
    "csv": logger_of("lightning.pytorch.loggers.CSVLogger", name="a"),
    "csv with a chosen version": logger_of("lightning.pytorch.loggers.CSVLogger", name="a", version="mine"),
    "a project": logger_of(PROJECT, project="p"),
    "a named run of a project": logger_of(PROJECT, project="p", name="a"),
    "a run with an id": logger_of(PROJECT, project="p", id="x"),
    "two": [logger_of(TENSORBOARD, name="a"), logger_of("lightning.pytorch.loggers.CSVLogger", name="a")],
}


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("logger", LOGGERS.values(), ids=LOGGERS.keys())
def test_the_same_command_again_resumes_with_every_logger(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], logger: Any
) -> None:
    assert fit(4, logger) == 0
    assert fit(8, logger) == 0
    assert steps_in(tmp_path) == [2, 4, 6, 8]
    capsys.readouterr()
    assert fit(8, logger) == 0
    assert "complete" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_rows_and_configs_of_the_first_part_are_kept(fit: Fit) -> None:
    for steps in (4, 8):
        assert fit(steps, LOGGERS["csv with a chosen version"]) == 0
    folder = Path("runs/a/mine")
    assert len((folder / "metrics.1.csv").read_text().splitlines()) > 4
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == 8
    assert yaml.safe_load((folder / "config.1.yaml").read_text())["trainer"]["max_steps"] == 4


def test_a_resumed_run_is_one_curve(fit: Fit) -> None:
    assert fit(5, LOGGERS["tensorboard"]) == 0
    [version] = Path("runs/a").iterdir()
    [first] = version.glob("events.*")  # files are read in the order of their times, in whole seconds
    first.rename(version / "events.out.tfevents.1000000000.first")
    assert fit(8, LOGGERS["tensorboard"]) == 0  # from step 4, so that step 5 is trained twice
    events = EventAccumulator(str(version))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(8))


def test_a_folder_that_belongs_to_a_run_is_not_taken(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(2, LOGGERS["a chosen version"]) == 0
    assert fit(4, LOGGERS["a chosen version"], "--ckpt_path", "null") == 2
    assert "runs/a/mine belongs to an earlier run: resume it with --ckpt_path auto" in capsys.readouterr().err


def test_runs_of_one_project_are_told_apart(fit: Fit) -> None:
    assert fit(4, logger_of(PROJECT, project="p", name="a")) == 0
    assert fit(2, logger_of(PROJECT, project="p", name="b")) == 0
    assert steps_in("runs") == [2, 2, 4]
    assert fit(6, logger_of(PROJECT, project="p", name="a")) == 0
    assert steps_in("runs") == [2, 2, 4, 6]
    assert fit(2, logger_of(PROJECT, project="p"), dataset="other") == 0
    assert fit(2, logger_of(PROJECT, project="q", name="a")) == 0
    assert steps_in("runs") == [2, 2, 2, 2, 4, 6]
    assert len(list(Path("runs").glob("*/*/config.yaml"))) == 4, "each in its own folder"


@pytest.mark.parametrize("logger", ["none", "tensorboard", "a named run of a project"])
def test_another_dataset_does_not_share_a_run(fit: Fit, capsys: pytest.CaptureFixture[str], logger: str) -> None:
    assert fit(2, LOGGERS[logger]) == 0
    assert fit(4, LOGGERS[logger], dataset="code") == 2
    assert "are of dataset 'prose', this run learns 'code': give its logger another name" in capsys.readouterr().err


def test_a_shared_folder_of_checkpoints_holds_two_runs(fit: Fit) -> None:
    shared = ("--trainer.callbacks.dirpath", "shared")
    assert fit(4, logger_of(TENSORBOARD, name="a"), *shared) == 0
    assert fit(2, logger_of(TENSORBOARD, name="b"), *shared) == 0
    assert steps_in("shared") == [2, 2, 4], "the second did not resume the first"


def test_copies_with_new_times(fit: Fit) -> None:
    assert fit(6, LOGGERS["tensorboard"]) == 0
    folder = Path("runs/a/version_0/checkpoints")
    for age, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        os.utime(path, (1000 + age, 1000 + age))
    with pytest.warns(UserWarning, match=r"step=6.ckpt at step 6 is used, although .*step=2.ckpt at step 2 is newer"):
        assert fit(8, LOGGERS["tensorboard"]) == 0
    assert steps_in("runs") == [2, 4, 6, 8]


def test_weights_next_to_complete_checkpoints_are_skipped(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(4, LOGGERS["tensorboard"]) == 0
    folder = Path("runs/a/version_0/checkpoints")
    content = torch.load(folder / "step=4.ckpt", weights_only=True)
    del content["optimizer_states"]
    torch.save(content | {"global_step": 5}, folder / "weights.ckpt")
    torch.save({"state_dict": content["state_dict"]}, folder / "foreign.ckpt")
    assert fit(6, LOGGERS["tensorboard"]) == 0
    assert (folder / "step=6.ckpt").exists()
    assert fit(0, LOGGERS["tensorboard"], command="validate") == 0
    for path in folder.glob("step=*"):
        path.unlink()
    with pytest.warns(UserWarning, match="contains only weights, so there is no run to resume"):
        assert fit(2, LOGGERS["tensorboard"]) == 0


def test_of_equal_steps_the_last_written_is_used(tmp_path: Path) -> None:
    for age, name in enumerate(("b", "a", "c")):
        torch.save({"global_step": 3}, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (100 - age, 100 - age))
    assert newest_checkpoint([tmp_path]) == tmp_path / "b.ckpt"
    shutil.copy(tmp_path / "c.ckpt", tmp_path / "d.ckpt")
    assert newest_checkpoint([tmp_path]) == tmp_path / "d.ckpt"


def test_last_is_a_link_to_the_newest_and_resumes_leave_nothing_behind(fit: Fit) -> None:
    keep = ("--trainer.callbacks.ModelCheckpoint.save_top_k=1", "--trainer.callbacks.ModelCheckpoint.save_last=link")
    for steps in (4, 6, 10):
        assert fit(steps, LOGGERS["tensorboard"], *keep) == 0
        folder = Path("runs/a/version_0/checkpoints")
        assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", f"step={steps}.ckpt"]
        assert (folder / "last.ckpt").resolve().name == f"step={steps}.ckpt"


def test_of_a_file_and_a_link_to_it(tmp_path: Path) -> None:
    torch.save({"global_step": 3, "optimizer_states": []}, tmp_path / "step=3.ckpt")
    (tmp_path / "last.ckpt").symlink_to("step=3.ckpt")
    assert newest_checkpoint([tmp_path]) == tmp_path / "step=3.ckpt"
    assert newest_checkpoint([tmp_path], resumable=True) == tmp_path / "last.ckpt"
