"""Stage B trains with its compressor: randomness by sample, frozen parts, resuming, metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks
from stage_runs import column, fit_six_steps, trainer
from torch import Tensor, nn
from torchvision.models import efficientnet_v2_s

from rewurst import UsageError
from rewurst.callbacks import LRRewarming, WarmupCosine
from rewurst.modules import StageB
from rewurst.modules.networks import VQGAN, SemanticCompressor, StageBUNet, diffusion
from rewurst.modules.shared.batches import generators

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*dataloader is not resumable.*",
    "ignore:.*exists and is not empty",
    "ignore:The dirpath has changed",
    "ignore:.*in eval mode at the start",
)

SMALL: dict[str, Any] = {
    "unet": {"preset": "tiny", "c_hidden": [16, 32], "c_cond": 16, "effnet_embd": 4},
    "compressor": {"preset": "tiny", "widths": [8, 16], "c_latent": 4},
    "text_length": 3,
    "sampling_steps": 3,
}
Data = Callable[..., Any]


@pytest.fixture
def stage_a_folder(tmp_path: Path) -> str:
    torch.manual_seed(1)
    vqgan = VQGAN.from_preset("tiny", embed_dim=16, num_vq_embeddings=16, scale_factor=0.8)
    vqgan.save(tmp_path / "stage_a")
    return str(tmp_path / "stage_a")


def stage_b(stage_a: str, **changes: Any) -> StageB:
    torch.manual_seed(0)
    return StageB(stage_a, **{**SMALL, **changes})


def fixed_norm(module: StageB) -> StageB:
    """Leave the compressor's BatchNorm in evaluation mode: then a batch's samples do not see each other."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    return module


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def test_it_learns_a_few_pictures(picture_data: Data, stage_a_folder: str, tmp_path: Path) -> None:
    module = stage_b(stage_a_folder)
    data = picture_data(8, 8, pictures=8, val=8, steps=200)
    run = trainer(tmp_path, max_steps=120, callbacks=[LRRewarming(WarmupCosine(5e-3, 5e-4, 0.1), 120)])
    before = trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)[-1]
    run.fit(module, data)
    after = trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)[-1]
    assert after["val/loss/average"] < 0.5 * before["val/loss/average"]
    losses = column(run.logger, "train/loss")
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_accumulation_is_the_larger_batch(picture_data: Data, stage_a_folder: str, tmp_path: Path) -> None:
    """Time, noise and the treatment of the embedding belong to the sample: micro-batches do not change them."""
    results = []
    for micro_batch_size in (1, 2, 4):
        module = fixed_norm(stage_b(stage_a_folder, optimizer=sgd, zero_share=0.3, noise_share=0.5))
        run = trainer(tmp_path, max_steps=3)
        run.fit(module, picture_data(micro_batch_size, 4))
        results.append((dict(module.named_parameters()), column(run.logger, "train/loss")))
    for weights, losses in results[1:]:
        assert losses == pytest.approx(results[0][1], rel=1e-4)
        for name, parameter in results[0][0].items():
            torch.testing.assert_close(weights[name], parameter, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("smallest", "largest"), [(1.0, 1.0), (0.1, 20.0)])
