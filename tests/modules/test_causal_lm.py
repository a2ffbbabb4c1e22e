"""CausalLM against transformers' own losses, and what it logs, counts, keeps and refuses."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from ranks import run_ranks
from torch import Tensor

from rewurst import UsageError
from rewurst.callbacks import ExactResume, LRRewarming, StepProgressBar, Throughput, WarmupCosine
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.modules import CausalLM
from rewurst.modules.language.objective import find_objective

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_loss_and_gradients_equal_transformers(
    tiny_config: dict[str, Any], architecture: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers casts logits with .float(), which in double precision would round them.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    config = {**(tiny_config if architecture == "gpt_neox" else LLAMA), "tie_word_embeddings": tied}
    module = CausalLM(config).double()
    ids = torch.randint(64, (3, 9))

    theirs = module.model(input_ids=ids, labels=ids).loss
    theirs.backward()
    gradients = {name: parameter.grad for name, parameter in module.model.named_parameters()}
    for ours in (lambda: module.loss(ids), lambda: module.token_losses(ids).mean()):
        module.zero_grad(set_to_none=True)
        loss = ours()
        loss.backward()
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-10)
        for name, parameter in module.model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-14)


HEADS = {
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 4},
    "cohere": {"logit_scale": 0.1},
    "granite": {"logits_scaling": 3.0},
}


@pytest.mark.parametrize("architecture", HEADS)
def test_heads_that_do_more_get_all_logits_and_one_line(
    architecture: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    module = CausalLM({**LLAMA, "model_type": architecture, "pad_token_id": 0, **HEADS[architecture]}).double()
    ids = torch.randint(64, (3, 9))
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        losses = [module.loss(ids).item(), module.token_losses(ids).mean().item()]
    theirs = module.model(input_ids=ids, labels=ids).loss.item()
    assert losses == pytest.approx([theirs] * 2, rel=1e-10)
    [record] = [record for record in caplog.records if "linear head" in record.message]
    assert record.message.endswith("ForCausalLM does more than a linear head: its loss is computed over all logits")


def test_looking_at_the_head_changes_neither_modes_nor_random_state(tiny_config: dict[str, Any]) -> None:
    module = CausalLM({**tiny_config, "hidden_dropout": 0.5})
    module.model.gpt_neox.layers[0].eval()  # type: ignore[union-attr,index,operator]
    modes, state = [m.training for m in module.modules()], torch.get_rng_state()
    with torch.no_grad():
        assert find_objective(module.model).plain_head
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_z_loss_is_part_of_training_alone(tiny_config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = CausalLM(tiny_config, z_loss=0.1)
    ids = torch.randint(64, (3, 9))
    expected = module.token_losses(ids).mean() + 0.1 * module(ids[:, :-1]).logsumexp(-1).square().mean()
    torch.testing.assert_close(module.loss(ids), expected)


class TestDocumentMasks:
    """Rows of several documents against each document by itself."""

    CONFIGS: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt_neox": {},
        "llama": LLAMA,
        "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
        "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 3},
    }

    @pytest.mark.parametrize("architecture", CONFIGS)
    def test_losses_and_gradients_equal_the_documents_run_apart(
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

    def test_the_mean_counts_what_is_predicted(self, tiny_config: dict[str, Any]) -> None:
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


@pytest.mark.parametrize(("every", "recomputed"), [(1, 3), (2, 2), (3, 1)])
def test_every_nth_block_is_recomputed(tiny_config: dict[str, Any], every: int, recomputed: int) -> None:
    torch.manual_seed(0)
    config = {**tiny_config, "num_hidden_layers": 3}
    module, ids = CausalLM(config), torch.randint(64, (2, 9))
    recomputing = CausalLM(config, activation_checkpointing=every)
    recomputing.load_state_dict(module.state_dict())
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    recomputing.loss(ids)  # the first one looks at the head
    for layer in recomputing.model.gpt_neox.layers:  # type: ignore[union-attr]
        layer.mlp.register_forward_pre_hook(count)  # type: ignore[union-attr]
    for each in (module, recomputing):
        each.loss(ids).backward()
    assert runs == 3 + recomputed
    for a, b in zip(module.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_blocks_are_compiled_one_by_one(
    tiny_config: dict[str, Any],
    data: Callable[..., TextDataModule],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_module, compiled = torch.nn.Module.compile, []

    def eagerly(self: torch.nn.Module) -> None:
        compiled.append(type(self).__name__)
        compile_module(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    curves = []
    for wanted in (False, True):
        torch.manual_seed(0)
        module = CausalLM(tiny_config, compile=wanted)
        names = list(module.state_dict())
        run = trainer(tmp_path, max_steps=2, val_check_interval=100)
        run.fit(module, data())
        assert list(module.state_dict()) == names
        curves.append(rows_of(run.logger, "train/loss"))
    assert compiled == ["GPTNeoXLayer"] * 2
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation 'flash_attention_2' cannot be used here: "),
        ({"activation_checkpointing": 0}, "activation_checkpointing 0 must be at least 1, or null"),
        ({"z_loss": -1.0}, "z_loss -1.0 must not be below 0"),
    ],
)
def test_options_that_cannot_be(tiny_config: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        CausalLM(tiny_config, **options)
    assert str(error.value).startswith(message)


def test_attention_is_computed_as_asked(tiny_config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ids = torch.randint(64, (2, 9))
    losses = []
    for asked, found in ((None, "sdpa"), ("eager", "eager")):
        torch.manual_seed(1)
        module = CausalLM(tiny_config, attn_implementation=asked)  # type: ignore[arg-type]
        assert module.model.config._attn_implementation == found  # type: ignore[union-attr]
        losses.append(module.loss(ids).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.fixture
def data(write_corpus: Callable[..., str]) -> Callable[..., TextDataModule]:
    folders = {name: write_corpus(name, 23 + 4 * seed, seed) for seed, name in enumerate(("prose", "code"))}

    def build(**changes: Any) -> TextDataModule:
        arguments: dict[str, Any] = {
            "dataset": "prose",
            "corpora": {"prose": Corpus(folders["prose"])},
            "val": folders,
            "sequence_length": 8,
            "micro_batch_size": 2,
            "global_batch_size": 4,
        }
        return TextDataModule(**{**arguments, **changes})

    return build


def trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "logger": CSVLogger(folder),
        "check_val_every_n_epoch": None,
        "enable_checkpointing": False,
    }
    return Trainer(**{**defaults, **options})


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


def rows_of(logger: Any, key: str) -> list[float]:
    header, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    values = [dict(zip(header.split(","), line.split(","), strict=True))[key] for line in lines]
    return [float(value) for value in values if value]


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_tokens_are_counted_through_a_restore(
    tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "saved", filename="a", every_n_train_steps=3)
    options: dict[str, Any] = {"callbacks": [checkpoint], "enable_checkpointing": True, "val_check_interval": 100}
    first = trainer(tmp_path, max_steps=3, **options)
    first.fit(CausalLM(tiny_config), data())
    assert rows_of(first.logger, "tokens") == [32, 64, 96]
    second = trainer(tmp_path, max_steps=5, **options)
    second.fit(CausalLM(tiny_config), data(), ckpt_path=tmp_path / "saved" / "a.ckpt", weights_only=True)
    assert rows_of(second.logger, "tokens") == [128, 160]


def test_the_logged_loss_is_that_of_the_global_batch(
    tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    curves = []
    for micro_batch_size in (1, 4):
        torch.manual_seed(0)
        run = trainer(tmp_path, max_steps=4, val_check_interval=100)
        run.fit(CausalLM(tiny_config), data(micro_batch_size=micro_batch_size))
        curves.append(rows_of(run.logger, "train/loss"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_only_matrices_decay(tiny_config: dict[str, Any]) -> None:
    optimizer = CausalLM(tiny_config).configure_optimizers()
    matrices, others = optimizer.param_groups
    assert {parameter.ndim for parameter in matrices["params"]} == {2}
    assert {parameter.ndim for parameter in others["params"]} == {1}
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert (matrices["betas"], matrices["eps"], matrices["lr"]) == ((0.9, 0.95), 1e-8, 3e-4)


@pytest.mark.parametrize(
    ("setting", "limit"), [({}, 0.01), ({"gradient_clip_val": 0.002}, 0.002), ({"gradient_clip_val": 0.0}, None)]
)
def test_gradients_are_clipped_to_the_norm_asked_for(
    tiny_config: dict[str, Any],
    data: Callable[..., TextDataModule],
    tmp_path: Path,
    setting: dict[str, Any],
    limit: float | None,
) -> None:
    norms = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            result = super().step(closure)
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))))
            return result

    module = CausalLM(tiny_config, optimizer=lambda groups: Watched(groups, lr=0.0), max_grad_norm=0.01)
    run = trainer(tmp_path, max_steps=2, val_check_interval=100, **setting)
    run.fit(module, data())
    logged = rows_of(run.logger, "train/grad_norm")
    assert norms == pytest.approx(logged if limit is None else [limit] * 2, rel=1e-3)
    assert min(logged) > 0.1, "logged before clipping"


class Breaks(LRRewarming):
    """Spoils the weights before the third step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if trainer.global_step == 2:
            with torch.no_grad():
                pl_module.model.get_input_embeddings().weight.fill_(float("nan"))


