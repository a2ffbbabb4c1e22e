"""Stage C trains on a frozen compressor's embeddings: losses, scale, text encoders, resuming, frozen parts, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from stage_runs import column, fit_six_steps, time_of, trainer

from rewurst import UsageError
from rewurst.callbacks import LRRewarming, WarmupCosine
from rewurst.modules import StageB, StageC, TextToImage
from rewurst.modules.networks import VQGAN, Prior
from rewurst.modules.pipeline.export import export_diffusers
from rewurst.modules.shared.text_encoder import checkpoint_text_encoder
from rewurst.preparation.tokenizer import train_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*dataloader is not resumable.*",
    "ignore:.*exists and is not empty",
    "ignore:The dirpath has changed",
    "ignore:.*in eval mode at the start",
)

PRIOR: dict[str, Any] = {"preset": "tiny", "c_in": 4, "c": 32, "c_cond": 16, "nhead": 2}
LENGTH = 6
Data = Callable[..., Any]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write checkpoints of small Stages A and B and a tokenizer, as training and preparation do."""
    folder = tmp_path_factory.mktemp("stages")
    torch.manual_seed(1)
    VQGAN.from_preset("tiny", embed_dim=16, num_vq_embeddings=16, scale_factor=0.8).save(folder / "a")
    unet = {"preset": "tiny", "c_hidden": [16, 32], "c_cond": 16, "effnet_embd": 4}
    compressor = {"preset": "tiny", "widths": [8, 16], "c_latent": 4}
    module = StageB(str(folder / "a"), unet, compressor, text_length=LENGTH)
    for parameter in module.unet.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape))
    norm = module.compressor.mapper[1]
    norm.weight.data.uniform_(1, 2)
    norm.bias.data.uniform_(-1, 1)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "b.ckpt")
    (folder / "captions.txt").write_text("disc 0 1 2 3 4 5 6 7 8 9 disc disc")
    train_tokenizer([str(folder / "captions.txt")], 270, folder / "tokenizer", progress=False)
    return {"a": str(folder / "a"), "b": str(folder / "b.ckpt"), "tokenizer": str(folder / "tokenizer")}


@pytest.fixture
def stage_c(stages: dict[str, str]) -> Callable[..., StageC]:
    def build(**changes: Any) -> StageC:
        text = {"tokenizer": stages["tokenizer"], "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        text |= {"num_attention_heads": 2, "max_position_embeddings": LENGTH}
        torch.manual_seed(0)
        defaults = {"prior": PRIOR, "text_encoder": text, "latent_mean": None, "latent_std": None}
        few = {"sampling_steps": 3, "stage_b_steps": 2}
        return StageC(stages["b"], **{**defaults, **few, **changes})

    return build


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def test_it_learns_a_few_pictures(picture_data: Data, stage_c: Callable[..., StageC], tmp_path: Path) -> None:
    module = stage_c()
    data = picture_data(8, 8, pictures=8, val=8, steps=200)
    run = trainer(tmp_path, max_steps=150, callbacks=[LRRewarming(WarmupCosine(5e-3, 5e-4, 0.1), 150)])
    before = trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)[-1]
    run.fit(module, data)
    after = trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)[-1]
    assert after["val/loss/average"] < 0.7 * before["val/loss/average"]


def test_accumulation_is_the_larger_batch(picture_data: Data, stage_c: Callable[..., StageC], tmp_path: Path) -> None:
    """With a trained text encoder; time and noise belong to the sample."""
    results = []
    for micro_batch_size in (1, 2, 4):
        module = stage_c(optimizer=sgd)
        run = trainer(tmp_path, max_steps=4)
        run.fit(module, picture_data(micro_batch_size, 4))
        results.append((dict(module.named_parameters()), column(run.logger, "train/loss")))
    for weights, losses in results[1:]:
        assert losses == pytest.approx(results[0][1], rel=1e-5)
        for name, parameter in results[0][0].items():
            torch.testing.assert_close(weights[name], parameter, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("largest", "high", "first"), [(1.0, 0.0, 0), (20.0, 0.6, 0), (20.0, 0.6, 1)])
