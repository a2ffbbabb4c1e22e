"""Stage C: diffusion in the Semantic Compressor's latents, from text: the prior that made Würstchen cheap."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Generator, Tensor

from .. import UsageError
from . import diffusion
from .diffusion_stage import DiffusionStage
from .flops import FROZEN, TRAINED, forward_flops, text_flops
from .image_metrics import valid_samples
from .lower_stages import LowerStages, own_scale
from .networks import ConditionCache, Prior, SemanticCompressor, TextEncoder
from .optimizers import OptimizerChoice
from .stage_parts import Batch, Frozen, Settings, build, generators, initialise, pixels, uniforms
from .text_encoding import checkpoint_text_encoder, fresh_text_encoder, text_encoder_state


class StageC(DiffusionStage):
    """Würstchen's Stage C, the text-conditional prior (arXiv 2306.00637).

    It learns to denoise x = (z + latent_std) / latent_mean, z being what the frozen Semantic Compressor makes of an
    image. The loss is the mean squared error of the predicted noise, weighted with p2 = 1 - alpha_bar(t), and more
    near t = 1 where ``max_loss_weight`` says so. Captions are
    seen through all states of a text encoder, padding included; one that was dropped is the text "".

    Batches are dicts with ``image`` (n, 3, height, width), bytes or floats in [0, 1], or ``z`` (n, 16, h, w), with
    ``caption``, a list of n texts, or ``text``, its states (n, 77, c) from a frozen encoder, and with ``seed``, (n,).
    All that is drawn for a sample comes from its seed. Where the data module has latents that were made beforehand, it
    says so by ``made_by``, and other networks than those that made them are refused.

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
            ``lion_8bit``, or any over parameter groups.
        latent_mean: With ``latent_std`` the scale of z (diffusers' names); the defaults are the released compressor's.
            None for numbers that bring this compressor's z to mean 0 and deviation 1, which a small one needs.
        latent_std: See ``latent_mean``.
        stage_a: Checkpoint or folder of Stage A, for pictures; by default the one that Stage B's checkpoint names.
        max_loss_weight: The loss is weighted with 1 / snr(t) too, kept in [1, max_loss_weight]; 1 is the paper's. Near
            t = 1, where the text alone knows the picture, the noise's error hardly tells what is missing: in a short
            run a small model learns the text from this weight.
        high_noise_share: Share of the training samples that are noised to a t in [0.85, 0.99), beyond those that are
            anyhow: what only the text tells, such as the place of a thing, is learnt there or nowhere.
        sampling_steps: Of Stage C, for pictures.
        guidance_scale: The same; up to 1 there is no guidance.
        stage_b_steps: Of Stage B, for pictures.
        max_grad_norm: Norm that gradients are clipped to, none for no clipping. ``Trainer(gradient_clip_val)`` wins.

    Raises:
        UsageError: An argument of a network is unknown, networks do not fit each other, weights do not fit.
    """

    charts: ClassVar[dict[str, list[str]]] = {"Error by diffusion time": ["val/loss_at/.*"]}

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
        sampling_steps: int = 60,
        guidance_scale: float = 4.0,
        stage_b_steps: int = 12,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__(optimizer, max_grad_norm, max_loss_weight)
        if not 0 <= high_noise_share <= 1:
            raise UsageError(f"high_noise_share {high_noise_share} must lie in [0, 1]")
        self.high_noise_share = high_noise_share
        self.prior = build(Prior, prior)
        self.compressor = Frozen(SemanticCompressor.from_checkpoint(stage_b, torch.float32), stage_b)
        self._set_scale(latent_mean, latent_std)
        self.text_encoder: Frozen[TextEncoder] | None = None
        self.text_model: TextEncoder | None = None
        if isinstance(text_encoder, str):
            self.text_encoder = Frozen(TextEncoder.from_pretrained(text_encoder), text_encoder)
        else:
            self.text_model = fresh_text_encoder(text_encoder).train()
        self._check_widths()
        if init_from is not None:
            initialise(self.prior, init_from)
            self._initialise_text(init_from)
        self.sampling_steps, self.guidance_scale, self.stage_b_steps = sampling_steps, guidance_scale, stage_b_steps
        self._stage_b, self._stage_a = stage_b, stage_a
        self._lower: LowerStages | None = None

    def _set_scale(self, latent_mean: float | None, latent_std: float | None) -> None:
        if (latent_mean is None) != (latent_std is None):
            raise UsageError(f"latent_mean {latent_mean} and latent_std {latent_std}: give both, or none of them")
        if latent_mean is None or latent_std is None:
            latent_mean, latent_std = own_scale(self.compressor.module)
            rank_zero_info(f"Stage C learns (z + latent_std) / latent_mean with {latent_std} and {latent_mean}")
        if latent_mean <= 0:
            raise UsageError(f"latent_mean {latent_mean} must be above 0: z is divided by it")
        self.prior.latent_mean, self.prior.latent_std = latent_mean, latent_std

    def _initialise_text(self, init_from: str) -> None:
        kept = checkpoint_text_encoder(init_from)
        if self.text_model is None or not isinstance(kept, TextEncoder):
            return
        vocabularies = [one.tokenizer.backend_tokenizer.get_vocab() for one in (kept, self.text_model)]
        if vocabularies[0] != vocabularies[1]:
            raise UsageError(f"init_from {init_from} was trained with another tokenizer than text_encoder's: give that")
        try:
            self.text_model.model.load_state_dict(kept.model.state_dict())
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UsageError(f"init_from {init_from} has a text encoder of another size: {reason}") from None

    def setup(self, stage: str) -> None:
        """Refuses latents and text states that other networks made."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        made_by: Mapping[str, Mapping[str, str]] = getattr(data, "made_by", {})
        for name, kept in made_by.items():
            part = self.frozen_parts().get(name)
            if part is not None and kept["sha256"] != part.fingerprint:
                raise UsageError(
                    f"{name} of {part.source} is not what made the latents of {kept['corpus']}, which was that of "
                    f"{kept['source']}: give that one, or prepare the latents again"
                )

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

    def text_states(self, batch: Batch) -> Tensor:
        """States (n, length, width) of a batch's captions: its ``text``, or what the text encoder makes of them."""
        if "text" in batch and self.text_encoder is not None:
            text: Tensor = batch["text"]
            return text.float()
        return self.encode(batch["caption"])

    def encode(self, captions: Sequence[str]) -> Tensor:
        """States (n, length, width) of captions; with gradients where the text encoder is trained along."""
        with warnings.catch_warnings(record=True) as cut:
            warnings.simplefilter("always")
            if self.text_encoder is not None:
                with torch.autocast(self.device.type, enabled=False):
                    states = self.text_encoder.on(self.device).encode(captions).clone()
            else:
                assert self.text_model is not None
                states = self.text_model(captions)
        if self._trainer is not None and self.trainer.training:
            self.log("train/captions_cut", float(len(cut)), batch_size=1)
        return states

    def losses(self, batch: Batch, t: Tensor, randomness: list[Generator] | None) -> Tensor:
        """Squared error of the noise predicted at t, (n,), without weights."""
        x = self.embeddings(batch)
        noise = diffusion.draw(x.shape, randomness, x)
        predicted = self.prior(diffusion.diffuse(x, t, noise), t, self.text_states(batch)).float()
        errors: Tensor = (predicted - noise).square().mean((1, 2, 3))
        return errors

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step on a micro-batch; the frozen networks pass it forward only, if at all."""
        encoder, compressor, n = self.text_model, self.compressor.module, _count(batch)
        total = 0.0 if encoder is None else TRAINED * text_flops(encoder, n)
        if self.text_encoder is not None:
            encoder = self.text_encoder.module
            total += 0.0 if "text" in batch else FROZEN * text_flops(encoder, n)
        assert encoder is not None
        if "z" in batch:
            x = tuple(batch["z"].shape)
        else:
            images = tuple(batch["image"].shape)
            x = (n, self.prior.config["c_in"], *compressor.latent_size(images[2:]))
            total += FROZEN * forward_flops(compressor, [images])
        return total + TRAINED * forward_flops(self.prior, [x, (n,), (n, encoder.length, encoder.width)])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of a micro-batch."""
        randomness = generators(batch)
        chance, high = uniforms(randomness, _count(batch), 2, self.device)
        t = diffusion.training_times(chance)
        t = torch.where(high < self.high_noise_share, 0.85 + 0.14 * chance, t)
        return self.watch((self.losses(batch, t, randomness) * self._weight(t)).mean(), batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Takes in each sample's loss at its own time."""
        randomness, count = generators(batch), _count(batch)
        bucket, t = self.validation_times(batch, count, randomness)
        losses = self.losses(batch, t, randomness)
        counted = valid_samples(batch, losses)
        self.take_in(dataloader_idx, losses * self._weight(t), losses, bucket, counted)

    def _weight(self, t: Tensor) -> Tensor:
        return diffusion.p2_weight(t) * diffusion.inverse_snr_weight(t, self.max_loss_weight)

    @torch.no_grad()
    def draw_embeddings(
        self, captions: Sequence[str], size: Sequence[int], randomness: list[Generator] | None = None
    ) -> Tensor:
        """Draw z (n, c, *size), in the compressor's scale, for captions."""
        guided = self.guidance_scale > 1
        text = self.encode([*captions, *([""] * len(captions) if guided else [])])
        shape = (len(captions), self.prior.config["c_in"], *size)
        x = diffusion.draw(shape, randomness, torch.empty(0, device=self.device))
        cache: ConditionCache = {}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            noise: Tensor = self.prior(x, t, text, cache).float()
            return diffusion.guide(noise, self.guidance_scale) if guided else noise

        times = diffusion.timesteps(self.sampling_steps)
        return self.prior.denormalize(diffusion.sample(predict, x, times, randomness))

    @torch.no_grad()
    def draw(self, captions: Sequence[str], size: Sequence[int], randomness: list[Generator] | None = None) -> Tensor:
        """Draw pictures (n, 3, height, width) in [0, 1] for captions, from embeddings of height and width ``size``."""
        z = self.draw_embeddings(captions, size, randomness)
        return self.lower_stages.draw(z, captions, randomness, self.stage_b_steps)

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
        pictures["B"] = self.lower_stages.draw(z, batch["caption"], generators(batch), self.stage_b_steps)
        pictures["C"] = self.draw(batch["caption"], z.shape[-2:], generators(batch))
        return pictures

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Pictures drawn for the captions, without samples that only fill up."""
        drawn = self.draw(batch["caption"], self.embeddings(batch).shape[-2:], generators(batch))
        return drawn[valid_samples(batch, drawn)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the scale of z and the text encoder too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["latent_scale"] = self._scale()
        if self.text_encoder is not None:
            checkpoint["text_encoder"] = self.text_encoder.source
        elif self.text_model is not None:
            checkpoint["text_encoder"] = text_encoder_state(self.text_model, "text_model")

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
        encoder = self.text_model if self.text_encoder is None else self.text_encoder.module
        assert encoder is not None
        for name, other, needed in (
            ("c_in", "the compressor's c_latent", self.compressor.module.config["c_latent"]),
            ("c_cond", "the text encoder's width", encoder.width),
        ):
            if self.prior.config[name] != needed:
                raise UsageError(
                    f"prior's {name} is {self.prior.config[name]} but {other} is {needed}: set {name} to that"
                )


def _count(batch: Batch) -> int:
    return len(batch["z"] if "z" in batch else batch["image"])
