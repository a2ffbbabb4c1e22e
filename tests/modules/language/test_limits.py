"""Limits of a model's vocabulary and positions compared with the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rewurst import UsageError
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.modules import CausalLM
from rewurst.modules.language.building import rebuild
from rewurst.modules.language.limits import extend_vocabulary, require_positions_for, require_vocabulary

LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 32}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "gpt_neox": {**LLAMA, "model_type": "gpt_neox"},
    "gpt2": {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "gptj (bias)": {"model_type": "gptj", "vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
    "gemma2": {**LLAMA, "model_type": "gemma2", "head_dim": 8, "num_key_value_heads": 2},
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 2, "num_key_value_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("extend", "size"), [(True, 70), (16, 80)])
def test_new_tokens_are_the_mean_of_the_old(kind: str, extend: bool | int, size: int) -> None:
    torch.manual_seed(0)
    model: Any = CausalLM(KINDS[kind]).model.eval()
    ids = torch.randint(64, (2, 9))
    before = model(ids).logits
    embeddings, head = (part.weight.detach().clone() for part in (model.get_input_embeddings(), model.lm_head))
    require_vocabulary(model, 70, extend)
    after = model(ids).logits
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :64], before)
    for part, old in ((model.get_input_embeddings(), embeddings), (model.get_output_embeddings(), head)):
        torch.testing.assert_close(part.weight[:64], old)
        torch.testing.assert_close(part.weight[64:], old.mean(0).expand(size - 64, -1))
    tied = before.numel() and torch.equal(embeddings, head)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    rebuilt = rebuild(model.config.to_dict())
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


def test_a_sufficient_vocabulary_stays() -> None:
    model: Any = CausalLM(LLAMA).model
    weight = model.get_input_embeddings().weight
    require_vocabulary(model, 64, 128)
    assert model.get_input_embeddings().weight is weight
    with pytest.raises(
        UsageError, match="the tokenizer has 65 tokens and the model's vocab_size is 64: add extend_voc"
    ):
        require_vocabulary(model, 65, False)
    with pytest.raises(UsageError, match="extend_vocabulary -1 must be true"):
        CausalLM(LLAMA, extend_vocabulary=-1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*exists and is not empty")
def test_an_extended_model_trains_and_resumes(write_corpus: Callable[..., str], tmp_path: Path) -> None:
    folder = write_corpus("prose", vocab_size=100)

    def run(steps: int, ckpt: Path | None = None) -> CausalLM:
        torch.manual_seed(0)
        module = CausalLM(LLAMA, extend_vocabulary=32)
        data = TextDataModule("prose", {"prose": Corpus(folder)}, {}, 8, 2, 4)
        saved = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, callbacks=[saved],
                          enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)  # fmt: skip
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
        return module

    whole = run(4)
    assert whole.model.get_input_embeddings().weight.shape == (128, 16)  # type: ignore[operator]
    resumed = run(4, tmp_path / "saved" / "step=2.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("config", "table"),
    [
        (KINDS["gpt2"], True),
        ({"model_type": "opt", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32}, True),
        ({**KINDS["gptj (bias)"], "n_positions": 32}, True),
        ({"model_type": "gpt_bigcode", "vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
         True),
        (LLAMA, False),
        ({**LLAMA, "max_position_embeddings": 16}, False),  # as many positions as channels
        (KINDS["gpt_neox"], False),
    ],
)  # fmt: skip
def test_rows_longer_than_the_positions(config: dict[str, Any], table: bool) -> None:
    model: Any = CausalLM(config).model
    positions = model.config.max_position_embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_positions_for(model, positions)
    model(torch.zeros(1, positions, dtype=torch.long))
    if table:
        with pytest.raises(UsageError, match=rf"sequence_length is {positions + 1}, \w+ has {positions} positions"):
            require_positions_for(model, positions + 1)
        return
    with pytest.warns(UserWarning, match=r"set rope_parameters \(rope_type linear, dynamic or yarn, and factor 2\)"):
        require_positions_for(model, 2 * positions)
    model(torch.zeros(1, 2 * positions, dtype=torch.long))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_it_is_noticed_when_training_begins(write_corpus: Callable[..., str]) -> None:
    data = TextDataModule("prose", {"prose": Corpus(write_corpus("prose"))}, {}, 8, 2, 4)
    trainer = Trainer(accelerator="cpu", max_steps=1, max_epochs=-1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)  # fmt: skip
    with pytest.raises(UsageError, match="sequence_length is 8, GPT2LMHeadModel has 4 positions"):
        trainer.fit(CausalLM({**KINDS["gpt2"], "n_positions": 4}), data)


def test_a_model_that_cannot_be_extended_says_so() -> None:
    model: Any = CausalLM(LLAMA).model
    model.resize_token_embeddings = lambda *_, **__: None
    with pytest.raises(UsageError, match="extend_vocabulary: LlamaForCausalLM cannot be given new tokens"):
        extend_vocabulary(model, 70)
