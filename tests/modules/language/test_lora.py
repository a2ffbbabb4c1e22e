"""Adapters are trained, saved, resumed, merged, and loaded by peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import tokenizer_folder
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks

from rewurst import UsageError
from rewurst.callbacks import LRRewarming, ReplayScheduler, WarmupCosine
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.modules import CausalLM
from rewurst.modules.language.building import build
from rewurst.modules.language.hugging_face import export_hugging_face
from rewurst.modules.networks.weight_files import read_file

CONFIG = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
          "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
          "eos_token_id": 0}  # fmt: skip
WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*exists and is not empty",
                                        "ignore:.is_gradient_checkpointing. is deprecated")  # fmt: skip


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    torch.manual_seed(0)
    build({**CONFIG, "tie_word_embeddings": request.param}).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    return str(tmp_path / "base")


def fit(module: CausalLM, corpora: dict[str, str], folder: Path, steps: int, ckpt: Path | None = None) -> Trainer:
    data = TextDataModule("code", {"code": Corpus(corpora["code"]), "prose": Corpus(corpora["prose"], replay=True)},
                          {}, 8, 2, 4)  # fmt: skip
    callbacks = [ReplayScheduler(share=0.25), LRRewarming(WarmupCosine(1e-2, 1e-3), 4),
                 ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)]  # fmt: skip
    trainer = Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, callbacks=callbacks,
                      enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    return trainer


@pytest.fixture
def corpora(write_corpus: Callable[..., str]) -> dict[str, str]:
    return {name: write_corpus(name, seed=seed) for seed, name in enumerate(("code", "prose"))}


@pytest.mark.parametrize("whole", [{}, WHOLE], ids=["adapters", "embeddings too"])
def test_only_adapters_are_trained_saved_and_resumed(
    base: str, corpora: dict[str, str], tmp_path: Path, whole: dict[str, Any]
) -> None:
    settings = {"r": 4, "lora_alpha": 8, **whole}

    def module() -> CausalLM:
        torch.manual_seed(1)
        return CausalLM(base, lora=settings)

    trained = module()
    before = {name: tensor.clone() for name, tensor in trained.named_parameters()}
    fit(trained, corpora, tmp_path / "saved", 4)
    for name, tensor in trained.named_parameters():
        learns = "lora_" in name or bool(whole and ("embed_tokens" in name or "lm_head" in name))
        assert tensor.requires_grad == learns
        assert torch.equal(tensor, before[name]) != learns, name
    content = torch.load(tmp_path / "saved" / "step=2.ckpt", weights_only=True)
    assert all("lora_" in name or whole for name in content["state_dict"])
    assert not any("layers" in name and "lora_" not in name for name in content["state_dict"])
    resumed = module()
    fit(resumed, corpora, tmp_path / "saved", 4, tmp_path / "saved" / "step=2.ckpt")
    for a, b in zip(trained.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("whole", [{}, WHOLE], ids=["adapters", "embeddings too"])
def test_exports_give_the_trained_logits(
    base: str, corpora: dict[str, str], tmp_path: Path, whole: dict[str, Any]
) -> None:
    from peft import PeftModel

    words = tokenizer_folder(tmp_path / "words", "<|endoftext|>", None)
    module = CausalLM(base, lora={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **whole})
    fit(module, corpora, tmp_path / "saved", 2)
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        expected = module.model.eval()(ids).logits
        assert not torch.allclose(expected, build(base).eval()(ids).logits, atol=1e-4)
        checkpoint = tmp_path / "saved" / "step=2.ckpt"
        export_hugging_face(checkpoint, tmp_path / "merged", words)
        torch.testing.assert_close(build(str(tmp_path / "merged")).eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)
        export_hugging_face(checkpoint, tmp_path / "adapter", words, adapter=True)
        adapted = PeftModel.from_pretrained(build(base), str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-5, atol=1e-6)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


def test_the_weights_of_init_from_are_the_base(base: str, tmp_path: Path) -> None:
    words = tokenizer_folder(tmp_path / "words", "<|endoftext|>", None)
    config = {**CONFIG, "tie_word_embeddings": build(base).config.tie_word_embeddings}  # type: ignore[union-attr]
    module = CausalLM(config, init_from=base, lora={"r": 2})
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    export_hugging_face(tmp_path / "a.ckpt", tmp_path / "hf", words)
    ids = torch.randint(64, (2, 9))
    assert torch.equal(build(str(tmp_path / "hf")).eval()(ids).logits, build(base).eval()(ids).logits)


def test_a_model_without_files_is_saved_whole(tmp_path: Path) -> None:
    module = CausalLM(CONFIG, lora={"r": 2})
    assert any("base_layer" in name for name in module.state_dict())
    words = tokenizer_folder(tmp_path / "words", "<|endoftext|>", None)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    export_hugging_face(tmp_path / "a.ckpt", tmp_path / "hf", words)
    ids = torch.randint(64, (2, 9))
    expected = module.model.eval()(ids).logits
    torch.testing.assert_close(build(str(tmp_path / "hf")).eval()(ids).logits, expected)
    with pytest.raises(UsageError, match="belong to a model that was never saved: export it merged"):
        export_hugging_face(tmp_path / "a.ckpt", tmp_path / "adapter", words, adapter=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4}, "lora: 'rank' is not a setting of peft's LoraConfig"),
        ({"target_modules": ["q_porj"]}, "lora: "),
        ({"r": 0}, "lora: "),
        ({"modules_to_save": ["embed_token"]}, "lora: modules_to_save 'embed_token' matches nothing in LlamaForCausalLM"
                                               "; did you mean 'embed_tokens'?"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        CausalLM(CONFIG, lora=settings)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_new_tokens_need_trained_embeddings(write_corpus: Callable[..., str], tmp_path: Path) -> None:
    large = {
        name: write_corpus(f"{name} large", vocab_size=80, seed=seed) for seed, name in enumerate(("code", "prose"))
    }
    with pytest.raises(UsageError, match="extend_vocabulary with lora: new rows would stay as they are"):
        fit(CausalLM(CONFIG, lora={"r": 2}, extend_vocabulary=True), large, tmp_path / "a", 2)
    build(CONFIG).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    module = CausalLM(str(tmp_path / "base"), lora={"r": 2, **WHOLE}, extend_vocabulary=True)
    fit(module, large, tmp_path / "b", 2)
    words = tokenizer_folder(tmp_path / "words", "<|endoftext|>", None)
    export_hugging_face(tmp_path / "b" / "step=2.ckpt", tmp_path / "hf", words)
    ids = torch.randint(80, (2, 9))
    expected = module.model.eval()(ids).logits
    torch.testing.assert_close(build(str(tmp_path / "hf")).eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_frozen_weights_cost_two_thirds() -> None:
    batch = {"input_ids": torch.zeros(2, 9, dtype=torch.long)}
    whole, adapted = CausalLM(CONFIG), CausalLM(CONFIG, lora={"r": 4})
    matrices = 2 * (4 * 16 * 16 + 3 * 16 * 32) + 64 * 16
    adapters = 2 * (4 * 4 * 32 + 3 * 4 * 48)
    attention = 12 * 2 * 16 * 8
    assert whole.flops(batch) == 2 * 8 * (6 * matrices + attention)
    assert adapted.flops(batch) == pytest.approx(2 * 8 * (4 * matrices + 6 * adapters + attention), rel=1e-3)


RANKS = """
import os, sys, json, warnings
warnings.filterwarnings("ignore")
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rewurst.callbacks import FSDP
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.modules import CausalLM

