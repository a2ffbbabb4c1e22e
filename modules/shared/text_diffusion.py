"""What diffusion from text has in common, whatever it learns: Stage C, and one stage to Stage A's latents."""

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
    """A diffusion model that is conditioned on captions alone.

    The loss is the mean squared error of the predicted noise, weighted with p2 = 1 - alpha_bar(t), and more near t = 1
    where ``max_loss_weight`` says so. Captions are seen through all states of a text encoder, padding included; one
    that was dropped is the text "". Subclasses build their network, then call :meth:`take_text_encoder`.

    Args:
        optimizer: Of all that is trained.
        max_grad_norm: As in :class:`WatchedModule`.
        max_loss_weight: Largest value of 1 / snr(t) that losses are weighted with.
        high_noise_share: Share of the training samples that are noised to a t in [0.85, 0.99).
        high_noise_steps: Steps at the beginning in which all training samples are.
        sampling_steps: For pictures.
        guidance_scale: The same; up to 1 there is no guidance.

    Raises:
        UsageError: A share outside of [0, 1], a weight below 1, a negative number of steps.
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
            raise UsageError(f"high_noise_share {high_noise_share} must lie in [0, 1]")
        if high_noise_steps < 0:
            raise UsageError(f"high_noise_steps {high_noise_steps} must be at least 0, which is none")
        self.high_noise_share, self.high_noise_steps = high_noise_share, high_noise_steps
        self.sampling_steps, self.guidance_scale = sampling_steps, guidance_scale
        self.text_encoder: Frozen[TextEncoder] | None = None
        self.text_model: TextEncoder | None = None

    def take_text_encoder(self, text_encoder: str | dict[str, Any]) -> None:
        """Loads a frozen text encoder by its folder or hub name, or builds one from settings, to be trained along."""
        if isinstance(text_encoder, str):
            self.text_encoder = Frozen(TextEncoder.from_pretrained(text_encoder), text_encoder)
        else:
            self.text_model = fresh_text_encoder(text_encoder).train()

    def initialise_text(self, init_from: str) -> None:
        """Takes the weights of a text encoder that was trained along, where ``init_from`` has one and this does."""
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

    @abstractmethod
    def data_of(self, batch: Batch) -> Tensor:
        """What is learnt, x (n, c, h, w), in the scale that the network works in."""

    @abstractmethod
    def predict_noise(self, x: Tensor, t: Tensor, text: Tensor, cache: ConditionCache | None = None) -> Tensor:
        """The noise in x at t; for ``k`` times as many states (guidance) as if x and t were repeated ``k`` times."""

    @abstractmethod
    def samples_in(self, batch: Batch) -> int:
        """How many samples a batch has."""

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder, frozen or trained along."""
        encoder = self.text_model if self.text_encoder is None else self.text_encoder.module
        assert encoder is not None
        return encoder

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
        x = self.data_of(batch)
        noise = diffusion.draw(x.shape, randomness, x)
        predicted = self.predict_noise(diffusion.diffuse(x, t, noise), t, self.text_states(batch)).float()
        errors: Tensor = (predicted - noise).square().mean((1, 2, 3))
        return errors

    def text_flops_of(self, batch: Batch) -> float:
        """FLOPs that a training step's text states take."""
        if self.text_model is not None and next(self.text_model.parameters()).requires_grad:
            return TRAINED * text_flops(self.text_model, self.samples_in(batch))
        return 0.0 if "text" in batch else FROZEN * text_flops(self.encoder, self.samples_in(batch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of a micro-batch."""
        randomness = generators(batch)
        [chance] = uniforms(randomness, self.samples_in(batch), 1, self.device)
        t = self._times(self.quantiles(batch, chance))
        return self.watch((self.losses(batch, t, randomness) * self._weight(t)).mean(), batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Takes in each sample's loss at its own time."""
        randomness, count = generators(batch), self.samples_in(batch)
        bucket, t = self.validation_times(batch, count, randomness)
        losses = self.losses(batch, t, randomness)
        counted = valid_samples(batch, losses)
        self.take_in(dataloader_idx, losses * self._weight(t), losses, bucket, counted)

    def _times(self, quantile: Tensor) -> Tensor:
        """Training times by their quantiles, (n,): the share of high noise first."""
        share = 1.0 if self.global_step < self.high_noise_steps else self.high_noise_share
        high = 0.85 + 0.14 * quantile / max(share, 1e-9)
        other = diffusion.training_times((quantile - share) / max(1 - share, 1e-9))
        return torch.where(quantile < share, high, other)

    def _weight(self, t: Tensor) -> Tensor:
        return diffusion.p2_weight(t) * diffusion.inverse_snr_weight(t, self.max_loss_weight)

    @torch.no_grad()
    def draw_data(self, captions: Sequence[str], shape: Sequence[int], randomness: list[Generator] | None) -> Tensor:
        """Draw x (n, *shape), in the network's scale, for captions, by DDPM in evenly spaced steps."""
        guided = self.guidance_scale > 1
        text = self.encode([*captions, *([""] * len(captions) if guided else [])])
        x = diffusion.draw((len(captions), *shape), randomness, torch.empty(0, device=self.device))
        cache: ConditionCache = {}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            noise = self.predict_noise(x, t, text, cache).float()
            return diffusion.guide(noise, self.guidance_scale) if guided else noise

        return diffusion.sample(predict, x, diffusion.timesteps(self.sampling_steps), randomness)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the text encoder too."""
        super().on_save_checkpoint(checkpoint)
        if self.text_encoder is not None:
            checkpoint["text_encoder"] = self.text_encoder.source
        elif self.text_model is not None:
            checkpoint["text_encoder"] = text_encoder_state(self.text_model, "text_model")
