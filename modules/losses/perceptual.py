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
"""Where VGG16's features are cut: behind the last ReLU of each of its five resolutions."""

WIDTHS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""LPIPS's normalisation of images in [-1, 1]."""


class LPIPS(nn.Module):
    """Distance of VGG16's features, each pixel's normalised, weighted by channel and averaged over pixels.

    Args:
        vgg: torchvision's ``vgg16``, or any network whose ``features`` are its.
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
                layer.inplace = False  # the slices' outputs are kept
        self.channel_weights = nn.ParameterList(torch.ones(c) for c in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    @classmethod
    def from_files(cls, path: str | Path | None = None, download: bool = False) -> Self | None:
        """Load VGG16's weights, and LPIPS's channel weights, which torchmetrics ships.

        Args:
            path: torchvision's file ``vgg16-397923af.pth``; by default where torchvision keeps its downloads.
            download: Fetch it there if it is missing.

        Returns:
            The distance, or none where no path is given and nothing was downloaded before.

        Raises:
            UsageError: The file is missing, cannot be read, or holds another network.
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
            raise UsageError(f"{path} has no {wrong[0]} as VGG16 has: give torchvision's vgg16-397923af.pth")
        vgg.load_state_dict({name: state[name] for name in wanted}, strict=False, assign=True)
        network = cls(vgg)
        network.load_channel_weights()
        return network.eval().requires_grad_(False)

    def load_channel_weights(self) -> None:
        """Take the channel weights of LPIPS 0.1, fitted to human judgements."""
        shipped = read_file(Path(str(files("torchmetrics"))) / "functional/image/lpips_models/vgg.pth")
        for index, weight in enumerate(self.channel_weights):
            weight.data = shipped[f"lin{index}.model.1.weight"].flatten().to(weight)

    def features(self, images: Float[Tensor, "batch 3 h w"]) -> list[Tensor]:
        """Return the five slices' outputs, of unit length at each pixel."""
        x: Tensor = (2 * images - 1 - self.shift) / self.scale
        normalised = []
        for part in self.slices:
            x = part(x)
            normalised.append(x / x.square().sum(1, keepdim=True).add(1e-8).sqrt())
        return normalised

    def forward(
        self, images: Float[Tensor, "batch 3 h w"], targets: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, " batch"]:
        """Compare images in [0, 1] of at least 16 pixels each way."""
        pairs = zip(self.features(images), self.features(targets), self.channel_weights, strict=True)
        distances = [((a - b).square().mean((2, 3)) * weight).sum(1) for a, b, weight in pairs]
        return torch.stack(distances).sum(0)


def cached_vgg16() -> Path:
    """Return where torchvision keeps VGG16's weights, there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG16_Weights.IMAGENET1K_V1.url).name
