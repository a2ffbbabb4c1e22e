"""An argument of one callback can be changed by its name, and a hint names the valid ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import wandb

from rewurst import UsageError
from rewurst.cli.lightning import parse
from rewurst.train import main

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = ["fit", "--config", str(CONFIGS / "continual/demo.yaml")]
PEAK = ("LRRewarming", ["schedule", "init_args", "peak"])


class Missing:
    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return "Requirement 'wandb' not met.\nInstall it."


def arguments(config: dict[str, Any], name: str) -> list[Any]:
    callbacks = config["trainer"]["callbacks"]
    return [item.get("init_args") for item in callbacks if item["class_path"].endswith(f".{name}")]


@pytest.mark.parametrize(
    ("option", "name", "path", "value"),
    [
        (["--trainer.callbacks.LRRewarming.length", "20"], "LRRewarming", ["length"], 20),
        (["--trainer.callbacks.LRRewarming.length=20_000 tokens"], "LRRewarming", ["length"], "20_000 tokens"),
        (
            ["--trainer.callbacks.LRRewarming.schedule.peak", "1e-3"],
            "LRRewarming",
            ["schedule", "init_args", "peak"],
            1e-3,
        ),
        (["--trainer.callbacks.LRRewarming.optimizer_state", "keep"], "LRRewarming", ["optimizer_state"], "keep"),
        (
            ["--trainer.callbacks.ModelCheckpoint.every_n_train_steps", "7"],
            "ModelCheckpoint",
            ["every_n_train_steps"],
            7,
        ),
        (["--trainer.callbacks.SaveOnSignal.signals", "[SIGUSR1]"], "SaveOnSignal", ["signals"], ["SIGUSR1"]),
        (["--trainer.callbacks.Throughput.window_size=null"], "Throughput", ["window_size"], None),
    ],
)
def test_an_argument_is_changed(option: list[str], name: str, path: list[str], value: Any) -> None:
    before, after = parse(DEMO), parse([*DEMO, *option])
    [changed] = arguments(after, name)
    for part in path:
        changed = changed[part]
    assert changed == value
    others = [item for item in after["trainer"]["callbacks"] if not item["class_path"].endswith(f".{name}")]
    assert others == [item for item in before["trainer"]["callbacks"] if not item["class_path"].endswith(f".{name}")]


def test_one_of_several(tmp_path: Path) -> None:
    overlay = tmp_path / "two.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks+": [
        {"class_path": "LogText", "init_args": {"prompts": [prompt]}} for prompt in "b"]}}))  # fmt: skip
    more = [*DEMO, "--config", str(overlay)]
    config = parse([*more, "--trainer.callbacks.LogText.1.max_new_tokens", "3"])
    assert [item["max_new_tokens"] for item in arguments(config, "LogText")] == [50, 3]
    with pytest.raises(UsageError, match=r"has 2 of them: number them, --trainer.callbacks.LogText.0.max_new_tokens"):
        parse([*more, "--trainer.callbacks.LogText.max_new_tokens", "3"])
    with pytest.raises(UsageError, match="has 2 of them, numbered from 0"):
        parse([*more, "--trainer.callbacks.LogText.2.max_new_tokens", "3"])


WRONG = [
    (["--trainer.callbacks.LRRewarmin.length", "5"], "no callback 'LRRewarmin'; did you mean 'LRRewarming'?"),
    (["--trainer.callbacks.BackboneX.length", "5"], "no callback 'BackboneX'; it has ExactResume"),
    (["--trainer.callbacks.LRRewarming.lenth", "5"], "LRRewarming has no option 'lenth'; did you mean 'length'?"),
    (["--trainer.callbacks.LRRewarming.length.x", "5"], "'length' has no arguments in the config"),
    (["--trainer.callbacks.LRRewarming.length"], "--trainer.callbacks.LRRewarming.length needs a value"),
    (["--trainer.callbacks.length", "5"], "of another callback: --trainer.callbacks.NAME.length"),
    (["--data.max_steps", "5"], "TextDataModule has no option 'max_steps'; it has cache_dir, corpora, dataset"),
    (["--max_steps", "5"], "there is no option 'max_steps'; did you mean 'trainer.max_steps'?"),
    (["--trainer.max_step", "5"], "there is no option 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
    (["--trainer.callbacks.LRRewarming.schedule.value", "5"], "WarmupCosine has no option 'value'; it has "),
    (["--model.init_args.max_steps", "5"], "CausalLM has no option 'max_steps'; it has "),
]


@pytest.mark.parametrize(("option", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_hint_names_what_is_valid_at_its_place(option: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse([*DEMO, *option])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_options_without_the_base_config(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--data.corpora.code.path=x", "--model.lr=1"):
        assert main(["fit", option]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "is named: give --config with the base config first" in line
        assert "did you mean" not in line


@pytest.mark.parametrize("command", [["prepare", "text", "a.jsonl"], ["prepare", "tokenizer", "a.jsonl"]])
def test_a_misspelled_option_is_named_before_the_missing_ones(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--ouut", "x"]) == 2
    assert "unrecognized arguments: --ouut; did you mean '--out'?" in capsys.readouterr().err
    assert main(["prepare", "text", "a.jsonl", "--tokeniser", "x"]) == 2
    assert "did you mean '--tokenizer'?" in capsys.readouterr().err


def test_what_cannot_be_built_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", Missing())
    replay = [{"class_path": "ReplayScheduler", "init_args": {"share": share}} for share in (0.1, 0.2)]
    for settings, message in (
        ({"accelerator": "gpu"}, "No supported gpu backend found: pass --trainer.accelerator cpu"),
        ({"callbacks+": replay}, "trainer.callbacks: there are two of ReplayScheduler, take one of them out"),
        ({"logger": {"class_path": "WandbLogger", "init_args": {"name": "a"}}}, "Requirement 'wandb' not met"),
    ):
        (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({"trainer": settings}))
        assert main([*DEMO, "--config", "overlay.yaml"]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1]
        assert not [line for line in error if "Traceback" in line]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.max_steps", "100"], "max_steps 100 ends the run at the vertical line (learning rate 0.00"),
        (["--trainer.max_steps", "400"], ""),
        (["--trainer.max_steps", "100", "--ckpt_path", "auto:runs/other"], ""),
    ],
)
def test_a_schedule_that_is_longer_than_the_run(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedule", *DEMO[1:], *options, "--out", str(tmp_path / "lr.png")]) == 0
    printed = capsys.readouterr().out
    assert said in printed
    assert bool(said) == ("max_steps" in printed)
