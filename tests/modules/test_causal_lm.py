"""CausalLM gives transformers' losses, and logs, counts, saves and refuses the right things."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from language_runs import LLAMA
from lightning.pytorch.callbacks import ModelCheckpoint
from stage_runs import logged_trainer as trainer
from torch import Tensor

from rewurst import UsageError
from rewurst.callbacks import LRRewarming, WarmupCosine
from rewurst.datamodules import TextDataModule
from rewurst.modules import CausalLM


class TestDocumentMasks:
    """Rows of several documents compared with each document alone."""

    CONFIGS: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt_neox": {},
        "llama": LLAMA,
        "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
        "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 3},
    }

    @pytest.mark.parametrize("architecture", CONFIGS)
    def test_losses_and_gradients_equal_those_of_single_documents(
        self, tiny_config: dict[str, Any], architecture: str
    ) -> None:
        torch.manual_seed(0)
        config = {**tiny_config, **self.CONFIGS[architecture], "vocab_size": 64, "eos_token_id": 0}
        if architecture == "gpt2":
            config = {"vocab_size": 64, "eos_token_id": 0, **self.CONFIGS["gpt2"], "resid_pdrop": 0.0,
                      "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
        module = CausalLM(config, document_masks=True).double()
        rows = [[[5, 9, 3, 0], [0], [7, 0], [8, 2, 6, 1, 4]], [[1, 2, 3, 4, 5, 6, 7, 8, 9, 0], [3, 3]],
                [list(range(1, 13))]]  # fmt: skip
        together = module.token_losses(torch.tensor([[*itertools.chain(*row)] for row in rows]))
        together.sum().backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

        module.zero_grad()
        module.document_masks = False
        for row, losses in zip(rows, together, strict=True):
            apart = []
            for document in row:
                own = module.token_losses(torch.tensor([document]))[0] if len(document) > 1 else torch.zeros(0)
                own.sum().backward() if own.numel() else None
                apart += [own.detach().double(), torch.zeros(1).double()]
            torch.testing.assert_close(losses, torch.cat(apart[:-1]), rtol=1e-9, atol=1e-11)
        assert len(gradients) > 10
        for name, parameter in module.named_parameters():
            if name in gradients:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-11)

    def test_the_mean_is_over_predicted_tokens(self, tiny_config: dict[str, Any]) -> None:
        module = CausalLM({**tiny_config, "eos_token_id": 0}, document_masks=True)
        ids = torch.tensor([[5, 9, 0, 7, 0, 3]])
        torch.testing.assert_close(module.loss(ids), module.token_losses(ids).sum() / 3)

    def test_training_and_validation_take_the_end_token_of_the_data(
        self, tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        module, loaded = CausalLM({**tiny_config, "eos_token_id": 63}, document_masks=True), data()
        run = trainer(tmp_path, max_steps=2, val_check_interval=4)
        run.fit(module, loaded)
        assert module.end_token == 0
        rows = torch.cat([batch["input_ids"] for batch in loaded.val_dataloader()["prose"]])[:23]
        losses = module.token_losses(rows)
        expected = losses.sum() / (rows[:, :-1] != 0).sum()
        assert float(run.callback_metrics["val/loss/prose"]) == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="document_masks: BloomForCausalLM takes no position_ids"):
            CausalLM({"model_type": "bloom", "vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2},
                     document_masks=True)  # fmt: skip
        rows = [{"input_ids": torch.ones(2, 4, dtype=torch.long)}]
        module = CausalLM({**LLAMA, "eos_token_id": None}, document_masks=True)
        with pytest.raises(UsageError, match="neither NoneType nor the model's config says which token ends"):
            trainer(tmp_path, max_steps=1).fit(module, rows)


def test_validation_is_the_mean_over_tokens_whatever_the_batch(
    tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = CausalLM(tiny_config)
    results = []
    for micro_batch_size in (1, 2, 4):
        [*_, last] = trainer(tmp_path).validate(module, data(micro_batch_size=micro_batch_size), verbose=False)
        results.append(last)
    whole = data(micro_batch_size=1)
    whole.setup("validate")
    for corpus in ("prose", "code"):
        rows = torch.cat([batch["input_ids"] for batch in whole.val_dataloader()[corpus]])
        expected = module.token_losses(rows).double().mean().item()
        for result in results:
            assert result[f"val/loss/{corpus}"] == pytest.approx(expected, rel=1e-6)
            assert result[f"val/perplexity/{corpus}"] == pytest.approx(math.exp(expected), rel=1e-5)
    mean = (results[0]["val/loss/prose"] + results[0]["val/loss/code"]) / 2
    assert results[0]["val/loss/average"] == pytest.approx(mean, rel=1e-6)


def test_test_and_predict(tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path) -> None:
    module = CausalLM(tiny_config)
    [*_, tested] = trainer(tmp_path).test(module, data(), verbose=False)
    predicted = trainer(tmp_path).predict(module, data())
    assert predicted is not None
    for index, corpus in enumerate(("prose", "code")):
        losses = torch.cat(predicted[index])  # type: ignore[arg-type]
        assert losses.shape == (23 + 4 * index, 8)
        assert float(losses.mean()) == pytest.approx(tested[f"test/loss/{corpus}"], rel=1e-5)


def test_only_matrices_decay(tiny_config: dict[str, Any]) -> None:
    optimizer = CausalLM(tiny_config).configure_optimizers()
    matrices, others = optimizer.param_groups
    assert {parameter.ndim for parameter in matrices["params"]} == {2}
    assert {parameter.ndim for parameter in others["params"]} == {1}
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert (matrices["betas"], matrices["eps"], matrices["lr"]) == ((0.9, 0.95), 1e-8, 3e-4)


def test_a_small_vocabulary_and_an_invalid_norm(
    tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the tokenizer has 64 tokens and the model's vocab_size is 32"):
        trainer(tmp_path, max_steps=1).fit(CausalLM({**tiny_config, "vocab_size": 32}), data())
    with pytest.raises(UsageError, match="max_grad_norm 0 must be above 0"):
        CausalLM(tiny_config, max_grad_norm=0)


class TestInitFrom:
    """Weights in any layout, and the names of tensors that do not fit."""

    @pytest.fixture
    def source(self, tiny_config: dict[str, Any]) -> CausalLM:
        torch.manual_seed(7)
        return CausalLM(tiny_config)

    def same(self, a: CausalLM, b: CausalLM) -> bool:
        pairs = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
        return all(torch.equal(x, y) for x, y in pairs)

    def test_every_layout(
        self, source: CausalLM, tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
    ) -> None:
        from safetensors.torch import save_file

        source.model.save_pretrained(tmp_path / "hf")  # type: ignore[operator]
        save_file(source.model.state_dict(), tmp_path / "a.safetensors")
        run = trainer(tmp_path)
        run.strategy.connect(source)
        run.save_checkpoint(tmp_path / "a.ckpt")
        for path in ("hf", "a.safetensors", "a.ckpt"):
            assert self.same(CausalLM(tiny_config, init_from=str(tmp_path / path)), source), path
        assert self.same(CausalLM(str(tmp_path / "hf")), source)
        assert CausalLM(str(tmp_path / "hf")).model.training, "from_pretrained leaves dropout off"

    def test_tensors_that_do_not_fit_are_named(
        self, source: CausalLM, tiny_config: dict[str, Any], tmp_path: Path
    ) -> None:
        source.model.save_pretrained(tmp_path / "hf")  # type: ignore[operator]
        hf = str(tmp_path / "hf")
        with pytest.raises(UsageError, match=r"missing gpt_neox.layers.2.\S+, .* and \d+ more, unexpected none"):
            CausalLM({**tiny_config, "num_hidden_layers": 3}, init_from=hf)
        with pytest.raises(UsageError, match=r"missing none, unexpected gpt_neox.layers.1"):
            CausalLM({**tiny_config, "num_hidden_layers": 1}, init_from=hf)
        with pytest.raises(UsageError, match=r"has shape \(64, 16\), the model's is \(80, 16\)"):
            CausalLM({**tiny_config, "vocab_size": 80}, init_from=hf)
        (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut off")
        (tmp_path / "cut.safetensors").write_bytes(b"\x10")
        for name, message in (
            ("cut.ckpt", r"cut.ckpt cannot be read as weights \(.*\): copy or download it again"),
            ("cut.safetensors", r"cut.safetensors cannot be read as weights \(.*\): copy or"),
            ("cutt.ckpt", r"cutt.ckpt is not a file; did you mean \S+cut.ckpt"),
        ):
            with pytest.raises(UsageError, match=message):
                CausalLM(tiny_config, init_from=str(tmp_path / name))

    def test_a_pickle_is_not_executed(self, tiny_config: dict[str, Any], tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "executed",))

        torch.save({"state_dict": {}, "bomb": Bomb()}, tmp_path / "bomb.ckpt")
        with pytest.raises(
            UsageError, match=r"bomb.ckpt contains a pickled getattr, which is not loaded: give a file of tensors"
        ):
            CausalLM(tiny_config, init_from=str(tmp_path / "bomb.ckpt"))
        assert not (tmp_path / "executed").exists()


def test_a_saved_checkpoint_loads_without_executing_anything(
    tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    callbacks = [
        LRRewarming(WarmupCosine(1e-3, 1e-4), 3),
        ModelCheckpoint(tmp_path / "saved", "a", every_n_train_steps=3),
    ]
    run = trainer(tmp_path, max_steps=3, callbacks=callbacks, enable_checkpointing=True, val_check_interval=3)
    run.fit(CausalLM(tiny_config), data())
    content: dict[str, Tensor] = torch.load(tmp_path / "saved" / "a.ckpt", weights_only=True)
    assert content["model_config"]["model_type"] == "gpt_neox"