class TestNotFinite:
    """Whatever is looked at when, the message names the first step and its rows."""

    MESSAGE = r"^loss is nan at optimizer step 2 at prose: prose-00000\d.tar, member"

    @pytest.mark.parametrize(
        ("options", "steps_done"),
        [
            ({"log_every_n_steps": 1, "max_steps": 9}, 2),
            ({"log_every_n_steps": 4, "max_steps": 9}, 3),
            ({"log_every_n_steps": 0, "max_steps": 5}, 5),  # at the end
            ({"log_every_n_steps": 0, "max_steps": 9, "val_check_interval": 8}, 4),
        ],
    )
    def test_the_run_stops_with_step_and_rows(
        self,
        tiny_config: dict[str, Any],
        data: Callable[..., TextDataModule],
        tmp_path: Path,
        options: dict[str, Any],
        steps_done: int,
    ) -> None:
        options = {"val_check_interval": 100, "callbacks": [Breaks(WarmupCosine(1e-3, 1e-4), 9)], **options}
        run = trainer(tmp_path, **options)
        with pytest.raises(FloatingPointError, match=self.MESSAGE):
            run.fit(CausalLM(tiny_config), data())
        assert run.global_step == steps_done

    def test_none_is_saved(
        self, tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
    ) -> None:
        save = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True,
                               save_on_exception=True)  # fmt: skip
        callbacks = [Breaks(WarmupCosine(1e-3, 1e-4), 9), save]
        options: dict[str, Any] = {"log_every_n_steps": 9, "max_steps": 9, "enable_checkpointing": True}
        run = trainer(tmp_path, val_check_interval=100, callbacks=callbacks, **options)
        with pytest.raises(FloatingPointError, match=self.MESSAGE):
            run.fit(CausalLM(tiny_config), data())
        assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["last.ckpt", "step=2.ckpt"]
        for path in (tmp_path / "saved").iterdir():
            assert torch.load(path, weights_only=True)["global_step"] == 2

    def test_a_norm_that_overflows(
        self, tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
    ) -> None:
        module = CausalLM(tiny_config)
        weight = module.model.get_output_embeddings().weight  # type: ignore[operator]
        weight.register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(FloatingPointError, match=r"^gradient norm is (nan|inf) at optimizer step 0$"):
            trainer(tmp_path, max_steps=5, log_every_n_steps=3, val_check_interval=100).fit(module, data())


