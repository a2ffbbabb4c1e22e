"""Documents that begin with a prompt: its tokens are read, and not predicted, wherever rows go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import tokenizer_folder
from lightning.pytorch import Trainer

from rewurst import UsageError
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.evaluation.text import evaluate_corpora
from rewurst.modules import CausalLM
from rewurst.preparation.index import index_shards
from rewurst.preparation.text import prepare_text
from rewurst.preparation.verify import verify

DOCUMENTS = [{"prompt": f"Q{number}? ", "text": f"answer {number * number}."} for number in range(60)]
CONFIG = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32,
          "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
          "eos_token_id": 0}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return tokenizer_folder(tmp_path / "tokenizer", "<|endoftext|>", "<s>")


def prepare(tmp_path: Path, tokenizer: Path, name: str = "out", suffix: str = ".jsonl", **options: Any) -> TokenShards:
    lines = [json.dumps(document) for document in DOCUMENTS]
    source = tmp_path / f"documents{suffix}"
    source.write_text("\n".join(lines) + "\n" if suffix == ".jsonl" else f"[{','.join(lines)}]")
    out = tmp_path / name
    prepare_text([str(source)], str(tokenizer), out, sequence_length=8, progress=False, **options)
    return TokenShards(out / "train")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_masks_leave_out_the_prompts(tmp_path: Path, tokenizer: Path, suffix: str) -> None:
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    shards = prepare(tmp_path, tokenizer, suffix=suffix, prompt_field="prompt")
    tokens, predicted = [], []
    for document in DOCUMENTS:
        prompt, text = (words(document[field], add_special_tokens=False)["input_ids"] for field in ("prompt", "text"))
        tokens += [1, *prompt, *text, 0]
        predicted += [True, *[False] * len(prompt), *[True] * (len(text) + 1)]
    rows = np.arange(len(shards))
    for found, expected in ((shards.read(rows), tokens), (shards.read_masks(rows), predicted)):
        stream = [found[0, 0], *found[:, 1:].flatten()]
        assert stream == expected[: len(stream)]
        assert len(stream) > len(expected) - 9
        assert (found[1:, 0] == found[:-1, -1]).all()
    assert verify(tmp_path / "out") == []
    assert shards.index.dtype == "uint16"


def test_documents_without_prompts_have_no_masks(tmp_path: Path, tokenizer: Path) -> None:
    shards = prepare(tmp_path, tokenizer)
    assert not shards.index.masks
    assert "masks" not in json.loads((tmp_path / "out" / "train" / "index.json").read_text())
    assert shards.read_masks(np.arange(3)).all()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves them open
def test_webdataset_reads_both_members(tmp_path: Path, tokenizer: Path) -> None:
    import webdataset

    shards = prepare(tmp_path, tokenizer, prompt_field="prompt")
    [tar] = (tmp_path / "out" / "train").glob("*.tar")
    sample, *_ = webdataset.WebDataset(str(tar), shardshuffle=False).decode()
    assert (sample["npy"] == shards.read(np.arange(len(sample["npy"])))).all()
    assert (sample["mask.npy"] == shards.read_masks(np.arange(len(sample["npy"])))).all()


def test_foreign_shards_with_masks_are_indexed(tmp_path: Path, tokenizer: Path) -> None:
    shards = prepare(tmp_path, tokenizer, prompt_field="prompt")
    [tar] = (tmp_path / "out" / "train").glob("*.tar")
    index_shards([str(tar)], tmp_path / "index", kind="text", progress=False)
    again = TokenShards(tmp_path / "index")
    rows = np.arange(len(shards))
    assert again.index.masks
    assert (again.read_masks(rows) == shards.read_masks(rows)).all()
    assert (again.read(rows) == shards.read(rows)).all()


def test_a_mixture_trains_and_validates_on_what_is_to_be_predicted(tmp_path: Path, tokenizer: Path) -> None:
    masked = prepare(tmp_path, tokenizer, prompt_field="prompt")
    plain = prepare(tmp_path, tokenizer, "plain")
    corpora = {"masked": Corpus(masked.path), "plain": Corpus(plain.path)}
    data = TextDataModule("a", corpora, {"masked": masked.path}, 8, 4, 4)
    seen: list[dict[str, Any]] = []

    class Kept(CausalLM):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module = Kept(CONFIG)
    trainer = Trainer(accelerator="cpu", max_steps=3, max_epochs=-1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, val_check_interval=3,
                      check_val_every_n_epoch=None, num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(module, data)
    for batch in seen:
        for corpus, row, mask in zip(batch["corpus"], batch["row"], batch["mask"], strict=True):
            expected = (masked if corpus == 0 else plain).read_masks(np.array([row]))[0]
            assert (mask.numpy() == expected).all()
    rows = np.arange(len(masked))
    ids, mask = torch.from_numpy(masked.read(rows).astype(np.int64)), torch.from_numpy(masked.read_masks(rows))
    with torch.no_grad():
        losses = module.token_losses(ids)
        expected = (losses * mask[:, 1:]).sum() / mask[:, 1:].sum()
        torch.testing.assert_close(module.loss(ids, mask), expected)
        torch.testing.assert_close(module.token_losses(ids, mask), losses * mask[:, 1:])
    assert float(trainer.callback_metrics["val/loss/masked"]) == pytest.approx(expected.item(), rel=1e-5)
    module.model.save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    found = evaluate_corpora(str(tmp_path / "hf"), {"masked": masked.path})["masked"]
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["tokens"] == int(mask[:, 1:].sum())


def test_what_is_masked_has_no_gradient(tokenizer: Path) -> None:
    module = CausalLM(CONFIG)
    ids = torch.randint(300, (2, 9))
    module.loss(ids, torch.zeros(2, 9, dtype=torch.bool)).backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in module.parameters())


def test_refusals(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match=r"a.txt: only .jsonl and .json files can have a prompt_field"):
        prepare_text([str(tmp_path / "a.txt")], str(tokenizer), tmp_path / "b", progress=False, prompt_field="prompt",
                     document_separator="blank-line")  # fmt: skip
    prepare(tmp_path, tokenizer, prompt_field="prompt")
    path = tmp_path / "out" / "train" / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "masks": 1}))
    with pytest.raises(UsageError, match="masks is 1, expected true or false"):
        TokenShards(path.parent)