def test_the_loss_is_the_papers(
    picture_data: Data, stage_c: Callable[..., StageC], tmp_path: Path, largest: float, high: float, first: int
) -> None:
    """Computed independently, one sample at a time: t, noise, eps = (x - a) / (|1 - b| + 1e-5), p2 = 1 / (1 + snr).

    Also with the optional weight 1 / snr near t = 1, and more samples there.
    """
    noise: dict[str, Any] = {"max_loss_weight": largest, "high_noise_share": high, "high_noise_steps": first}
    module = stage_c(latent_mean=3.0, latent_std=0.5, **noise)
    module.prior.get_parameter("out.1.weight").data.normal_(std=0.05)
    batch: dict[str, Any] = {}

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, b: Any, batch_idx: int) -> None:
            batch.update(b, weights={name: t.clone() for name, t in pl_module.state_dict().items()})

    run = trainer(tmp_path, max_steps=1, callbacks=[Keep()])
    run.fit(module, picture_data(8, 8))
    module.load_state_dict(batch.pop("weights"))
    losses = []
    with torch.no_grad():
        for index, seed in enumerate(batch["seed"]):
            generator = torch.Generator().manual_seed(int(seed))
            torch.rand(1, generator=generator)  # a time of its own, where nothing spreads times over the batch
            t = time_of(float(batch["quantile"][index]), 1.0 if first else high)
            x = (module.compressor.module(batch["image"][index : index + 1] / 255) + 0.5) / 3
            noise = torch.randn(x.shape, generator=generator)
            share = float(
                np.clip(
                    np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2, 1e-4, 0.9999
                )
            )
            noised = share**0.5 * x + (1 - share) ** 0.5 * noise
            assert module.text_model is not None
            text = module.text_model([batch["caption"][index]])
            assert text.shape == (1, LENGTH, 16)
            error = (module.prior(noised, torch.tensor([t]), text) - noise).square().mean()
            snr = share / (1 - share)
            losses.append(float(error) / (1 + snr) * min(max(1 / snr, 1), largest))
    assert column(run.logger, "train/loss") == pytest.approx([np.mean(losses)], rel=1e-4)


def test_the_own_scale_standardizes(picture_data: Data, stage_c: Callable[..., StageC]) -> None:
    module = stage_c()
    images = torch.rand(64, 3, 32, 32)
    compressor = module.compressor.module
    compressor.train()  # statistics of this batch, as running ones are of all
    with torch.no_grad():
        x = module.prior.normalize(compressor(images))
    compressor.eval()
    assert abs(float(x.mean())) < 1e-3
    assert float(x.std()) == pytest.approx(1, abs=1e-2)
    z = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(module.prior.denormalize(module.embeddings({"z": z})), z)


@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize("own", [True, False])
def test_a_resumed_run_is_the_whole_one(
    picture_data: Data, stage_c: Callable[..., StageC], text_encoder_folder: Path, tmp_path: Path, stop: int, own: bool
) -> None:
    def fit(name: str, ckpt_path: Path | None = None) -> tuple[dict[str, Any], list[float]]:
        changes = {} if own else {"text_encoder": str(text_encoder_folder)}
        module = stage_c(prior={**PRIOR, "dropout": 0.2, "c_cond": 16 if own else 32}, **changes)
        return fit_six_steps(tmp_path, name, module, picture_data(2, 4), ckpt_path)

    whole, losses = fit("whole")
    resumed, rest = fit("resumed", tmp_path / "whole" / f"step={stop}.ckpt")
    assert losses[stop:] == rest
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(tensor, resumed[key][name]) for name, tensor in whole[key].items())
    assert any(not torch.equal(t, whole["current_model_state"][name]) for name, t in whole["state_dict"].items())
    moments = [content["optimizer_states"][0]["state"] for content in (whole, resumed)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])
    assert {name.split(".")[0] for name in whole["state_dict"]} == ({"prior", "text_model"} if own else {"prior"})