class OnHost(Tensor):
    """What has been copied from the device: reading it waits for nothing."""


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_step_waits_for_the_device_between_logging_intervals(
    tiny_config: dict[str, Any],
    data: Callable[..., TextDataModule],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accumulate: int,
) -> None:
    waits: list[tuple[int, str]] = []
    callbacks = [LRRewarming(WarmupCosine(1e-3, 1e-4), 9), ExactResume(), StepProgressBar(), LearningRateMonitor()]
    callbacks.append(Throughput())
    options: dict[str, Any] = {"max_steps": 9, "log_every_n_steps": 4, "val_check_interval": 100}
    run = trainer(tmp_path, **options, callbacks=callbacks, enable_progress_bar=True)

    def counted(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            # Integers of the host (token ids in NumPy, random states) are no values of the device.
            if run.training and self.is_floating_point() and not isinstance(self, OnHost):
                waits.append((run.global_step, name))
            result = original(self, *args, **kwargs)
            return result.as_subclass(OnHost) if name == "cpu" else result

        return call

    module, loaded = CausalLM(tiny_config), data(micro_batch_size=4 // accumulate)
    for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    run.fit(module, loaded)
    # At the fourth and eighth step, until after the optimizer has counted it, and at the end.
    assert {step for step, _ in waits} == {3, 4, 7, 8, 9}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model_type": "gpt_neo_x"}, "model_type 'gpt_neo_x' is unknown to transformers; did you mean 'gpt_neox'?"),
        ({"hidden_size": 8}, "model_type None is unknown to transformers"),
        (
            {"model_type": "gpt_neox", "hidden_sise": 8},
            "'hidden_sise' is unknown to gpt_neox; did you mean 'hidden_size'?",
        ),
        ("./no/such/folder", "model folder ./no/such/folder does not exist"),
    ],
)
def test_models_that_do_not_exist(model: str | dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        CausalLM(model)
    assert message in str(error.value)


def test_a_vocabulary_that_is_too_small_and_a_norm_that_is_none(
    tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the tokenizer has 64 tokens and the model's vocab_size is 32"):
        trainer(tmp_path, max_steps=1).fit(CausalLM({**tiny_config, "vocab_size": 32}), data())
    with pytest.raises(UsageError, match="max_grad_norm 0 must be above 0"):
        CausalLM(tiny_config, max_grad_norm=0)


class TestInitFrom:
    """Weights from any layout, and the names of what does not fit."""

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

    def test_what_does_not_fit_is_named(self, source: CausalLM, tiny_config: dict[str, Any], tmp_path: Path) -> None:
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
            ("cutt.ckpt", r"cutt.ckpt is no file; did you mean \S+cut.ckpt"),
        ):
            with pytest.raises(UsageError, match=message):
                CausalLM(tiny_config, init_from=str(tmp_path / name))

    def test_a_pickle_is_not_executed(self, tiny_config: dict[str, Any], tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "executed",))

        torch.save({"state_dict": {}, "bomb": Bomb()}, tmp_path / "bomb.ckpt")
        with pytest.raises(
            UsageError, match=r"bomb.ckpt holds a pickled getattr, which is not loaded: give a file of tensors"
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


SHARDED = """
import json, os, sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from rewurst.modules import CausalLM

distributed.init_process_group("gloo")
rank = distributed.get_rank()
config = json.loads(sys.argv[1])
torch.manual_seed(0)
ids = torch.randint(64, (4, 9))
whole, sharded = CausalLM(config), CausalLM(config)
sharded.load_state_dict(whole.state_dict())
whole.loss(ids).backward()
parts = {"blocks": [*sharded.model.gpt_neox.layers], "head": [*sharded.model.gpt_neox.layers, sharded.model.lm_head]}
for part in parts[sys.argv[2]]:
    fully_shard(part)
fully_shard(sharded.model)
for _ in range(2):  # the second time as the first, which looked at the head
    sharded.zero_grad()
    sharded.loss(ids[2 * rank : 2 * rank + 2]).backward()
assert sharded._objective.plain_head
for a, b in zip(whole.parameters(), sharded.parameters(), strict=True):
    torch.testing.assert_close(a.grad, b.grad.full_tensor(), rtol=1e-5, atol=1e-7)
print("equal", flush=True)
distributed.barrier()
os._exit(0)  # gloo's threads may still be there when the interpreter ends, which then aborts
"""


@pytest.mark.parametrize("parts", ["blocks", "head"])
def test_a_sharded_model_has_the_gradients_of_a_whole_one(
    tiny_config: dict[str, Any], tmp_path: Path, parts: str
) -> None:
    (tmp_path / "script.py").write_text(SHARDED)
    said = run_ranks(tmp_path / "script.py", json.dumps(tiny_config), parts, processes=2)
    assert said.count("equal") == 2


TWO_PROCESSES = """
import json, sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from rewurst.callbacks import LRRewarming, ReplayScheduler, WarmupCosine
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.modules import CausalLM

settings = json.loads(Path(sys.argv[1]).read_text())
corpora = {"code": Corpus(settings["code"]), "prose": Corpus(settings["prose"], replay=True)}
val = {"prose": settings["prose"], "code": settings["code"]}
data = TextDataModule("code", corpora, val, 8, 2, 8)
torch.manual_seed(0)
module = CausalLM(settings["model"])
trainer = Trainer(
    accelerator="cpu", devices=settings["devices"], strategy="ddp" if settings["devices"] > 1 else "auto",
    max_steps=6, max_epochs=-1, val_check_interval=6 * 4 // settings["devices"], check_val_every_n_epoch=None,
    num_sanity_val_steps=0, log_every_n_steps=1, logger=CSVLogger(settings["folder"]),
    callbacks=[LRRewarming(WarmupCosine(1e-2, 1e-3, 0.1), 6), ReplayScheduler(0.3)],
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, data)
if trainer.is_global_zero:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    weights = {name: value.double().sum().item() for name, value in module.state_dict().items()}
    Path(settings["folder"], "result.json").write_text(json.dumps([metrics, weights]))
"""


def test_two_processes_train_and_validate_as_one(
    tiny_config: dict[str, Any], write_corpus: Callable[..., str], tmp_path: Path
) -> None:
    prose, code = write_corpus("prose", 23), write_corpus("code", 30, seed=1)
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    results = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        settings = {"prose": prose, "code": code, "model": tiny_config, "devices": devices, "folder": str(folder)}
        (folder / "settings.json").write_text(json.dumps(settings))
        if devices == 1:
            run_ranks(tmp_path / "script.py", str(folder / "settings.json"))
        else:  # as a user starts it: a new interpreter, from which Lightning starts the second process
            command = [sys.executable, str(tmp_path / "script.py"), str(folder / "settings.json")]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            environment |= {"MASTER_ADDR": "127.0.0.1"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            assert done.returncode == 0, done.stderr
        results.append(json.loads((folder / "result.json").read_text()))
    (metrics, weights), (metrics_of_two, weights_of_two) = results
    names = ["train/loss", "tokens", "replay/share_read", "replay/rows/prose", "val/loss/prose", "val/loss/code"]
    assert {name: metrics_of_two[name] for name in names} == pytest.approx({n: metrics[n] for n in names}, rel=1e-5)
    assert metrics["tokens"] == 6 * 8 * 8
    assert metrics["replay/rows/prose"] == int(0.3 * 48)
    assert weights_of_two == pytest.approx(weights, rel=1e-4, abs=1e-4)
