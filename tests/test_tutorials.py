"""The tutorials' commands, files and Python, one after another, on little data and few steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from rewurst.train import main

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r'^```(bash|yaml|python)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
Changes = list[tuple[str, str]]

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",
    "ignore:.*in eval mode at the start",
    "ignore:.*dataloader is not resumable",
    "ignore:.*exists and is not empty",
    "ignore:.*callbacks used to create the checkpoint.*",
)


def run(tutorial: str, changes: Changes) -> list[str]:
    """Does what a tutorial says in the working directory, and returns the commands that were run."""
    text = (ROOT / "docs" / "tutorials" / tutorial).read_text(encoding="utf8")
    for what, small in changes:
        assert what in text, f"{what!r} is to be made small and is not there"
        text = text.replace(what, small)
    commands = []
    for language, title, body in BLOCK.findall(text):
        if language == "yaml":
            assert title, "a config in a tutorial says which file it is"
            yaml.safe_load(body)
            Path(title).write_text(body, encoding="utf8")
        elif language == "python":
            exec(compile(body, tutorial, "exec"), {"__name__": "tutorial"})
        else:
            for line in body.splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "rewurst"
                assert main(arguments) == 0, line
                commands.append(line)
    return commands


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_continual(tmp_path: Path) -> None:
    for name, words in (("prose", "the value of a name is"), ("code", "def function(argument): return")):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{words} {i} {i * i}"}) + "\n" for i in range(300))
        )
    changes = [
        ("builtin:prose builtin:code", "prose.jsonl code.jsonl"),
        ("prepare text builtin:prose", "prepare text prose.jsonl"),
        ("prepare text builtin:code", "prepare text code.jsonl"),
        ("--vocab_size 2048", "--vocab_size 300"),
        ("--sequence_length 128", "--sequence_length 16"),
        ("sequence_length: 128", "sequence_length: 16"),
        ("hidden_size: 128", "hidden_size: 16"),
        ("num_hidden_layers: 4", "num_hidden_layers: 1"),
        ("intermediate_size: 512", "intermediate_size: 32"),
        ("max_steps: 400", "max_steps: 4"),
        ("max_steps: 800", "max_steps: 8"),
        ("length: 400", "length: 4"),
        ("val_check_interval: 100", "val_check_interval: 2"),
        ("every_n_train_steps: 100", "every_n_train_steps: 2"),
        ("log_every_n_steps: 10", "log_every_n_steps: 1"),
        ("--max_new_tokens 40", "--max_new_tokens 3"),
    ]
    commands = run("continual.md", changes)
    assert sum(command.startswith("rewurst fit") for command in commands) == 3
    assert Path("lr.png").is_file()
    for name in ("code", "replay"):
        assert json.loads(Path(f"runs/evaluate/{name}/results.json").read_text())["corpora"].keys() == {
            "prose/val",
            "code/val",
        }


def small_recipe(stage: str) -> str:
    """A recipe of drawn shapes with few steps, samples and channels."""
    content = yaml.safe_load((ROOT / "configs" / "wuerstchen" / "shapes" / f"{stage}.yaml").read_text(encoding="utf8"))
    content["model"]["init_args"] |= {
        "stage_a": {"vqgan": {"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 16}},
        "stage_b": {"sampling_steps": 2},
        "stage_c": {"sampling_steps": 2, "stage_b_steps": 2},
    }[stage]
    content["data"]["init_args"] |= {"micro_batch_size": 4, "global_batch_size": 4}
    content["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1, "log_every_n_steps": 1}
    arguments = {callback["class_path"]: callback.get("init_args") for callback in content["trainer"]["callbacks"]}
    arguments["LogSamples"]["samples"] = 1
    return yaml.safe_dump(content)


def test_wuerstchen() -> None:
    recipes = Path("configs/wuerstchen/shapes")
    recipes.mkdir(parents=True)
    for stage in ("stage_a", "stage_b", "stage_c"):
        (recipes / f"{stage}.yaml").write_text(small_recipe(stage))
    changes = [
        ("builtin:shapes --out", "builtin:shapes --pictures 1 --out"),
        ("--prior_steps 25", "--prior_steps 2 --steps 2"),
        ("--images data/shapes/val --image_size 64", "--images data/shapes/val --image_size 64 --steps 2 --limit 2"),
        ("prior_num_inference_steps=25", "prior_num_inference_steps=2, num_inference_steps=2"),
    ]
    commands = run("wuerstchen.md", changes)
    assert sum(command.startswith("rewurst fit") for command in commands) == 3
    assert all(Path(name).is_file() for name in ("circle.png", "drawn-0.png", "drawn-1.png"))
