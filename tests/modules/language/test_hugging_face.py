"""An exported folder loads in transformers and gives the loss of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from rewurst import UsageError
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.modules import CausalLM
from rewurst.modules.language.generation import generate_text
from rewurst.modules.language.hugging_face import export_hugging_face
from rewurst.preparation.text import prepare_text, train_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train a tiny model on real text; return its checkpoint and its validation loss."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "a.txt"
    text.write_text("\n".join(f"line {number} of some text, {number * number} words long" for number in range(400)))
    train_tokenizer([str(text)], 300, folder / "tokenizer", progress=False)
    prepare_text([str(text)], str(folder / "tokenizer"), folder / "data", sequence_length=16, progress=False)
    path = str(folder / "data" / "train")
    data = TextDataModule("text", {"text": Corpus(path)}, {"text": path}, 16, 8, 8)
    config = {
        "model_type": "gpt_neox",
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu", max_steps=20, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, val_check_interval=20, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(CausalLM(config), data)
    trainer.save_checkpoint(folder / "a.ckpt")
    loss = float(trainer.callback_metrics["val/loss/text"])
    return {"folder": folder, "checkpoint": folder / "a.ckpt", "data": data, "loss": loss, "text": text.read_text()}


def test_the_folder_gives_the_loss_of_the_checkpoint(trained: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_hugging_face(trained["checkpoint"], tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in trained["data"].val_dataloader()["text"]:
            rows = batch["input_ids"][batch["valid"]].long()
            total += float(model(input_ids=rows, labels=rows).loss) * rows[:, 1:].numel()
            tokens += rows[:, 1:].numel()
    assert total / tokens == pytest.approx(trained["loss"], abs=1e-5)
    assert tokenizer.decode(tokenizer(trained["text"])["input_ids"]) == trained["text"]
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_generated_text_continues_the_prompt(trained: dict[str, Any], tmp_path: Path) -> None:
    export_hugging_face(trained["checkpoint"], tmp_path / "hf")
    hf = str(tmp_path / "hf")
    state = torch.random.get_rng_state()
    first = generate_text(hf, "line 7", max_new_tokens=12)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.startswith("line 7")
    assert len(first) > len("line 7")
    assert generate_text(hf, "line 7", max_new_tokens=12) == first
    assert generate_text(hf, "line 7", max_new_tokens=12, seed=1) != first
    assert generate_text(hf, "", max_new_tokens=3, temperature=0) == generate_text(
        hf, "", max_new_tokens=3, temperature=0, seed=5
    )
    with pytest.raises(UsageError, match=r"top_p 1.5 must be in \(0, 1\]"):
        generate_text(hf, "a", top_p=1.5)


def test_what_cannot_be_exported(trained: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "hf"
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UsageError, match="holds no causal language model"):
        export_hugging_face(tmp_path / "other.ckpt", out)
    content = torch.load(trained["checkpoint"], weights_only=True)
    content["TextDataModule"]["tokenizer"] = "/gone"
    torch.save(content, tmp_path / "moved.ckpt")
    with pytest.raises(UsageError, match="is no longer at /gone: name its folder with --tokenizer"):
        export_hugging_face(tmp_path / "moved.ckpt", out)
    export_hugging_face(tmp_path / "moved.ckpt", out, tokenizer=trained["folder"] / "tokenizer")
    with pytest.raises(UsageError, match="exists already"):
        export_hugging_face(trained["checkpoint"], out)
    export_hugging_face(trained["checkpoint"], out, overwrite=True)
    (tmp_path / "precious").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export_hugging_face(trained["checkpoint"], tmp_path / "precious", overwrite=True)
