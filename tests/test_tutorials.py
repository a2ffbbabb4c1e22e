"""The tutorials' commands, files and Python run one after another, on little data and for few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from documentation import ROOT, Changes, run_blocks, write_small_recipes

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",
    "ignore:.*in eval mode at the start",
    "ignore:.*dataloader is not resumable",
    "ignore:.*exists and is not empty",
    "ignore:.*callbacks used to create the checkpoint.*",
)


def run(tutorial: str, changes: Changes) -> list[str]:
    """Run a tutorial in the working directory and return its commands."""
    return run_blocks((ROOT / "docs" / "tutorials" / tutorial).read_text(encoding="utf8"), changes)


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


def test_wuerstchen() -> None:
    write_small_recipes("shapes")
    changes = [
        ("builtin:shapes --out", "builtin:shapes --pictures 1 --out"),
        ("--prior_steps 25", "--prior_steps 2 --steps 2"),
        ("--images data/shapes/val --image_size 64", "--images data/shapes/val --image_size 64 --steps 2 --limit 2"),
        ("prior_num_inference_steps=25", "prior_num_inference_steps=2, num_inference_steps=2"),
    ]
    commands = run("wuerstchen.md", changes)
    assert sum(command.startswith("rewurst fit") for command in commands) == 3
    assert all(Path(name).is_file() for name in ("circle.png", "drawn-0.png", "drawn-1.png"))