def test_frozen_parts_are_checked(
    picture_data: Data,
    stage_c: Callable[..., StageC],
    text_encoder_folder: Path,
    stages: dict[str, str],
    tmp_path: Path,
) -> None:
    def fit(module: StageC, steps: int, ckpt_path: Path | None = None) -> None:
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        run = trainer(tmp_path, max_steps=steps, callbacks=[saved])
        run.fit(module, picture_data(4, 4), ckpt_path=ckpt_path, weights_only=True)

    clip = {"text_encoder": str(text_encoder_folder), "prior": {**PRIOR, "c_cond": 32}}
    fit(stage_c(**clip), 2)
    path = tmp_path / "step=2.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["text_encoder"] == str(text_encoder_folder)
    assert content["frozen"].keys() == {"compressor", "text_encoder"}
    assert content["networks"].keys() == {"prior"}
    again = stage_c(init_from=str(path), **clip).prior.state_dict()
    assert all(torch.equal(tensor, content["state_dict"][f"prior.{name}"]) for name, tensor in again.items())
    assert all(torch.equal(t, again[name]) for name, t in Prior.from_checkpoint(path).state_dict().items())

    other = torch.load(stages["b"], weights_only=True)
    other["state_dict"]["compressor.mapper.0.weight"] += 1
    torch.save(other, tmp_path / "other_b.ckpt")
    changed = StageC(str(tmp_path / "other_b.ckpt"), latent_mean=None, latent_std=None, **clip)
    with pytest.raises(UsageError, match=r"compressor \S+other_b.ckpt is not the one that the checkpoint was trained"):
        fit(changed, 4, path)
    with pytest.raises(
        UsageError, match=r"latent_mean and latent_std are {'latent_mean': 2.0, 'latent_std': 0.0}, the"
    ):
        fit(stage_c(latent_mean=2.0, latent_std=0.0, **clip), 4, path)


def test_a_trained_text_encoder_is_in_the_checkpoint(
    picture_data: Data, stage_c: Callable[..., StageC], tmp_path: Path
) -> None:
    module = stage_c()
    before = module.encode(["disc 3"]).detach().clone()
    saved = ModelCheckpoint(tmp_path, "c", every_n_train_steps=3)
    callbacks = [LRRewarming(WarmupCosine(1e-2, 1e-3, 0.1), 3), saved]
    trainer(tmp_path, max_steps=3, callbacks=callbacks).fit(module, picture_data(4, 4))
    texts = ["disc 3", "", "a text of which only the beginning is seen"]
    kept = checkpoint_text_encoder(tmp_path / "c.ckpt")
    assert kept is not None
    assert not isinstance(kept, str)
    with pytest.warns(UserWarning, match="of which 6 are used"):
        states = kept.encode(texts)
    assert torch.equal(states, module.encode(texts))
    assert states.isfinite().all()
    assert not torch.allclose(states[:1], before, atol=1e-3), "it was trained"
    again = stage_c(init_from=str(tmp_path / "c.ckpt"))
    assert torch.equal(again.encode(texts), states)


def test_validation_does_not_depend_on_batches_or_on_when(
    picture_data: Data, stage_c: Callable[..., StageC], tmp_path: Path
) -> None:
    module = stage_c()
    results = []
    for micro_batch_size in (1, 3, 4, 4):
        run = trainer(tmp_path, limit_val_batches=1.0)
        run.validate(module, picture_data(micro_batch_size, 4, val=7), verbose=False)
        results.append({name: float(value) for name, value in run.callback_metrics.items()})
        torch.rand(5)
    buckets = {f"val/loss_at/{i / 5:.1f}-{(i + 1) / 5:.1f}" for i in range(5)}
    assert set(results[0]) == buckets | {"val/loss/seen", "val/loss/unseen", "val/loss/average"}
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-4)
    assert results[2] == results[3]


def test_samples_are_original_b_and_c(picture_data: Data, stage_c: Callable[..., StageC], tmp_path: Path) -> None:
    module = stage_c().eval()
    data = picture_data(3, 3)
    trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)
    batch = next(iter(data.val_dataloader()["seen"]))
    with torch.no_grad():
        pictures, again = module.draw_samples(batch), module.draw_samples(batch)
        alone = module.draw_samples({name: value[1:2] for name, value in batch.items()})
        cached = {**batch, "z": module.compressor.module(batch["image"] / 255)}
        del cached["image"]
        from_cached = module.draw_samples(cached)
    assert list(pictures) == ["original", "B", "C"]
    for name, picture in pictures.items():
        assert picture.shape == batch["image"].shape
        assert torch.equal(picture, again[name])
        torch.testing.assert_close(picture[1:2], alone[name], rtol=1e-4, atol=1e-4)
    assert list(from_cached) == ["B", "C"]
    torch.testing.assert_close(from_cached["C"], pictures["C"])


