"""Stage B with the Semantic Compressor: diffusion in Stage A's latents, from latents 42 times smaller than images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from .. import UsageError
from .networks import VQGAN, ConditionCache, SemanticCompressor, StageBUNet, TextEncoder, diffusion
from .networks.base import Settings, build, holds, initialise
from .networks.weight_files import read_file
from .optimizers.choice import STAGE_B, OptimizerChoice, OptimizerSettings
from .shared.batches import Batch, generators, pixels, uniforms
from .shared.diffusion import DiffusionStage
from .shared.flops import FROZEN, TRAINED, forward_flops, text_flops
from .shared.frozen import Frozen
from .shared.image_metrics import psnr, ssim, valid_samples


class StageB(DiffusionStage):
    """Würstchen's Stage B and Semantic Compressor, trained together (arXiv 2306.00637).

    A frozen Stage A encodes images as the latents that the U-Net denoises. The compressor encodes them as the embedding
    z that the U-Net is conditioned on. In training, a sample's z is zeroed with probability ``zero_share``, or else
    noised with probability ``noise_share`` to a time from U(0, ``noise_until``), so that Stage B tolerates Stage C's
    errors. The loss is the mean squared error of the predicted noise.

    Batches are dicts with ``image`` (n, 3, height, width), bytes or floats in [0, 1], ``caption``, a list of n texts,
    and ``seed``, (n,). A sample's random numbers come from its seed, and its time from ``quantile``, (n,) in [0, 1), if
    present.

    It logs ``train/loss`` and ``train/grad_norm``; per corpus ``val/loss`` (t evenly spread over [0, 1]), and
    ``val/psnr`` (mean of each image's) and ``val/ssim`` of images generated from z; and over all corpora
    ``val/loss_at/<interval of t>``. Every validation uses the same times and noise.

    Args:
        stage_a: Checkpoint or folder of Stage A.
        unet: Preset of :class:`StageBUNet`, or its arguments.
        compressor: Preset of :class:`SemanticCompressor`, or its arguments.
        text_encoder: Folder or hub name of a frozen CLIP text model with its tokenizer. Without one, the U-Net ignores
            any text (its ``clip_mapper`` has zero weights).
        text_length: Number of states in place of a text without a text encoder; a later encoder must have as many.
        init_from: Checkpoint, in any format, with initial weights of the U-Net, and of the compressor if it has them.
        backbone_weights: Path of torchvision's ``efficientnet_v2_s-dd5fe13b.pth``, to initialize a compressor.
        optimizer: Optimizer of both networks: ``adamw``, ``adamw_8bit``, ``lion``, ``lion_8bit``, ``muon``, or any
            other optimizer over parameter groups.
        zero_share: Share of samples whose embedding is zeroed.
        noise_share: Share of the other samples whose embedding is noised.
        noise_until: Largest time to noise embeddings to.
        max_loss_weight: Upper bound of a loss's weight 1 / snr(t); the paper uses 1. Near t = 1 only z describes the
            image, but the noise's error hardly shows what is missing. At smaller t, simple images are visible through
            the noise. So without the weight a small model learns almost nothing from z.
        min_loss_weight: Lower bound of that weight, up to 1. At small t, where 1 / snr is near 0, the noise's error is
            large; with a weight of 1 it dominates the loss and delays learning from z.
        sampling_steps: Number of sampling steps per image in validation.
        guidance_scale: Scale of the guidance of these images, away from the zero embedding and the text ""; off up to
            1. The paper uses 4 (section 4), diffusers none.
        sampled_batches: Number of validation batches per corpus and rank for which images are generated.
        max_grad_norm: Norm to clip gradients to, or None for no clipping; ``Trainer(gradient_clip_val)`` overrides it.

    Raises:
        UsageError: A network's argument is unknown, or networks or weights do not fit.
    """

    optimizer_settings: ClassVar[OptimizerSettings] = STAGE_B
    planning_arguments: ClassVar[dict[str, Any]] = {"init_from": None, "backbone_weights": None}
    """Arguments that `rewurst plan` replaces, because they do not change the sizes of tensors."""
    charts: ClassVar[dict[str, list[str]]] = {
        "PSNR of pictures (dB)": ["val/psnr/.*"],
        "SSIM of pictures": ["val/ssim/.*"],
        "Error by diffusion time": ["val/loss_at/.*"],
    }

    def __init__(
        self,
        stage_a: str,
        unet: Settings = "paper",
        compressor: Settings = "paper",
        text_encoder: str | None = None,
        text_length: int = 77,
        init_from: str | None = None,
        backbone_weights: str | None = None,
        optimizer: OptimizerChoice = "adamw",
        zero_share: float = 0.05,
        noise_share: float = 0.3,
        noise_until: float = 0.5,
        max_loss_weight: float = 1.0,
        min_loss_weight: float = 1.0,
        sampling_steps: int = 12,
        guidance_scale: float = 0.0,
        sampled_batches: int = 1,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__(optimizer, max_grad_norm, max_loss_weight)
        shares = {"zero_share": zero_share, "noise_share": noise_share, "noise_until": noise_until}
        for name, value in (shares | {"min_loss_weight": min_loss_weight}).items():
            if not 0 <= value <= 1:
                raise UsageError(f"{name} {value} must be in [0, 1]")
        self.unet, self.compressor = build(StageBUNet, unet), build(SemanticCompressor, compressor)
        if backbone_weights is not None:
            _load_backbone(self.compressor, backbone_weights)
        if init_from is not None:
            initialise(self.unet, init_from)
            if holds(init_from, SemanticCompressor):
                initialise(self.compressor, init_from)
        self.stage_a = Frozen(VQGAN.from_checkpoint(stage_a, torch.float32), stage_a)
        self.text_encoder: Frozen[TextEncoder] | None = None
        if text_encoder is not None:
            self.text_encoder = Frozen(TextEncoder.from_pretrained(text_encoder), text_encoder)
        else:
            nn.init.zeros_(self.unet.clip_mapper.weight).requires_grad_(False)
        self._check_widths()
        self.text_length = text_length
        self.min_loss_weight = min_loss_weight
        self.zero_share, self.noise_share, self.noise_until = zero_share, noise_share, noise_until
        self.sampling_steps, self.sampled_batches = sampling_steps, sampled_batches
        self.guidance_scale = guidance_scale

    def latents(self, images: Tensor) -> Tensor:
        """Return Stage A's latents (n, 4, h, w) of images in [0, 1], in the U-Net's scale."""
        with torch.no_grad():
            return self.stage_a.on(images.device).to_latents(images).float()

    def text_states(self, captions: Sequence[str]) -> Tensor:
        """Return the states (n, length, width) of captions, or zeros without a text encoder."""
        if self.text_encoder is None:
            width = self.unet.config["clip_embd"]
            return torch.zeros(len(captions), self.text_length, width, device=self.device)
        with warnings.catch_warnings(record=True) as cut:
            warnings.simplefilter("always")
            states = self.text_encoder.on(self.device).encode(captions)
        if self._trainer is not None and self.trainer.training:
            self.log("train/captions_cut", float(len(cut)), batch_size=1)
        return states

    def flops(self, batch: Batch) -> float:
        """Return the FLOPs of a training step on a micro-batch; frozen networks run forward only."""
        images, vqgan, config = tuple(batch["image"].shape), self.stage_a.module, self.unet.config
        n, length = images[0], self.text_length
        total = FROZEN * forward_flops(vqgan, [images], "encode") + TRAINED * forward_flops(self.compressor, [images])
        if self.text_encoder is not None:
            length = self.text_encoder.module.length
            total += FROZEN * text_flops(self.text_encoder.module, n)
        latents = (n, config["c_in"], *(side // vqgan.compression for side in images[2:]))
        z = (n, config["effnet_embd"], *self.compressor.latent_size(images[2:]))
        return total + TRAINED * forward_flops(self.unet, [latents, (n,), z, (n, length, config["clip_embd"])])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a micro-batch."""
        images, randomness = pixels(batch), generators(batch)
        chance, zeroed, noised, level = uniforms(randomness, len(images), 4, images.device)
        t, latents = diffusion.training_times(self.quantiles(batch, chance)), self.latents(images)
        noise = diffusion.draw(latents.shape, randomness, latents)
        z = self._disturbed(self.compressor(images).float(), zeroed, noised, level, randomness)
        text = self.text_states(batch["caption"])
        losses = self._losses(latents, t, noise, z, text)
        return self.record((losses * self._weight(t)).mean(), batch)

    def _weight(self, t: Tensor) -> Tensor:
        """Return the weight (n,) of the noise's error at t."""
        return diffusion.inverse_snr_weight(t, self.max_loss_weight, self.min_loss_weight)

    def _disturbed(
        self, z: Tensor, zeroed: Tensor, noised: Tensor, level: Tensor, randomness: list[Generator] | None
    ) -> Tensor:
        """Zero or noise each sample's embedding according to its three uniform numbers, (n,) each."""
        noise = diffusion.draw(z.shape, randomness, z.detach())
        with_noise = diffusion.diffuse(z, level * self.noise_until, noise)
        z = torch.where((noised < self.noise_share)[:, None, None, None], with_noise, z)
        return torch.where((zeroed < self.zero_share)[:, None, None, None], 0.0, z)

    def _losses(self, latents: Tensor, t: Tensor, noise: Tensor, z: Tensor, text: Tensor) -> Tensor:
        """Return the mean squared error (n,) of the noise predicted at t."""
        predicted = self.unet(diffusion.diffuse(latents, t, noise), t, z, text).float()
        losses: Tensor = (predicted - noise).square().mean((1, 2, 3))
        return losses

    @torch.no_grad()
    def draw_latents(
        self, z: Tensor, text: Tensor, size: Sequence[int], randomness: list[Generator] | None, steps: int | None = None
    ) -> Tensor:
        """Generate Stage A latents (n, 4, *size) from embeddings (n, 16, h, w), by DDPM in evenly spaced steps."""
        like = torch.empty(0, device=z.device)
        x = diffusion.draw((len(z), self.unet.config["c_in"], *size), randomness, like)
        if self.guidance_scale > 1:
            text = torch.cat([text, self.text_states([""]).expand_as(text)])
        cache: ConditionCache = {}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.unet.guided(x, t, z, text, cache, self.guidance_scale).float()

        return diffusion.sample(predict, x, diffusion.timesteps(steps or self.sampling_steps), randomness)

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Tensor:
        """Return images in [0, 1] generated from the embeddings of a batch's images, with its seeds' noise."""
        images = pixels(batch)
        stage_a = self.stage_a.on(images.device)
        size = [side // stage_a.compression for side in images.shape[-2:]]
        z, text = self.compressor(images).float(), self.text_states(batch["caption"])
        return stage_a.to_images(self.draw_latents(z, text, size, generators(batch))).float()

    def forward(self, batch: Batch) -> Tensor:
        """Return the same as ``reconstruct``."""
        return self.reconstruct(batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Record each sample's loss at its own time, and in the first batches metrics of images generated from z."""
        images, randomness = pixels(batch), generators(batch)
        counted = valid_samples(batch, images)
        bucket, t = self.validation_times(batch, len(images), randomness)
        latents = self.latents(images)
        noise = diffusion.draw(latents.shape, randomness, latents)
        text = self.text_states(batch["caption"])
        losses = self._losses(latents, t, noise, self.compressor(images).float(), text)
        self.accumulate(dataloader_idx, losses, losses, bucket, counted)
        if batch_idx < self.sampled_batches:
            drawn = self.reconstruct(batch)
            self._means.add("psnr", dataloader_idx, psnr(drawn, images), counted)
            self._means.add("ssim", dataloader_idx, ssim(drawn, images), counted)

    def draw_samples(self, batch: Batch) -> dict[str, Tensor]:
        """Return originals, A's reconstructions and B's images from z for ``LogSamples``."""
        images = pixels(batch)
        stage_a = self.stage_a.on(images.device)
        return {"original": images, "A": stage_a.to_images(self.latents(images)), "B": self.reconstruct(batch)}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return images generated from z, without padding samples."""
        drawn = self.reconstruct(batch)
        return drawn[valid_samples(batch, drawn)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description of the text that Stage B sees."""
        super().on_save_checkpoint(checkpoint)
        if self.text_encoder is not None:
            checkpoint["text_encoder"] = self.text_encoder.source
        else:
            checkpoint["text_length"] = self.text_length

    def frozen_parts(self) -> dict[str, Frozen[Any] | None]:
        """Return Stage A, and the text encoder if there is one."""
        return {"stage_a": self.stage_a, "text_encoder": self.text_encoder}

    def _check_widths(self) -> None:
        config, stage_a = self.unet.config, self.stage_a.module
        pairs = [
            ("c_in", "stage_a's latent_channels", stage_a.config["latent_channels"]),
            ("c_out", "stage_a's latent_channels", stage_a.config["latent_channels"]),
            ("effnet_embd", "the compressor's c_latent", self.compressor.config["c_latent"]),
        ]
        if self.text_encoder is not None:
            pairs.append(("clip_embd", "the text encoder's width", self.text_encoder.module.width))
        for name, other, needed in pairs:
            if config[name] != needed:
                raise UsageError(f"unet's {name} is {config[name]} but {other} is {needed}: set {name} to that")


def _load_backbone(compressor: SemanticCompressor, path: str) -> None:
    """Load EfficientNetV2-S's features from torchvision's file."""
    state = {name.removeprefix("features."): tensor for name, tensor in read_file(path).items()}
    own = compressor.backbone.state_dict()
    if wrong := [name for name in own if name not in state or state[name].shape != own[name].shape]:
        raise UsageError(f"{path} lacks the backbone's features.{wrong[0]}: give efficientnet_v2_s-dd5fe13b.pth")
    compressor.backbone.load_state_dict({name: state[name] for name in own})
