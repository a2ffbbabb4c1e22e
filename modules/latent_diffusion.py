"""Latent diffusion in one stage: from text to Stage A's latents, the baseline that the cascade is held against."""

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

    The Würstchen paper's own baseline: the network is Stage B's, without the compressor's latents at any level, and
    everything else is Stage C's: the loss, its weights, dropped captions, sampling with guidance.

    Batches are dicts with ``image`` (n, 3, height, width), bytes or floats in [0, 1], or ``a`` (n, 4, h, w), Stage A's
    latents, with ``caption``, a list of n texts, or ``text``, its states (n, 77, c) from a frozen encoder, and with
    ``seed``, (n,). All that is drawn for a sample comes from its seed; its time from ``quantile``, (n,) in [0, 1), if
    it is there. Where the data module has latents that were made beforehand, other networks than those that made them
    are refused.

    Logs what :class:`StageC` logs.

    Args:
        stage_a: Checkpoint or folder of Stage A.
        unet: Preset of :class:`StageBUNet`, or its arguments; no level may see the compressor's latents, which is what
            a preset's ``inject_effnet`` is taken to say here.
        text_encoder: Folder or hub name of a frozen CLIP text model with its tokenizer; or settings of a small one that
            is trained along: those of ``transformers.CLIPTextConfig``, and ``tokenizer``, a folder.
        init_from: Weights of the U-Net to begin with: a checkpoint of any layout. Where it is one of ours with a text
            encoder that was trained along, that one's too.
        optimizer: Of the U-Net, and of a text encoder that is trained along: ``adamw``, ``adamw_8bit``, ``lion``,
            ``lion_8bit``, ``muon``, or any over parameter groups.
        max_loss_weight: As in :class:`StageC`.
        high_noise_share: As in :class:`StageC`.
        high_noise_steps: As in :class:`StageC`.
        sampling_steps: For pictures.
        guidance_scale: The same; up to 1 there is no guidance.
        max_grad_norm: Norm that gradients are clipped to, none for no clipping. ``Trainer(gradient_clip_val)`` wins.

    Raises:
        UsageError: An argument of a network is unknown, networks do not fit each other, weights do not fit.
    """

    planning_arguments: ClassVar[dict[str, Any]] = {"init_from": None}
    """Arguments that `rewurst plan` replaces: weights change no tensor's size."""

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
            # As the prior: zero padding tells a place only where channels are not zero, so they begin with a constant.
            nn.init.normal_(self.unet.get_parameter("embedding.1.bias"))
        self.stage_a = Frozen(VQGAN.from_checkpoint(stage_a, torch.float32), stage_a)
        self.take_text_encoder(text_encoder)
        self._check_widths()
        if init_from is not None:
            initialise(self.unet, init_from)
            self.initialise_text(init_from)

    def data_of(self, batch: Batch) -> Tensor:
        """Stage A's latents, in the scale that the U-Net works in: a batch's ``a``, or of its images.

        Stage A works in float32 under mixed precision too: latents that were made beforehand are the same.
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
        """What the U-Net predicts."""
        times = len(text) // len(x)
        noise: Tensor = self.unet(x.repeat(times, 1, 1, 1), t.repeat(times), None, text, cache)
        return noise

    def samples_in(self, batch: Batch) -> int:
        """How many samples a batch has."""
        return len(batch["caption"])

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step on a micro-batch; the frozen networks pass it forward only, if at all."""
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
        """Draw pictures (n, 3, height, width) in [0, 1] for captions; ``size`` is that of the latents."""
        x = self.draw_data(captions, (self.unet.config["c_in"], *size), randomness)
        return self.stage_a.on(x.device).to_images(x).float()

    def draw_samples(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures for :class:`~rewurst.callbacks.LogSamples`: originals, through Stage A, and from the caption."""
        latents = self.data_of(batch)
        pictures = {"original": pixels(batch)} if "image" in batch else {}
        pictures["A"] = self.stage_a.on(latents.device).to_images(latents).float()
        pictures["drawn"] = self.draw(batch["caption"], latents.shape[-2:], generators(batch))
        return pictures

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Pictures drawn for the captions, without samples that only fill up."""
        drawn = self.draw(batch["caption"], self.data_of(batch).shape[-2:], generators(batch))
        return drawn[valid_samples(batch, drawn)]

    def frozen_parts(self) -> dict[str, Frozen[Any] | None]:
        """Stage A, and the text encoder where it is not trained along."""
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
    """Arguments of a U-Net, with no level that sees the compressor's latents.

    Raises:
        UsageError: The arguments themselves say that one does.
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
