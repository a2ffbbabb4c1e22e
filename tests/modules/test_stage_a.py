"""Stage A trains: both optimizers, accumulation, resuming, metrics and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stage_runs
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks
from stage_runs import trainer
from torch import Tensor

from rewurst import UsageError
from rewurst.callbacks import ExactResume, LRRewarming, WarmupCosine, WeightAverage
from rewurst.modules import StageA
from rewurst.modules.networks import VQGAN
from rewurst.modules.shared.batches import uniforms

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*dataloader is not resumable.*",
    "ignore:.*exists and is not empty",
    "ignore:The dirpath has changed",
    "ignore:.*in eval mode at the start",
)

SMALL: dict[str, Any] = {
    "vqgan": {"preset": "tiny", "embed_dim": 16, "num_vq_embeddings": 16},
    "discriminator": {"c_hidden": 16, "depth": 3},
    "perceptual_weight": 0.0,
    "adversarial_start": 0,
}
Data = Callable[..., Any]


def stage_a(**changes: Any) -> StageA:
    torch.manual_seed(0)
    return StageA(**{**SMALL, **changes})


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def fixed_norm(module: StageA) -> StageA:
    """Leave the encoder's BatchNorm in evaluation mode: then a batch's samples do not see each other."""
    module.vqgan.down_blocks[-1].eval()
    return module


def column(logger: Any, key: str) -> list[float]:
    found = stage_runs.column(logger, key)
    return [value for at, value in enumerate(found) if at == 0 or value != found[at - 1]]  # logged by micro-batch too


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_reconstructions_come_near_and_codes_come_into_use(picture_data: Data, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = StageA({"preset": "tiny", "num_vq_embeddings": 64}, None, perceptual_weight=0.0, revive_after=20)
    rewarming = LRRewarming(WarmupCosine(1e-2, 1e-3, 0.1), 60)
    data = picture_data(8, 8, pictures=8, val=8)
    run = trainer(tmp_path, max_steps=60, callbacks=[rewarming])
    run.fit(module, data)
    losses = column(run.logger, "train/reconstruction")
    assert losses[-1] < 0.1 * losses[0]
    [seen] = trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)[:1]
    assert seen["val/psnr/seen"] > 17
    assert seen["val/codebook_usage/seen"] > 0.1


def test_accumulation_is_the_larger_batch_and_seeds_decide_what_is_dropped(picture_data: Data, tmp_path: Path) -> None:
    weights = []
    for micro_batch_size in (1, 2, 4):
        module = fixed_norm(stage_a(discriminator=None, optimizer=sgd, drop_quantisation=0.5))
        run = trainer(tmp_path, max_steps=3, precision=64)
        run.fit(module, picture_data(micro_batch_size, 4))
        assert run.global_step == module.step == 3
        weights.append({name: p.detach().clone() for name, p in module.named_parameters()})
    for others in weights[1:]:
        for name, parameter in weights[0].items():
            torch.testing.assert_close(others[name], parameter, rtol=1e-9, atol=1e-12)


def test_each_network_gets_the_gradients_of_its_own_loss(picture_data: Data, tmp_path: Path) -> None:
    """Computed independently by two backward passes as in the papers."""
    batch = picture_data(4, 4)
    module = stage_a(drop_quantisation=0.0, max_grad_norm=None)
    gradients: dict[str, Tensor] = {}

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            gradients.update({n: p.grad.clone() for n, p in pl_module.named_parameters() if id(p) in own})

    copy = stage_a(drop_quantisation=0.0)
    run = trainer(tmp_path, max_steps=1, callbacks=[Look()])
    run.fit(module, batch)
    images = next(iter(batch.train_dataloader()))["image"].float() / 255
    assert copy.discriminator is not None
    decoded, quantized = copy.vqgan(images)
    assert quantized is not None
    judged = copy.discriminator(decoded)
    loss = (decoded - images).square().mean() + quantized.loss - 0.01 * judged.mean()
    loss.backward()
    for name, parameter in copy.vqgan.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[f"vqgan.{name}"], parameter.grad, rtol=1e-4, atol=1e-7)
    copy.discriminator.zero_grad()
    real, fake = copy.discriminator(torch.cat([images, decoded.detach()])).chunk(2)
    ((1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()).backward()
    for name, parameter in copy.discriminator.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[f"discriminator.{name}"], parameter.grad, rtol=1e-4, atol=1e-7)


def test_the_discriminator_learns_from_its_start_on(picture_data: Data, tmp_path: Path) -> None:
    module = stage_a(adversarial_start=2)
    seen: list[tuple[int, bool]] = []
    assert module.discriminator is not None
    before = module.discriminator.logits.weight.detach().clone()

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            seen.append((trainer.global_step, torch.equal(before, module.discriminator.logits.weight)))  # type: ignore[union-attr]

    run = trainer(tmp_path, max_steps=4, callbacks=[Look()])
    run.fit(module, picture_data(2, 4))
    unchanged = [same for _, same in seen]
    assert unchanged == [True] * 5 + [False] * 3, "micro-batches 0 to 4 come before the first step of the third batch"
    assert [step for step, _ in seen] == [0, 1, 1, 2, 2, 3, 3, 4], "the discriminator's steps are not counted"
    assert len(set(column(run.logger, "train/discriminator"))) == len(set(column(run.logger, "train/adversarial"))) == 2
    assert len(set(column(run.logger, "train/loss"))) == 4
    assert set(column(run.logger, "step")) == {0, 1, 2, 3}, "loggers count global batches"


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_is_the_whole_one(picture_data: Data, tmp_path: Path, stop: int) -> None:
    """Stopped before the discriminator starts, at its start, and after it."""

    def fit(steps: int, name: str, ckpt_path: Path | None = None) -> tuple[dict[str, Any], list[float]]:
        module = stage_a(adversarial_start=3, revive_after=2)
        callbacks = [
            LRRewarming(WarmupCosine(1e-2, 1e-3, 0.1), 7),
            WeightAverage(0.5, every=2, start_step=2),
            ExactResume(),
            ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1),
        ]
        run = trainer(tmp_path, max_steps=steps, callbacks=callbacks, val_check_interval=4, limit_val_batches=1.0)
        run.fit(module, picture_data(2, 4), ckpt_path=ckpt_path, weights_only=True)
        content: dict[str, Any] = torch.load(tmp_path / name / f"step={steps}.ckpt", weights_only=True)
        return content, column(run.logger, "train/loss")

    whole, losses = fit(7, "whole")
    _, begun = fit(stop, "begun") if stop == 7 else (None, losses[:stop])
    resumed, rest = fit(7, "resumed", tmp_path / "whole" / f"step={stop}.ckpt")
    assert begun + rest == losses
    for key in ("state_dict", "current_model_state", "optimizer_states", "completed_steps", "networks"):
        assert equal(whole[key], resumed[key]), key
    assert not equal(whole["state_dict"], whole["current_model_state"])
    assert {type(state["step"]).__name__ for state in whole["optimizer_states"][1]["state"].values()} == {"Tensor"}
    assert {float(state["step"]) for state in whole["optimizer_states"][1]["state"].values()} == {4.0}


def test_both_learning_rates_are_rewarmed(picture_data: Data, tmp_path: Path) -> None:
    rates: list[list[float]] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            if optimizer is trainer.optimizers[-1]:
                rates.append([g["lr"] for o in trainer.optimizers for g in o.param_groups])

    def adam(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
        return lambda parameters: torch.optim.AdamW(parameters, lr=lr)

    def fit(dataset: str, steps: int, ckpt_path: Path | None = None) -> Trainer:
        module = stage_a(optimizer=adam(1e-3), discriminator_optimizer=adam(2e-3), fast_lr_scale=5.0)
        saved = ModelCheckpoint(tmp_path / dataset, "a", every_n_train_steps=4)
        callbacks = [LRRewarming(WarmupCosine(1e-3, 1e-4, 0.25), 4), saved, Look()]
        run = trainer(tmp_path, max_steps=steps, callbacks=callbacks)
        run.fit(module, picture_data(2, 4, dataset=dataset), ckpt_path=ckpt_path, weights_only=True)
        return run

    fit("discs", 4)
    run = fit("more discs", 8, tmp_path / "discs" / "a.ckpt")
    values = [WarmupCosine(1e-3, 1e-4, 0.25).value(step, 4) for step in range(4)]
    for got, value in zip(rates, values * 2, strict=True):
        assert got == pytest.approx([value, value, 5 * value, 2 * value])
    steps = {float(state["step"]) for o in run.optimizers for state in o.state.values()}
    assert steps == {4.0}, "both optimizers began anew"
    with pytest.raises(UsageError, match="set it to 12 for 4 more steps"):
        fit("yet more", 8, tmp_path / "more discs" / "a.ckpt")


def test_validation_is_the_mean_over_images_whatever_the_batch(picture_data: Data, tmp_path: Path) -> None:
    module = stage_a()
    results = []
    for micro_batch_size in (1, 4):
        data = picture_data(micro_batch_size, 4)
        run = trainer(tmp_path, limit_val_batches=1.0)
        results.append(run.validate(module, data, verbose=False)[-1] | run.callback_metrics)
    loader = picture_data(6, 6)
    loader.trainer = run
    [batch] = loader.val_dataloader()["unseen"]
    images = batch["image"].double() / 255
    module.eval()
    decoded = module.vqgan(images.float())[0].double().detach()
    mse = (decoded - images).square().mean((1, 2, 3))
    decibels = -10 * (decoded.clamp(0, 1) - images).square().mean((1, 2, 3)).log10()
    for result in results:
        assert float(result["val/loss/unseen"]) == pytest.approx(mse.mean().item(), rel=1e-5)
        assert float(result["val/psnr/unseen"]) == pytest.approx(decibels.mean().item(), rel=1e-5)
        assert float(result["val/ssim/unseen"]) == pytest.approx(float(results[0]["val/ssim/unseen"]), rel=1e-5)
        assert 0 < float(result["val/codebook_usage/unseen"]) <= 1
        average = (float(result["val/loss/seen"]) + float(result["val/loss/unseen"])) / 2
        assert float(result["val/loss/average"]) == pytest.approx(average, rel=1e-5)


def test_a_checkpoint_gives_the_networks_with_the_scale_that_was_measured(picture_data: Data, tmp_path: Path) -> None:
    module = stage_a()
    saved = ModelCheckpoint(tmp_path / "saved", "a", every_n_train_steps=3)
    run = trainer(tmp_path, max_steps=3, callbacks=[saved])
    run.fit(module, picture_data(4, 4))
    path = tmp_path / "saved" / "a.ckpt"
    content = torch.load(path, weights_only=True)
    assert {entry["class"] for entry in content["networks"].values()} == {"VQGAN", "PatchDiscriminator"}
    loaded = VQGAN.from_checkpoint(path)
    assert loaded.scale_factor == pytest.approx(float(module.latent_std), abs=1e-4)
    for name, tensor in module.vqgan.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    again = stage_a(init_from=str(path), vqgan={**SMALL["vqgan"], "scale_factor": 0.5})
    assert torch.equal(again.vqgan.vquantizer.embedding.weight, module.vqgan.vquantizer.embedding.weight)
    checkpoint: dict[str, Any] = {}
    again.latent_std.fill_(2.0)
    again.on_save_checkpoint(checkpoint)
    assert checkpoint["networks"]["vqgan"]["config"]["scale_factor"] == 0.5, "a number that is given stays"


@pytest.mark.filterwarnings("ignore:.*bf16.*")
def test_mixed_precision_keeps_float32_weights(picture_data: Data, tmp_path: Path) -> None:
    module = stage_a()
    run = trainer(tmp_path, max_steps=2, precision="bf16-mixed")
    run.fit(module, picture_data(2, 4))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    moments = {s["exp_avg"].dtype for o in run.optimizers for s in o.state.values()}
    assert moments == {torch.float32}


def test_dead_codes_are_revived(picture_data: Data, tmp_path: Path) -> None:
    module = stage_a(revive_after=3, discriminator=None)
    codebook = module.vqgan.vquantizer.embedding.weight
    with torch.no_grad():
        codebook[8:] = 1e3  # where no latent is
    run = trainer(tmp_path, max_steps=6)
    run.fit(module, picture_data(4, 4))
    assert float(codebook.detach().abs().max()) < 100
    assert max(column(run.logger, "train/revived_codes")) >= 8


def test_non_finite_losses_stop_the_run(picture_data: Data, tmp_path: Path) -> None:
    module = stage_a()
    with torch.no_grad():
        module.vqgan.get_parameter("in_block.1.weight").fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"^loss is nan at optimizer step 0"):
        trainer(tmp_path, max_steps=1).fit(module, picture_data(4, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vqgan": "huge"}, "VQGAN has no preset 'huge'"),
        ({"vqgan": {"preset": "tiny", "embed_dims": 3}}, "VQGAN has no argument 'embed_dims'"),
        ({"drop_quantisation": 1.0}, r"drop_quantisation 1.0 must be in \[0, 1\)"),
        ({"max_grad_norm": 0}, "max_grad_norm 0 must be above 0"),
        ({"adversarial_loss": "wasserstein"}, "adversarial_loss 'wasserstein' is unknown"),
        ({"perceptual_weight": 0.1, "vgg16": "no/vgg.pth"}, "no/vgg.pth is not a file"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stage_a(**changes)


def test_missing_perceptual_weights_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.warns(UserWarning, match="training omits the perceptual loss; give vgg16, or set") as said:
        module = stage_a(perceptual_weight=0.1)
    assert len(said) == 1
    assert module.lpips is None


def test_uniform_numbers_belong_to_their_sample() -> None:
    seeds = np.array([5, 2**63 - 1, 7])
    numbers = uniforms([torch.Generator().manual_seed(int(seed)) for seed in seeds], 3, 2, torch.device("cpu"))
    for index, seed in enumerate(seeds):
        alone = uniforms([torch.Generator().manual_seed(int(seed))], 1, 2, torch.device("cpu"))
        assert torch.equal(numbers[:, index], alone[:, 0])


TWO_PROCESSES = """
import json, runpy, sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rewurst.modules import StageA

