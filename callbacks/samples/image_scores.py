"""FID and CLIP score of the images that a module generates in validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from ... import UsageError
from ...hints import closest
from .image_quality import INCEPTION_FILE, Clip, ImageJudge, load_inception
from .validation_batches import ValidationCallback, corpora, fields_of, length, samples_of, select, valid


class ImageScores(ValidationCallback):
    """Callback that generates images for each validation corpus and logs their quality.

    It logs ``val/fid/<corpus>``, the Fréchet Inception distance between the corpus's images and those generated for
    them, and ``val/clip_score/<corpus>``, 100 times the cosine of image and caption in CLIP's space; each only with the
    weights for it. ``rewurst evaluate --images`` computes the same for an exported cascade. FID is biased by the number
    of images: compare only values of equal numbers, of some thousands to be meaningful.

    The module must have ``predict_step(batch, batch_idx)``, which returns images (n, 3, height, width) in [0, 1] for a
    validation batch (Stages B and C generate them, Stage A reconstructs). Batches must have ``image``, bytes or in
    [0, 1], ``caption`` for CLIP, and ``valid`` if they contain padding samples; for batches that are not dicts, the
    module returns these from ``batch_fields(batch) -> dict``. Batches of latents have no ``image``; for them
    ``reference`` names a replacement in the result of the module's ``draw_samples(batch)``, such as Stage C's ``"B"``,
    the lower stages' images from the real latents, so that FID measures the prior's loss only. Statistics of the real
    images are kept between validations.

    Randomness should come from the batch (``seed``). Numbers from the global generator are also the same every time,
    and its state is restored. Images are generated with the weights that are validated, such as averaged ones. With
    several processes, each generates images for its own share, and the metrics cover all of them.

    Args:
        inception: File with torch-fidelity's Inception weights, for FID; it is not downloaded.
        clip: Folder or hub name of a CLIP model with its processor, for the CLIP score.
        samples: Number of samples per corpus (default: all).
        every_n_steps: Minimum number of global batches between measurements, checked at validations (default: measure
            at every validation).
        corpora: Names of the corpora (default: all).
        reference: Name in ``draw_samples`` of the images that FID compares with (default: the batch's ``image``).

    Raises:
        UsageError: Weights are missing or cannot be read, a number is out of range, a corpus does not exist, there are
            no images to compare with, or the module does not generate images.

    Example::

        Trainer(callbacks=[ImageScores(clip="openai/clip-vit-large-patch14", samples=1000, every_n_steps=10_000)])
    """

    def __init__(
        self,
        inception: str | None = None,
        clip: str | None = None,
        samples: int | None = None,
        every_n_steps: int | None = None,
        corpora: list[str] | None = None,
        reference: str | None = None,
    ) -> None:
        if inception is None and clip is None:
            raise UsageError(
                f"ImageScores: give inception, the file {INCEPTION_FILE} of torch-fidelity, for FID, or clip, a folder "
                "or hub name of a CLIP model, for the CLIP score, or both"
            )
        if (samples is not None and samples < 2) or (every_n_steps is not None and every_n_steps < 1):
            raise UsageError(
                f"ImageScores: samples {samples} must be at least 2, and every_n_steps {every_n_steps} at least 1"
            )
        self.inception, self.clip, self.reference = inception, clip, reference
        self.samples, self.every_n_steps, self.corpora = samples, every_n_steps, corpora
        self._networks: tuple[nn.Module | None, Clip | None] | None = None
        self._judges: dict[str, ImageJudge] = {}
        self._knows_images: set[str] = set()
        self._taken: dict[str, int] = {}
        self._scored_at: int | None = None

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints, which allows several of these callbacks."""
        settings = {"samples": self.samples, "every": self.every_n_steps, "corpora": self.corpora}
        networks = {"inception": self.inception, "clip": self.clip, "reference": self.reference}
        return self._generate_state_key(**settings, **networks)

    @property
    def _legacy_state_key(self) -> Any:
        return type(self).__name__  # the key in older checkpoints, which allowed only one

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last measurement."""
        return {"scored_at": self._scored_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last measurement."""
        self._scored_at = state_dict["scored_at"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the networks early, so that missing files are reported before any computation."""
        if self._networks is None:
            self._networks = (
                None if self.inception is None else load_inception(self.inception),
                None if self.clip is None else Clip(self.clip),
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a measurement if one is due."""
        names = corpora(trainer)
        for wanted in self.corpora or []:
            if wanted not in names:
                raise UsageError(f"ImageScores: there is no validation corpus {wanted!r}{closest(wanted, names)}")
        self._taken = dict.fromkeys(self.corpora or names, 0) if self._is_due(trainer) else {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Generate images for as many of the batch's samples as are still needed.

        Images for padding samples are generated but not scored, because sharded modules need equal calls everywhere.
        """
        corpus = corpora(trainer)[dataloader_idx]
        if corpus not in self._taken:
            return
        batch = samples_of(batch, pl_module, "ImageScores")
        wanted = length(batch)
        if self.samples is not None:
            wanted = min(wanted, -(-self.samples // trainer.world_size) - self._taken[corpus])
        if wanted <= 0:
            return
        part = select(batch, range(wanted))
        self._taken[corpus] += length(part)
        fields = fields_of(part, pl_module)
        judged = valid(fields, length(part))
        if isinstance(part, dict):
            part.pop("valid", None)
        judge = self._judge(corpus, pl_module.device)
        devices = [pl_module.device.index or 0] if pl_module.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            if "fid" in judge.measures and corpus not in self._knows_images:
                images = self._images(pl_module, part, fields)[judged]
                if judged:
                    judge.take_images(images)
            pictures = self._pictures(pl_module, part, batch_idx)[judged]
        if judged:
            judge.take_drawn(pictures, self._captions(fields, judged))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics."""
        for corpus in self._taken:
            judge = self._judge(corpus, pl_module.device)
            for measure, value in judge.compute().items():
                pl_module.log(f"val/{measure}/{corpus}", value, sync_dist=True)
            judge.reset()
            self._knows_images.add(corpus)
            self._scored_at = self.completed_steps(trainer)
        self._taken = {}

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        if self.every_n_steps is None or self._scored_at is None or trainer.state.fn != "fit":
            return True
        return self.completed_steps(trainer) // self.every_n_steps > self._scored_at // self.every_n_steps

    def _judge(self, corpus: str, device: torch.device) -> ImageJudge:
        if corpus not in self._judges:
            assert self._networks is not None
            self._judges[corpus] = ImageJudge(*self._networks, device, keep_images=True)
        return self._judges[corpus]

    def _images(self, module: LightningModule, batch: Any, fields: Mapping[str, Any]) -> Tensor:
        if self.reference is None:
            if "image" not in fields:
                raise UsageError(
                    "ImageScores: batches have no image for FID to compare with: give reference, the name of a "
                    f"replacement in {type(module).__name__}.draw_samples, such as B"
                )
            images: Tensor = fields["image"]
            return images
        draw = getattr(module, "draw_samples", None)
        drawn = draw(batch) if callable(draw) else {}
        if self.reference not in drawn:
            there = ", ".join(drawn) or "nothing"
            raise UsageError(
                f"ImageScores: {type(module).__name__}.draw_samples returns {there}, not reference {self.reference!r}"
            )
        pictures: Tensor = drawn[self.reference]
        return pictures

    def _pictures(self, module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
        drawn = module.predict_step(batch, batch_idx)
        expected = (length(batch), 3)
        if not isinstance(drawn, Tensor) or drawn.ndim != 4 or tuple(drawn.shape[:2]) != expected:
            what = f"shape {tuple(drawn.shape)}" if isinstance(drawn, Tensor) else f"a {type(drawn).__name__}"
            raise UsageError(
                f"ImageScores: {type(module).__name__}.predict_step returns {what}, expected images of shape "
                f"{expected[0]} x 3 x height x width"
            )
        return drawn

    def _captions(self, fields: Mapping[str, Any], judged: list[int]) -> list[str]:
        if self.clip is not None and "caption" not in fields:
            raise UsageError("ImageScores: batches have no caption for the CLIP score: leave clip out")
        captions = fields.get("caption")
        return [captions[i] if captions is not None else "" for i in judged]
