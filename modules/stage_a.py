"""Stage A: the VQGAN between pixels and latents, trained against its discriminator (arXiv 2306.00637)."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .. import UsageError
from ..lightning_compat import logs_now, uncount_batch
from .losses.adversarial import ADVERSARIAL, AdversarialLoss, without_gradients
from .losses.perceptual import LPIPS, cached_vgg16
from .networks import VQGAN, PatchDiscriminator, describe
from .networks.base import Settings, build, initialise
from .optimizers.choice import STAGES, OptimizerChoice, make_optimizer
from .shared.batches import Batch, generators, pixels, uniforms, widened
from .shared.codebook import CodebookUse, drawn_rows, snap
from .shared.flops import stage_a_flops
from .shared.frozen import Frozen
from .shared.image_metrics import CorpusMeans, log_means, psnr, ssim, valid_samples
from .shared.monitored import (
    FiniteWatch,
    MeasuredByCorpus,
    check_max_grad_norm,
    check_recorded,
    place_of,
    scales_losses,
)

Losses = dict[str, Tensor]


class StageA(MeasuredByCorpus, LightningModule):
    """Würstchen's Stage A as a LightningModule.

    The loss is ``mse + perceptual_weight lpips + codebook + adversarial_weight adversarial``. From step
    ``adversarial_start``, the discriminator is trained too. ``trainer.global_step`` and ``max_steps`` count global
    batches here, although two optimizers step in each. :class:`~rewurst.callbacks.LRRewarming` re-warms both learning
    rates and keeps their ratio.

    Batches are dicts with ``image`` (n, 3, height, width), bytes or floats in [0, 1], and ``seed``, (n,).

    It logs ``train/loss`` and its terms (means over the global batch), ``train/discriminator``, ``train/grad_norm``,
    ``train/codebook_usage`` (share of codes used within 10 steps), ``train/latent_std``; and per corpus
    ``val/loss`` (mse and perceptual), ``val/psnr`` (mean of each image's), ``val/ssim``, ``val/lpips``,
    ``val/codebook_usage``.

    Args:
        vqgan: Preset of :class:`VQGAN`, or its arguments. Unless they set ``scale_factor``, checkpoints store the
            latents' measured standard deviation there, so that Stage B sees latents of deviation 1.
        discriminator: Preset or arguments of :class:`PatchDiscriminator`, or None for no discriminator.
        init_from: Checkpoint, in any format, or folder with initial weights of the VQGAN.
        optimizer: Optimizer of the VQGAN: ``adamw``, ``adamw_8bit``, ``lion``, ``lion_8bit``, ``muon``, or any
            other optimizer over parameter groups.
        discriminator_optimizer: Optimizer of the discriminator, likewise.
        fast_lr_scale: Factor of the learning rate for the codebook and the blocks' scalars.
        perceptual_weight: Weight of LPIPS on VGG16.
        vgg16: Path of torchvision's ``vgg16-397923af.pth`` (default: the one in torchvision's download folder). If it
            is missing, training warns once and omits the perceptual loss.
        download_vgg16: Whether to download the file if it is missing.
        adversarial_weight: Weight of the adversarial loss.
        adversarial_start: Step from which the adversarial loss counts and the discriminator is trained.
        adversarial_loss: Kind of adversarial loss, "hinge" or "non_saturating".
        drop_quantisation: Share of samples that are decoded without quantization.
        revive_after: Number of steps after which unused codes are replaced with latents, or None for never.
        accumulation: Number of micro-batches per global batch, if the data module has no ``accumulation``.
        max_grad_norm: Norm to clip each network's gradients to, or None for no clipping.

    Raises:
        UsageError: A network's argument is unknown, weights do not fit, or a number is out of range.
    """

    latent_std: Tensor
    charts: ClassVar[dict[str, list[str]]] = {
        "PSNR of pictures (dB)": ["val/psnr/.*"],
        "SSIM of pictures": ["val/ssim/.*"],
        "Terms of the loss": ["train/(reconstruction|codebook|perceptual|adversarial|discriminator)"],
        "Share of codes in use": ["train/codebook_usage", "val/codebook_usage/.*"],
    }
    flops_formula = "3 x forward passes"
    planning_arguments: ClassVar[dict[str, Any]] = {"init_from": None, "revive_after": None, "adversarial_start": 0}
    """Arguments that `rewurst plan` replaces: reviving reads values, and most steps train the discriminator."""
    counted_optimizers = 1  # the number of optimizers whose steps trainer.global_step counts

    def __init__(
        self,
        vqgan: Settings = "paper",
        discriminator: Settings | None = "paper",
        init_from: str | None = None,
        optimizer: OptimizerChoice = "adamw",
        discriminator_optimizer: OptimizerChoice = "adamw",
        fast_lr_scale: float = 1.0,
        perceptual_weight: float = 0.1,
        vgg16: str | None = None,
        download_vgg16: bool = False,
        adversarial_weight: float = 0.01,
        adversarial_start: int = 10_000,
        adversarial_loss: AdversarialLoss = "hinge",
        drop_quantisation: float = 0.1,
        revive_after: int | None = None,
        accumulation: int | None = None,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if not 0 <= drop_quantisation < 1:
            raise UsageError(f"drop_quantisation {drop_quantisation} must be in [0, 1)")
        check_max_grad_norm(max_grad_norm)
        if adversarial_loss not in ADVERSARIAL:
            raise UsageError(f"adversarial_loss {adversarial_loss!r} is unknown: choose hinge or non_saturating")
        self.vqgan = build(VQGAN, vqgan)
        self._measures_scale = isinstance(vqgan, str) or "scale_factor" not in vqgan
        if init_from is not None:
            initialise(self.vqgan, init_from)
        self.discriminator = None if discriminator is None else build(PatchDiscriminator, discriminator)
        self.codebook_use = CodebookUse(self.vqgan.config["num_vq_embeddings"])
        self.register_buffer("latent_std", torch.zeros(()))
        self.optimizer, self.discriminator_optimizer = optimizer, discriminator_optimizer
        self.fast_lr_scale, self.max_grad_norm = fast_lr_scale, max_grad_norm
        self.perceptual_weight, self.adversarial_weight = perceptual_weight, adversarial_weight
        self.adversarial_start, self.adversarial = adversarial_start, ADVERSARIAL[adversarial_loss]
        self.drop_quantisation, self.revive_after = drop_quantisation, revive_after
        self.lpips = frozen_lpips(vgg16, download_vgg16) if perceptual_weight else None
        self.step = 0
        self._accumulation = accumulation
        self._window: list[Losses] = []
        self._counts: Tensor | None = None
        self._recorded = FiniteWatch()
        self._means = CorpusMeans()
        self._codes: dict[int, Tensor] = {}

    @property
    def accumulation(self) -> int:
        """Number of micro-batches per global batch."""
        of_data = getattr(self.trainer.datamodule, "accumulation", None)  # type: ignore[attr-defined]
        return int(self._accumulation or of_data or 1)

    @property
    def adversary(self) -> PatchDiscriminator | None:
        """Discriminator, or None before the step in which its training starts."""
        return self.discriminator if self.step >= self.adversarial_start else None

    def forward(self, images: Tensor) -> Tensor:
        """Return reconstructions of images in [0, 1], with quantization."""
        reconstructions: Tensor = self.vqgan(images.to(self.dtype))[0]
        return reconstructions.float().clamp(0, 1)

    def flops(self, batch: Batch) -> float:
        """Return the FLOPs of a training step on a micro-batch, including discriminator and LPIPS if in use."""
        return stage_a_flops(self.vqgan, tuple(batch["image"].shape), self.adversary, self.lpips is not None)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate the gradients of a micro-batch; after the last one of a global batch, step both optimizers."""
        self._window.append({})
        terms = self._losses(batch)
        loss = sum(terms.values(), torch.zeros((), device=self.device))
        self._recorded.add("loss", self.step, loss, [place_of(batch)])
        closes = len(self._window) >= self.accumulation or self.trainer.is_last_batch
        with self._gradients(synchronised=closes):
            self.manual_backward(loss / self.accumulation)
        if closes:
            self._step()
        else:  # for loggers, Lightning counts every batch of manual optimization as a step
            uncount_batch(self.trainer)

    def _losses(self, batch: Batch) -> Losses:
        """Return both networks' weighted terms; one backward pass gives each network its own gradients."""
        images = pixels(batch)
        latents = self.vqgan.encode(images.to(self.dtype))
        quantized = self.vqgan.quantize(latents)
        [chance] = uniforms(generators(batch), len(images), 1, images.device)
        decoded = widened(self.vqgan.decode(snap(latents, quantized.latents, chance < self.drop_quantisation)))
        terms = {"reconstruction": F.mse_loss(decoded, images.to(decoded)), "codebook": widened(quantized.loss)}
        if self.lpips is not None:
            terms["perceptual"] = self.perceptual_weight * self.lpips.on(images.device)(decoded, images).mean()
        if self.adversary is not None:
            with without_gradients(self.adversary):
                terms["adversarial"] = self.adversarial_weight * self.adversarial.generator(
                    widened(self.adversary(decoded))
                )
        self._observe(widened(latents.detach()), quantized.indices)
        self._window[-1] = {name: term.detach() for name, term in terms.items()}
        if self.adversary is not None:
            real, fake = self.adversary(torch.cat([images.to(decoded), decoded.detach()])).chunk(2)
            terms["discriminator"] = self.adversarial.discriminator(widened(real), widened(fake))
            self._window[-1]["discriminator"] = terms["discriminator"].detach()
        elif self.discriminator is not None:  # DDP needs a gradient for every parameter in every backward pass
            terms["discriminator"] = 0.0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum()
        return terms

    @torch.no_grad()
    def _observe(self, latents: Tensor, indices: Tensor) -> None:
        """Record statistics for the end of the global batch."""
        deviation = latents.std()
        self.latent_std.copy_(
            torch.where(self.latent_std == 0, deviation, self.latent_std.lerp(deviation.to(self.latent_std), 0.01))
        )
        counts = self.codebook_use.counts(indices)
        self._counts = counts if self._counts is None else self._counts + counts
        self._latents = latents if self.revive_after is not None else None

    def _step(self) -> None:
        """Step the optimizers at the end of a global batch, and count this as one step."""
        optimizers = self.optimizers()
        first, *second = optimizers if isinstance(optimizers, list) else [optimizers]
        assert isinstance(first, LightningOptimizer)
        first.step()
        for optimizer in second:
            assert isinstance(optimizer, LightningOptimizer)
            if self.adversary is not None:
                # Lightning would count this as another step of the run.
                optimizer._on_before_step = optimizer._on_after_step = do_nothing_closure
                optimizer.step()
            optimizer.zero_grad()
        first.zero_grad()
        self._follow_codebook()
        self._log_window()
        self.step += 1

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients of one network, and record and log their norm."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf"))
        if not scales_losses(self.trainer):
            self._recorded.add("gradient norm", self.step, norm)
        if self._recorded.full or logs_now(self.trainer):
            check_recorded(self._recorded, self.trainer)
        first = self.trainer.optimizers[0]
        self.log("train/grad_norm" + ("" if optimizer is first else "/discriminator"), norm, batch_size=1)

    def _follow_codebook(self) -> None:
        assert self._counts is not None
        counts = self.trainer.strategy.reduce(self._counts, reduce_op="sum")
        assert isinstance(counts, Tensor)
        self.codebook_use.update(counts)
        self._counts = None
        self.log("train/codebook_usage", self.codebook_use.share, batch_size=1)
        self.log("train/latent_std", self.latent_std, batch_size=1)
        if self.revive_after is None:
            return
        dead = self.codebook_use.dead(self.revive_after)
        if len(dead):
            assert self._latents is not None
            rows = self.trainer.strategy.broadcast(drawn_rows(self._latents, len(dead), self.step))
            self.codebook_use.revive(dead, self.vqgan.vquantizer.embedding, rows)
        self.log("train/revived_codes", float(len(dead)), batch_size=1)

    def _log_window(self) -> None:
        """Log the means over the global batch."""
        window, self._window = self._window, []
        means = {name: torch.stack([terms[name] for terms in window]).mean() for name in window[0]}
        if "discriminator" in means:
            self.log("train/discriminator", means.pop("discriminator"), sync_dist=True, batch_size=1)
        for name, mean in means.items():
            self.log(f"train/{name}", mean, sync_dist=True, batch_size=1)
        self.log("train/loss", torch.stack(list(means.values())).sum(), prog_bar=True, sync_dist=True, batch_size=1)

    def _gradients(self, synchronised: bool) -> AbstractContextManager[None]:
        """Return a context in which DDP reduces gradients only at the last micro-batch of a global batch."""
        wrapped = self.trainer.strategy.model
        if synchronised or not isinstance(wrapped, DistributedDataParallel):
            return nullcontext()
        return wrapped.no_sync()

    def on_train_start(self) -> None:
        """Reset the micro-batch count, because an incomplete global batch is read again from its start."""
        # A checkpoint contains the weights after the step in its name, as with automatic optimization.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        self._window, self._counts = [], None
        self._recorded.forget()

    def on_validation_start(self) -> None:
        """Check the values so far, as a validation waits for the device anyway."""
        check_recorded(self._recorded, self.trainer)

    def on_train_end(self) -> None:
        """Check the steps since the last logging interval."""
        check_recorded(self._recorded, self.trainer)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Record each sample's metrics, with quantization."""
        images = pixels(batch)
        decoded, quantized = self.vqgan(images.to(self.dtype))
        decoded, counted = widened(decoded), valid_samples(batch, images)
        loss = (decoded - images).square().mean((1, 2, 3))
        if self.lpips is not None:
            distance = self.lpips.on(images.device)(decoded.clamp(0, 1), images)
            self._means.add("lpips", dataloader_idx, distance, counted)
            loss = loss + self.perceptual_weight * distance
        self._means.add("loss", dataloader_idx, loss, counted)
        self._means.add("psnr", dataloader_idx, psnr(decoded, images), counted)
        self._means.add("ssim", dataloader_idx, ssim(decoded, images), counted)
        counts = self.codebook_use.counts(quantized.indices[counted])
        self._codes[dataloader_idx] = self._codes.get(dataloader_idx, torch.zeros_like(counts)) + counts

    def _log_corpora(self, stage: str, loaders: Any) -> None:
        means = self._means.reduce(self.trainer.strategy)
        for corpus, counts in sorted(self._codes.items()):
            counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
            means["codebook_usage", corpus] = (counts > 0).double().mean()
        self._codes = {}
        log_means(self, means, stage, loaders)

    def draw_samples(self, batch: Batch) -> dict[str, Tensor]:
        """Return originals and their reconstructions for :class:`~rewurst.callbacks.LogSamples`."""
        images = pixels(batch)
        return {"original": images, "A": self(images)}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return reconstructions, without padding samples."""
        images = pixels(batch)
        reconstructions: Tensor = self(images)
        return reconstructions[valid_samples(batch, images)]

    def configure_optimizers(self) -> list[Optimizer]:
        """Build an optimizer per network. Weight decay, if any, applies to matrices except the codebook."""
        fast = [p for name, p in self.vqgan.named_parameters() if name.endswith("gammas") or "embedding" in name]
        others = [p for p in self.vqgan.parameters() if all(p is not one for one in fast)]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in others if p.ndim >= 2]},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
            {"params": fast, "weight_decay": 0.0},
        ]
        optimizer = make_optimizer(self.optimizer, STAGES, self.vqgan, groups)
        optimizer.param_groups[-1]["lr"] *= self.fast_lr_scale
        if self.discriminator is None:
            return [optimizer]
        parameters: list[dict[str, Any]] = [{"params": list(self.discriminator.parameters())}]
        return [optimizer, make_optimizer(self.discriminator_optimizer, STAGES, self.discriminator, parameters)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the step and descriptions of the networks, with the measured scale of the latents."""
        check_recorded(self._recorded, self._trainer)
        if self._measures_scale and self.latent_std > 0:
            self.vqgan.scale_factor = self.vqgan.config["scale_factor"] = round(float(self.latent_std), 4)
        checkpoint["networks"] = describe(self)
        checkpoint["completed_steps"] = self.step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the step."""
        self.step = checkpoint.get("completed_steps", 0)


def frozen_lpips(path: str | None, download: bool) -> Frozen[LPIPS] | None:
    """Load LPIPS for training, or warn once if its weights are not available.

    Raises:
        UsageError: A given file is missing, cannot be read, or contains a different network.
    """
    lpips = LPIPS.from_files(path, download)
    if lpips is not None:
        return Frozen(lpips, str(path or cached_vgg16()))
    rank_zero_warn(
        f"{cached_vgg16()} does not exist, so training omits the perceptual loss; give vgg16, or set download_vgg16 to "
        "download it, or perceptual_weight to 0"
    )
    return None
