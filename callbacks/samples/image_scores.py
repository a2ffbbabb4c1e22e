"""FID and CLIP score of the pictures that a module draws in validation."""

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
    """Draws the samples of each validation corpus and logs how good the pictures are.

    Logs ``val/fid/<corpus>``, the Fréchet Inception distance between the corpus's images and the pictures drawn for
    them, and ``val/clip_score/<corpus>``, 100 times the cosine of picture and caption in CLIP's space; each where there
    are weights for it. ``rewurst evaluate --images`` measures the same of an exported cascade. FID is biased by the
    number of images: compare values of the same number only, some thousands if they are to mean something.

    Needs of the module: ``predict_step(batch, batch_idx)``, which gives pictures (n, 3, height, width) in [0, 1] for a
    validation batch (Stages B and C draw them, Stage A reconstructs). Of the batch: ``image``, bytes or in [0, 1],
    ``caption`` for CLIP, and ``valid`` where some samples only fill it up; of a batch that is not a dict the module
    says them by ``batch_fields(batch) -> dict``. Batches of latents have no ``image``: there
    ``reference`` names what the module's ``draw_samples(batch)`` gives that stands for it, such as Stage C's ``"B"``,
    what the stages below make of the image's own latents; FID then says what the prior alone loses. What is known of
    the images is kept from one validation to the next.

    Randomness should come from the batch (``seed``); what is drawn from the global generator is the same every time
    too, and leaves it as it was. Pictures are drawn while validation has the weights in place that it judges, averaged
    ones for instance. With several processes each draws its part of its own share, and the values are those of all
    pictures together.

    Args:
        inception: File of torch-fidelity's Inception weights, for FID; nothing is fetched.
        clip: Folder of a CLIP model with its processor, or its name on the hub, for the CLIP score.
        samples: Samples of a corpus; by default all.
        every_n_steps: Completed global batches from one measurement to the next, checked at validations; by default
            every validation measures.
        corpora: Names of the corpora; by default all.
        reference: Name in ``draw_samples`` of the pictures that FID compares with; by default the batch's ``image``.

    Raises:
        UsageError: There are no weights, they cannot be read, a number is out of range, a corpus does not exist, there
            is nothing to compare with, or the module draws no pictures.

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
        """Key of the state in checkpoints, so that there may be several of these callbacks."""
        settings = {"samples": self.samples, "every": self.every_n_steps, "corpora": self.corpora}
        networks = {"inception": self.inception, "clip": self.clip, "reference": self.reference}
        return self._generate_state_key(**settings, **networks)

    @property
    def _legacy_state_key(self) -> Any:
        return type(self).__name__  # the key in checkpoints of before there could be several

    def state_dict(self) -> dict[str, Any]:
        """The step of the last measurement."""
        return {"scored_at": self._scored_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the step of the last measurement over."""
        self._scored_at = state_dict["scored_at"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Loads the networks, so that what is missing is said before anything is computed."""
        if self._networks is None:
            self._networks = (
                None if self.inception is None else load_inception(self.inception),
                None if self.clip is None else Clip(self.clip),
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a measurement, where it is time."""
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
        """Draws as many of the batch's samples as are still wanted.

        Those that only fill it up are drawn too and not judged: so all processes draw alike, as sharded modules need.
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
        """Logs the values."""
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
                    "ImageScores: batches have no image, which FID compares with: give reference, the name of what "
                    f"stands for it in {type(module).__name__}.draw_samples, such as B"
                )
            images: Tensor = fields["image"]
            return images
        draw = getattr(module, "draw_samples", None)
        drawn = draw(batch) if callable(draw) else {}
        if self.reference not in drawn:
            there = ", ".join(drawn) or "nothing"
            raise UsageError(
                f"ImageScores: {type(module).__name__}.draw_samples gives {there}, no reference {self.reference!r}"
            )
        pictures: Tensor = drawn[self.reference]
        return pictures

    def _pictures(self, module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
        drawn = module.predict_step(batch, batch_idx)
        expected = (length(batch), 3)
        if not isinstance(drawn, Tensor) or drawn.ndim != 4 or tuple(drawn.shape[:2]) != expected:
            what = f"shape {tuple(drawn.shape)}" if isinstance(drawn, Tensor) else f"a {type(drawn).__name__}"
            raise UsageError(
                f"ImageScores: {type(module).__name__}.predict_step gives {what}, expected pictures of shape "
                f"{expected[0]} x 3 x height x width"
            )
        return drawn

    def _captions(self, fields: Mapping[str, Any], judged: list[int]) -> list[str]:
        if self.clip is not None and "caption" not in fields:
            raise UsageError("ImageScores: batches have no caption, which the CLIP score compares with: leave clip out")
        captions = fields.get("caption")
        return [captions[i] if captions is not None else "" for i in judged]
