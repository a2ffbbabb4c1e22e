"""Stage C: diffusion in the Semantic Compressor's latents, from text: the prior that made Würstchen cheap."""

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

    It learns to denoise x = (z + latent_std) / latent_mean, z being what the frozen Semantic Compressor makes of an
    image. The loss is the mean squared error of the predicted noise, weighted with p2 = 1 - alpha_bar(t), and more
    near t = 1 where ``max_loss_weight`` says so. Captions are seen through all states of a text encoder, padding
    included; one that was dropped is the text "".

    Batches are dicts with ``image`` (n, 3, height, width), bytes or floats in [0, 1], or ``z`` (n, 16, h, w), with
    ``caption``, a list of n texts, or ``text``, its states (n, 77, c) from a frozen encoder, and with ``seed``, (n,).
    All that is drawn for a sample comes from its seed; its time from ``quantile``, (n,) in [0, 1), where there is one.
    Where the data module has latents that were made beforehand, it says so by ``made_by``, and other networks than
    those that made them are refused.

    Logs ``train/loss``, ``train/grad_norm``; for each corpus ``val/loss`` (weighted as in training, t evenly spread
    over [0, 1]), and over all corpora ``val/loss_at/<interval of t>``, without the weight. Times and noise of
    validation are the same every time.

    Args:
        stage_b: Checkpoint of Stage B, with the compressor; the compressor's folder is enough where nothing is drawn.
        prior: Preset of :class:`Prior`, or its arguments.
        text_encoder: Folder or hub name of a frozen CLIP text model with its tokenizer; or settings of a small one that
            is trained along: those of ``transformers.CLIPTextConfig``, and ``tokenizer``, a folder.
        init_from: Weights of the prior to begin with: a checkpoint of any layout, or a folder. Where it is one of ours
            with a text encoder that was trained along, that one's too.
        optimizer: Of the prior, and of a text encoder that is trained along: ``adamw``, ``adamw_8bit``, ``lion``,
            ``lion_8bit``, ``muon``, or any over parameter groups.
        latent_mean: With ``latent_std`` the scale of z (diffusers' names); the defaults are the released compressor's.
            None for numbers that bring this compressor's z to mean 0 and deviation 1, which a small one needs.
        latent_std: See ``latent_mean``.
        stage_a: Checkpoint or folder of Stage A, for pictures; by default the one that Stage B's checkpoint names.
        max_loss_weight: The loss is weighted with 1 / snr(t) too, kept in [1, max_loss_weight]; 1 is the paper's. Near
            t = 1, where the text alone knows the picture, the noise's error hardly tells what is missing: in a short
            run a small model learns the text from this weight.
        high_noise_share: Share of the training samples that are noised to a t in [0.85, 0.99), beyond those that are
            anyhow: what only the text tells, such as the place of a thing, is learnt there or nowhere.
        high_noise_steps: Steps at the beginning in which all training samples are: what only the text tells first.
        sampling_steps: Of Stage C, for pictures.
        guidance_scale: The same; up to 1 there is no guidance.
        stage_b_steps: Sampling steps of Stage B, for pictures.
        stage_b_guidance_scale: Guidance of Stage B, for pictures; up to 1 there is none. The paper samples with 4
            (section 4), diffusers without.
        max_grad_norm: Norm that gradients are clipped to, none for no clipping. ``Trainer(gradient_clip_val)`` wins.
        lora: Train low-rank adapters of the prior alone, on top of ``init_from``: settings of ``peft.LoraConfig``, such
            as ``{r: 16, lora_alpha: 32}``. Everything else is frozen, a text encoder of settings too. ``rewurst export
            lora`` writes them for diffusers; every other export and ``init_from`` take the merged weights.

    Raises:
        UsageError: An argument of a network is unknown, networks do not fit each other, weights do not fit.
    """

    planning_arguments: ClassVar[dict[str, Any]] = {"init_from": None, "latent_mean": 1.0, "latent_std": 0.0}
    """Arguments that `rewurst plan` replaces: the compressor's own scale would be read from its weights."""

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
        """Refuse adapters of a prior that has learned nothing."""
        super().on_fit_start()
        planned = isinstance(next(self.prior.parameters()), FakeTensor)  # by `rewurst plan`, which loads nothing
        if self.prior.lora and not self._has_base and self.trainer.ckpt_path is None and not planned:
            raise UsageError("lora adapts a trained prior: give init_from, a checkpoint of Stage C")

    def _set_scale(self, latent_mean: float | None, latent_std: float | None) -> None:
        if (latent_mean is None) != (latent_std is None):
            raise UsageError(f"latent_mean {latent_mean} and latent_std {latent_std}: give both, or none of them")
        if latent_mean is None or latent_std is None:
            latent_mean, latent_std = own_scale(self.compressor.module)
            rank_zero_info(f"Stage C learns (z + latent_std) / latent_mean with {latent_std} and {latent_mean}")
        if latent_mean <= 0:
            raise UsageError(f"latent_mean {latent_mean} must be above 0: z is divided by it")
        self.prior.latent_mean, self.prior.latent_std = latent_mean, latent_std

    def embeddings(self, batch: Batch) -> Tensor:
        """Stage C's data: x (n, c, h, w) from a batch's ``z``, or from its images.

        The compressor works in float32 under mixed precision too: latents that were made beforehand are the same.
        """
        z = batch.get("z")
        if z is None:
            images = pixels(batch)
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                z = self.compressor.on(images.device)(images)
        return self.prior.normalize(z.float())

    def data_of(self, batch: Batch) -> Tensor:
        """As ``embeddings``."""
        return self.embeddings(batch)

    def predict_noise(self, x: Tensor, t: Tensor, text: Tensor, cache: ConditionCache | None = None) -> Tensor:
        """What the prior predicts."""
        noise: Tensor = self.prior(x, t, text, cache)
        return noise

    def samples_in(self, batch: Batch) -> int:
        """How many samples a batch has."""
        return len(batch["z"] if "z" in batch else batch["image"])

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step on a micro-batch; the frozen networks pass it forward only, if at all."""
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
        """Draw z (n, c, *size), in the compressor's scale, for captions."""
        return self.prior.denormalize(self.draw_data(captions, (self.prior.config["c_in"], *size), randomness))

    @torch.no_grad()
    def draw(self, captions: Sequence[str], size: Sequence[int], randomness: list[Generator] | None = None) -> Tensor:
        """Draw pictures (n, 3, height, width) in [0, 1] for captions, from embeddings of height and width ``size``."""
        z = self.draw_embeddings(captions, size, randomness)
        return self._decode(z, captions, randomness)

    def _decode(self, z: Tensor, captions: Sequence[str], randomness: list[Generator] | None) -> Tensor:
        return self.lower_stages.draw(z, captions, randomness, self.stage_b_steps, self.stage_b_guidance_scale)

    @property
    def lower_stages(self) -> LowerStages:
        """Stage B and Stage A, loaded when the first picture is drawn."""
        if self._lower is None:
            self._lower = LowerStages(self._stage_b, self._stage_a, self.compressor.module.pixels_per_latent)
        return self._lower

    def draw_samples(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures for :class:`~rewurst.callbacks.LogSamples`: originals, by B from z, by C from the caption."""
        z = self.prior.denormalize(self.embeddings(batch))
        pictures = {"original": pixels(batch)} if "image" in batch else {}
        pictures["B"] = self._decode(z, batch["caption"], generators(batch))
        pictures["C"] = self.draw(batch["caption"], z.shape[-2:], generators(batch))
        return pictures

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Pictures drawn for the captions, without samples that only fill up."""
        drawn = self.draw(batch["caption"], self.embeddings(batch).shape[-2:], generators(batch))
        return drawn[valid_samples(batch, drawn)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the scale of z too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["latent_scale"] = self._scale()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that was trained with another compressor, text encoder or scale."""
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get("latent_scale", self._scale())
        if kept != self._scale():
            raise UsageError(f"latent_mean and latent_std are {self._scale()}, the checkpoint was trained with {kept}")

    def _scale(self) -> dict[str, float]:
        return {"latent_mean": self.prior.latent_mean, "latent_std": self.prior.latent_std}

    def frozen_parts(self) -> dict[str, Frozen[Any] | None]:
        """The compressor, and the text encoder where it is not trained along."""
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
    """From embeddings to pictures.

    Args:
        stage_b: Checkpoint with Stage B and its compressor.
        stage_a: Checkpoint or folder of Stage A; by default the one that Stage B's checkpoint names.
        pixels_per_latent: Of the compressor.

    Raises:
        UsageError: There is no Stage B or no Stage A, or the latter is not the one that B was trained with.
    """

    def __init__(self, stage_b: str, stage_a: str | None, pixels_per_latent: float) -> None:
        if not holds(stage_b, StageBUNet):
            raise UsageError(f"{stage_b} holds no StageBUNet, which pictures are drawn with: give Stage B's checkpoint")
        content = read_file(stage_b)
        kept = content.get("frozen", {}).get("stage_a")
        source = stage_a or (kept or {}).get("source")
        if source is None:
            raise UsageError(f"{stage_b} names no Stage A, which pictures are drawn with: give stage_a")
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
        """Draw pictures (n, 3, height, width) in [0, 1] from embeddings (n, c, h, w) in the compressor's scale."""
        unet, vqgan = self.unet.on(z.device), self.stage_a.on(z.device)
        text = self._text([*captions, *([""] * len(captions) if guidance_scale > 1 else [])], z.device)
        size = [int(side * self._scale) for side in z.shape[-2:]]
        x = diffusion.draw((len(z), unet.config["c_in"], *size), randomness, z)
        predict = unet.predictor(z, text, guidance_scale)
        return vqgan.to_images(diffusion.sample(predict, x, diffusion.timesteps(steps), randomness)).float()

    def _text(self, captions: Sequence[str], device: torch.device) -> Tensor:
        if self.text_encoder is not None:
            return self.text_encoder.on(device).encode(captions)
        return torch.zeros(len(captions), self._text_length, self.unet.module.config["clip_embd"], device=device)


def own_scale(compressor: SemanticCompressor) -> tuple[float, float]:
    """Return ``latent_mean`` and ``latent_std`` that bring a compressor's z to mean 0 and deviation 1.

    Its last layer is a BatchNorm, whose output has the mean ``bias`` and the deviation ``weight`` in every channel: no
    image has to be looked at, and every process finds the same numbers.
    """
    norm: Any = compressor.mapper[1]
    weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    mean = bias.mean()
    deviation = (weight.square() + (bias - mean).square()).mean().sqrt()
    return round(float(deviation), 4), round(-float(mean), 4)