base, corpus, folder, kind = sys.argv[1:]
torch.set_num_threads(1)
for steps, resume in ((2, None), (3, f"{folder}/{kind}/step=2.ckpt")):
    torch.manual_seed(1)
    module = CausalLM(base, lora={"r": 4, "modules_to_save": ["embed_tokens"]})
    data = TextDataModule("code", {"code": Corpus(corpus)}, {}, 8, 2, 4)
    saved = ModelCheckpoint(f"{folder}/{kind}", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    strategy = {"one": "auto", "ddp": "ddp", "fsdp": FSDP()}[kind]
    devices = 1 if kind == "one" else 2
    trainer = Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, max_epochs=-1,
                      logger=False, callbacks=[saved], enable_progress_bar=False, enable_model_summary=False,
                      limit_val_batches=0)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
print("done", flush=True)
if devices > 1:
    torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_train_the_same_adapters(write_corpus: Callable[..., str], tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    build(CONFIG).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    (tmp_path / "script.py").write_text(RANKS)
    corpus = write_corpus("code")
    for each, processes in (("one", 1), (kind, 2)):
        run_ranks(tmp_path / "script.py", str(tmp_path / "base"), corpus, str(tmp_path), each, processes=processes)
    whole, parts = (read_file(tmp_path / each / "step=3.ckpt")["state_dict"] for each in ("one", kind))
    assert whole.keys() == parts.keys()
    assert all("lora_" in name or "embed_tokens" in name for name in parts)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-6)
    words = tokenizer_folder(tmp_path / "words", "<|endoftext|>", None)
    export_hugging_face(tmp_path / kind / "step=3.ckpt", tmp_path / "hf", words)
