"""Low-rank adapters of Stage C: only they are trained, checkpoints merge them, diffusers loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from stage_runs import column, trainer

from rewurst import UsageError
from rewurst.modules import StageC
from rewurst.modules.networks import Prior, SemanticCompressor
from rewurst.train import main

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty",
    "ignore:.*in eval mode at the start",
    "ignore:Be aware that when using",
    "ignore:.*dataloader is not resumable.*",
)

PRIOR: dict[str, Any] = {"c_in": 4, "c": 32, "c_cond": 32, "depth": 2, "nhead": 2, "dropout": 0.0}
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 12, "target_modules": ["to_q", "to_out.0", "kv_mapper.1"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A prior that predicts something: a fresh one predicts nothing, and so learns no adapters."""
    torch.manual_seed(3)
    prior = Prior.from_config(PRIOR)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    prior.save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def stage_c(tmp_path: Path, base: Path, text_encoder_folder: Path) -> Callable[..., StageC]:
    SemanticCompressor.from_preset("tiny", widths=[8, 16], c_latent=4).save(tmp_path / "compressor")

    def build(**changes: Any) -> StageC:
        torch.manual_seed(0)
        defaults = {"init_from": str(base), "lora": LORA, "latent_mean": None, "latent_std": None}
        return StageC(str(tmp_path / "compressor"), PRIOR, str(text_encoder_folder), **defaults | changes)

    return build


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(5)
    return torch.randn(2, 4, 4, 4), torch.rand(2) * 0.8 + 0.1, torch.randn(2, 16, 32)


@pytest.fixture
def trained(stage_c: Callable[..., StageC], picture_data: Callable[..., Any], tmp_path: Path) -> tuple[StageC, Path]:
    module = stage_c(optimizer=adam)
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, max_steps=4, callbacks=[saving]).fit(module, picture_data())
    return module.eval(), tmp_path / "saved" / "step=4.ckpt"


def test_only_adapters_are_trained(trained: tuple[StageC, Path], base: Path) -> None:
    module, _ = trained
    before, after = Prior.from_folder(base).state_dict(), module.prior.state_dict()
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 2 * 3, "A and B of three layers in two blocks"
    assert all(".lora_" in name for name in trainable)
    assert all(after[name].abs().sum() > 0 for name in after if ".lora_B." in name)
    for name, tensor in after.items():
        if ".lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name


@torch.no_grad()
def test_checkpoints_and_folders_hold_the_merged_network(
    trained: tuple[StageC, Path], base: Path, tmp_path: Path
) -> None:
    module, checkpoint = trained
    expected = module.prior(*inputs())
    assert not torch.allclose(expected, Prior.from_folder(base)(*inputs()), atol=1e-3)
    torch.testing.assert_close(Prior.from_checkpoint(checkpoint)(*inputs()), expected, atol=1e-5, rtol=1e-5)
    module.prior.save(tmp_path / "merged")
    torch.testing.assert_close(Prior.from_folder(tmp_path / "merged")(*inputs()), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_loads_the_adapters(
    rslora: bool,
    stage_c: Callable[..., StageC],
    base: Path,
    tmp_path: Path,
    text_encoder_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wuerstchen = pytest.importorskip("diffusers.pipelines.deprecated.wuerstchen")
    from diffusers import DDPMWuerstchenScheduler

    module = stage_c(lora=LORA | {"use_rslora": rslora}).eval()
    for name, parameter in module.named_parameters():
        if ".lora_B." in name:
            parameter.normal_()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "c.ckpt")
    assert main(["export", "lora", str(tmp_path / "c.ckpt"), str(tmp_path / "lora")]) == 0
    assert "lora: 6 layers; load it with load_lora_weights" in capsys.readouterr().out
    theirs = wuerstchen.WuerstchenPrior.from_pretrained(base).eval()
    pipeline = wuerstchen.WuerstchenPriorPipeline(
        tokenizer=None, text_encoder=None, prior=theirs, scheduler=DDPMWuerstchenScheduler()
    )
    pipeline.load_lora_weights(tmp_path / "lora")
    x, t, text = inputs()
    torch.testing.assert_close(theirs(x, t, text), module.prior(x, t, text), atol=1e-4, rtol=1e-4)


def test_a_run_resumes(
    stage_c: Callable[..., StageC], picture_data: Callable[..., Any], trained: tuple[StageC, Path], tmp_path: Path
) -> None:
    whole, _ = trained
    module = stage_c(optimizer=adam)
    run = trainer(tmp_path, max_steps=4)
    run.fit(module, picture_data(), ckpt_path=tmp_path / "saved" / "step=2.ckpt", weights_only=True)
    assert len(column(run.logger, "train/loss")) == 2
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4}, "lora has 'rank', expected r, lora_alpha"),
        ({"r": 0}, "lora's r is 0, expected a whole number of at least 1"),
        ({"target_modules": ["to_x"]}, "lora cannot be added: "),
        ({"target_modules": ["projection"]}, "target_modules match projection, which is not a linear layer"),
    ],
)
def test_wrong_settings(lora: dict[str, Any], message: str, stage_c: Callable[..., StageC]) -> None:
    with pytest.raises(UsageError, match=message) as error:
        stage_c(lora=lora)
    assert "\n" not in str(error.value)


def test_adapters_need_a_trained_prior(
    stage_c: Callable[..., StageC], picture_data: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="lora adapts a trained prior: give init_from"):
        trainer(tmp_path, max_steps=1).fit(stage_c(init_from=None), picture_data())


def test_a_checkpoint_without_adapters_has_none_to_export(base: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "networks": {}}, tmp_path / "c.ckpt")
    assert main(["export", "lora", str(tmp_path / "c.ckpt"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_the_memory_plan_knows_adapters(stage_c: Callable[..., StageC]) -> None:
    """As `rewurst plan` builds modules: by tensors without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        prior = Prior.from_config(PRIOR)
        prior.add_lora(LORA)
        x, t, text = torch.empty(2, 4, 4, 4), torch.empty(2), torch.empty(2, 16, 32)
        prior(x, t, text).sum().backward()
        trained = [name for name, parameter in prior.named_parameters() if parameter.grad is not None]
    assert len(trained) == 12
    assert all(".lora_" in name for name in trained)
