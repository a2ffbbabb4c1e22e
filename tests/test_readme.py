"""README's three stories run as printed, on little data and with small models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from documentation import ROOT, run_blocks, write_small_recipes
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",
    "ignore:.*in eval mode at the start",
    "ignore:.*dataloader is not resumable",
    "ignore:.*exists and is not empty",
    "ignore:.*callbacks used to create the checkpoint.*",
    "ignore:.*does not have many workers.*",
)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def story(title: str) -> str:
    """Return the text below a third-level heading of README."""
    sections = (ROOT / "README.md").read_text(encoding="utf8").split("\n### ")[1:]
    [text] = [section.split("\n## ")[0] for section in sections if section.startswith(f"{title}\n")]
    return text


def test_continue_a_hugging_face_model_on_your_own_text() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from rewurst.preparation.tokenizer import train_tokenizer

    for name, words in (("new", "def function(argument): return"), ("old", "the value of a name is")):
        Path(name).mkdir()
        lines = (json.dumps({"text": f"{words} {i} {i * i}"}) + "\n" for i in range(300))
        (Path(name) / "text.jsonl").write_text("".join(lines))
    train_tokenizer(["new", "old"], 300, Path("hub"))
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gpt_neox", intermediate_size=32, max_position_embeddings=16, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained("hub")
    changes = [
        ("EleutherAI/pythia-70m", "hub"),
        ("--out data", "--sequence_length 16 --out data"),
        ("sequence_length: 2048", "sequence_length: 16"),
        ("max_steps: 1000", "accelerator: cpu\n  max_steps: 4"),
        ("length: 1000", "length: 4"),
        ("val_check_interval: 800", "val_check_interval: 16"),
        ("log_every_n_steps: 10", "log_every_n_steps: 1"),
        ("every_n_train_steps: 100", "every_n_train_steps: 2"),
        ('upon a time"', 'upon" --max_new_tokens 3'),
    ]
    run_blocks(story("Continue a Hugging Face model on your own text"), changes)
    results = json.loads(Path("runs/evaluate/mine/results.json").read_text())
    assert results["corpora"].keys() == {"new/val", "old/val"}
    [run] = Path("runs/mine").glob("version_*")
    logged = EventAccumulator(str(run)).Reload().Tags()["scalars"]
    assert {"forgetting/old", "adaptation/new", "replay/share_read"} <= set(logged)


def test_rewarm_your_own_lightning_project(caplog: pytest.LogCaptureFixture) -> None:
    run_blocks(story("Re-warm your own Lightning project"), [("Trainer(max", 'Trainer(accelerator="cpu", max')])
    assert Path("old.ckpt").is_file()
    assert "dataset 'new data' begins at step 50" in caplog.text


def test_train_wuerstchen_on_your_own_pictures() -> None:
    Path("pictures").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(256, size=(24, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).resize((128, 128)).save(f"pictures/{index}.png")
        Path(f"pictures/{index}.txt").write_text(f"a picture of heart number {index}")
    write_small_recipes("emoji")
    changes = [
        ("--held_out 0.05", "--held_out 0.25"),
        ("--vocab_size 2000", "--vocab_size 300"),
        ("--prior_steps 25", "--prior_steps 2 --steps 2"),
    ]
    run_blocks(story("Train Würstchen on your own pictures"), changes)
    with Image.open("heart.png") as picture:
        assert picture.size == (128, 128)
