"""Base class of text-conditional diffusion: Stage C, and a single stage that generates Stage A's latents."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from ... import UsageError
from ..networks import ConditionCache, TextEncoder, diffusion
from ..optimizers.choice import OptimizerChoice
from .batches import Batch, generators, uniforms
from .diffusion import DiffusionStage
from .flops import FROZEN, TRAINED, text_flops
from .frozen import Frozen
from .image_metrics import valid_samples
from .text_encoder import checkpoint_text_encoder, fresh_text_encoder, text_encoder_state


class TextStage(DiffusionStage):
    """A diffusion model that is conditioned only on captions.

    The loss is the mean squared error of the predicted noise, weighted by p2 = 1 - alpha_bar(t), and more near t = 1
    with ``max_loss_weight``. Captions are encoded as all states of a text encoder, including padding; a dropped caption
    is the text "". Subclasses build their network, then call :meth:`take_text_encoder`.

    Args:
        optimizer: Optimizer of all trained parameters.
        max_grad_norm: Norm to clip gradients to, as in :class:`WatchedModule`.
        max_loss_weight: Largest weight of a loss; weights are 1 / snr(t) up to it.
        high_noise_share: Share of training samples whose t is in [0.85, 0.99).
        high_noise_steps: Number of steps at the beginning in which that share is 1.
        sampling_steps: Number of sampling steps per image.
        guidance_scale: Scale of the guidance in sampling; off up to 1.

    Raises:
        UsageError: A share is outside [0, 1], a weight is below 1, or a number of steps is negative.
    """

    charts: ClassVar[dict[str, list[str]]] = {"Error by diffusion time": ["val/loss_at/.*"]}

    def __init__(
        self,
        optimizer: OptimizerChoice,
        max_grad_norm: float | None,
        max_loss_weight: float,
        high_noise_share: float,
        high_noise_steps: int,
        sampling_steps: int,
        guidance_scale: float,
    ) -> None:
        super().__init__(optimizer, max_grad_norm, max_loss_weight)
        if not 0 <= high_noise_share <= 1:
            raise UsageError(f"high_noise_share {high_noise_share} must be in [0, 1]")
        if high_noise_steps < 0:
            raise UsageError(f"high_noise_steps {high_noise_steps} must be at least 0")
        self.high_noise_share, self.high_noise_steps = high_noise_share, high_noise_steps
        self.sampling_steps, self.guidance_scale = sampling_steps, guidance_scale
        self.text_encoder: Frozen[TextEncoder] | None = None
        self.text_model: TextEncoder | None = None

    def take_text_encoder(self, text_encoder: str | dict[str, Any]) -> None:
        """Load a frozen text encoder by its folder or hub name, or build one from settings, to train it too."""
        if isinstance(text_encoder, str):
            self.text_encoder = Frozen(TextEncoder.from_pretrained(text_encoder), text_encoder)
        else:
            self.text_model = fresh_text_encoder(text_encoder).train()

    def initialise_text(self, init_from: str) -> None:
        """Load the weights of a trained text encoder, if both ``init_from`` and this module have one."""
        kept = checkpoint_text_encoder(init_from)
        if self.text_model is None or not isinstance(kept, TextEncoder):
            return
        vocabularies = [one.tokenizer.backend_tokenizer.get_vocab() for one in (kept, self.text_model)]
        if vocabularies[0] != vocabularies[1]:
            raise UsageError(f"init_from {init_from} was trained with a different tokenizer than text_encoder's")
        try:
            self.text_model.model.load_state_dict(kept.model.state_dict())
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UsageError(f"init_from {init_from} has a text encoder of a different size: {reason}") from None

    def setup(self, stage: str) -> None:
        """Check that latents and text states were made by the same networks."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        made_by: Mapping[str, Mapping[str, str]] = getattr(data, "made_by", {})
        for name, kept in made_by.items():
            part = self.frozen_parts().get(name)
            if part is not None and kept["sha256"] != part.fingerprint:
                raise UsageError(
                    f"{name} of {part.source} did not make the latents of {kept['corpus']}, which were made by that of "
                    f"{kept['source']}: use that one, or prepare the latents again"
                )

    @abstractmethod
    def data_of(self, batch: Batch) -> Tensor:
        """Return the data to learn, x (n, c, h, w), in the network's scale."""

    @abstractmethod
    def predict_noise(self, x: Tensor, t: Tensor, text: Tensor, cache: ConditionCache | None = None) -> Tensor:
        """Predict the noise in x at t; with ``k`` times as many states (guidance), x and t count as repeated."""

    @abstractmethod
    def samples_in(self, batch: Batch) -> int:
        """Return the number of samples in a batch."""

    @property
    def encoder(self) -> TextEncoder:
        """Text encoder, frozen or trained."""
        encoder = self.text_model if self.text_encoder is None else self.text_encoder.module
        assert encoder is not None
        return encoder

    def text_states(self, batch: Batch) -> Tensor:
        """Return the states (n, length, width) of a batch's captions: its ``text``, or the text encoder's output."""
        if "text" in batch and self.text_encoder is not None:
            text: Tensor = batch["text"]
            return text.float()
        return self.encode(batch["caption"])

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Return the states (n, length, width) of captions, with gradients if the text encoder is trained."""
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
        """Return the squared error of the noise predicted at t, (n,), without weights."""
        x = self.data_of(batch)
        noise = diffusion.draw(x.shape, randomness, x)
        predicted = self.predict_noise(diffusion.diffuse(x, t, noise), t, self.text_states(batch)).float()
        errors: Tensor = (predicted - noise).square().mean((1, 2, 3))
        return errors

    def text_flops_of(self, batch: Batch) -> float:
        """Return the FLOPs of the text states in a training step."""
        if self.text_model is not None and next(self.text_model.parameters()).requires_grad:
            return TRAINED * text_flops(self.text_model, self.samples_in(batch))
        return 0.0 if "text" in batch else FROZEN * text_flops(self.encoder, self.samples_in(batch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a micro-batch."""
        randomness = generators(batch)
        [chance] = uniforms(randomness, self.samples_in(batch), 1, self.device)
        t = self._times(self.quantiles(batch, chance))
        return self.record((self.losses(batch, t, randomness) * self._weight(t)).mean(), batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Record each sample's loss at its own time."""
        randomness, count = generators(batch), self.samples_in(batch)
        bucket, t = self.validation_times(batch, count, randomness)
        losses = self.losses(batch, t, randomness)
        counted = valid_samples(batch, losses)
        self.accumulate(dataloader_idx, losses * self._weight(t), losses, bucket, counted)

    def _times(self, quantile: Tensor) -> Tensor:
        """Return the training times at quantiles, (n,), with the high-noise share first."""
        share = 1.0 if self.global_step < self.high_noise_steps else self.high_noise_share
        high = 0.85 + 0.14 * quantile / max(share, 1e-9)
        other = diffusion.training_times((quantile - share) / max(1 - share, 1e-9))
        return torch.where(quantile < share, high, other)

    def _weight(self, t: Tensor) -> Tensor:
        return diffusion.p2_weight(t) * diffusion.inverse_snr_weight(t, self.max_loss_weight)

    @torch.no_grad()
    def draw_data(self, captions: Sequence[str], shape: Sequence[int], randomness: list[Generator] | None) -> Tensor:
        """Generate x (n, *shape), in the network's scale, for captions, by DDPM in evenly spaced steps."""
        guided = self.guidance_scale > 1
        text = self.encode([*captions, *([""] * len(captions) if guided else [])])
        x = diffusion.draw((len(captions), *shape), randomness, torch.empty(0, device=self.device))
        cache: ConditionCache = {}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            noise = self.predict_noise(x, t, text, cache).float()
            return diffusion.guide(noise, self.guidance_scale) if guided else noise

        return diffusion.sample(predict, x, diffusion.timesteps(self.sampling_steps), randomness)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description of the text encoder."""
        super().on_save_checkpoint(checkpoint)
        if self.text_encoder is not None:
            checkpoint["text_encoder"] = self.text_encoder.source
        elif self.text_model is not None:
            checkpoint["text_encoder"] = text_encoder_state(self.text_model, "text_model")
