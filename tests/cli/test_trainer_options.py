"""Every argument of the Trainer is honored or refused in one line, as the docs say."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from rewurst.cli.options.trainer_options import OPTIONS, table, write
from rewurst.train import main

PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"
pytestmark = pytest.mark.filterwarnings(
    "ignore:corpus .* is read again",
    "ignore:.*barebones", "ignore:.*exists and is not empty", "ignore:The number of training batches",
    "ignore:.*self.log.*", "ignore:.*Lightning couldn't infer", "ignore:.*Detected KeyboardInterrupt",
    "ignore:Anomaly Detection", "ignore:.*sync_batchnorm",
)  # fmt: skip

# A value of each argument, and how many steps of at most six are trained with it; none where a machine is needed.
VALUES: dict[str, tuple[Any, int] | None] = {
    "accelerator": ("cpu", 6),
    "strategy": ("auto", 6),
    "devices": (1, 6),
    "num_nodes": (1, 6),
    "precision": ("bf16-mixed", 6),
    "logger": (False, 6),
    "callbacks": (None, 6),
    "fast_dev_run": (2, 2),
    "max_epochs": (1, 4),
    "min_epochs": (1, 6),
    "max_steps": (3, 3),
    "min_steps": (2, 6),
    "max_time": ({"hours": 1}, 6),
    "limit_train_batches": (2, 6),
    "limit_val_batches": (1, 6),
    "limit_test_batches": (1, 6),
    "limit_predict_batches": (1, 6),
    "overfit_batches": (2, 6),
    "val_check_interval": (2, 6),
    "check_val_every_n_epoch": (2, 6),
    "num_sanity_val_steps": (1, 6),
    "log_every_n_steps": (1, 6),
    "enable_checkpointing": (False, 6),
    "enable_progress_bar": (True, 6),
    "enable_model_summary": (True, 6),
    "accumulate_grad_batches": None,
    "gradient_clip_val": (0.5, 6),
    "gradient_clip_algorithm": ("norm", 6),
    "deterministic": (True, 6),
    "benchmark": (True, 6),
    "inference_mode": (False, 6),
    "use_distributed_sampler": (True, 6),
    "profiler": ("simple", 6),
    "detect_anomaly": (True, 6),
    "barebones": (True, 6),
    "plugins": (None, 6),
    "sync_batchnorm": (True, 6),
    "reload_dataloaders_every_n_epochs": (1, 6),
    "default_root_dir": ("elsewhere", 6),
    "enable_autolog_hparams": (False, 6),
    "model_registry": ("registry", 6),
}
NEEDS_MORE: dict[str, dict[str, Any]] = {
    "gradient_clip_algorithm": {"gradient_clip_val": 0.5},
    "barebones": dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")),
}
ARGUMENTS = [name for name in inspect.signature(Trainer).parameters]  # noqa: C416


def test_the_table_has_every_argument_and_the_page_has_the_table(tmp_path: Path) -> None:
    assert list(OPTIONS) == ARGUMENTS == list(VALUES)
    again = tmp_path / "trainer.md"
    again.write_text(PAGE.read_text("utf8"), encoding="utf8")
    write(again)
    assert again.read_text("utf8") == PAGE.read_text("utf8"), (
        "python -m rewurst.cli.options.trainer_options docs/trainer.md"
    )
    assert table() in PAGE.read_text("utf8")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_is_honoured_or_refused_in_one_line(
    name: str, write_corpus: Any, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = write_corpus("prose", rows=20)
    value, steps = VALUES[name] or (3, 0)
    trainer = {
        "accelerator": "cpu", "max_steps": 6, "logger": False, "enable_progress_bar": False, "num_sanity_val_steps": 0,
        "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    trainer |= NEEDS_MORE.get(name, {})
    if name == "barebones":
        del trainer["num_sanity_val_steps"]
    data = {
        "dataset": "prose", "corpora": {"prose": {"path": path}}, "val": {"prose": path}, "sequence_length": 8,
        "micro_batch_size": 5, "global_batch_size": 5,
    }  # fmt: skip
    trained: list[int] = []
    fit = Trainer.fit

    def noted(self: Trainer, *args: Any, **kwargs: Any) -> None:
        fit(self, *args, **kwargs)
        trained.append(self.global_step)

    monkeypatch.setattr(Trainer, "fit", noted)
    config = {
        "model": {"class_path": "CausalLM", "init_args": {"model": tiny_config}},
        "data": {"class_path": "TextDataModule", "init_args": data},
        "trainer": trainer | {name: value},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    status = main(["fit", "--config", "config.yaml"])
    error = capsys.readouterr().err.strip().splitlines()
    if OPTIONS[name].outcome == "refused":
        assert status == 2
        assert name in error[-1]
        assert "Traceback" not in "".join(error)
    else:
        assert status == 0, error[-1]
        assert trained == [steps]
