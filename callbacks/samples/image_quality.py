"""Judges of drawn pictures: the Fréchet Inception distance to real ones, and CLIP's score beside their captions."""

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
        path: File of its weights. Without one torchmetrics would fetch them.

    Raises:
        UsageError: There is no such file, it holds something else, or torch-fidelity is not installed.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    if not Path(path).is_file():
        raise UsageError(f"inception {path} is no file: give {INCEPTION_FILE} of torch-fidelity")
    try:
        network: Any = NoTrainInceptionV3("inception-v3-compat", [str(INCEPTION_FEATURES)], path)
    except ModuleNotFoundError:
        raise UsageError("FID needs torch-fidelity: pip install 'rewurst[eval]'") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError):
        raise UsageError(f"inception {path} does not hold the weights of {INCEPTION_FILE} of torch-fidelity") from None
    network.num_features = INCEPTION_FEATURES
    inception: nn.Module = network
    return inception


class Clip(nn.Module):
    """A CLIP model with its processor.

    Torchmetrics' own score reads features by methods that return something else since transformers 5.

    Args:
        name: Folder or hub name.

    Raises:
        UsageError: It cannot be loaded.
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
        """100 cosines of each picture, (n, 3, h, w) bytes, and its caption, at least 0 (Hessel et al. 2021)."""
        inputs = self.processor(
            text=list(captions), images=list(pictures.cpu()), return_tensors="pt", padding=True, truncation=True
        ).to(self.model.device)
        out = self.model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())
        return (100 * cosine).clamp_min(0)


class ImageJudge:
    """Takes in pictures and says how good they are, over all processes together.

    Args:
        inception: Network from bytes (n, 3, h, w) to features, for FID.
        clip: For the CLIP score.
        device: To run on, and to gather from where there are several processes.
        keep_images: Keep what is known of the real images when the judge begins anew.
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
        """Names of what ``compute`` gives."""
        return [name for name, part in (("fid", self._fid), ("clip_score", self._clip)) if part is not None]

    def take_images(self, images: Tensor) -> None:
        """Takes in real images (n, 3, h, w), bytes or in [0, 1]."""
        if self._fid is not None:
            self._fid.update(as_bytes(images), real=True)

    def take_drawn(self, pictures: Tensor, captions: Sequence[str]) -> None:
        """Takes in drawn pictures (n, 3, h, w), bytes or in [0, 1]."""
        if self._fid is not None:
            self._fid.update(as_bytes(pictures), real=False)
        if self._clip is not None:
            self._mean.update(self._clip(as_bytes(pictures), captions))

    def compute(self) -> dict[str, float]:
        """Values by name; every process must ask.

        Raises:
            UsageError: Less than two pictures or images were taken in, of which FID has no covariance.
        """
        found: dict[str, float] = {}
        if self._fid is not None:
            try:
                found["fid"] = float(self._fid.compute())
            except RuntimeError as error:
                if "More than one sample" not in str(error):
                    raise
                raise UsageError("FID needs two images at least, and some thousands to mean something") from None
        if self._clip is not None:
            found["clip_score"] = float(self._mean.compute())
        return found

    def reset(self) -> None:
        """Begins anew."""
        if self._fid is not None:
            self._fid.reset()
        self._mean.reset()


def as_bytes(pictures: Tensor) -> Tensor:
    """Bytes of pictures in [0, 1]; bytes stay as they are."""
    if pictures.dtype == torch.uint8:
        return pictures
    return (pictures.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
