"""Class paths of earlier versions still name classes whose files have moved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rewurst import callbacks, datamodules, modules
from rewurst.cli.lightning import parse
from rewurst.cli.options.class_names import with_public_paths

OLD_FILES = {
    "callbacks": ("lr_rewarming", "learning_rate.schedules"),
    "datamodules": ("text_datamodule",),
    "modules": ("stage_a", "networks.x.y"),
}


@pytest.mark.parametrize("package", [callbacks, datamodules, modules])
def test_every_public_class_is_found_by_the_path_of_a_file(package: object) -> None:
    room = package.__name__.removeprefix("rewurst.")  # type: ignore[attr-defined]
    for name in (name for name in package.__all__ if name[0].isupper()):  # type: ignore[attr-defined]
        for file in OLD_FILES[room]:
            assert with_public_paths(f"rewurst.{room}.{file}.{name}") == f"rewurst.{room}.{name}"


@pytest.mark.parametrize(
    "path",
    [
        "rewurst.callbacks.LRRewarming",
        "rewurst.modules.networks.UNet",  # not a name that rewurst.modules exports
        "mine.rewurst_callbacks.lr_rewarming.LRRewarming",
        "lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor",
    ],
)
def test_other_paths_stay(path: str) -> None:
    assert with_public_paths(path) == path


def test_configs_and_arguments_with_paths_of_files_that_moved(tmp_path: Path) -> None:
    config = {
        "model": {"class_path": "rewurst.modules.language_model.CausalLM", "init_args": {"model": {"vocab_size": 64}}},
        "trainer": {
            "callbacks": [
                {
                    "class_path": "rewurst.callbacks.lr_rewarming.LRRewarming",
                    "init_args": {
                        "schedule": {
                            "class_path": "rewurst.callbacks.schedules.WarmupCosine",
                            "init_args": {"peak": 1e-3, "minimum": 1e-4},
                        },
                        "length": 10,
                    },
                }
            ]
        },
    }
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(config))
    data = "rewurst.datamodules.text_module.TextDataModule"
    sizes = {"sequence_length": 16, "micro_batch_size": 1, "global_batch_size": 1}
    settings = {"dataset": "a", "corpora": {"a": {"path": "a"}}, "val": {}} | sizes
    options = [f"--data.init_args.{name}={json.dumps(value)}" for name, value in settings.items()]
    parsed = parse(["fit", "--config", str(path), "--data", data, *options])
    assert parsed["model"]["class_path"] == "rewurst.modules.CausalLM"
    assert parsed["data"]["class_path"] == "rewurst.datamodules.TextDataModule"
    [rewarming] = parsed["trainer"]["callbacks"]
    assert rewarming["class_path"] == "rewurst.callbacks.LRRewarming"
    assert rewarming["init_args"]["schedule"]["class_path"] == "rewurst.callbacks.WarmupCosine"