def test_the_loss_is_the_papers(
    picture_data: Data, stage_a_folder: str, tmp_path: Path, smallest: float, largest: float
) -> None:
    """Computed independently, one sample at a time, with and without the added weight 1 / snr."""
    options: dict[str, Any] = {"max_loss_weight": largest, "min_loss_weight": smallest}
    module = fixed_norm(stage_b(stage_a_folder, zero_share=0.4, noise_share=0.5, noise_until=0.5, **options))
    for parameter in module.unet.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    run = trainer(tmp_path, max_steps=1)
    data = picture_data(8, 8)
    batch: dict[str, Any] = {}

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, b: Any, batch_idx: int) -> None:
            batch.update(b)
            batch["weights"] = {name: t.clone() for name, t in pl_module.state_dict().items()}

    run.callbacks.append(Keep())  # type: ignore[attr-defined]
    run.fit(module, data)
    module.load_state_dict(batch.pop("weights"))
    losses, kinds = [], []
    stage_a = VQGAN.from_folder(stage_a_folder)
    with torch.no_grad():
        for index, seed in enumerate(batch["seed"]):
            image = batch["image"][index : index + 1] / 255
            generator = torch.Generator().manual_seed(int(seed))
            _, zeroed, noised, level = torch.rand(4, generator=generator)
            t = torch.tensor([min((1 - batch["quantile"][index]) * 1.08 + 0.001, 1.0)], dtype=torch.float32)
            latents, z = stage_a.encode(image) / 0.8, module.compressor(image)
            noise, noise_of_z = (torch.randn(x.shape, generator=generator) for x in (latents, z))
            if zeroed < 0.4:
                z = 0 * z
            elif noised < 0.5:
                share = diffusion.alpha_bar(level * 0.5)
                z = share.sqrt() * z + (1 - share).sqrt() * noise_of_z
            kinds.append((bool(zeroed < 0.4), bool(noised < 0.5)))
            share = diffusion.alpha_bar(t)
            predicted = module.unet(share.sqrt() * latents + (1 - share).sqrt() * noise, t, z, torch.zeros(1, 3, 32))
            weight = ((1 - share) / share).clamp(smallest, largest)
            losses.append((predicted - noise).square().mean() * weight)
    assert len(set(kinds)) > 2, "zeroed, noised and plain embeddings are among them"
    assert column(run.logger, "train/loss") == pytest.approx([torch.stack(losses).mean().item()], rel=1e-4)


def test_weights_of_the_loss() -> None:
    t = torch.tensor([0.001, 0.3, 0.5, 0.7, 0.95, 1.0])
    share = diffusion.alpha_bar(t)
    unbounded = [float((1 - a) / a) for a in share]
    wanted = [min(max(1.0, weight), 100.0) for weight in unbounded]
    assert diffusion.inverse_snr_weight(t, 100.0).tolist() == pytest.approx(wanted)
    assert diffusion.inverse_snr_weight(t, 1.0).tolist() == [1.0] * 6
    assert diffusion.inverse_snr_weight(t, 1.0, 0.2).tolist() == pytest.approx([max(0.2, min(1, w)) for w in unbounded])


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_is_the_whole_one(
    picture_data: Data, stage_a_folder: str, text_encoder_folder: Path, tmp_path: Path, stop: int
) -> None:
    def fit(name: str, ckpt_path: Path | None = None) -> tuple[dict[str, Any], list[float]]:
        unet = {**SMALL["unet"], "dropout": 0.2}
        module = stage_b(stage_a_folder, unet=unet, text_encoder=str(text_encoder_folder))
        return fit_six_steps(tmp_path, name, module, picture_data(2, 4), ckpt_path)

    whole, losses = fit("whole")
    resumed, rest = fit("resumed", tmp_path / "whole" / f"step={stop}.ckpt")
    assert losses[stop:] == rest
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(tensor, resumed[key][name]) for name, tensor in whole[key].items())
    moments = [content["optimizer_states"][0]["state"] for content in (whole, resumed)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])


