"""The tutorial on continuing a hub model on one's own text, with a small model and little text."""

from __future__ import annotations

from pathlib import Path

import pytest
from documentation import ROOT, run_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rewurst.preparation.tokenizer import train_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*in eval mode at the start", "ignore:.*smaller than the logging interval"
)


def test_your_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWURST_CORPORA_DIR", str(tmp_path / "cache"))
    for folder in ("my_texts", "old_texts"):
        Path(folder).mkdir()
        for i in range(20):
            Path(f"{folder}/{i}.txt").write_text(" ".join(f"{folder} {i * k} said once" for k in range(40)))
    train_tokenizer(["my_texts"], 300, Path("tokenizer"), progress=False)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("small_model")
    AutoTokenizer.from_pretrained("tokenizer").save_pretrained("small_model")
    changes = [
        (
            "--model.init_args.model EleutherAI/pythia-70m",
            "--model.init_args.model small_model --trainer.accelerator cpu",
        ),
        (
            "--data.init_args.source my_texts\n",
            "--data.init_args.source my_texts --data.init_args.replay_source old_texts\n",
        ),
        ("--max_new_tokens 40", "--max_new_tokens 3"),
    ]
    page = (ROOT / "docs/tutorials/your_text.md").read_text(encoding="utf8")
    commands = run_blocks(page, changes)
    assert sum(command.startswith("rewurst fit") for command in commands) == 2
    assert Path("runs/again/version_0/config.yaml").is_file()
    AutoModelForCausalLM.from_pretrained("runs/your_text/model")
