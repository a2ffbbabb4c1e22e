"""Single-stage latent diffusion, from text to Stage A's latents: the baseline for the cascade."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from .. import UsageError
from .networks import VQGAN, ConditionCache, StageBUNet
from .networks.base import Settings, build, initialise
from .networks.layers import AUTHORS_WIDTH
from .optimizers.choice import OptimizerChoice
from .shared.batches import Batch, generators, pixels
from .shared.flops import FROZEN, TRAINED, forward_flops
from .shared.frozen import Frozen
from .shared.image_metrics import valid_samples
from .shared.text_diffusion import TextStage


class LatentDiffusion(TextStage):
    """Text-conditional diffusion in a frozen Stage A's latents, without a compressor (Rombach et al. 2022).

    This is the Würstchen paper's own baseline. The network is Stage B's, without the compressor's latents at any level.
    Everything else is as in Stage C: the loss, its weights, dropped captions, sampling with guidance.

    Batches are dicts with ``image`` (n, 3, height, width), bytes or floats in [0, 1], or ``a`` (n, 4, h, w), Stage A's
    latents; with ``caption``, a list of n texts, or ``text``, its states (n, 77, c) from a frozen encoder; and with
    ``seed``, (n,). A sample's random numbers come from its seed, and its time from ``quantile``, (n,) in [0, 1), if
    present. If the data module provides prepared latents, only the networks that made them are accepted.

    It logs the same as :class:`StageC`.

    Args:
        stage_a: Checkpoint or folder of Stage A.
        unet: Preset of :class:`StageBUNet`, or its arguments; no level may see the compressor's latents, so a preset's
            ``inject_effnet`` is turned off.
        text_encoder: Folder or hub name of a frozen CLIP text model with its tokenizer; or settings of a small one to
            train: those of ``transformers.CLIPTextConfig``, and ``tokenizer``, a folder.
        init_from: Checkpoint, in any format, with initial weights of the U-Net, and of a trained text encoder if the
            checkpoint has one.
        optimizer: Optimizer of the U-Net and of a trained text encoder: ``adamw``, ``adamw_8bit``, ``lion``,
            ``lion_8bit``, ``muon``, or any other optimizer over parameter groups.
        max_loss_weight: Largest factor of the loss near t = 1, as in :class:`StageC`.
        high_noise_share: Share of training samples with high noise, as in :class:`StageC`.
        high_noise_steps: Number of initial steps with only high noise, as in :class:`StageC`.
        sampling_steps: Number of sampling steps per image.
        guidance_scale: Scale of the guidance in sampling; off up to 1.
        max_grad_norm: Norm to clip gradients to, or None for no clipping; ``Trainer(gradient_clip_val)`` overrides it.

    Raises:
        UsageError: A network's argument is unknown, or networks or weights do not fit.
    """

    planning_arguments: ClassVar[dict[str, Any]] = {"init_from": None}
    """Arguments that `rewurst plan` replaces, because weights do not change the sizes of tensors."""

    def __init__(
        self,
        stage_a: str,
        unet: Settings = "paper",
        text_encoder: str | dict[str, Any] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        init_from: str | None = None,
        optimizer: OptimizerChoice = "adamw",
        max_loss_weight: float = 1.0,
        high_noise_share: float = 0.0,
        high_noise_steps: int = 0,
        sampling_steps: int = 60,
        guidance_scale: float = 4.0,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        noise = (max_loss_weight, high_noise_share, high_noise_steps)
        super().__init__(optimizer, max_grad_norm, *noise, sampling_steps, guidance_scale)
        self.unet = build(StageBUNet, without_embedding(unet))
        if self.unet.config["c_hidden"][0] < AUTHORS_WIDTH:
            # Only zero padding tells positions apart, and only if channels are not zero, so they start with a constant.
            nn.init.normal_(self.unet.get_parameter("embedding.1.bias"))
        self.stage_a = Frozen(VQGAN.from_checkpoint(stage_a, torch.float32), stage_a)
        self.take_text_encoder(text_encoder)
        self._check_widths()
        if init_from is not None:
            initialise(self.unet, init_from)
            self.initialise_text(init_from)

    def data_of(self, batch: Batch) -> Tensor:
        """Return Stage A's latents in the U-Net's scale, from a batch's ``a`` or from its images.

        Stage A runs in float32 even under mixed precision, so that the latents are equal to prepared ones.
        """
        if "a" in batch:
            latents: Tensor = batch["a"]
            return latents.float()
        if "image" not in batch:
            raise UsageError("the data has neither images nor a, Stage A's latents: prepare latents with --what z,a")
        images = pixels(batch)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.stage_a.on(images.device).to_latents(images).float()

    def predict_noise(self, x: Tensor, t: Tensor, text: Tensor, cache: ConditionCache | None = None) -> Tensor:
        """Return the U-Net's prediction of the noise."""
        times = len(text) // len(x)
        noise: Tensor = self.unet(x.repeat(times, 1, 1, 1), t.repeat(times), None, text, cache)
        return noise

    def samples_in(self, batch: Batch) -> int:
        """Return the number of samples in a batch."""
        return len(batch["caption"])

    def flops(self, batch: Batch) -> float:
        """Return the FLOPs of a training step on a micro-batch; frozen networks run forward only, if at all."""
        vqgan, encoder, n = self.stage_a.module, self.encoder, self.samples_in(batch)
        total = self.text_flops_of(batch)
        if "a" in batch:
            x = tuple(batch["a"].shape)
        else:
            images = tuple(batch["image"].shape)
            x = (n, self.unet.config["c_in"], *(side // vqgan.compression for side in images[2:]))
            total += FROZEN * forward_flops(vqgan, [images], "encode")
        return total + TRAINED * forward_flops(self.unet, [x, (n,), None, (n, encoder.length, encoder.width)])

    @torch.no_grad()
    def draw(self, captions: Sequence[str], size: Sequence[int], randomness: list[Generator] | None = None) -> Tensor:
        """Generate images (n, 3, height, width) in [0, 1] for captions; ``size`` is that of the latents."""
        x = self.draw_data(captions, (self.unet.config["c_in"], *size), randomness)
        return self.stage_a.on(x.device).to_images(x).float()

    def draw_samples(self, batch: Batch) -> dict[str, Tensor]:
        """Return originals, Stage A's reconstructions and generated images for ``LogSamples``."""
        latents = self.data_of(batch)
        pictures = {"original": pixels(batch)} if "image" in batch else {}
        pictures["A"] = self.stage_a.on(latents.device).to_images(latents).float()
        pictures["drawn"] = self.draw(batch["caption"], latents.shape[-2:], generators(batch))
        return pictures

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return images generated for the captions, without padding samples."""
        drawn = self.draw(batch["caption"], self.data_of(batch).shape[-2:], generators(batch))
        return drawn[valid_samples(batch, drawn)]

    def frozen_parts(self) -> dict[str, Frozen[Any] | None]:
        """Return Stage A, and the text encoder unless it is trained."""
        return {"stage_a": self.stage_a, "text_encoder": self.text_encoder}

    def _check_widths(self) -> None:
        channels = self.stage_a.module.config["latent_channels"]
        for name, other, needed in (
            ("c_in", "stage_a's latent_channels", channels),
            ("c_out", "stage_a's latent_channels", channels),
            ("clip_embd", "the text encoder's width", self.encoder.width),
        ):
            if self.unet.config[name] != needed:
                raise UsageError(
                    f"unet's {name} is {self.unet.config[name]} but {other} is {needed}: set {name} to that"
                )


def without_embedding(unet: Settings) -> dict[str, Any]:
    """Return a U-Net's arguments such that no level sees the compressor's latents.

    Raises:
        UsageError: The arguments explicitly let a level see them.
    """
    arguments = {"preset": unet} if isinstance(unet, str) else dict(unet)
    if any(arguments.get("inject_effnet", [])):
        raise UsageError(
            f"unet's inject_effnet is {arguments['inject_effnet']}: nothing is injected here, leave it out"
        )
    if "c_hidden" in arguments:
        levels = len(arguments["c_hidden"])
    else:
        preset = {key: value for key, value in arguments.items() if key == "preset"}
        with torch.device("meta"):
            levels = len(build(StageBUNet, preset).config["c_hidden"])
    return arguments | {"inject_effnet": [False] * levels}
