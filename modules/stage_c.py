"""Stage C: the text-conditional diffusion prior in the Semantic Compressor's latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import UsageError
from .networks import VQGAN, ConditionCache, Prior, SemanticCompressor, StageBUNet, TextEncoder, diffusion
from .networks.base import Settings, build, holds, initialise
from .networks.weight_files import read_file
from .optimizers.choice import OptimizerChoice
from .shared.batches import Batch, generators, pixels
from .shared.flops import FROZEN, PASSED, TRAINED, forward_flops
from .shared.frozen import Frozen
from .shared.image_metrics import valid_samples
from .shared.text_diffusion import TextStage


class StageC(TextStage):
    """Würstchen's Stage C, the text-conditional prior (arXiv 2306.00637).

    It learns to denoise x = (z + latent_std) / latent_mean, where z is the frozen Semantic Compressor's embedding of an
    image. The loss is the mean squared error of the predicted noise, weighted by p2 = 1 - alpha_bar(t), and more near
    t = 1 with ``max_loss_weight``. Captions are encoded as all states of a text encoder, including padding; a dropped
    caption is the text "".

    Batches are dicts with ``image`` (n, 3, height, width), bytes or floats in [0, 1], or ``z`` (n, 16, h, w); with
    ``caption``, a list of n texts, or ``text``, its states (n, 77, c) from a frozen encoder; and with ``seed``, (n,).
    A sample's random numbers come from its seed, and its time from ``quantile``, (n,) in [0, 1), if present. A data
    module with prepared latents names the networks that made them in ``made_by``, and only these networks are
    accepted.

    It logs ``train/loss`` and ``train/grad_norm``; per corpus ``val/loss`` (weighted as in training, t evenly spread
    over [0, 1]); and over all corpora ``val/loss_at/<interval of t>``, without the weight. Every validation uses the
    same times and noise.

    Args:
        stage_b: Checkpoint of Stage B, with the compressor; if no images are generated, the compressor's folder.
        prior: Preset of :class:`Prior`, or its arguments.
        text_encoder: Folder or hub name of a frozen CLIP text model with its tokenizer; or settings of a small one to
            train: those of ``transformers.CLIPTextConfig``, and ``tokenizer``, a folder.
        init_from: Checkpoint, in any format, or folder with initial weights of the prior, and of a trained text encoder
            if the checkpoint has one.
        optimizer: Optimizer of the prior and of a trained text encoder: ``adamw``, ``adamw_8bit``, ``lion``,
            ``lion_8bit``, ``muon``, or any other optimizer over parameter groups.
        latent_mean: Divisor in the scale of z (diffusers' name); the default is the released compressor's. With None,
            this compressor's z is scaled to mean 0 and deviation 1, which small compressors need.
        latent_std: Offset in the scale of z, likewise.
        stage_a: Checkpoint or folder of Stage A, for images (default: the one that Stage B's checkpoint names).
        max_loss_weight: Upper bound of an additional weight of the loss, 1 / snr(t) and at least 1; the paper uses 1.
            Near t = 1 only the text describes the image, but the noise's error hardly shows what is missing. This
            weight lets a small model learn the text in a short run.
        high_noise_share: Share of training samples whose t is in [0.85, 0.99), in addition to those that are there
            anyway. Only there is information learned that only the text has, such as an object's position.
        high_noise_steps: Number of steps at the beginning in which that share is 1, so that the text is learned first.
        sampling_steps: Number of Stage C's sampling steps per image.
        guidance_scale: Scale of Stage C's guidance; off up to 1.
        stage_b_steps: Number of Stage B's sampling steps per image.
        stage_b_guidance_scale: Scale of Stage B's guidance; off up to 1. The paper uses 4 (section 4), diffusers none.
        max_grad_norm: Norm to clip gradients to, or None for no clipping; ``Trainer(gradient_clip_val)`` overrides it.
        lora: ``peft.LoraConfig`` settings, such as ``{r: 16, lora_alpha: 32}``, to train only low-rank adapters of the
            prior, on top of ``init_from``. Everything else is frozen, even a text encoder given by settings. ``rewurst
            export lora`` writes them for diffusers; every other export and ``init_from`` use the merged weights.

    Raises:
        UsageError: A network's argument is unknown, or networks or weights do not fit.
    """

    planning_arguments: ClassVar[dict[str, Any]] = {"init_from": None, "latent_mean": 1.0, "latent_std": 0.0}
    """Arguments that `rewurst plan` replaces: the compressor's scale would be read from its weights."""

    def __init__(
        self,
        stage_b: str,
        prior: Settings = "paper",
        text_encoder: str | dict[str, Any] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        init_from: str | None = None,
        optimizer: OptimizerChoice = "adamw",
        latent_mean: float | None = Prior.latent_mean,
        latent_std: float | None = Prior.latent_std,
        stage_a: str | None = None,
        max_loss_weight: float = 1.0,
        high_noise_share: float = 0.0,
        high_noise_steps: int = 0,
        sampling_steps: int = 60,
        guidance_scale: float = 4.0,
        stage_b_steps: int = 12,
        stage_b_guidance_scale: float = 0.0,
        max_grad_norm: float | None = 1.0,
        lora: dict[str, Any] | None = None,
    ) -> None:
        noise = (max_loss_weight, high_noise_share, high_noise_steps)
        super().__init__(optimizer, max_grad_norm, *noise, sampling_steps, guidance_scale)
        self.prior = build(Prior, prior)
        self.compressor = Frozen(SemanticCompressor.from_checkpoint(stage_b, torch.float32), stage_b)
        self._set_scale(latent_mean, latent_std)
        self.take_text_encoder(text_encoder)
        self._check_widths()
        if init_from is not None:
            initialise(self.prior, init_from)
            self.initialise_text(init_from)
        self._has_base = init_from is not None
        if lora is not None:
            self.prior.add_lora(lora)
            if self.text_model is not None:
                self.text_model.requires_grad_(False)
        self.stage_b_steps, self.stage_b_guidance_scale = stage_b_steps, stage_b_guidance_scale
        self._stage_b, self._stage_a = stage_b, stage_a
        self._lower: LowerStages | None = None

    def on_fit_start(self) -> None:
        """Check that adapters are not added to an untrained prior."""
        super().on_fit_start()
        planned = isinstance(next(self.prior.parameters()), FakeTensor)  # by `rewurst plan`, which loads nothing
        if self.prior.lora and not self._has_base and self.trainer.ckpt_path is None and not planned:
            raise UsageError("lora adapts a trained prior: give init_from, a checkpoint of Stage C")

    def _set_scale(self, latent_mean: float | None, latent_std: float | None) -> None:
        if (latent_mean is None) != (latent_std is None):
            raise UsageError(f"latent_mean {latent_mean} and latent_std {latent_std}: give both or neither")
        if latent_mean is None or latent_std is None:
            latent_mean, latent_std = own_scale(self.compressor.module)
            rank_zero_info(f"Stage C learns (z + latent_std) / latent_mean with {latent_std} and {latent_mean}")
        if latent_mean <= 0:
            raise UsageError(f"latent_mean {latent_mean} must be above 0: z is divided by it")
        self.prior.latent_mean, self.prior.latent_std = latent_mean, latent_std

    def embeddings(self, batch: Batch) -> Tensor:
        """Return Stage C's data, x (n, c, h, w), from a batch's ``z`` or from its images.

        The compressor runs in float32 even under mixed precision, so that the latents are equal to prepared ones.
        """
        z = batch.get("z")
        if z is None:
            images = pixels(batch)
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                z = self.compressor.on(images.device)(images)
        return self.prior.normalize(z.float())

    def data_of(self, batch: Batch) -> Tensor:
        """Return the same as ``embeddings``."""
        return self.embeddings(batch)

    def predict_noise(self, x: Tensor, t: Tensor, text: Tensor, cache: ConditionCache | None = None) -> Tensor:
        """Return the prior's prediction of the noise."""
        noise: Tensor = self.prior(x, t, text, cache)
        return noise

    def samples_in(self, batch: Batch) -> int:
        """Return the number of samples in a batch."""
        return len(batch["z"] if "z" in batch else batch["image"])

    def flops(self, batch: Batch) -> float:
        """Return the FLOPs of a training step on a micro-batch; frozen networks run forward only, if at all."""
        compressor, encoder, n = self.compressor.module, self.encoder, self.samples_in(batch)
        total = self.text_flops_of(batch)
        if "z" in batch:
            x = tuple(batch["z"].shape)
        else:
            images = tuple(batch["image"].shape)
            x = (n, self.prior.config["c_in"], *compressor.latent_size(images[2:]))
            total += FROZEN * forward_flops(compressor, [images])
        passes = PASSED if self.prior.lora else TRAINED
        return total + passes * forward_flops(self.prior, [x, (n,), (n, encoder.length, encoder.width)])

    @torch.no_grad()
    def draw_embeddings(
        self, captions: Sequence[str], size: Sequence[int], randomness: list[Generator] | None = None
    ) -> Tensor:
        """Generate z (n, c, *size), in the compressor's scale, for captions."""
        return self.prior.denormalize(self.draw_data(captions, (self.prior.config["c_in"], *size), randomness))

    @torch.no_grad()
    def draw(self, captions: Sequence[str], size: Sequence[int], randomness: list[Generator] | None = None) -> Tensor:
        """Generate images (n, 3, height, width) in [0, 1] for captions; ``size`` is that of the embeddings."""
        z = self.draw_embeddings(captions, size, randomness)
        return self._decode(z, captions, randomness)

    def _decode(self, z: Tensor, captions: Sequence[str], randomness: list[Generator] | None) -> Tensor:
        return self.lower_stages.draw(z, captions, randomness, self.stage_b_steps, self.stage_b_guidance_scale)

    @property
    def lower_stages(self) -> LowerStages:
        """Stage B and Stage A, loaded for the first image."""
        if self._lower is None:
            self._lower = LowerStages(self._stage_b, self._stage_a, self.compressor.module.pixels_per_latent)
        return self._lower

    def draw_samples(self, batch: Batch) -> dict[str, Tensor]:
        """Return originals, B's images from z and C's images from the caption for ``LogSamples``."""
        z = self.prior.denormalize(self.embeddings(batch))
        pictures = {"original": pixels(batch)} if "image" in batch else {}
        pictures["B"] = self._decode(z, batch["caption"], generators(batch))
        pictures["C"] = self.draw(batch["caption"], z.shape[-2:], generators(batch))
        return pictures

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return images generated for the captions, without padding samples."""
        drawn = self.draw(batch["caption"], self.embeddings(batch).shape[-2:], generators(batch))
        return drawn[valid_samples(batch, drawn)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the scale of z."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["latent_scale"] = self._scale()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint was trained with the same compressor, text encoder and scale."""
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get("latent_scale", self._scale())
        if kept != self._scale():
            raise UsageError(f"latent_mean and latent_std are {self._scale()}, the checkpoint was trained with {kept}")

    def _scale(self) -> dict[str, float]:
        return {"latent_mean": self.prior.latent_mean, "latent_std": self.prior.latent_std}

    def frozen_parts(self) -> dict[str, Frozen[Any] | None]:
        """Return the compressor, and the text encoder unless it is trained."""
        return {"compressor": self.compressor, "text_encoder": self.text_encoder}

    def _check_widths(self) -> None:
        for name, other, needed in (
            ("c_in", "the compressor's c_latent", self.compressor.module.config["c_latent"]),
            ("c_cond", "the text encoder's width", self.encoder.width),
        ):
            if self.prior.config[name] != needed:
                raise UsageError(
                    f"prior's {name} is {self.prior.config[name]} but {other} is {needed}: set {name} to that"
                )


class LowerStages:
    """Stages B and A, which decode embeddings into images.

    Args:
        stage_b: Checkpoint with Stage B and its compressor.
        stage_a: Checkpoint or folder of Stage A (default: the one that Stage B's checkpoint names).
        pixels_per_latent: Side length of a latent's square in pixels, a property of the compressor.

    Raises:
        UsageError: Stage B or Stage A is missing, or Stage A is not the one that B was trained with.
    """

    def __init__(self, stage_b: str, stage_a: str | None, pixels_per_latent: float) -> None:
        if not holds(stage_b, StageBUNet):
            raise UsageError(f"{stage_b} has no StageBUNet, which generates images: give Stage B's checkpoint")
        content = read_file(stage_b)
        kept = content.get("frozen", {}).get("stage_a")
        source = stage_a or (kept or {}).get("source")
        if source is None:
            raise UsageError(f"{stage_b} names no Stage A, which is needed to generate images: give stage_a")
        self.stage_a = Frozen(VQGAN.from_checkpoint(source, torch.float32), source)
        self.stage_a.check(kept, "stage_a")
        self.unet = Frozen(StageBUNet.from_checkpoint(stage_b, torch.float32), stage_b)
        named = content.get("text_encoder")
        self.text_encoder = Frozen(TextEncoder.from_pretrained(named), named) if isinstance(named, str) else None
        self._text_length = int(content.get("text_length", 77))
        self._scale = pixels_per_latent / self.stage_a.module.compression

    @torch.no_grad()
    def draw(
        self,
        z: Tensor,
        captions: Sequence[str],
        randomness: list[Generator] | None,
        steps: int,
        guidance_scale: float = 0.0,
    ) -> Tensor:
        """Generate images (n, 3, height, width) in [0, 1] from embeddings (n, c, h, w) in the compressor's scale."""
        unet, vqgan = self.unet.on(z.device), self.stage_a.on(z.device)
        text = self._text([*captions, *([""] * len(captions) if guidance_scale > 1 else [])], z.device)
        size = [int(side * self._scale) for side in z.shape[-2:]]
        x = diffusion.draw((len(z), unet.config["c_in"], *size), randomness, z)
        cache: ConditionCache = {}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return unet.guided(x, t, z, text, cache, guidance_scale).float()

        return vqgan.to_images(diffusion.sample(predict, x, diffusion.timesteps(steps), randomness)).float()

    def _text(self, captions: Sequence[str], device: torch.device) -> Tensor:
        if self.text_encoder is not None:
            return self.text_encoder.on(device).encode(captions)
        return torch.zeros(len(captions), self._text_length, self.unet.module.config["clip_embd"], device=device)


def own_scale(compressor: SemanticCompressor) -> tuple[float, float]:
    """Return ``latent_mean`` and ``latent_std`` that bring a compressor's z to mean 0 and deviation 1.

    Its last layer is a BatchNorm, whose output has the mean ``bias`` and the deviation ``weight`` in every channel, so
    no images are needed, and every process computes the same numbers.
    """
    norm: Any = compressor.mapper[1]
    weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    mean = bias.mean()
    deviation = (weight.square() + (bias - mean).square()).mean().sqrt()
    return round(float(deviation), 4), round(-float(mean), 4)
