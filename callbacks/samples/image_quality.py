"""Quality of generated images: the Fréchet Inception distance to real ones, and the CLIP score with captions."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ... import UsageError

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
"""Name under which torch-fidelity publishes the weights."""
INCEPTION_FEATURES = 2048


def load_inception(path: str) -> nn.Module:
    """Load torch-fidelity's Inception network, from bytes (n, 3, h, w) to features (n, 2048).

    Args:
        path: File with its weights, which torchmetrics would otherwise download.

    Raises:
        UsageError: The file does not exist or has other content, or torch-fidelity is not installed.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    if not Path(path).is_file():
        raise UsageError(f"inception {path} is not a file: give {INCEPTION_FILE} of torch-fidelity")
    try:
        network: Any = NoTrainInceptionV3("inception-v3-compat", [str(INCEPTION_FEATURES)], path)
    except ModuleNotFoundError:
        raise UsageError("FID needs torch-fidelity: pip install 'rewurst[eval]'") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError):
        raise UsageError(f"inception {path} does not have the weights of {INCEPTION_FILE} of torch-fidelity") from None
    network.num_features = INCEPTION_FEATURES
    inception: nn.Module = network
    return inception


class Clip(nn.Module):
    """A CLIP model with its processor.

    Torchmetrics' own score uses methods that return something different since transformers 5.

    Args:
        name: Folder or hub name of the model.

    Raises:
        UsageError: The model cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        from transformers import CLIPModel, CLIPProcessor

        try:
            model: Any = CLIPModel.from_pretrained(name)
            self.processor: Any = CLIPProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"clip {name} cannot be loaded as a CLIP model with its processor: {reason}") from None
        self.model = model.eval()

    @torch.no_grad()
    def forward(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Return 100 max(0, cosine) of each image, (n, 3, h, w) bytes, and its caption (Hessel et al. 2021)."""
        inputs = self.processor(
            text=list(captions), images=list(pictures.cpu()), return_tensors="pt", padding=True, truncation=True
        ).to(self.model.device)
        out = self.model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())
        return (100 * cosine).clamp_min(0)


class ImageJudge:
    """Quality metrics of generated images, over all processes.

    Args:
        inception: Network from bytes (n, 3, h, w) to features, for FID.
        clip: CLIP model for the CLIP score.
        device: Device to run on and to communicate through.
        keep_images: Whether to keep the statistics of the real images on ``reset``.
    """

    def __init__(
        self,
        inception: nn.Module | None,
        clip: Clip | None,
        device: torch.device | str = "cpu",
        keep_images: bool = False,
    ) -> None:
        self._fid: Any = None
        if inception is not None:
            from torchmetrics.image.fid import FrechetInceptionDistance

            self._fid = FrechetInceptionDistance(inception, reset_real_features=not keep_images).to(device)
        self._clip = None if clip is None else clip.to(device)
        self._mean = MeanMetric().to(device)

    @property
    def measures(self) -> list[str]:
        """Names of the metrics that ``compute`` returns."""
        return [name for name, part in (("fid", self._fid), ("clip_score", self._clip)) if part is not None]

    def take_images(self, images: Tensor) -> None:
        """Add real images (n, 3, h, w), bytes or in [0, 1]."""
        if self._fid is not None:
            self._fid.update(as_bytes(images), real=True)

    def take_drawn(self, pictures: Tensor, captions: Sequence[str]) -> None:
        """Add generated images (n, 3, h, w), bytes or in [0, 1], and their captions."""
        if self._fid is not None:
            self._fid.update(as_bytes(pictures), real=False)
        if self._clip is not None:
            self._mean.update(self._clip(as_bytes(pictures), captions))

    def compute(self) -> dict[str, float]:
        """Return the metrics by name; every process must call this.

        Raises:
            UsageError: There are fewer than two generated or real images, which is too few for FID's covariance.
        """
        found: dict[str, float] = {}
        if self._fid is not None:
            try:
                found["fid"] = float(self._fid.compute())
            except RuntimeError as error:
                if "More than one sample" not in str(error):
                    raise
                raise UsageError("FID needs at least two images, and some thousands to be meaningful") from None
        if self._clip is not None:
            found["clip_score"] = float(self._mean.compute())
        return found

    def reset(self) -> None:
        """Discard what was measured so far."""
        if self._fid is not None:
            self._fid.reset()
        self._mean.reset()


def as_bytes(pictures: Tensor) -> Tensor:
    """Convert images in [0, 1] to bytes; bytes stay unchanged."""
    if pictures.dtype == torch.uint8:
        return pictures
    return (pictures.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