def test_frozen_parts_stay_out_of_the_checkpoint_which_knows_them(
    picture_data: Data, stage_a_folder: str, text_encoder_folder: Path, tmp_path: Path
) -> None:
    clip = str(text_encoder_folder)
    module = stage_b(stage_a_folder, text_encoder=clip)
    saved = ModelCheckpoint(tmp_path / "saved", "a", every_n_train_steps=2)
    trainer(tmp_path, max_steps=2, callbacks=[saved]).fit(module, picture_data(4, 4))
    path = tmp_path / "saved" / "a.ckpt"
    content = torch.load(path, weights_only=True)
    assert {name.split(".")[0] for name in content["state_dict"]} == {"unet", "compressor"}
    assert content["text_encoder"] == clip
    assert content["frozen"]["stage_a"]["source"] == stage_a_folder
    assert {entry["class"] for entry in content["networks"].values()} == {"StageBUNet", "SemanticCompressor"}
    for network, kind in ((module.unet, StageBUNet), (module.compressor, SemanticCompressor)):
        loaded = kind.from_checkpoint(path).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in network.state_dict().items())
    again = stage_b(stage_a_folder, init_from=str(path), text_encoder=clip)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in module.state_dict().items())

    other = tmp_path / "other_a"
    VQGAN.from_preset("tiny", embed_dim=16, num_vq_embeddings=16, scale_factor=0.8).save(other)
    message = rf"stage_a {other} is not the one that the checkpoint was trained with, which came from {stage_a_folder}"
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, max_steps=4).fit(
            stage_b(str(other), text_encoder=clip), picture_data(4, 4), ckpt_path=path, weights_only=True
        )


def test_without_a_text_encoder_texts_do_not_matter(stage_a_folder: str) -> None:
    module = stage_b(stage_a_folder).eval()
    for parameter in module.unet.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    x, t, z = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 4, 8, 8)
    outputs = [module.unet(x, t, z, states) for states in (torch.zeros(2, 3, 32), 9 * torch.randn(2, 3, 32))]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert all(
        p is not module.unet.clip_mapper.weight for g in module.configure_optimizers().param_groups for p in g["params"]
    )


def test_validation_does_not_depend_on_batches_or_on_when(
    picture_data: Data, stage_a_folder: str, tmp_path: Path
) -> None:
    module = stage_b(stage_a_folder, sampled_batches=100)
    results = []
    for micro_batch_size in (1, 3, 4, 4):
        run = trainer(tmp_path, limit_val_batches=1.0)
        run.validate(module, picture_data(micro_batch_size, 4, val=7), verbose=False)
        results.append({name: float(value) for name, value in run.callback_metrics.items()})
        torch.rand(5)
    buckets = [f"val/loss_at/{i / 5:.1f}-{(i + 1) / 5:.1f}" for i in range(5)]
    names = {f"val/{name}/{corpus}" for name in ("loss", "psnr", "ssim") for corpus in ("seen", "unseen")}
    assert set(results[0]) == names | set(buckets) | {"val/loss/average"}
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-4)
    assert results[2] == results[3]


def test_samples_are_original_a_and_b(picture_data: Data, stage_a_folder: str, tmp_path: Path) -> None:
    module = stage_b(stage_a_folder).eval()
    data = picture_data(3, 3)
    trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)
    batch = next(iter(data.val_dataloader()["seen"]))
    with torch.no_grad():
        pictures, again = module.draw_samples(batch), module.draw_samples(batch)
        alone = module.draw_samples({name: value[1:2] for name, value in batch.items()})
    assert list(pictures) == ["original", "A", "B"]
    for name, picture in pictures.items():
        assert picture.shape == batch["image"].shape
        assert torch.equal(picture, again[name])
        torch.testing.assert_close(picture[1:2], alone[name], rtol=1e-4, atol=1e-5)
    assert generators({"image": batch["image"]}) is None


