"""The command line as typed by a user: real data, resumed runs, one-line errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rewurst.cli.parser import parser_of
from rewurst.cli.tools import TOOLS
from rewurst.train import main

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:.*Checkpoint directory .* exists and is not empty"
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare two small corpora by the command line, and a config that trains on them."""
    folder = tmp_path_factory.mktemp("cli")
    for name, word in (("prose", "words"), ("code", "tokens")):
        lines = [{"text": f"{word} of document {number}, " * 12} for number in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    sources = [str(folder / "prose.jsonl"), str(folder / "code.jsonl")]
    tokenizer = str(folder / "tokenizer")
    assert main(["prepare", "tokenizer", *sources, "--vocab_size", "320", "--out", tokenizer]) == 0
    for source, name in zip(sources, ("prose", "code"), strict=True):
        options = ["--tokenizer", tokenizer, "--sequence_length", "16", "--held_out", "0.2"]
        assert main(["prepare", "text", source, *options, "--out", str(folder / name)]) == 0
    return folder


@pytest.fixture
def config(workspace: Path, tmp_path: Path) -> Path:
    """Write the demo's config at a smaller size, on the workspace's data."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "configs/continual/demo.yaml").read_text())
    sizes = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    content["model"]["init_args"]["model"] |= sizes | {"intermediate_size": 32}
    content["data"]["init_args"] |= {
        "corpora": {"prose": {"path": str(workspace / "prose" / "train")}},
        "val": {name: str(workspace / name / "val") for name in ("prose", "code")},
        "sequence_length": 16,
        "micro_batch_size": 4,
        "global_batch_size": 4,
    }
    content["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "runs")
    content["trainer"] |= {
        "max_steps": 6,
        "val_check_interval": 3,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
    }
    arguments = {callback["class_path"]: callback.get("init_args") for callback in content["trainer"]["callbacks"]}
    arguments["LRRewarming"]["length"] = 20
    arguments["ModelCheckpoint"]["every_n_train_steps"] = 3
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def step_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


def test_the_same_command_again_resumes(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--config", str(config)]
    run = tmp_path / "runs" / "start"
    assert main([*fit, "--trainer.max_steps", "3"]) == 0
    assert step_of(run / "version_0/checkpoints/last.ckpt") == 3
    saved = yaml.safe_load((run / "version_0/config.yaml").read_text())
    assert saved["model"]["class_path"] == "rewurst.modules.CausalLM"
    assert list(run.glob("version_0/events.out.tfevents.*"))

    assert main(fit) == 0
    assert step_of(run / "version_0/checkpoints/last.ckpt") == 6
    content = torch.load(run / "version_0/checkpoints/last.ckpt", weights_only=True)
    assert content["callbacks"]["LRRewarming"]["start_step"] == 0, "the same dataset was continued"

    capsys.readouterr()
    assert main(fit) == 0
    assert "complete" in capsys.readouterr().out
    assert not (run / "version_1").exists(), "one folder, one curve"


def test_a_truncated_checkpoint_is_skipped(config: Path, tmp_path: Path) -> None:
    fit = ["fit", "--config", str(config)]
    run = tmp_path / "runs" / "start"
    assert main([*fit, "--trainer.max_steps", "3"]) == 0
    whole = (run / "version_0/checkpoints/last.ckpt").read_bytes()
    (run / "version_0/checkpoints/newer.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"newer.ckpt is truncated: an older checkpoint is used instead"):
        assert main(fit) == 0
    assert step_of(run / "version_0/checkpoints/last.ckpt") == 6


def test_a_new_dataset_continues_another_run(config: Path, workspace: Path, tmp_path: Path) -> None:
    assert main(["fit", "--config", str(config)]) == 0
    later = tmp_path / "later.yaml"
    overlay: dict[str, Any] = yaml.safe_load((ROOT / "configs/continual/demo_replay.yaml").read_text())
    overlay["ckpt_path"] = f"auto:{tmp_path / 'runs' / 'start'}"
    overlay["data"]["init_args"]["corpora"] = {
        "code": {"path": str(workspace / "code" / "train")},
        "prose": {"path": str(workspace / "prose" / "train"), "replay": True},
    }
    overlay["trainer"]["max_steps"] = 12
    later.write_text(yaml.safe_dump(overlay))
    assert main(["fit", "--config", str(config), "--config", str(later), "--trainer.callbacks.share", "0.25"]) == 0
    content = torch.load(tmp_path / "runs/replay/version_0/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 12
    assert content["callbacks"]["LRRewarming"]["start_step"] == 6
    assert content["tokens"] == 12 * 4 * 16
    assert content["callbacks"]["ReplayScheduler"] == {"dataset": "code_with_replay", "share": "0.25"}


def test_validate_export_and_generate(
    config: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(config)]) == 0
    checkpoint = str(tmp_path / "runs/start/version_0/checkpoints/last.ckpt")
    assert main(["validate", "--config", str(config), "--ckpt_path", checkpoint]) == 0
    assert "val/loss/prose" in capsys.readouterr().out
    hf = str(tmp_path / "hf")
    assert main(["export", "hf", checkpoint, hf]) == 0
    capsys.readouterr()
    assert main(["generate", "text", hf, "words of", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("words of")
    assert main(["prepare", "verify", str(workspace / "code" / "train")]) == 0


def test_a_schedule_is_drawn_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = [ROOT / "configs/continual" / name for name in ("demo.yaml", "demo_replay.yaml")]
    out = tmp_path / "figures" / "lr.png"
    arguments = [option for path in configs for option in ("--config", str(path))]
    assert main(["schedule", *arguments, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "learning rate: step 0: 0, step 8: 0.002, step 400: 0.0002" in said
    assert "replay share: step 0: 0.05, step 400: 0.05" in said
    assert out.read_bytes().startswith(b"\x89PNG")
    for wrong, message in (
        (arguments, "the following arguments are required: --out"),
        ([*arguments, "--trainer.callbacks", "null", "--out", str(out)], "has no LRRewarming callback"),
        ([*arguments, "--out", str(out.with_suffix(".xyz"))], "lr.xyz cannot be written"),
        ([*arguments, "--trainer.max_stepz", "3", "--out", str(out)], "did you mean 'trainer.max_steps'?"),
    ):
        assert main(["schedule", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_help_of_the_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["schedule", "--help"])
    assert ended.value.code == 0
    assert "--out FILE" in capsys.readouterr().out


def test_checkpoints_that_cannot_be_resumed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["validate", "--config", str(config)]) == 2
    assert "ckpt_path auto: there is no whole checkpoint under" in capsys.readouterr().err
    assert main(["fit", "--config", str(config)]) == 0
    checkpoint = tmp_path / "runs/start/version_0/checkpoints/last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    only_weights = {key: value for key, value in content.items() if key != "optimizer_states"}
    torch.save(only_weights, tmp_path / "weights.ckpt")
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "foreign.ckpt")
    capsys.readouterr()
    for options, message in (
        (
            ["--ckpt_path", "weights.ckpt"],
            "contains only weights, so there is no run to resume; pass it to --model.init_from",
        ),
        (["--ckpt_path", "foreign.ckpt"], "foreign.ckpt is not a Lightning checkpoint"),
        (["--ckpt_path", "runs"], "ckpt_path runs is a folder: give a .ckpt file, or auto:runs for its newest"),
        (["--model.model.hidden_size", "32"], "has shape (320, 16), the model's is (320, 32)"),
        (["--model.model.num_hidden_layers", "3"], "weights of another model, missing model.gpt_neox.layers.2"),
    ):
        assert main(["fit", "--config", str(config), *options]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("rewurst fit: error: ")
        assert message in line


def test_auto_does_not_use_a_foreign_checkpoint(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", str(config)]) == 0
    content = yaml.safe_load(config.read_text())
    content["trainer"]["logger"] = False
    del content["trainer"]["callbacks"][1]  # the monitor needs a logger
    config.write_text(yaml.safe_dump(content))
    capsys.readouterr()
    assert main(["fit", "--config", str(config), "--trainer.max_steps", "3"]) == 0
    assert "complete" not in capsys.readouterr().out
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 3
    assert main(["fit", "--config", str(config), "--trainer.max_steps", "3"]) == 0
    assert "complete" in capsys.readouterr().out


def overlay(text: str) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        (folder / "overlay.yaml").write_text(text)
        return ["--config", str(folder / "overlay.yaml")]

    return write


WRONG = [
    (["--trainer.max_stepz", "5"], "no option 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"),
    (["--trainer.max_steps", "five"], "trainer.max_steps: 'five' is not of type int"),
    (["--data.sequence_lenth", "5"], "no option 'sequence_lenth'; did you mean 'sequence_length'?"),
    (["--model", "CausalML"], "model: there is no class 'CausalML'; did you mean 'CausalLM'?"),
    (["--trainer.callbacks+=LRRewarmin"], "there is no class 'LRRewarmin'; did you mean 'LRRewarming'?"),
    (["--model.init_args.model.hidden_sise", "8"], "'hidden_sise' is unknown to gpt_neox; did you mean 'hidden_size'?"),
    (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    (["--ckpt_path", "runs/nowhere.ckpt"], "ckpt_path runs/nowhere.ckpt does not exist"),
    (["--ckpt_path", "auto:runs/nowhere"], "ckpt_path auto:runs/nowhere: there is no whole checkpoint under"),
    (["--data.corpora.prose.path", "{workspace}/prose/trian"], "no corpus at {workspace}/prose/trian"),
    (["--data.corpora.prose.path", "{workspace}/prose/trian"], "did you mean {workspace}/prose/train?"),
    (overlay("trainer:\n  max_stepz: 5\n"), "no option 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"),
    (
        overlay("data:\n  class_path: TextDataModul\n"),
        "data: there is no class 'TextDataModul'; did you mean 'TextData",
    ),
    (overlay("data:\n  init_args:\n    corpora: {prose: {pth: x}}\n"), "no option 'pth'; did you mean 'path'?"),
    (overlay("modl:\n  class_path: CausalLM\n"), "no option 'modl.class_path'; did you mean 'model'?"),
    (overlay("data: [\n"), "overlay.yaml is not valid YAML: while parsing a flow node"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_use_is_one_line_and_status_2(
    arguments: list[str] | Callable[[Path], list[str]],
    message: str,
    config: Path,
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed = arguments(tmp_path) if callable(arguments) else [a.format(workspace=workspace) for a in arguments]
    capsys.readouterr()
    assert main(["fit", "--config", str(config), *typed]) == 2
    *said, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("rewurst fit: error: ")
    assert message.format(workspace=workspace) in line
    assert not [earlier for earlier in said if re.search("error|usage|Traceback", earlier, re.IGNORECASE)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "no command 'fitt'; did you mean 'fit'?"),
        (["prepare", "texts", "a"], "no command 'texts'; did you mean 'text'?"),
        (
            ["prepare", "everything"],
            "no command 'everything'; there are tokenizer, text, images, latents, index, verify",
        ),
        (["prepare", "text", "a", "--tokeniser", "b", "--out", "c"], "--tokenizer"),
        (["prepare", "text", "builtin:pros", "--tokenizer", "b", "--out", "c"], "builtin:prose"),
        (["prepare", "verify", "nowhere"], "no corpus at nowhere"),
        (
            ["export", "hf", "nowhere.ckpt", "out"],
            "nowhere.ckpt is not a file: give a .safetensors, .pt or .ckpt file with weights",
        ),
        (["generate", "text", "./nowhere", "a"], "model folder ./nowhere does not exist"),
    ],
)
def test_wrong_use_of_the_tools(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"rewurst {arguments[0]}: error: ")
    assert message in error
    assert "\n" not in error


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys; from rewurst.train import main; status = main(['--help']); "
        "assert status == 0 and not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "prepare text" in result.stdout
    assert main(["--version"]) == 0


def test_both_programs_are_the_same() -> None:
    installed = shutil.which("rewurst", path=str(Path(sys.executable).parent))
    assert installed is not None
    commands = ([installed], [sys.executable, str(ROOT / "train.py")])
    said = [subprocess.run([*c, "generate", "text"], capture_output=True, text=True, check=False) for c in commands]
    assert said[0].returncode == said[1].returncode == 2
    assert said[0].stderr == said[1].stderr != ""


COMMANDS = [[group, name] if name else [group] for group, tools in TOOLS.items() for name in tools]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for command in [*COMMANDS, ["schedule"], ["plan"], ["fit"], ["validate"], ["test"], ["predict"]]:
        assert re.search(rf"^  (.*\| )?{' '.join(command)}( |$)", listed, re.M), command
    for group in ("prepare", "export", "generate", "reproduce"):
        assert main([group, "--help"]) == 0
        listed = capsys.readouterr().out
        assert all(f"  {group} {name} " in listed for name in TOOLS[group])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_option_has_a_help_text_that_stands_alone(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert not re.search("``|:class:|:func:", capsys.readouterr().out)
    tool = TOOLS[command[0]][command[1] if command[1:] else ""]
    module, _, name = tool.function.partition(":")
    parser = parser_of(getattr(import_module(f"rewurst.{module}"), name), "rewurst", tool.positional)
    for action in parser._actions[1:]:
        first = (action.help or "").partition(" ")[0]
        assert first[:1].isupper(), f"{command} {action.dest}: {action.help!r}"
        assert first.lower() not in {"of", "by", "that", "which", "whose", "what", "who", "to"}, action.help


def test_help_and_wrong_use_of_tools_import_nothing_heavy() -> None:
    code = (
        "import sys; from rewurst.train import main\n"
        "for line in ('--help', 'prepare --help', 'prepare text --hlep', 'prepare txt'): main(line.split())\n"
        "print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "no command 'txt'; did you mean 'text'?" in result.stderr
