"""Perceptual distance of images: LPIPS on torchvision's VGG16 (Zhang et al., arXiv 1801.03924)."""

from importlib.resources import files
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16

from ... import UsageError
from ..networks.weight_files import read_file

SLICES = (4, 9, 16, 23, 30)
"""Ends of the slices of VGG16's features: after the last ReLU of each of its five resolutions."""

WIDTHS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""LPIPS's normalization of images in [-1, 1]."""


class LPIPS(nn.Module):
    """Distance of VGG16's features, normalized at each pixel, weighted by channel and averaged over pixels.

    Args:
        vgg: torchvision's ``vgg16``, or any network with the same ``features``.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: nn.Module) -> None:
        super().__init__()
        features = list(vgg.get_submodule("features").children())
        self.slices = nn.ModuleList(
            nn.Sequential(*features[start:end]) for start, end in zip((0, *SLICES), SLICES, strict=False)
        )
        for layer in self.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the slices' outputs are still needed
        self.channel_weights = nn.ParameterList(torch.ones(c) for c in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    @classmethod
    def from_files(cls, path: str | Path | None = None, download: bool = False) -> Self | None:
        """Load VGG16's weights, and LPIPS's channel weights from torchmetrics.

        Args:
            path: Path of torchvision's ``vgg16-397923af.pth`` (default: the one in torchvision's download folder).
            download: Whether to download the file there if it is missing.

        Returns:
            The distance, or None if no path is given and the file was not downloaded before.

        Raises:
            UsageError: The file is missing, cannot be read, or contains a different network.
        """
        if path is None:
            path = cached_vgg16()
            if download and not path.is_file():
                torch.hub.download_url_to_file(VGG16_Weights.IMAGENET1K_V1.url, str(path), "397923af")
            if not path.is_file():
                return None
        state = read_file(path)
        with torch.device("meta"):
            vgg = vgg16()
        wanted = {name: tensor for name, tensor in vgg.state_dict().items() if name.startswith("features.")}
        if wrong := [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]:
            raise UsageError(f"{path} does not have VGG16's {wrong[0]}: give torchvision's vgg16-397923af.pth")
        vgg.load_state_dict({name: state[name] for name in wanted}, strict=False, assign=True)
        network = cls(vgg)
        network.load_channel_weights()
        return network.eval().requires_grad_(False)

    def load_channel_weights(self) -> None:
        """Load the channel weights of LPIPS 0.1, fitted to human judgments."""
        shipped = read_file(Path(str(files("torchmetrics"))) / "functional/image/lpips_models/vgg.pth")
        for index, weight in enumerate(self.channel_weights):
            weight.data = shipped[f"lin{index}.model.1.weight"].flatten().to(weight)

    def features(self, images: Float[Tensor, "batch 3 h w"]) -> list[Tensor]:
        """Return the five slices' outputs, normalized to unit length at each pixel."""
        x: Tensor = (2 * images - 1 - self.shift) / self.scale
        normalised = []
        for part in self.slices:
            x = part(x)
            normalised.append(x / x.square().sum(1, keepdim=True).add(1e-8).sqrt())
        return normalised

    def forward(
        self, images: Float[Tensor, "batch 3 h w"], targets: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, " batch"]:
        """Return the distance of images in [0, 1] of at least 16x16 pixels."""
        pairs = zip(self.features(images), self.features(targets), self.channel_weights, strict=True)
        distances = [((a - b).square().mean((2, 3)) * weight).sum(1) for a, b, weight in pairs]
        return torch.stack(distances).sum(0)


def cached_vgg16() -> Path:
    """Return the path where torchvision stores VGG16's weights, whether or not it exists."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG16_Weights.IMAGENET1K_V1.url).name