settings = json.loads(Path(sys.argv[1]).read_text())
Pictures = runpy.run_path(settings["conftest"])["picture_data"].__wrapped__()

torch.manual_seed(0)
sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
module = StageA(**settings["model"], optimizer=sgd, discriminator_optimizer=sgd)
module.vqgan.down_blocks[-1].eval()
trainer = Trainer(
    accelerator="cpu", devices=settings["devices"], strategy="ddp" if settings["devices"] > 1 else "auto",
    max_steps=4, max_epochs=-1, val_check_interval=4 * settings["accumulation"], check_val_every_n_epoch=None,
    num_sanity_val_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, use_distributed_sampler=False, precision=64,
)
trainer.fit(module, Pictures(4 // settings["devices"] // settings["accumulation"], 4))
if trainer.is_global_zero:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    weights = {name: value.double().sum().item() for name, value in module.named_parameters()}
    Path(settings["folder"], "result.json").write_text(json.dumps([metrics, weights]))
"""


def test_two_processes_train_and_validate_as_one(tmp_path: Path) -> None:
    """With plain DDP, a discriminator that starts at the third step, and accumulation."""
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    conftest = Path(__file__).parents[1] / "conftest.py"
    results = []
    for devices, accumulation in ((1, 1), (2, 1), (2, 2)):
        folder = tmp_path / f"{devices}{accumulation}"
        folder.mkdir()
        # Codes are revived where the first process's latents are.
        model = {**SMALL, "adversarial_start": 2} | (
            {"adversarial_start": 9, "revive_after": 2} if accumulation > 1 else {}
        )
        settings = {"conftest": str(conftest), "model": model, "devices": devices, "folder": str(folder)}
        (folder / "settings.json").write_text(json.dumps({**settings, "accumulation": accumulation}))
        run_ranks(tmp_path / "script.py", str(folder / "settings.json"), processes=devices)
        results.append(json.loads((folder / "result.json").read_text()))
    (metrics, weights), (metrics_of_two, weights_of_two), _ = results
    names = ["train/loss", "train/discriminator", "train/codebook_usage", "val/psnr/unseen", "val/ssim/seen"]
    names += ["val/loss/unseen", "val/codebook_usage/seen", "val/loss/average"]
    assert {n: metrics_of_two[n] for n in names} == pytest.approx({n: metrics[n] for n in names}, rel=1e-4)
    assert weights_of_two == pytest.approx(weights, rel=1e-3, abs=1e-4)