def test_a_pretrained_backbone(stage_a_folder: str, tmp_path: Path) -> None:
    state = efficientnet_v2_s().state_dict()
    torch.save(state, tmp_path / "efficientnet.pth")
    unet = {**SMALL["unet"], "effnet_embd": 16}
    module = stage_b(stage_a_folder, unet=unet, compressor={}, backbone_weights=str(tmp_path / "efficientnet.pth"))
    for name, tensor in module.compressor.backbone.state_dict().items():
        assert torch.equal(tensor, state[f"features.{name}"])
    with pytest.raises(UsageError, match=r"efficientnet.pth lacks the backbone's features\.\S+:"):
        stage_b(stage_a_folder, backbone_weights=str(tmp_path / "efficientnet.pth"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_share": 1.5}, r"zero_share 1.5 must be in \[0, 1\]"),
        ({"max_loss_weight": 0.5}, r"max_loss_weight 0.5 must be at least 1"),
        ({"unet": {"preset": "tiny"}}, r"unet's effnet_embd is 16 but the compressor's c_latent is 4"),
        ({"compressor": "huge"}, r"SemanticCompressor has no preset 'huge'"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm -1.0 must be above 0"),
    ],
)
def test_bad_arguments(stage_a_folder: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stage_b(stage_a_folder, **changes)


def test_text_that_does_not_fit(stage_a_folder: str, text_encoder_folder: Path) -> None:
    unet = {**SMALL["unet"], "clip_embd": 24}
    with pytest.raises(UsageError, match="clip_embd is 24 but the text encoder's width is 32: set clip_embd to that"):
        stage_b(stage_a_folder, unet=unet, text_encoder=str(text_encoder_folder))


@pytest.mark.filterwarnings("ignore:.*bf16.*")
def test_mixed_precision_keeps_float32_weights(picture_data: Data, stage_a_folder: str, tmp_path: Path) -> None:
    module = stage_b(stage_a_folder)
    run = trainer(tmp_path, max_steps=2, precision="bf16-mixed")
    run.fit(module, picture_data(2, 4))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    moments: set[Any] = {s["exp_avg"].dtype for s in run.optimizers[0].state.values()}
    assert moments == {torch.float32}


def test_truncated_captions_are_counted(
    picture_data: Data, stage_a_folder: str, text_encoder_folder: Path, tmp_path: Path
) -> None:
    module = stage_b(stage_a_folder, text_encoder=str(text_encoder_folder))
    cut: list[Tensor] = []

    class Lengthen(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch["caption"][0] = "very " * 40 + "long"

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            cut.append(trainer.callback_metrics["train/captions_cut"])

    trainer(tmp_path, max_steps=1, callbacks=[Lengthen()]).fit(module, picture_data(4, 4))
    assert cut == [1.0]


TWO_PROCESSES = """
import json, runpy, sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rewurst.callbacks import LogSamples, WeightAverage
from rewurst.modules import StageB

settings = json.loads(Path(sys.argv[1]).read_text())
Pictures = runpy.run_path(settings["conftest"])["picture_data"].__wrapped__()
torch.manual_seed(0)
module = StageB(**settings["model"], optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05))
for part in module.modules():
    if isinstance(part, torch.nn.BatchNorm2d):
        part.eval()
trainer = Trainer(
    accelerator="cpu", devices=settings["devices"], strategy="ddp" if settings["devices"] > 1 else "auto",
    max_steps=3, max_epochs=-1, val_check_interval=6 // settings["devices"], check_val_every_n_epoch=None,
    num_sanity_val_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, use_distributed_sampler=False, default_root_dir=settings["folder"],
    callbacks=[WeightAverage(0.5), LogSamples(2)],
)
trainer.fit(module, Pictures(2, 4))
if trainer.is_global_zero:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    weights = {name: value.double().sum().item() for name, value in module.named_parameters()}
    Path(settings["folder"], "result.json").write_text(json.dumps([metrics, weights]))
"""


def test_two_processes_train_and_validate_as_one(stage_a_folder: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    conftest = Path(__file__).parents[1] / "conftest.py"
    results = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        model = {**SMALL, "stage_a": stage_a_folder, "sampled_batches": 9}
        settings = {"conftest": str(conftest), "model": model, "devices": devices, "folder": str(folder)}
        (folder / "settings.json").write_text(json.dumps(settings))
        run_ranks(tmp_path / "script.py", str(folder / "settings.json"), processes=devices)
        results.append(json.loads((folder / "result.json").read_text()))
        assert len(list((folder / "samples").glob("*.png"))) == 2
    (metrics, weights), (metrics_of_two, weights_of_two) = results
    assert metrics_of_two == pytest.approx(metrics, rel=1e-3)
    assert weights_of_two == pytest.approx(weights, rel=1e-3, abs=1e-3)