def test_an_export_draws_diffusers_pictures(
    picture_data: Data,
    stage_c: Callable[..., StageC],
    stages: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Stage C with its own text encoder and scale, a Stage B that ignores text, 4 pixels per latent."""
    from diffusers import DiffusionPipeline

    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    module = stage_c(guidance_scale=3.0)
    module.prior.get_parameter("out.1.weight").data.normal_(std=0.02)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "c.ckpt")
    out = export_diffusers(stages["a"], stages["b"], tmp_path / "c.ckpt", tmp_path / "out")

    ours = TextToImage.from_folder(out)
    assert (ours.latent_mean, ours.latent_std) == (module.prior.latent_mean, module.prior.latent_std) != (42, 1)
    steps = {"prior_num_inference_steps": 3, "num_inference_steps": 2, "prior_guidance_scale": 3.0}
    options = {"height": 32, "width": 32, "output_type": "pt", "seed": 3}
    drawn = ours(["disc 3"], **options, **steps).images
    module.eval()
    again = module.draw(["disc 3"], (8, 8), [torch.Generator().manual_seed(3)])
    torch.testing.assert_close(drawn, again, rtol=1e-4, atol=1e-4)

    above, below = (
        DiffusionPipeline.from_pretrained(out / part, trust_remote_code=True) for part in ("prior", "decoder")
    )
    for pipeline in (above, below):
        pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    z = above("disc 3", height=32, width=32, num_inference_steps=3, guidance_scale=3.0, generator=generator)
    theirs = below(
        z.image_embeddings, "disc 3", num_inference_steps=2, guidance_scale=0.0, generator=generator, output_type="pt"
    )
    assert drawn.std() > 0.03
    assert (theirs.images - drawn).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": "huge"}, "Prior has no preset 'huge'"),
        ({"prior": {**PRIOR, "c_in": 3}}, "prior's c_in is 3 but the compressor's c_latent is 4: set c_in to that"),
        ({"prior": {**PRIOR, "c_cond": 3}}, "prior's c_cond is 3 but the text encoder's width is 16"),
        ({"latent_mean": 2.0}, "latent_mean 2.0 and latent_std None: give both or neither"),
        ({"latent_mean": 0.0, "latent_std": 1.0}, "latent_mean 0.0 must be above 0"),
        ({"text_encoder": {"hidden_size": 16}}, "text_encoder has no tokenizer"),
        (
            {"text_encoder": {"tokenizer": "x", "hidden_sise": 16}},
            r"hidden_sise is unknown.*did you mean 'hidden_size'",
        ),
        ({"max_grad_norm": -1.0}, "max_grad_norm -1.0 must be above 0"),
        ({"max_loss_weight": 0.5}, "max_loss_weight 0.5 must be at least 1"),
        ({"high_noise_share": 1.5}, r"high_noise_share 1.5 must be in \[0, 1\]"),
    ],
)
def test_bad_arguments(stage_c: Callable[..., StageC], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stage_c(**changes)


def test_pictures_need_stage_b_and_a(stage_c: Callable[..., StageC], stages: dict[str, str], tmp_path: Path) -> None:
    module = stage_c(stage_a=str(tmp_path / "a"))
    VQGAN.from_preset("tiny", embed_dim=16, num_vq_embeddings=16).save(tmp_path / "a")
    with pytest.raises(UsageError, match=r"stage_a .* is not the one that the checkpoint was trained with"):
        _ = module.lower_stages
    content = torch.load(stages["b"], weights_only=True)
    del content["frozen"]
    torch.save(content, tmp_path / "b.ckpt")
    clip = {
        "prior": PRIOR,
        "text_encoder": {"tokenizer": stages["tokenizer"], "hidden_size": 16, "num_attention_heads": 2},
    }
    with pytest.raises(UsageError, match=r"b.ckpt names no Stage A, which is needed to generate images: give stage_a"):
        _ = StageC(str(tmp_path / "b.ckpt"), **clip).lower_stages
